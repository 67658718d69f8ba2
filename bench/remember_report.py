"""The README's table of what NCL and its peers remember, and the paper's findings held against it, from docs/remember/results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.tables import table
from fastcl.metrics import AccuracyMatrix, acc, forgetting

# What the paper finds: the first is to have a larger ACC than the second.
FINDINGS = (("ncl", "kfac-ewc, strength 1"), ("owm", "kfac-ewc, strength 1"), ("kfac-ewc", "kfac-ewc, strength 1"), ("ncl", "kfac-ewc"))
TITLES = {
    "naive": "naive",
    "ewc": "EWC",
    "kfac-ewc, strength 1": "KFAC-EWC, lambda = 1",
    "kfac-ewc": "KFAC-EWC",
    "owm": "OWM",
    "ncl": "NCL",
    "joint": "joint",
}


def _matrices(row: Mapping[str, Any]) -> list[AccuracyMatrix]:
    found = [m for m in row["matrices"] if m is not None]
    return [AccuracyMatrix.of([[float("nan") if v is None else v for v in line] for line in m]) for m in found]


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def mean_acc(row: Mapping[str, Any]) -> float:
    """Mean ACC over the seeds; a run that diverged counts as 0."""
    found = [acc(m.values) for m in _matrices(row)]
    return sum(found) / len(row["matrices"])


def findings(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each finding whose two contenders were trained."""
    said = []
    for first, second in FINDINGS:
        if first in rows and second in rows:
            a, b = 100 * mean_acc(rows[first]), 100 * mean_acc(rows[second])
            verdict = "holds" if a > b else "**does not hold**"
            said.append(f"{TITLES[first]} above {TITLES[second]}: {verdict} ({a:.1f} against {b:.1f})")
    return said


def section(result: Mapping[str, Any]) -> str:
    """The README's section."""
    m, c = result["machine"], result["settings"]
    layers = "-".join(["64", *[str(c["width"])] * c["depth"], "10"])
    parts = [
        f"{m['cpu']}, one thread; torch {m['torch']}, fastcl {m['fastcl']} ({m['backend']}); {m['date']}. MLP {layers} (with a head of two "
        f"classes for each task in the task-incremental stream), learning rate {c['lr']} unless it is what was tuned, no momentum, batches of "
        f"{c['batch_size']}, {c['epochs']} epochs a task. One hyper-parameter each, chosen for each stream on seeds "
        f"{', '.join(map(str, result['tuning_seeds']))} by held-out training images; here are test images, seeds "
        f"{result['seeds'][0]} to {result['seeds'][-1]}, mean ± standard deviation, in %."
    ]
    streams = dict.fromkeys((r["stream"], r["scenario"]) for r in result["rows"])
    for stream, scenario in streams:
        rows = {r["contender"]: r for r in result["rows"] if (r["stream"], r["scenario"]) == (stream, scenario)}
        lines = []
        for name, row in rows.items():
            matrices = _matrices(row)
            lost = "-" if name == "joint" else _percent([forgetting(m.values) for m in matrices])
            diverged = len(row["matrices"]) - len(matrices)
            shown = _percent([acc(m.values) for m in matrices]) + (f" ({diverged} diverged)" if diverged else "")
            lines.append([TITLES[name], f"{row['setting']} {row['value']:g}", shown, lost])
        parts.append(f"**{stream}, {scenario}-incremental**")
        parts.append(table(("method", "tuned", "ACC", "forgetting"), lines, text=range(2)))
        parts.append("\n".join(f"* {line}." for line in findings(rows)))
    return "\n\n".join(parts)
