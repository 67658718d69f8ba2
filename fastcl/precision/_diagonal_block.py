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
from fastcl.precision._primal_block import MOMENTUM, PrimalBlock


class Lists(NamedTuple):
    """What the ops take: one entry per parameter that has a gradient."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    anchors: list[Tensor]
    diagonal: list[Tensor]
    basis: list[Tensor]


class DiagonalBlock(PrimalBlock):
    """``Lambda = D``: the low-rank step with a Q of no rows."""

    def __init__(self, slots: Sequence[Slot], value: float) -> None:
        super().__init__(slots)
        params = self.params
        self.diagonal = [torch.full(p.shape, value, dtype=compute_dtype(p), device=p.device) for p in params]
        self.damping = 0.0
        self.damped = self.diagonal
        self._basis = [d.new_empty((0, *d.shape)) for d in self.diagonal]
        self._sigma = torch.empty(0, dtype=torch.float64, device=params[0].device)
        self._mu = [torch.zeros_like(d) for d in self.diagonal]
        self._kept: list[tuple[Lists, float, float]] = []

    def __getstate__(self) -> dict[str, object]:
        """Without the direction that was kept for apply()."""
        return {**self.__dict__, "_kept": []}

    @property
    def like(self) -> Sequence[Tensor]:
        """D."""
        return self.diagonal

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """One call of ``low_rank_step_`` for each dtype."""
        for lists in self._lists(grads, states):
            ops.low_rank_step_(*lists, self._sigma, lr, momentum, strength)

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """One sweep; V is not formed."""
        total = torch.zeros((), dtype=torch.float64, device=self._sigma.device)
        self._kept = []
        for lists in self._lists(grads, states):
            args = lists._replace(momenta=lists.momenta if momentum else [], anchors=lists.anchors if strength else [])
            found = _place(self._sigma).sums("low_rank_step_products", (3,), *args, rest=(momentum, strength))
            total = total + stages.direction_square(found, self._sigma)
            self._kept.append((args, momentum, strength))
        return total

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:  # noqa: ARG002 (direction has them)
        """The second sweep."""
        kept, self._kept = self._kept, []
        for (params, grads, momenta, *rest), momentum, strength in kept:
            _place(self._sigma).call.write(
                "low_rank_step_update_", [params, momenta], grads, momenta, *rest, self._sigma, step, momentum, strength
            )

    def _lists(self, grads: Sequence[Tensor | None], states: Sequence[State]) -> list[Lists]:
        """What an op takes: the parameters that have a gradient, those of one dtype together."""
        columns: tuple[Sequence[Any], ...] = (self.params, grads, [s[MOMENTUM] for s in states], self._mu, self.damped, self._basis)
        live = [i for i, g in enumerate(grads) if g is not None]
        return [Lists(*([column[i] for i in own] for column in columns)) for own in self._by_dtype(live)]

    def _by_dtype(self, members: Sequence[int]) -> list[list[int]]:
        dtypes = dict.fromkeys(self.diagonal[i].dtype for i in members)
        return [[i for i in members if self.diagonal[i].dtype == dtype] for dtype in dtypes]

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
        for x, d in zip(tensors, self.damped, strict=True):
            if x is not None:
                x.div_(d)

    @torch.no_grad()
    def multiply_(self, tensors: Sequence[Tensor | None]) -> None:
        """``X <- X D``."""
        for x, d in zip(tensors, self.damped, strict=True):
            if x is not None:
                x.mul_(d)

    @torch.no_grad()
    def quadratic(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One sweep."""
        total = torch.zeros((), dtype=torch.float64, device=self._sigma.device)
        live = [i for i, t in enumerate(tensors) if t is not None]
        for own in self._by_dtype(live):
            x, d, q = ([column[i] for i in own] for column in (tensors, self.damped, self._basis))
            total = total + ops.low_rank_quadratic(x, d, q, self._sigma)  # type: ignore[arg-type]
        return total

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
