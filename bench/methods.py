"""Train every method on Split-Digits (class-incremental) and Permuted-Digits (domain-incremental); write methods.json and its plots.

For each seed all methods have their turn before the next seed begins, so that a machine that slows down slows them all. Only a whole run
is written; ``--quick`` and other narrowed runs print, and write if ``--out`` names a folder. ``python -m bench.report`` makes the README's
section of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: python bench/NAME.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import machine
from bench.compare import RedTests, require_green
from bench.methods_report import FILE, draw, section
from fastcl.experiment import METHODS, Config, Result, run

RESULTS = machine.ROOT / "bench" / "results"
STREAMS = (("split-digits", "class"), ("permuted-digits", "domain"))
SETTINGS = {"epochs": 20, "batch_size": 32, "lr": 0.05, "width": 256, "depth": 2}
SEEDS = 5
TESTS = (
    "tests/test_agem.py",
    "tests/test_gem.py",
    "tests/test_replay.py",
    "tests/test_spg.py",
    "tests/test_ewc.py",
    "tests/test_child_tuning.py",
    "tests/test_ncl.py",
    "tests/test_optim_ncl.py",
    "tests/test_joint.py",
    "tests/test_experiment.py",
)


def configuration(stream: str, scenario: str, method: str, seed: int, settings: Mapping[str, Any]) -> Config:
    """One method on one stream with one seed; the method's own settings are its defaults."""
    return Config.of(stream=stream, scenario=scenario, method=method, first_seed=seed, seeds=1, **settings)


def measure(settings: Mapping[str, Any], seeds: int, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """Train everything and return the result as plain data."""
    from tqdm import tqdm

    found: dict[tuple[str, str], dict[str, list[Result]]] = {key: {m: [] for m in methods} for key in STREAMS}
    turns = [(*key, method, seed) for seed in range(seeds) for key in STREAMS for method in methods]
    with tempfile.TemporaryDirectory() as folder:
        for stream, scenario, method, seed in tqdm(turns, unit="run", disable=None):
            config = configuration(stream, scenario, method, seed, settings)
            found[stream, scenario][method] += run(config, Path(folder, f"{stream}-{method}-{seed}"))
    streams = [_stream(*key, by_method, settings) for key, by_method in found.items()]
    facts = machine.facts("cpu") | {"threads": configuration(*STREAMS[0], methods[0], 0, settings).threads}
    return {"format": 1, "machine": facts, "settings": dict(settings), "seeds": seeds, "streams": streams}


def _stream(stream: str, scenario: str, by_method: Mapping[str, Sequence[Result]], settings: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for method, results in by_method.items():
        own = configuration(stream, scenario, method, 0, settings).options
        seconds = [r.seconds_per_step for r in results]
        rows.append({"method": method, "options": own, "seconds_per_step": seconds, "matrices": [r.matrix for r in results]})
    return {"stream": stream, "scenario": scenario, "tasks": len(rows[0]["matrices"][0]), "methods": rows}


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the JSON and draw the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps(result) + "\n")
    draw(result, folder)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if the tests are red."""
    p = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one epoch, two seeds")
    p.add_argument("--method", action="append", choices=list(METHODS), help="only this one; may be given several times")
    p.add_argument("--out", type=Path, help="folder for the result (default: bench/results, for a whole run only)")
    p.add_argument("--require-green", action="store_true", help="run the methods' tests first, and stop if they fail")
    args = p.parse_args(argv)
    if args.require_green:
        try:
            require_green(TESTS)
        except RedTests as red:
            print(f"bench: {red}", file=sys.stderr)
            return 1
    settings, seeds = (SETTINGS | {"epochs": 1}, 2) if args.quick else (SETTINGS, SEEDS)
    torch.set_num_threads(1)
    result = measure(settings, seeds, args.method or tuple(METHODS))
    folder = args.out or (None if args.quick or args.method else RESULTS)
    print(section(result, with_pictures=False))
    if folder is not None:
        print(f"written: {write(result, folder).name} and plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
