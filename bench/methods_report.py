"""The README's table of methods and its plots, from bench/results/methods.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables import number, table
from fastcl.experiment import METHODS
from fastcl.experiment.compare import mean_matrix
from fastcl.experiment.plots import curves, heat_maps
from fastcl.metrics import AccuracyMatrix, acc, forgetting

FILE = "methods.json"
TITLES = {
    "naive": "naive",
    "agem": "A-GEM",
    "gem": "GEM",
    "replay": "replay",
    "spg": "SPG",
    "ewc": "EWC",
    "ewc-online": "EWC online",
    "child-tuning-f": "Child-Tuning F",
    "child-tuning-d": "Child-Tuning D",
    "kfac-ewc": "KFAC-EWC",
    "owm": "OWM",
    "ncl": "NCL",
    "joint": "joint",
}


def pictures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """File name and caption of the plots of each stream."""
    out = []
    for s in result["streams"]:
        where = f"{s['stream']}, {s['scenario']}-incremental"
        out.append((f"methods-{s['stream']}-curves.png", f"accuracy along the stream, {where}"))
        out.append((f"methods-{s['stream']}-matrices.png", f"accuracy matrices, {where}"))
    return out


def _matrices(row: Mapping[str, Any]) -> list[AccuracyMatrix]:
    return [AccuracyMatrix.of([[float("nan") if v is None else v for v in line] for line in matrix]) for matrix in row["matrices"]]


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Draw every plot into ``folder``."""
    files = iter(pictures(result))
    for s in result["streams"]:
        title = f"{s['stream']}, {s['scenario']}-incremental, {s['tasks']} tasks, mean of {result['seeds']} seeds"
        shown = {TITLES.get(r["method"], r["method"]): _matrices(r) for r in s["methods"]}
        bounds = {TITLES.get(r["method"], r["method"]) for r in s["methods"] if METHODS[r["method"]].at_once}
        sequential = {name: m for name, m in shown.items() if name not in bounds}
        upper = {f"{name} training (upper bound)": m for name, m in shown.items() if name in bounds}
        curves(folder / next(files)[0], title + "; bars: one standard deviation", sequential, upper)
        heat_maps(folder / next(files)[0], title, {name: mean_matrix(m) for name, m in sequential.items()})


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def rows(s: Mapping[str, Any]) -> list[list[str]]:
    """A stream's table: accuracies, forgetting, seconds per step and the overhead, of each seed over the naive run of that seed."""
    naive = next((r["seconds_per_step"] for r in s["methods"] if r["method"] == "naive"), None)
    out = []
    for r in s["methods"]:
        values = [m.values for m in _matrices(r)]
        lost = "-" if METHODS[r["method"]].at_once else _percent([forgetting(v) for v in values])
        over = "-"
        if naive is not None and r["method"] != "naive":
            over = f"{100 * statistics.fmean(own / base - 1 for own, base in zip(r['seconds_per_step'], naive, strict=True)):+.0f} %"
        own = ", ".join(f"{name} {value}" for name, value in r["options"].items() if value is not None)
        step = number(1e3 * statistics.fmean(r["seconds_per_step"]))
        out.append([TITLES.get(r["method"], r["method"]), own, _percent([acc(v) for v in values]), lost, step, over])
    return out


def section(result: Mapping[str, Any], with_pictures: bool = True) -> str:
    """The README's section."""
    m, c = result["machine"], result["settings"]
    layers = "-".join(["64", *[str(c["width"])] * c["depth"], "10"])
    many = f"{result['seeds']} seed" + "s" * (result["seeds"] > 1)
    parts = [
        f"{m['cpu']}, threads: {m['threads']}, {m['instructions']}; torch {m['torch']}, Python {m['python']}, fastcl {m['fastcl']} "
        f"({m['backend']}); {m['date']}. MLP {layers} with one head, SGD with learning rate {c['lr']}, batches of {c['batch_size']}, "
        f"{c['epochs']} epochs a task; mean ± standard deviation over {many}, in %. ACC: mean accuracy on all tasks after the last one. "
        "Forgetting: Chaudhry et al. (2018). Time: a training step, without evaluation and without the "
        "work at the beginning and the end of a task. SPG is defined for a head per task; here its one head is shared."
    ]
    head = ("method", "settings", "ACC", "forgetting", "ms per step", "over naive")
    for s in result["streams"]:
        parts.append(f"**{s['stream']}, {s['scenario']}-incremental, {s['tasks']} tasks**")
        parts.append(table(head, rows(s), text=range(2)))
    if with_pictures:
        parts += [f"![{caption}](bench/results/{file})" for file, caption in pictures(result)]
    return "\n\n".join(parts)
