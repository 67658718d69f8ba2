"""What blocks have in common that keep the direction of their steps, V, as their momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl._model import Slot
from fastcl.precision._blocks import State

MOMENTUM = "momentum_buffer"


class PrimalBlock:
    """``V <- momentum V + strength (W - mu) + Lambda^-1 g``: the step of the dual momentum, but nothing has to follow Lambda."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)

    @property
    def like(self) -> Sequence[Tensor]:
        """Tensors of the momenta's shapes, dtypes and places."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Block`, as for all that follows."""
        return tuple(slot.name for slot in self.slots)

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The parameters that are there now."""
        return tuple(slot.parameter() for slot in self.slots)

    @torch.no_grad()
    def begin(self, states: Sequence[State]) -> None:
        """``momentum_buffer``, V: zeros."""
        for state, t in zip(states, self.like, strict=True):
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(t)

    @torch.no_grad()
    def reset(self, states: Sequence[State]) -> None:
        """Momentum 0."""
        for state in states:
            state[MOMENTUM].zero_()

    def refresh(self, states: Sequence[State]) -> None:
        """Nothing: no pull is kept."""

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Any gradients will do."""
