"""Replay buffers: what is kept of a stream within a fixed number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastcl.data._balanced import BalancedBuffer, Groups
from fastcl.data._storage import RANDOM, Buffer

__all__ = ["Buffer", "ClassBalancedBuffer", "ReservoirBuffer", "TaskBalancedBuffer"]


class ReservoirBuffer(Buffer):
    """Keeps a uniform random subset of all samples that were ever added, whatever their task or class.

    Vitter, "Random Sampling with a Reservoir", ACM TOMS 11 (1985), algorithm R: the first ``capacity`` samples are kept; sample number
    ``i`` (from 0) after them draws ``j`` uniformly from 0 to ``i`` and replaces the one in slot ``j`` if ``j < capacity``. At any moment
    every sample seen is kept with probability ``capacity / seen``. A batch is placed at once; where two of its samples draw one slot, the
    later one stays, as if they had come one by one.
    """

    def _place(self, y: Tensor, task: int) -> tuple[Tensor, Tensor, int]:  # noqa: ARG002 (neither matters here)
        n = len(y)
        position = self._seen + torch.arange(n)
        late = position >= self._capacity
        slot = position.clone()
        slot[late] = torch.randint(RANDOM, (int(late.sum()),), generator=self._generator) % (position[late] + 1)
        kept = slot < self._capacity
        last = torch.full((self._capacity,), -1).scatter_reduce_(0, slot[kept], torch.arange(n)[kept], "amax")
        slots = (last >= 0).nonzero()[:, 0]
        return last[slots], slots, min(self._seen + n, self._capacity)

    def _validate(self, state: Mapping[str, Any]) -> None:
        super()._validate(state)
        if len(state["x"]) != min(self._capacity, state["seen"]):
            raise ValueError(f"state holds {len(state['x'])} samples; a reservoir of {self._capacity} that saw {state['seen']} is fuller")


class ClassBalancedBuffer(BalancedBuffer):
    """Keeps the same number of samples of every class seen so far, and of each class a uniform random subset.

    With ``C`` classes that have come often enough it holds ``capacity // C`` of each; a class with fewer samples keeps all of them and
    leaves its room to the others. The aim is that of class-balancing reservoirs (Chrysakis and Moens, "Online Continual Learning from
    Imbalanced Data", ICML 2020); here every class gets equal room exactly, so up to ``C - 1`` places can stay free.

    Args:
        capacity: the largest number of samples that are kept, at least 1, and no less than the classes that will come.
        generator: a CPU generator that decides; a new one, seeded from torch's default generator, if None.
        per_task: a class is a pair of task and target, for streams with task-local targets, where target 0 means another class in
            every task. By default a class is a value of the target.

    Raises:
        TypeError: a capacity that is no int, a generator that is none.
        ValueError: a capacity below 1, a generator of another device.

    :meth:`add` raises ValueError as well when the targets are no integers [n], and when there are more classes than ``capacity``.
    """

    GROUPS = "classes"

    def __init__(self, capacity: int, *, generator: torch.Generator | None = None, per_task: bool = False) -> None:
        super().__init__(capacity, generator=generator)
        self._per_task = per_task
        self._width = 2 if per_task else 1

    def _keys(self, y: Tensor, task: int) -> Groups:
        if y.dim() != 1 or y.dtype.is_floating_point or y.dtype.is_complex:
            raise ValueError(f"y must be class labels, integers of shape [n]; got {y.dtype} of shape {tuple(y.shape)}")
        y = y.cpu().to(torch.int64)
        labels = sorted(set(y.tolist()))
        return [(task, label) if self._per_task else (label,) for label in labels], torch.searchsorted(torch.tensor(labels), y)

    def _validate_keys(self, state: Mapping[str, Any], keys: Tensor) -> None:
        y = state["y"]
        if not len(y):
            return
        if y.dim() != 1 or y.dtype.is_floating_point or y.dtype.is_complex:
            raise ValueError(f"state['y'] must be class labels, integers of shape [n]; got {y.dtype} of shape {tuple(y.shape)}")
        if not torch.equal(keys[:, -1].cpu(), y.cpu().to(torch.int64)):
            raise ValueError("state['y'] contradicts state['group']: a sample's target is not the class of its group")
        if self._per_task and not torch.equal(keys[:, 0].cpu(), state["task"].cpu()):
            raise ValueError("state['task'] contradicts state['group']: a sample's task is not that of its group")


class TaskBalancedBuffer(BalancedBuffer):
    """Keeps the same number of samples of every task seen so far, and of each task a uniform random subset.

    After ``T`` tasks it holds ``capacity // T`` samples of each: a capacity of 100 is 20 per task after five tasks. A task with fewer
    samples keeps all of them and leaves its room to the others. Equal memory per task is what GEM assumes (Lopez-Paz and Ranzato,
    NeurIPS 2017, arXiv 1706.08840, section 3).

    :meth:`add` raises ValueError as well when there are more tasks than ``capacity``.
    """

    GROUPS = "tasks"

    def _keys(self, y: Tensor, task: int) -> Groups:
        return [(task,)], torch.zeros(len(y), dtype=torch.int64)

    def _validate_keys(self, state: Mapping[str, Any], keys: Tensor) -> None:
        if not torch.equal(keys[:, 0].cpu(), state["task"].cpu()):
            raise ValueError("state['task'] contradicts state['group']: a sample's task is not that of its group")
