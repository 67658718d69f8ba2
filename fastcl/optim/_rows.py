"""The lists that a step works on."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

State = dict[str, Any]


@dataclass
class Plan:
    """What is known of a group's parameters from one step to the next; see :meth:`Swept._plan_of`."""

    params: list[Tensor]
    start: int  # the first one's position among all parameters
    local: list[Tensor]  # this rank's memory
    sharded: bool
    states: list[State] = field(default_factory=list)


@dataclass
class Rows:
    """The parameters of a group that a step updates, and what belongs to them, in lists of equal length."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    local: list[Tensor]
    local_grads: list[Tensor]
    states: list[State]
    members: list[int] | None  # positions among all parameters, where some are missing
    start: int
    fresh: list[bool] | None = None  # which states were made in this step, if any
    before: list[State | None] | None = None  # what a step that is refused puts back, where it has made state

    def select(self, members: Sequence[int]) -> Rows:
        """Some of the rows."""
        positions = [self.start + i if self.members is None else self.members[i] for i in members]
        columns: Any = (self.params, self.grads, self.local, self.local_grads, self.states)
        params, grads, local, local_grads, states = ([column[i] for i in members] for column in columns)
        local = params if self.local is self.params else local
        return Rows(self.group, params, grads, local, local_grads, states, positions, self.start)

    def forget_made(self, state: dict[Tensor, State]) -> None:
        """Put back what was there before state was made."""
        for p, was in zip(self.params, self.before or (), strict=False):
            if was is None:
                state.pop(p, None)
            else:
                state[p].clear()
                state[p].update(was)

    def pick(self, column: Sequence[Any]) -> list[Any]:
        """The rows of a list over all parameters."""
        return list(column[self.start : self.start + len(self.params)]) if self.members is None else [column[i] for i in self.members]


def same(known: Sequence[Any], now: Iterable[Any]) -> bool:
    """Whether these are the very same objects."""
    now = list(now)
    return len(known) == len(now) and all(map(operator.is_, known, now))
