"""Fine-tuning a small BERT on few samples: plainly, and with Child-Tuning F and D. Everything it reads comes with Python.

A BERT-shaped transformer (transformers' own, 4 layers of 128, about 1 M weights, from random weights) first learns English as a masked
language model on ``pydoc_data.topics``, the reference manual's chapters that ``help()`` shows; its tokenizer is trained on the same text.
Then it is fine-tuned on a small labelled set: which package of the standard library (asyncio, email, importlib, multiprocessing, unittest,
xml) a docstring comes from, 60 training samples of each. Training, validation and test samples come from different files and share no text.
Fine-tuning changes every weight that it has a gradient for; the head of the language model stays as it is, but for the embeddings that it
shares. What is forgotten is told by the masked-LM loss on chapters that were held out, before and after, with the same masks.

    vanilla           fastcl.optim.AdamW(decay="hf"), the norm of all gradients clipped to 1, linear warm-up and decay
    Child-Tuning F    the same, with the mask drawn anew in every step       transforms=[fastcl.optim.ChildMask]
    Child-Tuning D    the same, with a child network chosen beforehand       transforms=[fastcl.optim.FixedMask]

The language model is trained once. A seed decides about the classifier's weights, the order of the samples, dropout and F's masks. The
learning rate of each method was chosen among three on seed 100, by the accuracy on the validation files (``--tune`` repeats it). Seed 100
is not reported, and the test files were not looked at. Both children keep 0.3.

    lr       vanilla   F      D           (accuracy on the validation files in %, seed 100)
    0.0005   56.1      46.6   53.7
    0.001    59.9      57.1   62.2
    0.002    67.0      60.5   62.2

Run it with ``python examples/finetune_bert.py``; ``pip install '.[examples]'`` brings what it needs (transformers 5, tokenizers, and what
the command line needs). About seven minutes on one core that has nothing else to do; ``--quick`` shows in less than a minute that it all
works. The docstrings, and with them the numbers, differ between versions of Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastcl
from fastcl import backends, optim
from fastcl.data import Batches
from fastcl.methods import ChildTuning

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched
# transformers would take this checkout's folder of that name, where its root is on sys.path, for a package of the hub.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

try:
    import matplotlib
    import tokenizers
    import transformers
    from rich.console import Console
    from rich.table import Table
    from stdlib_texts import PACKAGES, docstrings, manual
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install '.[examples]'")

matplotlib.use("Agg")

TUNING_SEED = 100
METHODS = {"vanilla": None, "Child-Tuning F": "F", "Child-Tuning D": "D"}
PAD, UNKNOWN, START, END, MASK = range(5)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Setting:
    """What is tuned for each method."""

    lr: float
    keep: float = 1.0


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    layers: int = 4
    width: int = 128
    vocabulary: int = 2000
    length: int = 64
    pretraining_steps: int = 600
    pretraining_batch: int = 32
    per_class: int = 60
    epochs: int = 6
    batch: int = 16


QUICK = Scale(layers=2, width=32, vocabulary=500, length=32, pretraining_steps=20, per_class=10, epochs=1)
TUNED = {"vanilla": Setting(2e-3), "Child-Tuning F": Setting(2e-3, 0.3), "Child-Tuning D": Setting(1e-3, 0.3)}
GRID = {"lr": (5e-4, 1e-3, 2e-3), "keep": (0.3,)}


class Net(nn.Module):
    """transformers' BERT with its masked-LM head, and a linear classifier of the mean over a text's tokens."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=scale.vocabulary,
            hidden_size=scale.width,
            num_hidden_layers=scale.layers,
            num_attention_heads=max(1, scale.width // 32),
            intermediate_size=4 * scale.width,
            max_position_embeddings=scale.length,
            pad_token_id=PAD,
        )
        self.lm = transformers.BertForMaskedLM(config)
        self.classifier = nn.Linear(scale.width, len(PACKAGES))

    def hidden(self, ids: Tensor) -> Tensor:
        """The last layer's outputs, [n, length, width]."""
        states: Tensor = self.lm.bert(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
        return states

    def language(self, ids: Tensor, asked: Tensor) -> Tensor:
        """Logits over the vocabulary for the tokens that are asked for, [asked, vocabulary]."""
        logits: Tensor = self.lm.cls(self.hidden(ids)[asked])
        return logits

    def forward(self, ids: Tensor) -> Tensor:
        """Logits over the packages, [n, packages]."""
        ids = ids[:, : int((ids != PAD).sum(1).max())]  # what is padding in every row costs time and changes nothing
        mask = ids != PAD
        return self.classifier((self.hidden(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@dataclass(frozen=True)
class Data:
    """Token ids: blocks of the manual [n, length], and docstrings with their packages."""

    manual: Tensor
    held_out: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]


def prepare(scale: Scale) -> Data:
    """Train the tokenizer on the manual (not on what is held out) and encode everything."""
    learned, held_out = manual()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=scale.vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(learned, trainer)

    def framed(ids: Sequence[int]) -> list[int]:
        own = [START, *ids[: scale.length - 2], END]
        return own + [PAD] * (scale.length - len(own))

    def blocks(texts: Sequence[str]) -> Tensor:
        every = [tokenizer.encode(text).ids for text in texts]
        cut = [ids[i : i + scale.length - 2] for ids in every for i in range(0, len(ids), scale.length - 2)]
        return torch.tensor([framed(ids) for ids in cut])

    parts = {}
    for name, samples in docstrings(scale.per_class).items():
        texts, labels = zip(*samples, strict=True)
        parts[name] = torch.tensor([framed(tokenizer.encode(text).ids) for text in texts]), torch.tensor(labels)
    return Data(blocks(learned), blocks(held_out), parts)


def corrupt(ids: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's masking: of 15 % of the tokens 80 % become [MASK], 10 % another token; and the targets, -100 where nothing is asked."""
    draw = torch.rand(ids.shape, generator=generator)
    chosen = (draw < 0.15) & (ids >= len(SPECIAL))
    others = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    seen = torch.where(chosen & (draw < 0.12), MASK, torch.where(chosen & (draw >= 0.135), others, ids))
    return seen, torch.where(chosen, ids, -100)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a tenth of the steps, then linear decay to 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.1 * steps + 1), (steps - s) / (0.9 * steps + 1)))


def optimizer_of(model: nn.Module, lr: float, transforms: Sequence[Any] = ()) -> torch.optim.Optimizer:
    """AdamW in the order of Child-Tuning's authors, with clipping and masks inside its one sweep."""
    return optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, decay="hf", clip_norm=1.0, transforms=transforms)


def pretrain(data: Data, scale: Scale) -> dict[str, Tensor]:
    """Train the masked language model; its weights."""
    torch.manual_seed(0)
    model, generator = Net(scale), torch.Generator().manual_seed(0)
    optimizer = optimizer_of(model, 1e-3)
    rate = schedule(optimizer, scale.pretraining_steps)
    for _ in tqdm(range(scale.pretraining_steps), desc="masked language model", unit="step", leave=False, mininterval=0.5, disable=None):
        ids, targets = corrupt(
            data.manual[torch.randint(len(data.manual), (scale.pretraining_batch,), generator=generator)], scale.vocabulary, generator
        )
        asked = targets != -100
        optimizer.zero_grad()
        cross_entropy(model.language(ids, asked), targets[asked]).backward()
        optimizer.step()
        rate.step()
    return model.state_dict()


@torch.no_grad()
def language_loss(model: Net, data: Data, scale: Scale) -> float:
    """Mean cross-entropy, in nats per masked token, on the chapters that were held out; always the same masks."""
    model.eval()
    ids, targets = corrupt(data.held_out, scale.vocabulary, torch.Generator().manual_seed(1))
    total = sum(
        float(cross_entropy(model.language(i, t != -100), t[t != -100], reduction="sum"))
        for i, t in zip(ids.split(64), targets.split(64), strict=True)
    )
    return total / int((targets != -100).sum())


@torch.no_grad()
def accuracy(model: Net, part: tuple[Tensor, Tensor]) -> float:
    """The fraction of a part that is right."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in Batches(*part, 64))
    return right / len(part[1])


@dataclass(frozen=True)
class Outcome:
    """What one fine-tuning gave."""

    method: str
    seed: int
    accuracy: float
    loss_before: float
    loss_after: float
    seconds: float

    @property
    def forgetting(self) -> float:
        """Rise of the masked-LM loss."""
        return self.loss_after - self.loss_before


def finetune(
    weights: dict[str, Tensor], data: Data, scale: Scale, method: str, setting: Setting, seed: int, part: str, tick: Callable[[], Any]
) -> Outcome:
    """Fine-tune from the language model's weights; measured on ``part``."""
    torch.manual_seed(seed)
    model = Net(scale)
    model.load_state_dict({n: w for n, w in weights.items() if not n.startswith("classifier.")}, strict=False)
    before, start = language_loss(model, data, scale), time.perf_counter()
    model.train()
    loader = Batches(*data.parts["train"], scale.batch, torch.Generator().manual_seed(seed))
    transforms: tuple[Any, ...] = ()
    if METHODS[method] is not None:
        child = ChildTuning(model, METHODS[method], keep=setting.keep, seed=seed)
        child.start_task(loader, cross_entropy)
        transforms = child.transforms()
    optimizer = optimizer_of(model, setting.lr, transforms)
    rate = schedule(optimizer, scale.epochs * len(loader))
    for x, y in itertools.chain.from_iterable(loader for _ in range(scale.epochs)):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        rate.step()
        tick()
    seconds = time.perf_counter() - start
    return Outcome(method, seed, accuracy(model, data.parts[part]), before, language_loss(model, data, scale), seconds)


def runs(
    weights: dict[str, Tensor], data: Data, scale: Scale, plan: Iterable[tuple[str, Setting, int]], part: str
) -> list[tuple[Setting, Outcome]]:
    """Fine-tune for every method, setting and seed of the plan."""
    listed, found = list(plan), []
    steps = scale.epochs * -(-len(data.parts["train"][1]) // scale.batch)
    with tqdm(total=steps * len(listed), unit="step", leave=False, mininterval=0.5, disable=None) as bar:
        for method, setting, seed in listed:
            bar.set_description(f"{method}, seed {seed}")
            found.append((setting, finetune(weights, data, scale, method, setting, seed, part, bar.update)))
    return found


def tune(console: Console, weights: dict[str, Tensor], data: Data, scale: Scale) -> list[dict[str, Any]]:
    """Try the grid on the tuning seed and print the accuracies on the validation files, best first."""
    settings = {m: [Setting(lr, k) for lr in GRID["lr"] for k in (GRID["keep"] if v else (1.0,))] for m, v in METHODS.items()}
    found = runs(weights, data, scale, ((m, s, TUNING_SEED) for m, of_method in settings.items() for s in of_method), "validation")
    rows = [{**dataclasses.asdict(s), **dataclasses.asdict(o)} for s, o in found]
    rows.sort(key=lambda row: (list(METHODS).index(row["method"]), -row["accuracy"]))
    table = Table(title=f"seed {TUNING_SEED}, validation files", title_justify="left")
    for column in ("method", "lr", "keep", "accuracy"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(row["method"], f"{row['lr']:g}", f"{row['keep']:g}", f"{100 * row['accuracy']:.1f}")
    console.print(table)
    return rows


def shown(values: Sequence[float], digits: int, factor: float = 1) -> str:
    """Mean and standard deviation."""
    spread = f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * statistics.fmean(values):.{digits}f}{spread}"


def report(console: Console, outcomes: Sequence[Outcome], scale: Scale, tests: int) -> None:
    """The table; beside the means the differences to vanilla, seed by seed."""
    seeds = sorted({o.seed for o in outcomes})
    table = Table(
        title=f"{len(PACKAGES) * scale.per_class} training and {tests} test docstrings, mean ± std over {len(seeds)} seeds; "
        "forgetting: rise of the masked-LM loss on held-out chapters of the manual, nats per token",
        title_justify="left",
    )
    for column in ("method", "lr", "keep", "test accuracy, %", "over vanilla", "loss before", "loss after", "forgetting", "over vanilla"):
        table.add_column(column, justify="left" if column == "method" else "right")
    plain = {o.seed: o for o in outcomes if o.method == "vanilla"}
    for method in METHODS:
        own = [o for o in outcomes if o.method == method]
        gain, more = ([f(o) - f(plain[o.seed]) for o in own] for f in (lambda o: o.accuracy, lambda o: o.forgetting))
        setting = TUNED[method]
        table.add_row(
            method,
            f"{setting.lr:g}",
            f"{setting.keep:g}" if METHODS[method] else "",
            shown([o.accuracy for o in own], 1, 100),
            shown(gain, 1, 100) if METHODS[method] else "",
            shown([o.loss_before for o in own][:1], 3),
            shown([o.loss_after for o in own], 3),
            shown([o.forgetting for o in own], 3),
            shown(more, 3) if METHODS[method] else "",
        )
    console.print(table)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy and forgetting of every seed, and their means."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = (("test accuracy, %", lambda o: 100 * o.accuracy), ("forgetting: rise of the masked-LM loss, nats", lambda o: o.forgetting))
    for axis, (title, value) in zip(axes, panels, strict=True):
        for place, method in enumerate(METHODS):
            values = [value(o) for o in outcomes if o.method == method]
            axis.plot([place] * len(values), values, "o", color="0.6", markersize=5)
            axis.plot([place - 0.2, place + 0.2], [statistics.fmean(values)] * 2, "-", color="C0", linewidth=3)
        axis.set_xticks(range(len(METHODS)), list(METHODS))
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.margins(x=0.2)
    figure.suptitle("fine-tuning a small BERT: a point per seed, bars: means", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Pre-train, fine-tune, print, save and plot."""
    parser = argparse.ArgumentParser(description="vanilla fine-tuning of a small BERT against Child-Tuning F and D")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_bert"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="reported seeds (default: 0 to 4)")
    parser.add_argument("--tune", action="store_true", help=f"try the grid on seed {TUNING_SEED} and the validation files instead")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one epoch, two seeds: shows that it runs, and nothing else")
    options = parser.parse_args(argv)
    if TUNING_SEED in options.seeds or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must differ from each other and from {TUNING_SEED}, on which the settings were chosen")
    scale, seeds = (QUICK, options.seeds[:2]) if options.quick else (Scale(), options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    console, start = Console(width=160), time.perf_counter()
    torch.set_num_threads(1)  # these layers gain little from a second one
    transformers.logging.set_verbosity_error()

    data = prepare(scale)
    weights = pretrain(data, scale)
    trained = time.perf_counter() - start
    console.print(
        f"masked language model: {sum(w.numel() for n, w in weights.items() if n.startswith('lm.bert')) / 1e6:.2f} M weights, "
        f"{len(data.manual)} blocks of {scale.length} tokens, {scale.pretraining_steps} steps, {trained:.0f} s; "
        f"ops on the CPU are served by {backends.serving('cpu')!r}"
    )
    facts = {
        "scale": dataclasses.asdict(scale),
        "packages": PACKAGES,
        "samples": {name: len(part[1]) for name, part in data.parts.items()},
        "versions": {"fastcl": fastcl.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
        | {"tokenizers": tokenizers.__version__, "python": platform.python_version()},
        "backend": backends.serving("cpu"),
        "seconds_of_pretraining": trained,
    }
    if options.tune:
        rows = tune(console, weights, data, scale)
        (options.out / "tuning.json").write_text(json.dumps(facts | {"seed": TUNING_SEED, "runs": rows}, indent=2) + "\n")
        return 0

    plan = [(method, TUNED[method], seed) for seed in seeds for method in METHODS]
    outcomes = [outcome for _, outcome in runs(weights, data, scale, plan, "test")]
    report(console, outcomes, scale, len(data.parts["test"][1]))
    settings = {method: dataclasses.asdict(setting) for method, setting in TUNED.items()}
    listed = [dataclasses.asdict(o) | {"forgetting": o.forgetting} for o in outcomes]
    (options.out / "results.json").write_text(json.dumps(facts | {"settings": settings, "runs": listed}, indent=2) + "\n")
    plot(outcomes, options.out / "results.png")
    console.print(f"written to {options.out}/; {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: what was printed stands, the remaining files were not written")
