"""Measure every cell with all providers side by side and write bench/results/<device>.json and .csv.

``python -m bench.compare`` measures the default cells; see ``--help``. Only a whole run is written as a result: one that is narrowed by
``--op``, ``--size``, ``--dtype`` or ``--quick`` is printed, and written where ``--out`` says. ``--part`` measures whole parts again and
keeps the others, if machine, software and settings are the same: no ratio is made of two parts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a file: python bench/NAME.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import bench_ncl, bench_optim, bench_step, machine, measure, report, targets
from bench.cells import DTYPES, SMALL, Cell, Workload, cells, providers
from fastcl.testing import CASES, SIZES, elements

RESULTS = machine.ROOT / "bench" / "results"
TESTS = tuple(
    f"tests/test_{family}.py"
    for family in ("soft_mask", "importance", "projection", "child_mask", "pull", "quantile", "bit_mask", "kronecker", "low_rank")
)
SLOW_MS = 500.0  # a call that takes longer has its memory measured once
STEP_ROUNDS = (15, 400)  # an overhead of a few percent is a small difference of two large times
QUICK = {"sizes": ("400x64", "1x2^20"), "dtypes": ("fp32", "fp32+uint8")}


class RedTests(RuntimeError):
    """The ops' tests are not green, so their times mean nothing."""


def require_green(tests: Sequence[str] = TESTS, root: Path = machine.ROOT) -> None:
    """Run the ops' tests; raises :class:`RedTests` unless all of them ran and passed."""
    missing = [t for t in tests if not (root / t).is_file()]
    if missing:
        raise RedTests(f"no benchmark without green tests: {', '.join(missing)} not found")
    command = [sys.executable, "-m", "pytest", *tests, "-x", "-q", "-m", "not slow and not gpu", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RedTests(f"no benchmark without green tests: pytest {' '.join(tests)} exited with {done.returncode}\n{tail}")


def run_cell(cell: Cell, device: str, seconds: float, rounds: tuple[int, int], everything: bool = False) -> dict[str, Any]:
    """One cell's record."""
    work = Workload(cell, device, everything)
    for name in providers(cell, device):
        work.add(name)
    times = measure.interleave(work.calls, work.reset, measure.clock(device), seconds=seconds, rounds=rounds, burst=cell.burst)
    total, large = cell.amount.total, elements(SIZES[cell.size]) >= SMALL

    def extra(name: str, median: float) -> int | None:
        repeats = 3 if median < SLOW_MS else 1
        return measure.extra_bytes(work.calls[name], work.reset, device, repeats) if large else None

    rows: dict[str, dict[str, Any]] = {}
    for name, by_round in times.items():
        spread = measure.Spread.of(measure.flat(by_round))
        bytes_moved = None if name == "fp32 importance" else total
        rows[name] = {
            **spread.row(),
            "gb_per_s": None if bytes_moved is None else bytes_moved / spread.median / 1e6,
            # Paired within rounds, beside the medians' own ratio: the two differ when the machine was not quiet.
            "to_yardstick": measure.paired_ratio(by_round, times["yardstick"]).row() if name != "yardstick" else None,
            "extra_bytes": extra(name, spread.median),
        }
    tensors = len(SIZES[cell.size])
    return {
        "op": cell.op,
        "size": cell.size,
        "dtype": cell.dtype,
        "tensors": tensors,
        "elements": elements(SIZES[cell.size]),
        "bytes": total,
        "rounds": len(times["fastcl"]),
        "providers": rows,
        "not_run": work.not_run,
    }


def _flat_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for r in records:
        shared = {k: r[k] for k in ("op", "size", "dtype", "tensors", "elements", "bytes", "rounds")}
        for name, p in r["providers"].items():
            numbers = {k: p[k] for k in ("median_ms", "low_ms", "high_ms", "samples", "gb_per_s", "extra_bytes")}
            yardstick = r["providers"]["yardstick"]["median_ms"]
            out.append({**shared, "provider": name, **numbers, "times_yardstick": p["median_ms"] / yardstick, "not_run": ""})
        out += [{**shared, "provider": name, "not_run": reason} for name, reason in r["not_run"].items()]
    return out


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write <name>.json and <name>.csv, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['machine']['name']}.json"
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)
    rows = _flat_rows(result["cells"])
    with path.with_suffix(".csv").open("w", newline="") as f:
        table = csv.DictWriter(f, fieldnames=list(rows[0]), restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
    """A bar on a terminal; elsewhere one line for each part when it is done, so that a log shows where the time goes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        done = itertools.count(1)

        @contextlib.contextmanager
        def doing(what: str) -> Iterator[None]:
            start = time.perf_counter()
            progress.update(bar, description=what)
            yield
            progress.advance(bar)
            if not console.is_terminal:
                print(f"[{next(done)}/{total}] {what}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

        yield doing


PARTS = ("cells", "optimizers", "precision", "steps")


def run(
    chosen: Sequence[Cell],
    device: str,
    seconds: float,
    rounds: tuple[int, int],
    parts: Sequence[str] = PARTS,
    everything: bool = False,
) -> dict[str, Any]:
    """Measure the parts of the result that are named, with a progress bar."""
    longer = 4 * seconds
    work: dict[str, list[tuple[str, Callable[[], dict[str, Any]]]]] = {part: [] for part in parts}
    if "cells" in parts:
        work["cells"] = [(str(c), partial(run_cell, c, device, seconds, rounds, everything)) for c in chosen]
    if "optimizers" in parts:
        work["optimizers"] = [
            (f"{n} {s}", partial(bench_optim.measure_optimizer, n, s, device, longer, rounds)) for n, s in bench_optim.pairs()
        ]
    if "precision" in parts and device == "cpu":
        work["precision"] = [(f"{row.op} {row.size}", partial(bench_ncl.measure_row, row, longer, rounds)) for row in bench_ncl.ROWS]
    if "steps" in parts:
        if device == "cpu":
            work["steps"].append(("training step, NCL", partial(bench_ncl.measure_training, longer, STEP_ROUNDS)))
        for model, method in itertools.product(bench_step.MODELS, bench_step.METHODS):
            measured = partial(bench_step.measure_step, model, method, device, longer, STEP_ROUNDS)
            work["steps"].append((f"training step, {model}, {method}", measured))
    records: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    with _progress(sum(map(len, work.values()))) as doing:
        for part, tasks in work.items():
            for what, measured in tasks:
                with doing(what):
                    records[part].append(measured())
    return {"format": 1, "machine": machine.facts(device), "settings": settings(device, seconds, rounds), **records}


def settings(device: str, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """How a run measures."""
    order, memory = "random in each round", measure.MEMORY_METHOD[device]
    return {"seconds_per_cell": seconds, "rounds": list(rounds), "order": order, "memory": memory}


def stored(folder: Path, facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The stored result, some of whose parts are measured again.

    Raises:
        ValueError: there is none, or its machine, software or settings are others.
    """
    path = folder / f"{facts['name']}.json"
    if not path.is_file():
        raise ValueError(f"{path.name} is not there yet: run all parts once")
    result: dict[str, Any] = json.loads(path.read_text())
    compared = [(key, value, result["machine"].get(key)) for key, value in facts.items() if key not in {"commit", "date"}]
    for what, own, other in (*compared, ("settings", settings, result["settings"])):
        if own != other:
            raise ValueError(f"{path.name} has {what} {other!r}, this run {own!r}: run all parts")
    return {**{part: [] for part in PARTS}, **result}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", action="append", choices=list(CASES), default=[], help="only this op (may be repeated)")
    p.add_argument("--size", action="append", choices=list(SIZES), default=[], help="only this size (may be repeated)")
    p.add_argument("--dtype", action="append", choices=list(DTYPES), default=[], help="only this dtype (may be repeated)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--seconds", type=float, default=2.0, help="time to spend on one cell, beyond its fewest rounds (default: %(default)s)")
    p.add_argument("--all", action="store_true", help="every dtype for every size, and torch.compile wherever it ends within a minute")
    p.add_argument("--quick", action="store_true", help="two small sizes, three rounds: shows that it runs, measures nothing")
    p.add_argument("--require-green", action="store_true", help="run the ops' tests first and stop if they are red")
    p.add_argument(
        "--part", action="append", choices=PARTS, default=[], help="measure only this part again, and keep the others of the stored result"
    )
    p.add_argument("--out", type=Path, help="folder for the results (default: bench/results, for a whole run only)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it measured, 1 if it refused."""
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda was asked for and torch sees no CUDA device", file=sys.stderr)
        return 1
    if args.require_green:
        try:
            require_green()
        except RedTests as red:
            print(f"bench: {red}", file=sys.stderr)
            return 1
    narrowed = bool(args.op or args.size or args.dtype or args.quick)
    if narrowed and args.part:
        print("bench: --part takes whole parts: not with --op, --size, --dtype or --quick", file=sys.stderr)
        return 1
    sizes, dtypes = (args.size or QUICK["sizes"], args.dtype or QUICK["dtypes"]) if args.quick else (args.size, args.dtype)
    seconds, rounds = (0.2, (3, 3)) if args.quick else (args.seconds, (5, 400))
    folder = args.out or (None if narrowed else RESULTS)
    others: dict[str, Any] = {}
    if folder is not None and args.part:
        try:
            others = stored(folder, machine.facts(args.device), settings(args.device, seconds, rounds))
        except ValueError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    parts = args.part or (("cells",) if narrowed else PARTS)
    result = run(cells(args.op, sizes, dtypes, args.all), args.device, seconds, rounds, parts, args.all)
    result |= {part: records for part, records in others.items() if part in PARTS and part not in parts}
    print(report.section(result, pictures=False))
    if folder is not None:
        print(f"written: {write(result, folder).name} and .csv")
    missed = sum(o.verdict == "missed" for o in targets.of(result)) if args.device == "cpu" else 0
    if missed:
        print(f"bench: {missed} target{'s' * (missed > 1)} missed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
