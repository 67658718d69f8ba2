"""The Kronecker factors of one layer, as the steps need them: damped, inverted, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import _distributed
from fastcl.precision._buffers import padded, padded_copy, parts
from fastcl.precision._factorise import Factored, decompose, factorise, symmetric
from fastcl.precision._layers import Layer, compute_dtype

Damping = tuple[str, float]
Pair = tuple[Tensor, Tensor]


class Eigen(NamedTuple):
    """``G x A + alpha I`` in the eigenbasis of its factors; the vectors of a diagonal factor are None."""

    A_vectors: Tensor | None
    G_vectors: Tensor | None
    scale: Tensor  # [m, n]: 1 / (s_G s_A^T + alpha)
    alpha: float


class Matrices(NamedTuple):
    """Factors of one layer: as merged, as damped, and inverted or (damping "exact") as eigenbases."""

    factors: tuple[Tensor, Tensor]
    damped: tuple[Tensor, Tensor]
    inverse: tuple[Tensor, Tensor] | None
    eigen: Eigen | None


class Factors:
    """A layer, its factors and its anchor ``[W | b]``; what the block reads in every step, replaced once per task."""

    def __init__(self, layer: Layer, value: float) -> None:
        weight = layer.weight.parameter()
        self.layer, self.failures = layer, 0
        self.shapes = tuple(slot.parameter().shape for slot in layer.slots)
        self.rows, self.columns, self.dtype = layer.rows, layer.columns, compute_dtype(weight)
        self.anchor = padded(self.rows, self.columns, self.dtype, weight.device)
        self._workspace: Tensor | None = None
        options = {"dtype": self.dtype, "device": weight.device}
        A = torch.eye(self.columns, **options).mul_(value)  # type: ignore[call-overload]
        G = torch.full((self.rows,), value, **options) if layer.kind == "embedding" else torch.eye(self.rows, **options).mul_(value)  # type: ignore[call-overload]
        prepared = prepare([(A, G)], None)[0]
        if prepared is None:  # multiples of the identity have inverses
            raise ValueError(f"layer {layer.name!r}: 1 / sqrt(n_data) = {value} cannot be inverted in {self.dtype}")
        self.matrices: Matrices = prepared

    @property
    def anchors(self) -> list[Tensor]:
        """The anchor's weight and bias."""
        return parts(self.anchor, self.shapes)

    def params(self) -> tuple[Tensor, ...]:
        """The weight and, where there is one, the bias that are there now."""
        return tuple(slot.parameter() for slot in self.layer.slots)

    def load_(self, matrix: Tensor) -> Tensor:
        """``[W | b]`` into a matrix [m, n]."""
        for part, p in zip(parts(matrix, self.shapes), self.params(), strict=True):
            part.copy_(_distributed.whole(p))
        return matrix

    def workspace(self) -> Tensor:
        """A matrix for the direction of a step: made at the first, kept for the next."""
        if self._workspace is None or self._workspace.device != self.anchor.device:
            self._workspace = padded(self.rows, self.columns, self.dtype, self.anchor.device)
        return self._workspace

    def __getstate__(self) -> dict[str, object]:
        """Without the workspace, which has nothing to keep."""
        return {**self.__dict__, "_workspace": None}

    def follow(self) -> None:
        """Move to the device of the weight."""
        device = self.layer.weight.parameter().device
        if self.anchor.device == device:
            return
        m = self.matrices
        pairs = [_moved(pair, device) for pair in (m.factors, m.damped)]
        eigen = None
        if m.eigen is not None:
            vectors = [None if v is None else v.to(device) for v in m.eigen[:2]]
            eigen = Eigen(vectors[0], vectors[1], m.eigen.scale.to(device), m.eigen.alpha)
        self.matrices = Matrices(pairs[0], pairs[1], None if m.inverse is None else _moved(m.inverse, device), eigen)
        self.anchor = padded_copy(self.anchor.to(device), self.dtype)


def prepare(pairs: Sequence[tuple[Tensor, Tensor]], damping: Damping | None) -> list[Matrices | None]:
    """What the steps need of the factors ``(A, G)`` of several layers; None for a layer with a factor that is beyond repair."""
    wide = [(symmetric(A), symmetric(G)) for A, G in pairs]
    if damping is not None and damping[0] == "exact":
        return [_exact(*row, damping[1]) for row in zip(pairs, wide, _two_by_two(decompose(_flat(wide))), strict=True)]
    damped = wide if damping is None else [pi_damped(A, G, damping[1]) for A, G in wide]
    return [_inverted(*row) for row in zip(pairs, wide, damped, _two_by_two(factorise(_flat(damped))), strict=True)]


def _flat(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [f for pair in pairs for f in pair]


def _two_by_two(found: Sequence[Factored | None]) -> list[tuple[Factored | None, Factored | None]]:
    return list(zip(found[::2], found[1::2], strict=True))


def _inverted(given: Pair, wide: Pair, damped: Pair, found: tuple[Factored | None, Factored | None]) -> Matrices | None:
    a, g = found
    if a is None or g is None or a.inverse is None or g.inverse is None:
        return None
    dtype = given[0].dtype
    repaired = _narrow((a.factor, g.factor), dtype)
    # What the ladder added belongs to the factor itself: the next merge needs a definite one, too.
    own = [w if f is d else w + (f - d) for w, d, f in zip(wide, damped, (a.factor, g.factor), strict=True)]
    factors = repaired if wide is damped else _narrow((own[0], own[1]), dtype)
    return Matrices(factors, repaired, _narrow((a.inverse, g.inverse), dtype), None)


def _exact(given: Pair, wide: Pair, found: tuple[Factored | None, Factored | None], alpha: float) -> Matrices | None:
    a, g = found
    if a is None or g is None or a.values is None or g.values is None:
        return None
    dtype = given[0].dtype
    scale = (torch.outer(g.values, a.values) + alpha).reciprocal().to(dtype)
    vectors = [None if f.vectors is None else f.vectors.to(dtype) for f in (a, g)]
    own = _narrow(wide, dtype)
    return Matrices(own, own, None, Eigen(vectors[0], vectors[1], scale, alpha))


def _moved(pair: Pair, device: torch.device) -> Pair:
    return _narrow((pair[0].to(device), pair[1].to(device)), pair[0].dtype)


def _narrow(pair: Pair, dtype: torch.dtype) -> Pair:
    return padded_copy(pair[0], dtype), padded_copy(pair[1], dtype)


def pi_damped(A: Tensor, G: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``A + alpha pi I, G + alpha / pi I`` with ``pi = sqrt((tr A / n) / (tr G / m))``."""
    pi = (_mean(A) / _mean(G)).sqrt()
    return _shifted(A, alpha * pi), _shifted(G, alpha / pi)


def _mean(f: Tensor) -> Tensor:
    return f.mean() if f.dim() == 1 else f.diagonal().mean()


def _shifted(f: Tensor, by: Tensor) -> Tensor:
    if f.dim() == 1:
        return f + by
    moved = f.clone()
    moved.diagonal().add_(by)
    return moved
