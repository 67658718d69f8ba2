"""Blocks over DTensors, as fully_shard makes them of parameters: state is sharded like them, Lambda and mu are whole on every rank.

What falls on one element is computed by the rank that holds it, one rounding at a time; a layer's solve is computed by every rank, from
the whole M, so that the result has the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import _distributed
from fastcl._model import Slot
from fastcl.ops import _sharded
from fastcl.precision import _primal_block
from fastcl.precision._blocks import State
from fastcl.precision._buffers import padded, parts
from fastcl.precision._diagonal_block import DiagonalBlock
from fastcl.precision._factors import Factors
from fastcl.precision._kronecker_block import MOMENTUM, PULL, KroneckerBlock, _multiply, _solve


def kronecker_block(layers: Sequence[Factors]) -> KroneckerBlock:
    """The block for these layers' parameters as they are now: plain, or sharded."""
    return (ShardedKroneckerBlock if _sharded.is_sharded([p for f in layers for p in f.params()]) else KroneckerBlock)(layers)


def diagonal_block(slots: Sequence[Slot], value: float) -> DiagonalBlock:
    """The block for these parameters as they are now, with the diagonal ``value``."""
    return (ShardedDiagonalBlock if _sharded.is_sharded([slot.parameter() for slot in slots]) else DiagonalBlock)(slots, value)


class ShardedKroneckerBlock(KroneckerBlock):
    """One layer after another: M is gathered, V computed whole, and its shard applied; no more than one whole layer exists at a time."""

    _shards: Sequence[tuple[Factors, Sequence[State], list[Tensor]]] = ()  # of the direction that apply() takes

    @torch.no_grad()
    def begin(self, states: Sequence[State]) -> None:
        """``dual_momentum`` and ``pull``: DTensors."""
        fresh = []
        for f, own in self._by_layer(states):
            if any(name not in s for s in own for name in (MOMENTUM, PULL)):
                fresh.append(f)
                for p, state in zip(f.params(), own, strict=True):
                    state.update({name: _zeros(p, f.dtype) for name in (MOMENTUM, PULL)})
        self._pull(states, fresh)

    @torch.no_grad()
    def reset(self, states: Sequence[State]) -> None:
        """Momentum 0, pull exact."""
        for t in _sharded.shards([s[MOMENTUM] for s in states]):
            t.zero_()
        self.refresh(states)

    @torch.no_grad()
    def _pull(self, states: Sequence[State], layers: Sequence[Factors]) -> None:
        for f, own in self._by_layer(states):
            if f in layers:
                H = f.load_(padded(f.rows, f.columns, f.dtype, f.anchor.device)).sub_(f.anchor)
                _multiply([f], [H])
                for (mine, part), _ in _pairs(f, H, [s[PULL] for s in own]):
                    mine.copy_(part)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """Two gathers a layer: of the weight's M and the bias's."""
        for f, own_grads, own in self._live(grads, states):
            _, V = _direction(f, own_grads, own, momentum, strength)
            _move(f, own, [part for (_, part), _ in _pairs(f, V, [s[MOMENTUM] for s in own])], lr)

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """<M, V>, by every rank from the whole of both; this rank's shard of V is kept."""
        total = torch.zeros((), dtype=torch.float64, device=self.layers[0].anchor.device)
        kept: list[tuple[Factors, Sequence[State], list[Tensor]]] = []
        for f, own_grads, own in self._live(grads, states):
            M, V = _direction(f, own_grads, own, momentum, strength)
            kept.append((f, own, [part.clone() for (_, part), _ in _pairs(f, V, [s[MOMENTUM] for s in own])]))
            total = total + (M.double() * V.double()).sum()
        self._shards = kept
        return total

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:  # noqa: ARG002 (direction has them)
        """No collective."""
        kept, self._shards = self._shards, ()
        for f, own, V in kept:
            _move(f, own, V, step.to(f.dtype))

    def __getstate__(self) -> dict[str, object]:
        """Without the direction."""
        return {**super().__getstate__(), "_shards": ()}

    def _live(
        self, grads: Sequence[Tensor | None], states: Sequence[State]
    ) -> list[tuple[Factors, Sequence[Tensor | None], Sequence[State]]]:
        """The layers that have a gradient. Raises TypeError or ValueError for one that is not sharded like its parameter."""
        params = [p for p, g in zip(self.params, grads, strict=True) if g is not None]
        _sharded.check_matching("grads", [g for g in grads if g is not None], "params", params, one_element=False)
        rows = zip(self._by_layer(grads), self._by_layer(states), strict=True)
        return [(f, own_grads, own) for (f, own_grads), (_, own) in rows if any(g is not None for g in own_grads)]


def _direction(
    f: Factors, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float
) -> tuple[Tensor, Tensor]:
    """M <- momentum M + g + strength H on this rank's shards; the whole M and V = Lambda^-1 M."""
    for g, state in zip(grads, states, strict=True):
        M, H = _sharded.shards([state[MOMENTUM], state[PULL]])
        # Each operation rounds once: multiplied and added in one, elements would depend on where in a shard they lie.
        M.mul_(momentum).add_(H * strength)
        if g is not None:
            M.add_(_sharded.shards([g])[0])
    gathered, V = padded(f.rows, f.columns, f.dtype, f.anchor.device), padded(f.rows, f.columns, f.dtype, f.anchor.device)
    for part, state in zip(parts(gathered, f.shapes), states, strict=True):
        part.copy_(_distributed.whole(state[MOMENTUM]))
    _solve([f], [V.copy_(gathered)])
    return gathered, V


def _move(f: Factors, states: Sequence[State], V: Sequence[Tensor], step: float | Tensor) -> None:
    """W <- W - step V;  H <- H - step M, on this rank's shards."""
    params = f.params()
    for p, v, state in zip(_sharded.shards(params), V, states, strict=True):
        M, H = _sharded.shards([state[MOMENTUM], state[PULL]])
        p.copy_(p.to(f.dtype) - v * step)
        H.sub_(M * step)
    _sharded.bump_versions(params)


def _pairs(f: Factors, matrix: Tensor, tensors: Sequence[Tensor]) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Of each tensor beside a layer's parameters this rank's shard, the same elements of ``matrix``, and the tensor."""
    rows = zip(_sharded.shards(tensors), parts(matrix, f.shapes), tensors, strict=True)
    return [((mine, _part(part, like)), like) for mine, part, like in rows]


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """The elements of a whole tensor that this rank holds of ``like``."""
    return _sharded.shards([_distributed.lay_out(whole.contiguous(), like)])[0]


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    if not _sharded.is_sharded([like]):
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    from torch.distributed.tensor import DTensor

    d: Any = like
    own = torch.zeros_like(_sharded.shards([like])[0], dtype=dtype)
    return DTensor.from_local(own, d.device_mesh, d.placements, run_check=False, shape=d.shape, stride=d.stride())


class ShardedDiagonalBlock(DiagonalBlock):
    """The diagonal block: nothing but the norm needs another rank."""

    _stepped: Sequence[int] = ()  # which parameters the direction that apply() takes is of

    @torch.no_grad()
    def begin(self, states: Sequence[State]) -> None:
        """``momentum_buffer``: a DTensor."""
        for p, d, state in zip(self.params, self.diagonal, states, strict=True):
            if _primal_block.MOMENTUM not in state:
                state[_primal_block.MOMENTUM] = _zeros(p, d.dtype)

    @torch.no_grad()
    def reset(self, states: Sequence[State]) -> None:
        """Momentum 0."""
        for t in _sharded.shards([s[_primal_block.MOMENTUM] for s in states]):
            t.zero_()

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """No collective."""
        live = self._advanced(grads, states, momentum, strength)
        self._walk(live, states, lr)

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """Sum of D V^2: one all-reduce."""
        live = self._stepped = self._advanced(grads, states, momentum, strength)
        total = torch.zeros((), dtype=torch.float64, device=self._sigma.device)
        if not live:
            return total
        tensors = [states[i][_primal_block.MOMENTUM] for i in live]
        mesh = _sharded.mesh_of(("state", tensors))
        for i, t, own, counts in zip(live, tensors, _sharded.shards(tensors), _sharded.counted(tensors, mesh), strict=True):
            if counts:
                total = total + (own.double().square() * _part(self.damped[i], t).double()).sum()
        return _sharded.all_reduce_sum(total, mesh)

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:
        """No collective."""
        live, self._stepped = self._stepped, ()
        self._walk(live, states, step)

    def __getstate__(self) -> dict[str, object]:
        """Without the direction."""
        return {**super().__getstate__(), "_stepped": ()}

    def _advanced(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> list[int]:
        """V <- momentum V + strength (W - mu) + g / D for the parameters that have a gradient; which they are."""
        live = [i for i, g in enumerate(grads) if g is not None]
        params = [self.params[i] for i in live]
        found = [g for g in grads if g is not None]
        _sharded.check_matching("grads", found, "params", params, one_element=False)
        for i, p, g in zip(live, params, found, strict=True):
            v, own, grad = _sharded.shards([states[i][_primal_block.MOMENTUM], p, g])
            v.mul_(momentum)
            if strength:
                v.add_((own.to(v.dtype) - _part(self._mu[i], p)) * strength)
            v.add_(grad.to(v.dtype) / _part(self.damped[i], p))
        return live

    def _walk(self, live: Sequence[int], states: Sequence[State], step: float | Tensor) -> None:
        params = [self.params[i] for i in live]
        for i, p in zip(live, _sharded.shards(params), strict=True):
            (v,) = _sharded.shards([states[i][_primal_block.MOMENTUM]])
            p.copy_(p.to(v.dtype) - v * (step.to(v.dtype) if isinstance(step, Tensor) else step))
        _sharded.bump_versions(params)
