"""Parameters that one matrix of low rank plus a diagonal couples, as a block that an optimizer drives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastcl import _distributed, ops
from fastcl._model import Slot
from fastcl.ops import _low_rank_operators, _sharded, _sharded_low_rank
from fastcl.ops._low_rank_stages import Place, direction_square, pick, products, shrunk
from fastcl.precision._blocks import State
from fastcl.precision._forms import Form, damped, moved
from fastcl.precision._primal_block import MOMENTUM, PrimalBlock

Lists: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Direction(NamedTuple):
    """What :meth:`JointBlock.apply` needs of the direction that was asked for."""

    lists: Lists
    coefficients: Tensor
    momentum: float
    strength: float


class JointBlock(PrimalBlock):
    """All parameters of ``slots`` together: ``Lambda = D + U U^T`` over their concatenation.

    Parameters without a gradient stay where they are: the others then step by the inverse of their own part of Lambda.
    """

    def __init__(self, slots: Sequence[Slot], rank: int, prior: float) -> None:
        super().__init__(slots)
        dtype = torch.float32
        for p in self.params:
            dtype = torch.promote_types(dtype, p.dtype)
        self.own = self.form = Form.on([_filled(p, prior, dtype) for p in self.params], rank)
        self.alpha = 0.0
        self.anchor = [_filled(p, 0.0, dtype) for p in self.params]
        self._parts: dict[tuple[int, ...], Tensor] = {}
        self._kept: Direction | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what is looked up again."""
        return {**self.__dict__, "_parts": {}, "_kept": None}

    def take(self, form: Form) -> None:
        """Lambda <- another, with the same damping."""
        self.own = form
        self.damp(self.alpha)

    def damp(self, alpha: float) -> None:
        """Work with Lambda + alpha I."""
        self.form = damped(self.own, alpha) if alpha else self.own
        self.alpha, self._parts, self._kept = alpha, {}, None

    def follow(self) -> None:
        """Move to the device of the parameters, and shard what is not sharded as they are."""
        params = self.params
        if all(_distributed.laid_out(d, p) for d, p in zip(self.own.diagonal, params, strict=True)):
            return
        diagonal, self.anchor = (
            [_distributed.lay_out(t, p) for t, p in zip(own, params, strict=True)] for own in (self.own.diagonal, self.anchor)
        )
        self.take(moved(self.own, diagonal))

    @property
    def like(self) -> Sequence[Tensor]:
        """D."""
        return self.form.diagonal

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """``V <- rho V + lambda (W - mu) + Lambda^-1 g``, ``W <- W - lr V``."""
        at, lists = self._lists(grads, states, momentum, strength)
        if not at:
            return
        if len(at) == len(self.slots) or not len(self.form.sigma):
            ops.low_rank_step_(*lists, self.form.sigma, lr, momentum, strength)
            return
        self._kept = self._direction(at, lists, momentum, strength)[1]
        self.apply(states, torch.full((), lr, dtype=torch.float64, device=self.form.sigma.device))

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """``V^T Lambda V`` from one sweep."""
        at, lists = self._lists(grads, states, momentum, strength)
        if not at:
            self._kept = None
            return torch.zeros((), dtype=torch.float64, device=self.form.sigma.device)
        square, self._kept = self._direction(at, lists, momentum, strength)
        return square

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:  # noqa: ARG002 (direction has them)
        """The second sweep."""
        if self._kept is None:
            return
        (lists, coefficients, momentum, strength), self._kept = self._kept, None
        place, local = self._place(*lists)
        p, g, v, mu, d, b = (pick(tensors, place.members) for tensors in local)
        if p:
            place.call.write("low_rank_step_update_", [p, v], g, v, mu, d, b, coefficients, step, momentum, strength)
        written = [*lists[0], *lists[2]]  # the parameters and V
        if _sharded.is_sharded(written):
            _sharded.bump_versions(written)

    def _direction(self, at: tuple[int, ...], lists: Lists, momentum: float, strength: float) -> tuple[Tensor, Direction]:
        sigma = self.form.sigma
        rank = len(sigma)
        place, local = self._place(*lists)
        found = place.sums("low_rank_step_products", (2 * rank + 3,), *local, rest=(momentum, strength))
        along = found[:rank]
        if len(at) == len(self.slots) or not rank:
            return direction_square(found, sigma), Direction(lists, shrunk(sigma, along), momentum, strength)
        coefficients = self._part(at) @ along
        inverse = (found[2 * rank] - along @ coefficients).clamp(min=0)
        kept = found[2 * rank + 2] + (sigma * found[rank : 2 * rank]).square().sum()
        return (inverse + 2 * found[2 * rank + 1] + kept).clamp(min=0), Direction(lists, coefficients, momentum, strength)

    def _part(self, at: tuple[int, ...]) -> Tensor:
        """``S (I + S Q Q^T S)^-1 S`` for the columns of Q that belong to some of the parameters, whose rows are not orthonormal."""
        if at not in self._parts:
            diagonal, basis, sigma = self.form
            gram = self.rows_of(Form([diagonal[i] for i in at], [basis[i] for i in at], sigma))
            gram = sigma[:, None] * gram * sigma
            gram.diagonal().add_(1)
            self._parts[at] = sigma[:, None] * torch.linalg.inv(gram) * sigma
        return self._parts[at]

    def _lists(
        self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float
    ) -> tuple[tuple[int, ...], Lists]:
        """Which parameters have gradients, and what the op takes for them: a factor of 0 leaves its list out."""
        at = tuple(i for i, g in enumerate(grads) if g is not None)
        params, present = self.params, [g for g in grads if g is not None]
        momenta = [states[i][MOMENTUM] for i in at] if momentum else []
        anchors = [self.anchor[i] for i in at] if strength else []
        diagonal, basis = ([tensors[i] for i in at] for tensors in self.form[:2])
        return at, ([params[i] for i in at], present, momenta, anchors, diagonal, basis)

    def _place(self, *lists: Sequence[Tensor]) -> tuple[Place, Sequence[Sequence[Tensor]]]:
        """Where the lists are, the basis last and the diagonal before it, and this rank's memory of them."""
        *others, diagonal, basis = lists
        if not _sharded.is_sharded(diagonal):
            return _low_rank_operators.whole(self.form.sigma.device), [[t.detach() for t in tensors] for tensors in lists]
        named = [(f"list {i}", tensors) for i, tensors in enumerate(others) if tensors]
        place, (d, *rest, b) = _sharded_low_rank._local(basis, self.form.sigma, ("diagonal", diagonal), *named)
        found = iter(rest)
        return place, [*(next(found) if tensors else [] for tensors in others), d, b]

    @torch.no_grad()
    def rows_of(self, form: Form) -> Tensor:
        """Products of the rows of a form's basis, [r, r] float64."""
        rank = len(form.sigma)
        place, (d, b) = self._place(form.diagonal, form.basis)
        own = [pick(tensors, place.counted) for tensors in (d, b)]
        gram = torch.zeros((rank, rank), dtype=torch.float64, device=form.sigma.device)
        if own[0] and rank:
            # The stage wants a vector beside the rows.
            gram = place.call.read("low_rank_gram", own[0], *own, torch.ones_like(form.sigma), [own[0]])[:rank, :rank].contiguous()
        return place.reduce(gram)

    @torch.no_grad()
    def anchor_(self) -> None:
        """Mu <- W."""
        self.set_anchors(self.params)

    def anchors(self) -> list[Tensor]:
        """Mu."""
        return self.anchor

    @torch.no_grad()
    def set_anchors(self, values: Sequence[Tensor]) -> None:
        """Mu <- values."""
        placed = [_distributed.lay_out(v, mine) for v, mine in zip(values, self.anchor, strict=True)]
        for mine, value in zip(_sharded.shards(self.anchor), _sharded.shards(placed), strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def solve_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- Lambda^-1 X; None counts as 0."""
        ops.low_rank_solve_(self._whole(tensors), *self.form)

    @torch.no_grad()
    def multiply_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- Lambda X; None counts as 0."""
        values, sigma = self._whole(tensors), self.form.sigma
        place, (x, d, b) = self._place(values, *self.form[:2])
        along = products(place, x, d, b, len(sigma), False)[: len(sigma)]
        weights = along * sigma * sigma
        for value, diagonal, rows in zip(x, d, b, strict=True):
            coupled = torch.tensordot(weights.to(diagonal.dtype), rows, dims=1)
            value.mul_(diagonal).add_(diagonal.sqrt().mul_(coupled))
        if _sharded.is_sharded(values):
            _sharded.bump_versions(values)

    @torch.no_grad()
    def quadratic(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """``X^T Lambda X``."""
        return ops.low_rank_quadratic(self._whole(tensors), *self.form)

    def _whole(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(d) if t is None else t for t, d in zip(tensors, self.form.diagonal, strict=True)]


def _filled(p: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor beside a parameter, sharded as it is."""
    full = torch.full_like(p.detach(), value, dtype=dtype, requires_grad=False)
    return full if _sharded.is_sharded([full]) else full.contiguous()
