"""Measures of continual learning over the accuracy matrix ``R``.

``R[i, j]`` is the accuracy on task ``j`` after training task ``i`` (both from 0), a fraction in [0, 1]; NaN where it was not measured.
With ``k`` the last trained task:

* average accuracy ``ACC_k = 1/(k+1) sum_{j<=k} R[k, j]`` (Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840);
* backward transfer ``BWT_k = 1/k sum_{j<k} (R[k, j] - R[j, j])`` (the same), negative when the past is forgotten;
* forward transfer ``FWT_k = 1/k sum_{1<=j<=k} (R[j-1, j] - b[j])`` (the same), ``b`` the accuracies of the untrained model: positive
  when the past helps with a task before it is trained;
* forgetting ``F_k = 1/k sum_{j<k} (max_{l<k} R[l, j] - R[k, j])`` (Chaudhry et al., ECCV 2018, arXiv 1801.10112).
"""

from __future__ import annotations

import csv
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Matrix = Tensor | Sequence[Sequence[float]]
Baseline = Tensor | Sequence[float]

MOST_TASKS = 10_000  # a matrix of 0.8 GB


class AccuracyMatrix:
    """The accuracy matrix of one run, filled while it goes on.

    Example::

        R = AccuracyMatrix(tasks=5)
        for i in range(5):
            train(task=i)
            for j in range(i + 1):
                R[i, j] = accuracy(task=j)
        print(R.acc(), R.forgetting())

    Args:
        tasks: number of tasks, from 1 to 10000.

    Raises:
        TypeError: a number of tasks, later an index, that is no int.
        ValueError: a number of tasks out of range.
    """

    def __init__(self, tasks: int) -> None:
        if isinstance(tasks, bool) or not isinstance(tasks, int):
            raise TypeError(f"tasks must be a whole number, got {type(tasks).__name__}")
        if tasks < 1:
            raise ValueError(f"tasks must be at least 1, got {tasks}")
        if tasks > MOST_TASKS:
            raise ValueError(f"tasks must be at most {MOST_TASKS}, got {tasks}")
        self._values = torch.full((tasks, tasks), math.nan, dtype=torch.float64)

    @classmethod
    def of(cls, values: Matrix) -> AccuracyMatrix:
        """The matrix with these values: square, each in [0, 1] or NaN. Raises ValueError otherwise."""
        checked = _checked(values)
        matrix = cls(len(checked))
        matrix._values.copy_(checked)
        return matrix

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._values)

    @property
    def values(self) -> Tensor:
        """A copy of the matrix: [tasks, tasks], float64."""
        return self._values.clone()

    def __getitem__(self, index: tuple[int, int]) -> float:
        i, j = self._index(index)
        return float(self._values[i, j])

    def __setitem__(self, index: tuple[int, int], accuracy: float) -> None:
        i, j = self._index(index)
        value = float(accuracy)
        if not 0 <= value <= 1:
            raise ValueError(f"R[{i}, {j}] must be a fraction in [0, 1], got {value}")
        self._values[i, j] = value

    def _index(self, index: tuple[int, int]) -> tuple[int, int]:
        if not isinstance(index, tuple) or len(index) != 2:
            raise TypeError(f"an entry has two indices, R[after task i, on task j]; got {index!r}")
        i, j = _whole("i", index[0]), _whole("j", index[1])
        for name, n in (("i", i), ("j", j)):
            if not 0 <= n < self.tasks:
                raise IndexError(f"{name} is {n}; accepted are 0 to {self.tasks - 1}")
        return i, j

    def acc(self, after: int | None = None) -> float:
        """Average accuracy; see :func:`acc`."""
        return acc(self._values, after)

    def bwt(self, after: int | None = None) -> float:
        """Backward transfer; see :func:`bwt`."""
        return bwt(self._values, after)

    def fwt(self, baseline: Baseline, after: int | None = None) -> float:
        """Forward transfer; see :func:`fwt`."""
        return fwt(self._values, baseline, after)

    def forgetting(self, after: int | None = None) -> float:
        """Forgetting of Chaudhry et al.; see :func:`forgetting`."""
        return forgetting(self._values, after)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix with a header row; what was not measured stays empty."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["after task", *range(self.tasks)])
            for i, row in enumerate(self._values.tolist()):
                writer.writerow([i, *("" if math.isnan(v) else repr(v) for v in row)])


def acc(values: Matrix, after: int | None = None) -> float:
    """Average accuracy ``1/(k+1) sum_{j<=k} R[k, j]`` (Lopez-Paz and Ranzato, NeurIPS 2017).

    Args:
        values: the accuracy matrix, [tasks, tasks]; NaN where not measured.
        after: ``k``, the task after which is asked, from 0; the last one by default.

    Raises:
        ValueError: not a square matrix, a value outside [0, 1], an entry that is needed and was not measured.
    """
    r, k = _rows(values, after)
    return float(_measured(r, [(k, j) for j in range(k + 1)]).mean())


def bwt(values: Matrix, after: int | None = None) -> float:
    """Backward transfer ``1/k sum_{j<k} (R[k, j] - R[j, j])`` (Lopez-Paz and Ranzato, NeurIPS 2017); 0 after the first task.

    Arguments and errors as in :func:`acc`.
    """
    r, k = _rows(values, after)
    if k == 0:
        return 0.0
    return float((_measured(r, [(k, j) for j in range(k)]) - _measured(r, [(j, j) for j in range(k)])).mean())


def fwt(values: Matrix, baseline: Baseline, after: int | None = None) -> float:
    """Forward transfer ``1/k sum_{1<=j<=k} (R[j-1, j] - b[j])`` (Lopez-Paz and Ranzato, NeurIPS 2017); 0 after the first task.

    It needs the accuracy on every task just before that task is trained: the entries next to the diagonal, above it.

    Args:
        values: the accuracy matrix, [tasks, tasks]; NaN where not measured.
        baseline: ``b``, the accuracy on each task at random initialisation, before any training: [tasks], fractions in [0, 1]. The
            first one does not enter and may be NaN.
        after: ``k``, the task after which is asked, from 0; the last one by default.

    Raises:
        ValueError: not a square matrix, a value outside [0, 1], a baseline of another length, an entry that is needed and was not
            measured.
    """
    r, k = _rows(values, after)
    b = torch.as_tensor(baseline, dtype=torch.float64)
    if tuple(b.shape) != (len(r),):
        raise ValueError(f"baseline must hold one accuracy per task, shape {(len(r),)}; got shape {tuple(b.shape)}")
    if bool(((b < 0) | (b > 1)).any()):
        raise ValueError("baseline must hold fractions in [0, 1]")
    if k == 0:
        return 0.0
    needed = b[1 : k + 1]
    if bool(needed.isnan().any()):
        raise ValueError(f"baseline[{1 + int(needed.isnan().nonzero()[0, 0])}] is NaN, and this measure needs it")
    return float((_measured(r, [(j - 1, j) for j in range(1, k + 1)]) - needed).mean())


def forgetting(values: Matrix, after: int | None = None) -> float:
    """Forgetting ``1/k sum_{j<k} f_j``, ``f_j = max_{l<k} R[l, j] - R[k, j]`` (Chaudhry et al., ECCV 2018); 0 after the first task.

    The maximum is over the best accuracy that the task ever had before ``k``: entries above the diagonal take part if they were
    measured, those from the diagonal down have to be. Negative when later tasks have helped. Arguments and errors as in :func:`acc`.
    """
    r, k = _rows(values, after)
    if k == 0:
        return 0.0
    _measured(r, [(i, j) for j in range(k) for i in range(j, k)])
    best = r[:k, :k].nan_to_num(nan=-math.inf).amax(dim=0)
    return float((best - _measured(r, [(k, j) for j in range(k)])).mean())


def mean_and_std(matrices: Iterable[AccuracyMatrix], measure: Callable[[AccuracyMatrix], float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation (n - 1) of a measure over runs; the deviation of a single run is NaN.

    Raises ValueError if there is no run.
    """
    values = torch.tensor([measure(m) for m in matrices], dtype=torch.float64)
    if not values.numel():
        raise ValueError("matrices is empty; pass one accuracy matrix per run")
    return float(values.mean()), float(values.std()) if len(values) > 1 else math.nan


def _checked(values: Matrix) -> Tensor:
    r = torch.as_tensor(values, dtype=torch.float64)
    if r.dim() != 2 or r.shape[0] != r.shape[1] or not len(r):
        raise ValueError(f"values must be a square matrix [tasks, tasks], got shape {tuple(r.shape)}")
    if bool(((r < 0) | (r > 1)).any()):
        raise ValueError("values must be fractions in [0, 1], or NaN where not measured")
    return r


def _rows(values: Matrix, after: int | None) -> tuple[Tensor, int]:
    r = _checked(values)
    k = len(r) - 1 if after is None else _whole("after", after)
    if not 0 <= k < len(r):
        raise ValueError(f"after is {after}; accepted are 0 to {len(r) - 1}")
    return r, k


def _whole(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}") from None


def _measured(r: Tensor, entries: list[tuple[int, int]]) -> Tensor:
    rows, columns = zip(*entries, strict=True)
    found = r[list(rows), list(columns)]
    missing = [e for e, v in zip(entries, found.tolist(), strict=True) if math.isnan(v)]
    if missing:
        raise ValueError(f"R{list(missing[0])} was not measured, and this measure needs it")
    return found
