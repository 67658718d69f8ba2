"""Does it remember? NCL and what it is compared with (Kao et al. 2021) on the digits, each with one hyper-parameter that was tuned.

Two steps, each of which writes a file into docs/remember::

    python -m bench.remember --tune     # settings.json: every candidate on seeds 1000 and 1001, measured on held-out training images
    python -m bench.remember            # results.json: the chosen ones on seeds 0 to 4, measured on the test images

A method's hyper-parameter is chosen for each stream by the largest mean ACC; the first of equals; a run that diverges counts as 0. What does
not differ between methods: the network, plain gradient descent without momentum, learning rate, batches and their order, epochs. naive and
joint have the learning rate as their hyper-parameter, so that no method wins by a learning rate that suits it alone. With ``--quick``
(one epoch, one seed) and other narrowed runs nothing is written unless ``--out`` names a folder. ``python -m bench.report`` makes the
README's section of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:  # run as a file: python bench/NAME.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import machine
from bench.compare import RedTests, require_green
from bench.remember_report import FINDINGS, section
from fastcl.experiment import Config, Result, run
from fastcl.experiment.files import load_json
from fastcl.experiment.runner import TrainingError

FOLDER = machine.ROOT / "docs" / "remember"
STREAMS = (("permuted-digits", "domain"), ("split-digits", "task"), ("split-digits", "class"))
SETTINGS = {"epochs": 20, "batch_size": 32, "lr": 0.05, "width": 256, "depth": 2}
SEEDS, TUNING_SEEDS = range(5), (1000, 1001)
TESTS = ("tests/test_optim_ncl.py", "tests/test_ncl.py", "tests/test_ewc.py", "tests/test_experiment.py")


class Contender(NamedTuple):
    """A row of the comparison: a method, the one setting that is tuned, its candidates."""

    method: str
    setting: str
    candidates: tuple[float, ...]


CONTENDERS: dict[str, Contender] = {
    "naive": Contender("naive", "lr", (0.02, 0.05, 0.1)),
    "ewc": Contender("ewc", "strength", (1.0, 3.0, 10.0, 30.0, 100.0)),
    "kfac-ewc, strength 1": Contender("kfac-ewc", "strength", (1.0,)),
    "kfac-ewc": Contender("kfac-ewc", "strength", (0.1, 0.3, 1.0, 3.0, 5.0, 10.0)),
    "owm": Contender("owm", "alpha", (1e-3, 1e-2, 3e-2, 1e-1, 1.0)),
    "ncl": Contender("ncl", "weight", (1.0, 10.0, 100.0, 1000.0, 10000.0)),
    "joint": Contender("joint", "lr", (0.02, 0.05, 0.1)),
}


def configuration(stream: str, scenario: str, name: str, value: float, seed: int, settings: Mapping[str, Any], **more: Any) -> Config:
    """One contender with one value of its setting, on one stream with one seed."""
    given = {**settings, CONTENDERS[name].setting: value, **more}
    return Config.of(stream=stream, scenario=scenario, method=CONTENDERS[name].method, first_seed=seed, seeds=1, **given)


def train(config: Config) -> Result | None:
    """Train it; None if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run(config, Path(folder, "run"))[0]
        except TrainingError:
            return None


def tune(settings: Mapping[str, Any], seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Every candidate's ACC on the tuning seeds, and which was chosen."""
    from tqdm import tqdm

    turns = [(*key, name, value) for key in STREAMS for name in names for value in CONTENDERS[name].candidates]
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for stream, scenario, name, value in tqdm(turns, unit="candidate", disable=None):
        results = [train(configuration(stream, scenario, name, value, seed, settings, validation=True)) for seed in seeds]
        mean = statistics.fmean(0.0 if r is None else r.accuracy.acc() for r in results)
        found.setdefault((stream, scenario, name), {})[value] = mean
    rows = [
        {
            "stream": stream,
            "scenario": scenario,
            "contender": name,
            "setting": CONTENDERS[name].setting,
            "acc": [[value, mean] for value, mean in by_value.items()],
            "chosen": max(by_value, key=lambda value: by_value[value]),
        }
        for (stream, scenario, name), by_value in found.items()
    ]
    return {"format": 1, "machine": machine.facts("cpu"), "settings": dict(settings), "seeds": list(seeds), "rows": rows}


def measure(tuned: Mapping[str, Any], seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """The chosen ones on the test images; for each seed all contenders have their turn before the next seed begins."""
    from tqdm import tqdm

    chosen = {(r["stream"], r["scenario"], r["contender"]): r["chosen"] for r in tuned["rows"] if r["contender"] in names}
    found: dict[tuple[str, str, str], list[Result | None]] = {key: [] for key in chosen}
    for _, (key, value) in tqdm([(seed, item) for seed in seeds for item in chosen.items()], unit="run", disable=None):
        found[key].append(train(configuration(*key, value, seeds[len(found[key])], tuned["settings"])))
    rows = [
        {
            "stream": stream,
            "scenario": scenario,
            "contender": name,
            "setting": CONTENDERS[name].setting,
            "value": chosen[stream, scenario, name],
            "matrices": [None if r is None else r.matrix for r in results],
            "seconds_per_step": [None if r is None else r.seconds_per_step for r in results],
        }
        for (stream, scenario, name), results in found.items()
    ]
    facts = machine.facts("cpu") | {"threads": 1}
    return {"format": 1, "machine": facts, "settings": tuned["settings"], "tuning_seeds": tuned["seeds"], "seeds": list(seeds), "rows": rows}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the JSON, one line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if the tests are red or nothing was tuned."""
    p = argparse.ArgumentParser(prog="python -m bench.remember", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tune", action="store_true", help="choose the hyper-parameters")
    p.add_argument("--quick", action="store_true", help="one epoch, one seed")
    p.add_argument("--contender", action="append", choices=list(CONTENDERS), help="only this one; may be given several times")
    p.add_argument("--out", type=Path, help="folder of both files (default: docs/remember, for whole runs only)")
    p.add_argument("--require-green", action="store_true", help="run the methods' tests first, and stop if they fail")
    args = p.parse_args(argv)
    if args.require_green:
        try:
            require_green(TESTS)
        except RedTests as red:
            print(f"bench: {red}", file=sys.stderr)
            return 1
    folder = args.out or (None if args.quick or args.contender else FOLDER)
    names = args.contender or list(CONTENDERS)
    torch.set_num_threads(1)
    if args.tune:
        tuned = tune(SETTINGS | ({"epochs": 1} if args.quick else {}), TUNING_SEEDS[:1] if args.quick else TUNING_SEEDS, names)
        for row in tuned["rows"]:
            shown = ", ".join(f"{value:g}: {100 * mean:.1f}" for value, mean in row["acc"])
            print(f"{row['stream']}, {row['scenario']}: {row['contender']}, {row['setting']} {row['chosen']:g}   ({shown})")
        if folder is not None:
            write(tuned, folder / "settings.json")
        return 0
    path = (args.out or FOLDER) / "settings.json"
    if not path.is_file():
        print(f"bench: {path} is missing; run with --tune first", file=sys.stderr)
        return 1
    tuned = load_json(path)
    if args.quick:
        tuned["settings"] = tuned["settings"] | {"epochs": 1}
    result = measure(tuned, SEEDS[:1] if args.quick else SEEDS, names)
    print(section(result))
    if folder is not None:
        write(result, folder / "results.json")
    return 0


__all__ = ["CONTENDERS", "FINDINGS", "main", "measure", "tune"]

if __name__ == "__main__":
    sys.exit(main())
