"""Parameters whose precision is a diagonal, as one block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl import _distributed, ops
from fastcl._model import Slot
from fastcl.ops import _low_rank_stages as stages
from fastcl.precision._blocks import State
from fastcl.precision._layers import compute_dtype

MOMENTUM = "momentum_buffer"


class Lists(NamedTuple):
    """What the ops take: one entry per parameter that has a gradient."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    anchors: list[Tensor]
    diagonal: list[Tensor]
    basis: list[Tensor]


class DiagonalBlock:
    """``Lambda = D``: the low-rank step with a Q of no rows.

    The momentum is ``V <- momentum V + strength (W - mu) + Lambda^-1 g``, the same step as with the dual momentum, and no pull is kept.
    """

    def __init__(self, slots: Sequence[Slot], value: float) -> None:
        self._slots = list(slots)
        params = self.params
        self.diagonal = [torch.full(p.shape, value, dtype=compute_dtype(p), device=p.device) for p in params]
        self.damping = 0.0
        self.damped = self.diagonal
        self._basis = [d.new_empty((0, *d.shape)) for d in self.diagonal]
        self._sigma = torch.empty(0, dtype=torch.float64, device=params[0].device)
        self._mu = [torch.zeros_like(d) for d in self.diagonal]
        self._kept: tuple[Lists, float, float] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without the direction that was kept for apply()."""
        return {**self.__dict__, "_kept": None}

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Block`, as for all that follows."""
        return tuple(slot.name for slot in self._slots)

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The parameters that are there now."""
        return tuple(slot.parameter() for slot in self._slots)

    @torch.no_grad()
    def begin(self, states: Sequence[State]) -> None:
        """``momentum_buffer``: zeros of the precision's dtype."""
        for state, d in zip(states, self.diagonal, strict=True):
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(d)

    @torch.no_grad()
    def reset(self, states: Sequence[State]) -> None:
        """Momentum 0."""
        for state in states:
            state[MOMENTUM].zero_()

    def refresh(self, states: Sequence[State]) -> None:
        """Nothing: no pull is kept."""

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """One call of ``low_rank_step_``."""
        if live := [i for i, g in enumerate(grads) if g is not None]:
            ops.low_rank_step_(*self._lists(live, grads, states), self._sigma, lr, momentum, strength)

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """One sweep; V is not formed."""
        live = [i for i, g in enumerate(grads) if g is not None]
        if not live:
            self._kept = None
            return torch.zeros((), dtype=torch.float64, device=self._sigma.device)
        lists, place = self._lists(live, grads, states), _place(self._sigma)
        args = lists._replace(momenta=lists.momenta if momentum else [], anchors=lists.anchors if strength else [])
        found = place.sums("low_rank_step_products", (3,), *args, rest=(momentum, strength))
        self._kept = args, momentum, strength
        return stages.direction_square(found, self._sigma)

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:  # noqa: ARG002 (direction has them)
        """The second sweep."""
        if self._kept is not None:
            (args, momentum, strength), self._kept = self._kept, None
            params, grads, momenta, *rest = args
            _place(self._sigma).call.write(
                "low_rank_step_update_", [params, momenta], grads, momenta, *rest, self._sigma, step, momentum, strength
            )

    def _lists(self, live: Sequence[int], grads: Sequence[Tensor | None], states: Sequence[State]) -> Lists:
        params = self.params
        columns: tuple[Sequence[Any], ...] = (params, grads, [s[MOMENTUM] for s in states], self._mu, self.damped, self._basis)
        return Lists(*([column[i] for i in live] for column in columns))

    @torch.no_grad()
    def anchor_(self) -> None:
        """Mu <- W."""
        self.set_anchors([_distributed.whole(p) for p in self.params])

    def anchors(self) -> list[Tensor]:
        """Not copied."""
        return list(self._mu)

    @torch.no_grad()
    def set_anchors(self, values: Sequence[Tensor]) -> None:
        """Mu <- values."""
        for mine, value in zip(self._mu, values, strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def solve_(self, tensors: Sequence[Tensor | None]) -> None:
        """``X <- X / D``."""
        rows = self._rows(tensors)
        if rows[0]:
            ops.low_rank_solve_(*rows, self._sigma)

    @torch.no_grad()
    def multiply_(self, tensors: Sequence[Tensor | None]) -> None:
        """``X <- X D``."""
        for x, d in zip(tensors, self.damped, strict=True):
            if x is not None:
                x.mul_(d)

    @torch.no_grad()
    def quadratic(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One sweep."""
        rows = self._rows(tensors)
        if not rows[0]:
            return torch.zeros((), dtype=torch.float64, device=self._sigma.device)
        return ops.low_rank_quadratic(*rows, self._sigma)

    def _rows(self, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        rows = [(t, d, q) for t, d, q in zip(tensors, self.damped, self._basis, strict=True) if t is not None]
        return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]

    def add_(self, more: Sequence[Tensor]) -> None:
        """D <- D + more."""
        for d, m in zip(self.diagonal, more, strict=True):
            d.add_(m)
        self.damp(self.damping)

    def replace(self, diagonal: Sequence[Tensor]) -> None:
        """D <- the given."""
        for d, value in zip(self.diagonal, diagonal, strict=True):
            d.copy_(value)
        self.damp(self.damping)

    def damp(self, alpha: float) -> None:
        """Use ``D + alpha`` in place of D."""
        self.damping = alpha
        self.damped = [d + alpha for d in self.diagonal] if alpha else self.diagonal

    def follow(self) -> None:
        """Move to the device of the parameters."""
        device = self.params[0].device
        if self._sigma.device != device:
            self.diagonal, self._basis, self._mu = ([t.to(device) for t in own] for own in (self.diagonal, self._basis, self._mu))
            self._sigma = self._sigma.to(device)
            self.damp(self.damping)


def _place(sigma: Tensor) -> stages.Place:
    return stages.Place(stages.Checked(), sigma.device)
