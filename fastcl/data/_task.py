"""A data set, a task of a stream, and batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.data._checks import whole


class Batches:
    """Shuffled batches ``(x, y)`` of two tensors, by indexing and without worker processes; can be iterated any number of times.

    Args:
        x: inputs, [n, ...].
        y: targets, [n].
        batch_size: at least 1; the last batch may be smaller.
        generator: draws a new order for every pass; None keeps the order.

    Raises:
        TypeError: a batch size that is no int.
        ValueError: lengths that differ, no sample, a batch size below 1.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator | None = None) -> None:
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y has {len(y)}; pass one target per sample")
        if not len(x):
            raise ValueError("x has no sample")
        self._x, self._y, self._size, self._generator = x, y, whole("batch_size", batch_size, 1, 2**63 - 1), generator

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._generator is None:
            yield from zip(torch.split(self._x, self._size), torch.split(self._y, self._size), strict=True)
            return
        for index in torch.split(torch.randperm(len(self._x), generator=self._generator), self._size):
            yield self._x[index], self._y[index]


@dataclass(frozen=True)
class Dataset:
    """Training and test data as tensors: inputs [n, ...] in float32, targets [n] in int64 from 0 to ``classes - 1``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


@dataclass(frozen=True)
class Task:
    """One task: inputs [n, ...] in float32, targets [n] in int64 from 0 to ``classes - 1``.

    ``classes`` is the number of outputs that one head needs: all classes of the stream where one head serves every task (class- and
    domain-incremental), the task's own where each task has a head (task-incremental).

    ``labels`` are the data set's class labels that occur in the task, in order; all of ``range(classes)`` unless given. In a
    class-incremental stream the targets are these labels; with task-local targets, target ``i`` stands for ``labels[i]``.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels:
            object.__setattr__(self, "labels", tuple(range(self.classes)))

    def train(self, batch_size: int, generator: torch.Generator | None = None) -> Batches:
        """Batches of the training data."""
        return Batches(self.train_x, self.train_y, batch_size, generator)

    def test(self, batch_size: int = 1024) -> Batches:
        """Batches of the test data, in order."""
        return Batches(self.test_x, self.test_y, batch_size)
