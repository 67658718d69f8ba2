"""Tables for the terminal; they need rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastcl.experiment.compare import Group, Row
from fastcl.metrics import AccuracyMatrix

if TYPE_CHECKING:
    from rich.table import Table


def plus_minus(pair: tuple[float, float], scale: float = 100, digits: int = 1) -> str:
    """Mean and standard deviation, in percent by default; the mean alone if there was one seed."""
    mean, std = (scale * v for v in pair)
    return f"{mean:.{digits}f}" if math.isnan(std) else f"{mean:.{digits}f} ± {std:.{digits}f}"


def matrix_table(title: str, runs: Sequence[AccuracyMatrix]) -> Table:
    """The accuracy matrix in percent, mean ± std over runs; what was not measured stays empty."""
    from rich.table import Table

    values = torch.stack([r.values for r in runs])
    mean = values.mean(dim=0)
    std = values.std(dim=0) if len(runs) > 1 else torch.full_like(mean, math.nan)
    table = Table(title=title, title_justify="left")
    table.add_column("after task", justify="right")
    for j in range(values.shape[1]):
        table.add_column(f"on {j}", justify="right")
    for i in range(values.shape[1]):
        pairs = zip(mean[i].tolist(), std[i].tolist(), strict=True)
        table.add_row(str(i), *("" if math.isnan(pair[0]) else plus_minus(pair) for pair in pairs))
    return table


def comparison_table(group: Group) -> Table:
    """One line per run. Accuracies in percent, mean ± std over seeds."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=group.title + "; %, mean ± std over seeds", title_justify="left")
    settings = any(row.settings for row in group.rows)
    for column in ("run", "method", *(("settings",) if settings else ())):
        table.add_column(column, overflow="fold")
    for column in ("seeds", "ACC", "BWT", "FWT", "forgetting", "ms/step", "over naive"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in group.rows:
        cells = _cells(row)
        # As Text: a folder's name may look like rich's markup.
        table.add_row(Text(row.run.name), row.run.config.method, *((Text(row.settings),) if settings else ()), *cells)
    return table


def _cells(row: Row) -> list[str]:
    complete, wanted = len(row.run.results), row.run.config.seeds
    seeds = str(complete) if complete == wanted else f"{complete} of {wanted}"
    measures = [plus_minus(v) if v is not None else "" for v in (row.acc, row.bwt, row.fwt, row.forgetting)]
    overhead = "" if row.overhead is None else f"{100 * row.overhead:+.0f} %"
    return [seeds, *measures, plus_minus(row.seconds_per_step, 1e3, 2), overhead]
