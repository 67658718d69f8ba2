"""Buffers that give groups of samples equal room."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastcl.data._checks import rows
from fastcl.data._storage import RANDOM, Buffer, Value

Key = tuple[int, ...]
Groups = tuple[list[Key], Tensor]


class BalancedBuffer(Buffer):
    """Gives every group of samples the same room, and each group a uniform random subset of its samples.

    Every sample gets a random priority when it comes. A group of ``n`` samples keeps the ``min(n, room)`` with the smallest priorities: a
    uniform subset, however the room has shrunk meanwhile. ``room`` is the largest number for which all groups fit. Once a sample has
    been dropped it never grows, so no sample that was dropped is missed later.
    """

    GROUPS = ""  # what the groups are: in messages, and the name of their keys in the state

    def __init__(self, capacity: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(capacity, generator=generator)
        self._width = 1  # numbers that make a key
        self._groups: dict[Key, int] = {}  # key -> number of the group
        self._counts = torch.zeros(0, dtype=torch.int64)  # samples seen of each group
        self._group = torch.zeros(capacity, dtype=torch.int64)  # of each slot
        self._priority = torch.zeros(capacity, dtype=torch.int64)

    @abstractmethod
    def _keys(self, y: Tensor, task: int) -> Groups:
        """The groups that occur in a batch, and for every sample the index of its own among them."""

    def _place(self, y: Tensor, task: int) -> tuple[Tensor, Tensor, int]:
        keys, member = self._keys(y, task)
        groups = dict(self._groups)
        new_group = torch.tensor([groups.setdefault(key, len(groups)) for key in keys])[member]
        if len(groups) > self._capacity:
            raise ValueError(
                f"capacity is {self._capacity}, too small for the {len(groups)} {self.GROUPS} seen: each needs room for a sample"
            )
        counts = new_group.bincount(minlength=len(groups))
        counts[: len(self._counts)] += self._counts
        old = self._length
        group = torch.cat([self._group[:old], new_group])
        priority = torch.cat([self._priority[:old], torch.randint(RANDOM, (len(y),), generator=self._generator)])
        kept = _smallest(priority, group, _room(counts, self._capacity))
        self._groups, self._counts = groups, counts
        length = int(kept.sum())
        taken = kept[old:].nonzero()[:, 0]
        free = torch.cat([~kept[:old], torch.ones(length, dtype=torch.bool)])[:length].nonzero()[:, 0]
        slots, gaps = free.tensor_split([len(taken)])
        self._fill(gaps, length + kept[length:old].nonzero()[:, 0])
        self._group[slots], self._priority[slots] = new_group[taken], priority[old:][taken]
        return taken, slots, length

    def _fill(self, gaps: Tensor, source: Tensor) -> None:
        """When the buffer gets shorter: its last samples move to the slots that dropped ones left."""
        for stored in (self._x, self._y, self._task, self._group, self._priority):
            if stored is not None and len(gaps):
                stored[gaps.to(stored.device)] = stored[source.to(stored.device)]

    def state_dict(self) -> dict[str, Value]:
        n = self._length
        keys = torch.tensor(list(self._groups), dtype=torch.int64).reshape(-1, self._width)
        own = {self.GROUPS: keys, "counts": self._counts, "group": self._group[:n], "priority": self._priority[:n]}
        return super().state_dict() | {name: t.clone() for name, t in own.items()}

    def _validate(self, state: Mapping[str, Any]) -> None:
        super()._validate(state)
        keys, counts, group, priority = (state[k] for k in (self.GROUPS, "counts", "group", "priority"))
        groups = len(keys) if keys.dim() else 0
        rows(self.GROUPS, keys, groups, self._width)
        rows("counts", counts, groups)
        rows("group", group, len(state["x"]))
        rows("priority", priority, len(state["x"]))
        if len(set(map(tuple, keys.tolist()))) != groups or groups > self._capacity:
            raise ValueError(f"state[{self.GROUPS!r}] has {groups} rows that must differ and be no more than the capacity {self._capacity}")
        if bool(((group < 0) | (group >= groups)).any()) or int(counts.sum()) != state["seen"]:
            raise ValueError("state['group'] must be row numbers, and state['counts'] add up to state['seen']")
        if not torch.equal(group.bincount(minlength=groups), counts.clamp(max=_room(counts, self._capacity))):
            raise ValueError("state['group'] does not hold as many samples of each group as state['counts'] leads to")
        self._validate_keys(state, keys[group])

    @abstractmethod
    def _validate_keys(self, state: Mapping[str, Any], keys: Tensor) -> None:
        """Raise ValueError unless ``keys`` [n, width], those of the samples' groups, are the ones that the samples have."""

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        n = len(state["x"])
        self._groups = {tuple(key): number for number, key in enumerate(state[self.GROUPS].tolist())}
        self._counts = state["counts"].cpu().clone()
        self._group[:n], self._priority[:n] = state["group"], state["priority"]


def _room(counts: Tensor, capacity: int) -> int:
    """The largest room for which ``sum(min(count, room)) <= capacity``; the largest count if everything fits."""
    room, left = 0, capacity
    for i, count in enumerate(sorted(counts.tolist())):
        room = left // (len(counts) - i)
        if count > room:
            return room
        room, left = count, left - count
    return room


def _smallest(priority: Tensor, group: Tensor, room: int) -> Tensor:
    """Whether each sample is among the ``room`` smallest priorities of its group: [n], bool."""
    order = priority.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = group.bincount()
    first = (sizes.cumsum(0) - sizes)[group[order]]
    kept = torch.zeros(len(group), dtype=torch.bool)
    kept[order] = torch.arange(len(group)) - first < room
    return kept
