"""Several runs side by side: what they measured, by stream and scenario, as rows for a table and a CSV file."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcl.experiment.config import FIELDS, Config
from fastcl.experiment.folder import read_config, seed_folder
from fastcl.experiment.learners import METHODS
from fastcl.experiment.runner import Result, read_result
from fastcl.metrics import AccuracyMatrix, mean_and_std

MeanStd = tuple[float, float]
GROUPED_BY = ("stream", "scenario", "tasks", "validation", "shuffle_classes")
DEFINITIONS = (
    "R[i, j]: accuracy on task j after training task i. ACC: mean of the last row. "
    "BWT (Lopez-Paz and Ranzato 2017): mean of R[last, j] - R[j, j]. "
    "FWT (the same): mean of R[j - 1, j] - accuracy on j before any training. "
    "Forgetting (Chaudhry et al. 2018): mean over j of the largest earlier R[l, j] - R[last, j]."
)


@dataclass(frozen=True)
class Run:
    """A run's folder: its name, what was run, and the results of the seeds that are complete."""

    name: str
    config: Config
    results: list[Result]

    @property
    def matrices(self) -> list[AccuracyMatrix]:
        """The accuracy matrices of the seeds."""
        return [result.accuracy for result in self.results]

    @property
    def at_once(self) -> bool:
        """Whether all tasks were trained together, so that there is only a last row."""
        return METHODS[self.config.method].at_once

    @property
    def seconds_per_step(self) -> list[float]:
        """Of each seed."""
        return [result.seconds_per_step for result in self.results]


@dataclass(frozen=True)
class Row:
    """The measures of a run, each as mean and standard deviation (n - 1; NaN for one seed); None where it is not defined."""

    run: Run
    settings: str
    acc: MeanStd
    bwt: MeanStd | None
    fwt: MeanStd | None
    forgetting: MeanStd | None
    seconds_per_step: MeanStd
    overhead: float | None


@dataclass(frozen=True)
class Group:
    """Runs that a table may show together: of one stream, scenario and number of tasks."""

    title: str
    slug: str
    rows: list[Row]


def load_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: it has no ``config.json``.
        ValueError: a damaged file, or one of another version; the message names it.
    """
    path = Path(folder)
    config = read_config(path / "config.json")
    files = {seed: seed_folder(path, seed) / "result.json" for seed in config.all_seeds()}
    return Run(path.name or str(path), config, [read_result(file, config, seed) for seed, file in files.items() if file.exists()])


def told_apart(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: as much of the end of its path as no other folder shares; a folder's own name where that is enough."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]

    def shortest(own: tuple[str, ...]) -> str:
        others = {p for p in parts if p != own}
        lengths = range(1, len(own) + 1)
        enough = next((n for n in lengths if all(p[-n:] != own[-n:] for p in others)), len(own))
        return "/".join(own[-enough:])

    return [shortest(own) for own in parts]


def compare(runs: Iterable[Run]) -> list[Group]:
    """The runs in groups of one stream, scenario and number of tasks, in the order in which these first come; each run is one row.

    The overhead is the ratio of seconds per step to those of the naive run in the group whose configuration is the same but for the
    method, its settings and the seeds, computed on the same processor, device, threads and versions; None if there is none.

    Raises:
        ValueError: no run, or one without a complete seed.
    """
    found = list(runs)
    if not found:
        raise ValueError("runs is empty; give the folder of at least one run")
    for run in found:
        if not run.results:
            raise ValueError(f"{run.name} has no complete seed; `fastcl run` with the same settings goes on with it")
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in found:
        groups.setdefault(tuple(getattr(run.config, name) for name in GROUPED_BY), []).append(run)
    return [_group(members) for members in groups.values()]


def _group(runs: list[Run]) -> Group:
    c = runs[0].config
    parts = [f"{c.stream}, {c.scenario}-incremental, {c.tasks} tasks"]
    parts += ["validation images"] * c.validation + ["classes shuffled"] * c.shuffle_classes
    slug = "-".join([c.stream, c.scenario, str(c.tasks), *["validation"] * c.validation, *["shuffled"] * c.shuffle_classes])
    return Group(", ".join(parts), slug, [_row(run, runs) for run in runs])


def _row(run: Run, peers: Sequence[Run]) -> Row:
    def over_seeds(measure: Callable[[AccuracyMatrix], float]) -> MeanStd | None:
        return None if run.at_once else mean_and_std(run.matrices, measure)

    fwt = None if run.at_once else _mean_and_std([r.accuracy.fwt(r.baseline) for r in run.results])
    naive = [s for peer in peers if peer.config.method == "naive" and _same_but_the_method(peer, run) for s in peer.seconds_per_step]
    return Row(
        run,
        _settings(run, peers),
        mean_and_std(run.matrices, AccuracyMatrix.acc),
        over_seeds(AccuracyMatrix.bwt),
        fwt,
        over_seeds(AccuracyMatrix.forgetting),
        _mean_and_std(run.seconds_per_step),
        statistics.fmean(run.seconds_per_step) / statistics.fmean(naive) - 1 if naive else None,
    )


def _mean_and_std(values: Sequence[float]) -> MeanStd:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _same_but_the_method(a: Run, b: Run) -> bool:
    apart = {"method", "root", "seeds", "first_seed"}
    other = [name for name, field in FIELDS.items() if name not in apart and not field.metadata["of_method"]]
    environments = [e for run in (a, b) for result in run.results for e in result.environments]
    return all(getattr(a.config, n) == getattr(b.config, n) for n in other) and all(e == environments[0] for e in environments)


def _settings(run: Run, peers: Sequence[Run]) -> str:
    """The method's own settings that are not its defaults, and of the others what differs between the runs."""
    c = run.config
    own = [f"{n}={getattr(c, n)}" for n, default in METHODS[c.method].options.items() if getattr(c, n) != default]
    others = [n for n, field in FIELDS.items() if not field.metadata["of_method"] and n not in {*GROUPED_BY, "method", "root", "seeds"}]
    return ", ".join(own + [f"{n}={getattr(c, n)}" for n in others if any(getattr(p.config, n) != getattr(c, n) for p in peers)])


def mean_matrix(runs: Sequence[AccuracyMatrix]) -> Tensor:
    """Mean over runs, entry by entry."""
    return torch.stack([r.values for r in runs]).mean(dim=0)


def write_csv(path: Path, groups: Sequence[Group]) -> None:
    """One line per run; fractions and seconds, empty where a measure is not defined."""
    measures = ("acc", "bwt", "fwt", "forgetting", "seconds_per_step")
    head = ["run", *FIELDS, "complete_seeds", *(f"{m}_{part}" for m in measures for part in ("mean", "std")), "overhead_over_naive"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for row in (row for group in groups for row in group.rows):
            numbers = [v for m in measures for v in (getattr(row, m) or (None, None))] + [row.overhead]
            shown = ["" if v is None or math.isnan(v) else repr(v) for v in numbers]
            writer.writerow([row.run.name, *row.run.config.to_json().values(), len(row.run.results), *shown])
