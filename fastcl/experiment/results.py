"""Whether what a ``result.json`` states can be the result of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from fastcl.experiment.config import Config
from fastcl.experiment.learners import METHODS


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def fault(found: Mapping[str, Any], config: Config) -> str | None:
    """What is wrong with the values, in words that begin with the name of one; None if they can be averaged and plotted."""
    tasks, at_once = config.tasks, METHODS[config.method].at_once
    if missing := [n for n in ("seed", "matrix", "baseline", "steps", "seconds", "seconds_at_ends", "environments") if n not in found]:
        return f"{missing[0]!r} is missing"
    matrix = found["matrix"]
    if not isinstance(matrix, list) or len(matrix) != tasks or any(not isinstance(row, list) or len(row) != tasks for row in matrix):
        return f"matrix must have {tasks} rows of {tasks} accuracies, as the configuration has {tasks} tasks"
    measured = matrix[-1:] if at_once else matrix
    if not all(_fraction(v) for row in measured for v in row) or any(v is not None for row in matrix[: -len(measured)] for v in row):
        return "matrix must hold a number from 0 to 1 wherever the method is measured, and null elsewhere"
    baseline = found["baseline"]
    if not isinstance(baseline, list) or len(baseline) != tasks or not all(_fraction(v) for v in baseline):
        return f"baseline must be {tasks} numbers from 0 to 1"
    if not isinstance(found["steps"], int) or isinstance(found["steps"], bool) or found["steps"] < 1:
        return f"steps must be a whole number from 1; got {found['steps']!r:.40}"
    if not _number(found["seconds"]) or not found["seconds"]:
        return f"seconds must be a finite number above 0; got {found['seconds']!r:.40}"
    if not _number(found["seconds_at_ends"]):
        return f"seconds_at_ends must be a finite number from 0; got {found['seconds_at_ends']!r:.40}"
    environments = found["environments"]
    if not isinstance(environments, list) or not environments or not all(isinstance(e, dict) for e in environments):
        return "environments must be objects, at least one"
    return None
