"""Write the README's benchmark sections and the plots from bench/results/*.json; no number is typed by hand.

A section stands between ``<!-- bench:cpu -->`` and ``<!-- /bench:cpu -->``, likewise for ``bench:gpu`` and ``bench:claim`` (one sentence).
``bench:demo`` shows docs/demo, where ``python examples/spg_permuted_digits.py --out docs/demo`` writes; ``bench:finetune`` likewise shows
docs/finetune_bert of examples/finetune_bert.py; ``bench:methods`` is made of
bench/results/methods.json, from ``python -m bench.methods``, and ``bench:remember`` of docs/remember/results.json, from
``python -m bench.remember``.
``--check`` writes nothing and exits with 1 when the README does not say what the results say.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/NAME.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import bench_ncl, bench_optim, machine, methods_report, remember_report, targets
from bench.cells import ORDER
from bench.tables import number, table

RESULTS = machine.ROOT / "bench" / "results"
README = machine.ROOT / "README.md"
DEMO = machine.ROOT / "docs" / "demo"
FINETUNED = machine.ROOT / "docs" / "finetune_bert"
REMEMBERED = machine.ROOT / "docs" / "remember"
REQUIRED = {"cpu", "gpu"}  # the claim may be left out
NONE = "not measured yet"
NOTHING: dict[str, Any] = {"streams": []}
OPTIMIZERS = (
    "The whole `optimizer.step()`. torch fused: `torch.optim.AdamW(fused=True)` without the transform, which the others do besides; "
    "official: as the methods' public code; eager and foreach: in-place torch ops, then torch fused. Over three fresh allocations of all "
    "tensors: which pages they get moves times by a third."
)
PRECISION = (
    "NCL's step. official: both factors inverted in every step, the penalty by autograd; for kron_merge whole matrices by turns; torch: "
    "inverses kept, four lines in eager torch, torch.bmm for layers of one shape, Q as [r, P] or [P, r]. The yardstick of a low-rank step "
    "moves 8 r + 28 bytes per parameter, a step without momentum."
)
HEADLINE = ("soft_mask_", "gpt2-small", "fp32")


def conditions(result: Mapping[str, Any]) -> str:
    """What the numbers were taken on, in one paragraph."""
    m = result["machine"]
    where = m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads, {m['instructions']}"
    software = f"torch {m['torch']}, Python {m['python']}, fastcl {m['fastcl']} ({m['backend']})"
    rounds = sorted({c["rounds"] for c in result["cells"]})
    many = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])
    return (
        f"{where}; {software}; {m['date']}. Medians of {many} rounds; in each round every provider has its turn, in random order, on "
        f"freshly restored inputs. The yardstick moves the fewest bytes that the op can through flat buffers and does nothing else "
        f"({m['yardstick']}). Providers: official, as the methods' public code; eager, in-place torch ops; foreach, `torch._foreach_*` "
        f"(for `soft_mask_` with equal dtypes the bare `torch._foreach_addcmul_`); compile, `torch.compile` of eager."
    )


def _limit(target: targets.Target, value: float) -> str:
    if target.kind == "overhead":
        return f"<= {value:.0%}".replace("%", " %")
    if target.kind == "memory":
        return "0 %" if value <= targets.MEMORY_RESOLUTION else f"<= {value:.0%}".replace("%", " %")
    return f"{'>=' if target.kind == 'speed' else '<='} {value:g} x"


def _target_row(o: targets.Outcome) -> list[str]:
    t = o.target
    what = {
        "speed": f"speed, relative to {t.against}",
        "time": f"time, relative to {t.against}",
        "memory": "extra memory, of P",
        "overhead": "overhead over the step without",
    }[t.kind]
    shown = "-" if o.value is None else f"{100 * o.value:.2f} %" if t.kind in ("memory", "overhead") else f"{number(o.value)} x"
    verdict = {"missed": "**missed**", "not measured": f"**not measured** {o.reason}".strip()}.get(o.verdict, o.verdict)
    return [f"`{t.op}`", t.size, t.dtype, what, _limit(t, t.must), _limit(t, t.reach), shown, verdict]


def targets_table(result: Mapping[str, Any]) -> str:
    """Every target with its value and verdict."""
    head = ("op", "size", "dtype", "fastcl's", "must", "reach for", "measured", "verdict")
    return table(head, [_target_row(o) for o in targets.of(result)], text=(0, 1, 2, 3, 7))


def cells_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of every provider in every cell, and fastcl's rate; what was not run is listed below with its reason."""
    extra = [p for p in ("triton",) if any(p in c["providers"] for c in result["cells"])]
    columns = [*ORDER[:-1], *extra, "yardstick"]
    rows, reasons = [], {}
    for c in result["cells"]:
        shown = [f"{number(p[name]['median_ms'])}" if name in p else "-" for p in [c["providers"]] for name in columns]
        ours, yard = c["providers"]["fastcl"], c["providers"]["yardstick"]
        shown[columns.index("fastcl")] = f"**{shown[columns.index('fastcl')]}**"
        rate = [number(ours["gb_per_s"]), number(yard["median_ms"] / ours["median_ms"])]
        rows.append([f"`{c['op']}`", c["size"], c["dtype"], *shown, *rate])
        for name, reason in c["not_run"].items():
            reasons.setdefault((name, reason), []).append(f"{c['op']} {c['size']} {c['dtype']}")
    head = ["op", "size", "dtype", *(f"{n}, ms" for n in columns), "fastcl, GB/s", "of the yardstick"]
    notes = [f"* not run: {name}, {reason} ({_places(cells)})." for (name, reason), cells in reasons.items()]
    return "\n".join([table(head, rows, text=range(3)), *(["", *notes] if notes else [])])


def _places(cells: Sequence[str]) -> str:
    return ", ".join(cells) if len(cells) <= 3 else f"{len(cells)} cells, first {cells[0]}"


def optimizers_table(result: Mapping[str, Any]) -> str:
    """The optimizers' steps under every provider, and fastcl's relative to torch's fused AdamW without the transform."""
    columns = [bench_optim.BARE, "official", "eager", "foreach", "fastcl", "yardstick"]
    rows = []
    for c in result["optimizers"]:
        p = c["providers"]
        shown = [number(p[name]["median_ms"]) if name in p else "-" for name in columns]
        shown[columns.index("fastcl")] = f"**{shown[columns.index('fastcl')]}**"
        relative = p["fastcl"]["median_ms"] / p[bench_optim.BARE]["median_ms"]
        rows.append([c["op"], c["size"], c["dtype"], *shown, number(relative)])
    head = ["optimizer step", "size", "dtype", *(f"{n}, ms" for n in columns), f"fastcl / {bench_optim.BARE}"]
    return table(head, rows, text=range(3))


def precision_table(result: Mapping[str, Any]) -> str:
    """NCL's steps and merging under every provider."""
    columns = [p for p in bench_ncl.PROVIDERS if any(p in c["providers"] for c in result["precision"])]
    rows = []
    for c in result["precision"]:
        shown = [number(c["providers"][name]["median_ms"]) if name in c["providers"] else "-" for name in columns]
        shown[columns.index("fastcl")] = f"**{shown[columns.index('fastcl')]}**"
        rows.append([c["op"], c["size"], *shown])
    return table(["precision", "size", *(f"{n}, ms" for n in columns)], rows, text=range(2))


def steps_table(result: Mapping[str, Any]) -> str:
    """The training step under every variant of every method."""
    rows = []
    for s in result["steps"]:
        for name, m in s["variants"].items():
            o, peak = m["overhead_percent"], m["peak_bytes_over_none"]
            over = "" if name == "none" else f"{o['median']:+.1f} % ({o['low']:+.1f} to {o['high']:+.1f})"
            shown = "-" if peak is None else f"{peak / 2**20:.1f}"
            strong = "**" if name == "fastcl" else ""
            rows.append(
                [
                    f"{s['model']}, {s['parameters'] / 1e6:.1f} M",
                    s["method"],
                    name,
                    number(m["median_ms"]),
                    f"{strong}{over}{strong}",
                    shown,
                ]
            )
    return table(("training step", "method", "by", "ms", "overhead (quartiles)", "peak memory over none, MiB"), rows, text=range(3))


def claim(result: Mapping[str, Any]) -> str:
    """One sentence about the headline cell."""
    record = next((c for c in result["cells"] if (c["op"], c["size"], c["dtype"]) == HEADLINE), None)
    if record is None:
        return NONE
    p, m = record["providers"], result["machine"]
    ours = p["fastcl"]["median_ms"]
    versus = ", ".join(f"{number(p[n]['median_ms'] / ours)} x {n}" for n in ("official", "eager", "compile") if n in p)
    return (
        f"Masking GPT-2 small's gradients ({record['elements'] / 1e6:.0f} M, fp32) takes {number(ours)} ms: {versus} (speed), at "
        f"{p['yardstick']['median_ms'] / ours:.0%} of the speed at which {m.get('gpu', m['cpu'])} moves the same bytes.".replace("%", " %")
    )


def section(result: Mapping[str, Any], pictures: bool = True) -> str:
    """One device's section."""
    name = result["machine"]["name"]
    parts = [conditions(result)]
    if name == "cpu":
        parts.append(targets_table(result))
    if pictures:
        from bench import plots

        parts += [f"![{caption}](bench/results/{file})" for file, caption in plots.captions(result)]
    parts.append(cells_table(result))
    if result["optimizers"]:
        parts += [OPTIMIZERS, optimizers_table(result)]
    if result["precision"]:
        parts += [PRECISION, precision_table(result)]
    if result["steps"]:
        parts.append(steps_table(result))
        parts.append(f"Memory: {result['settings']['memory']}.")
    return "\n\n".join(parts)


def demo(folder: Path = DEMO) -> str:
    """The demo's table and its two plots, from what it wrote."""
    if not (folder / "summary.csv").is_file():
        return NONE
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def percent(row: Mapping[str, str], name: str) -> str:
        return f"{100 * float(row[name + '_mean']):.1f} ± {100 * float(row[name + '_std']):.1f}" if row[name + "_mean"] else "-"

    shown = [[r["method"], f"{r['width']}, {r['lr']}, {r['epochs']}", percent(r, "acc"), percent(r, "forgetting")] for r in rows]
    head = ("method", "width, lr, epochs", "ACC, %", "forgetting, %")
    return "\n\n".join(
        [
            table(head, shown, text=range(2)),
            "![accuracy matrices](docs/demo/matrix.png)",
            "![accuracy along the stream](docs/demo/curve.png)",
        ]
    )


def finetune(folder: Path = FINETUNED) -> str:
    """The example's table and plot, from what it wrote."""
    if not (folder / "results.json").is_file():
        return NONE
    found = json.loads((folder / "results.json").read_text())
    rows = []
    for method, setting in found["settings"].items():
        runs = [r for r in found["runs"] if r["method"] == method]

        def spread(name: str, scale: float, digits: int, runs: Sequence[Mapping[str, float]] = runs) -> str:
            values = [scale * r[name] for r in runs]
            return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

        shown = [spread("accuracy", 100, 1), spread("loss_before", 1, 2), spread("loss_after", 1, 2), spread("forgetting", 1, 3)]
        rows.append([method, f"{setting['lr']:g}", f"{setting['keep']:g}", *shown])
    head = ("method", "lr", "keep", "test accuracy, %", "masked-LM loss before", "after", "forgetting")
    seeds = len({r["seed"] for r in found["runs"]})
    samples = found["samples"]
    note = f"Mean ± standard deviation over {seeds} seeds; {samples['train']} training and {samples['test']} test samples."
    return "\n\n".join([note, table(head, rows, text=range(1)), "![accuracy against forgetting](docs/finetune_bert/results.png)"])


def remember(folder: Path = REMEMBERED) -> str:
    """What NCL and its peers remember, and which of the paper's findings hold."""
    path = folder / "results.json"
    return remember_report.section(json.loads(path.read_text())) if path.is_file() else NONE


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results of ops by device name."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.name != methods_report.FILE}
    return {name: {"optimizers": [], "precision": [], **result} for name, result in found.items()}


def load_methods(folder: Path) -> dict[str, Any] | None:
    """The result of the methods, if there is one."""
    path = folder / methods_report.FILE
    return json.loads(path.read_text()) if path.is_file() else None


def sections(results: Mapping[str, Mapping[str, Any]], trained: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The text for every marker; what has no result says so."""
    gpus = [r for name, r in results.items() if name != "cpu"]
    return {
        "claim": claim(results["cpu"]) if "cpu" in results else NONE,
        "cpu": section(results["cpu"]) if "cpu" in results else NONE,
        "gpu": "\n\n".join(section(r) for r in gpus) if gpus else NONE,
        "demo": demo(),
        "finetune": finetune(),
        "remember": remember(),
        "methods": methods_report.section(trained) if trained else NONE,
    }


def replace(text: str, name: str, body: str) -> tuple[str, bool]:
    """The text with the section ``name`` set to ``body``, and whether the text has that section.

    Raises:
        ValueError: the section's markers are not one pair in order.
    """
    opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if opening not in text and closing not in text:
        return text, False
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"the text needs exactly one {opening} followed by one {closing}")
    pattern = re.compile(re.escape(opening) + ".*?" + re.escape(closing), re.DOTALL)
    return pattern.sub(lambda _: f"{opening}\n{body}\n{closing}", text), True


def updated(text: str, results: Mapping[str, Mapping[str, Any]], trained: Mapping[str, Any] | None = None) -> tuple[str, list[str]]:
    """The README's new text, and the names of the sections that it has no markers for."""
    absent = []
    for name, body in sections(results, trained).items():
        text, found = replace(text, name, body)
        if not found:
            absent.append(name)
    return text, absent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if ``--check`` finds the README stale."""
    p = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the README or a plot is stale")
    p.add_argument("--readme", type=Path, default=README)
    p.add_argument("--results", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    results, trained, before = load(args.results), load_methods(args.results), args.readme.read_text()
    after, absent = updated(before, results, trained)
    for name in sorted(set(absent) & REQUIRED):
        print(f"bench: {args.readme.name} has no section <!-- bench:{name} -->", file=sys.stderr)
    from bench import plots

    if args.check:
        files = [file for r in results.values() for file, _ in plots.captions(r)] + [
            file for file, _ in methods_report.pictures(trained or NOTHING)
        ]
        missing = [file for file in files if not (args.results / file).is_file()]
        stale = [f"{args.readme.name} does not say what the results say"] if after != before else []
        stale += [f"missing: {', '.join(missing)}"] if missing else []
        if stale:
            print(f"bench: {'; '.join(stale)}; run python -m bench.report", file=sys.stderr)
        return 1 if stale or set(absent) & REQUIRED else 0
    for r in results.values():
        plots.draw(r, args.results)
    methods_report.draw(trained or NOTHING, args.results)
    args.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
