"""All Kronecker-factored layers of a precision as one block: one call of an op for all of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastcl import ops
from fastcl.ops.kronecker import ncl_apply_, ncl_direction_
from fastcl.precision._blocks import State
from fastcl.precision._buffers import padded, parts, whole
from fastcl.precision._factors import Eigen, Factors, Pair

MOMENTUM, PULL = "dual_momentum", "pull"
T = TypeVar("T")
LayerTensors: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Lists(NamedTuple):
    """What one call of the op takes: one entry per layer that has a gradient."""

    layers: list[Factors]
    params: list[LayerTensors]
    grads: list[LayerTensors]
    M: list[Tensor]
    H: list[Tensor]


class KroneckerBlock:
    """Lambda is block diagonal over the layers, ``Lambda vec(X) = vec(G X A)``, with damping "exact" ``vec(G X A) + alpha vec(X)``."""

    def __init__(self, layers: Sequence[Factors]) -> None:
        self.layers = list(layers)
        self._slots = [slot for f in self.layers for slot in f.layer.slots]
        self._places: list[tuple[int, bool]] = []  # of each layer's weight among the parameters, and whether a bias follows
        start = 0
        for f in self.layers:
            self._places.append((start, len(f.shapes) == 2))
            start += len(f.shapes)
        self._known: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        self._kept: tuple[Lists, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what is looked up again: it belongs to an optimizer."""
        return {**self.__dict__, "_known": ([], [], []), "_kept": None}

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Block`, as for all that follows."""
        return tuple(slot.name for slot in self._slots)

    @property
    def params(self) -> tuple[Tensor, ...]:
        """Weight, bias, weight, ..."""
        return tuple([slot.parameter() for slot in self._slots])

    @torch.no_grad()
    def begin(self, states: Sequence[State]) -> None:
        """``dual_momentum`` and ``pull``: views of padded matrices [m, n], so that a bias is a column."""
        fresh = [f for f, own in self._by_layer(states) if any(name not in s for s in own for name in (MOMENTUM, PULL))]
        for f, own in self._by_layer(states):
            if f in fresh:
                for name in (MOMENTUM, PULL):
                    matrix = padded(f.rows, f.columns, f.dtype, f.anchor.device)
                    for state, view in zip(own, parts(matrix, f.shapes), strict=True):
                        state[name] = view
        self._pull(states, fresh)

    def reset(self, states: Sequence[State]) -> None:
        """Momentum 0, pull exact."""
        for M in self._matrices(states)[0]:
            M.zero_()
        self.refresh(states)

    def refresh(self, states: Sequence[State]) -> None:
        """Pull exact."""
        self._pull(states, self.layers)

    @torch.no_grad()
    def _pull(self, states: Sequence[State], layers: Sequence[Factors]) -> None:
        if not layers:
            return
        pulls = self._matrices(states)[1]
        for f, H in zip(self.layers, pulls, strict=True):
            if f in layers:
                f.load_(H).sub_(f.anchor)
        chosen = [(f, H) for f, H in zip(self.layers, pulls, strict=True) if f in layers]
        self._multiply([f for f, _ in chosen], [H for _, H in chosen])

    def _multiply(self, layers: Sequence[Factors], X: Sequence[Tensor]) -> None:
        """X <- Lambda X."""
        _multiply(layers, X)

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """A step moves both parameters of a layer."""
        for f, own in self._by_layer(grads):
            frozen = [slot.name for slot, g in zip(f.layer.slots, own, strict=True) if g is None and not slot.parameter().requires_grad]
            if len(frozen) == 1 and len(own) == 2 and any(g is not None for g in own):
                raise ValueError(
                    f"{frozen[0]!r} is frozen and the other parameter of layer {f.layer.name!r} has a gradient: their Kronecker factors "
                    "couple them, and a step would move both; freeze the whole layer, or this parameter before the precision is built"
                )

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """One call for all layers; damping "exact" takes four GEMMs a layer."""
        lists = self._lists(grads, states)
        if not lists.layers:
            return
        inverse = _inverses(lists.layers)
        if inverse is not None:
            ops.ncl_step_(lists.params, lists.grads, lists.M, lists.H, inverse, lr, momentum, strength)
            return
        V = self._damped_direction(lists, momentum, strength)
        ncl_apply_(lists.params, lists.H, V, lists.M, torch.full((), lr, dtype=torch.float64, device=V[0].device))

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """<M, V>."""
        lists = self._lists(grads, states)
        if not lists.layers:
            self._kept = None
            return torch.zeros((), dtype=torch.float64, device=self.layers[0].anchor.device)
        V, square = self._direction(lists, momentum, strength)
        self._kept = lists, V
        return square

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:  # noqa: ARG002 (direction has them)
        """W <- W - step V, pull <- pull - step M."""
        if self._kept is not None:
            (lists, V), self._kept = self._kept, None
            ncl_apply_(lists.params, lists.H, V, lists.M, step)

    def _direction(self, lists: Lists, momentum: float, strength: float) -> tuple[list[Tensor], Tensor]:
        inverse = _inverses(lists.layers)
        if inverse is not None:
            V = [f.workspace() for f in lists.layers]
            return V, ncl_direction_(lists.grads, lists.M, V, lists.H, inverse, momentum, strength)
        V = self._damped_direction(lists, momentum, strength)
        return V, ops.grad_dot(lists.M, V)

    def _damped_direction(self, lists: Lists, momentum: float, strength: float) -> list[Tensor]:
        V = [f.workspace() for f in lists.layers]
        for f, grads, M, H, v in zip(lists.layers, lists.grads, lists.M, lists.H, V, strict=True):
            M.mul_(momentum).add_(H, alpha=strength)
            for part, g in zip(parts(M, f.shapes), (grads,) if isinstance(grads, Tensor) else grads, strict=True):
                part.add_(g)
            v.copy_(M)
        _solve(lists.layers, V)
        return V

    @torch.no_grad()
    def anchor_(self) -> None:
        """Mu <- W."""
        for f in self.layers:
            f.load_(f.anchor)

    def anchors(self) -> list[Tensor]:
        """Views of the layers' anchors."""
        return [t for f in self.layers for t in parts(f.anchor, f.shapes)]

    @torch.no_grad()
    def set_anchors(self, values: Sequence[Tensor]) -> None:
        """Mu <- values."""
        for mine, value in zip(self.anchors(), values, strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def solve_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- G^-1 X A^-1."""
        self._through(tensors, _solve)

    @torch.no_grad()
    def multiply_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- G X A."""
        self._through(tensors, _multiply)

    @torch.no_grad()
    def quadratic(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Sum of <X, G X A>; damping "exact" adds alpha <X, X>."""
        layers, X = self._gathered(tensors)
        if not X:
            return torch.zeros((), dtype=torch.float64, device=self.layers[0].anchor.device)
        total = ops.kron_quadratic(X, [f.matrices.damped for f in layers])
        for f, x in zip(layers, X, strict=True):
            if f.matrices.eigen is not None:
                total = total + f.matrices.eigen.alpha * x.double().square().sum()
        return total

    def follow(self) -> None:
        """Move to the device of the weights."""
        for f in self.layers:
            f.follow()

    def _through(self, tensors: Sequence[Tensor | None], function: Callable[[Sequence[Factors], Sequence[Tensor]], None]) -> None:
        layers, X = self._gathered(tensors)
        if X:
            function(layers, X)
        found = dict(zip(map(id, layers), X, strict=True))
        for f, own in self._by_layer(tensors):
            for part, t in zip(parts(found[id(f)], f.shapes) if id(f) in found else (), own, strict=False):
                if t is not None:
                    t.copy_(part)

    def _gathered(self, tensors: Sequence[Tensor | None]) -> tuple[list[Factors], list[Tensor]]:
        """The layers with a tensor that is not None, and their [X | x] in matrices."""
        layers, found = [], []
        for f, own in self._by_layer(tensors):
            if any(t is not None for t in own):
                layers.append(f)
                found.append(padded(f.rows, f.columns, f.dtype, f.anchor.device))
                for part, t in zip(parts(found[-1], f.shapes), own, strict=True):
                    if t is not None:
                        part.copy_(t)
        return layers, found

    def _by_layer(self, values: Sequence[T]) -> list[tuple[Factors, Sequence[T]]]:
        rows, start = [], 0
        for f in self.layers:
            rows.append((f, values[start : start + len(f.shapes)]))
            start += len(f.shapes)
        return rows

    def _matrices(self, states: Sequence[State]) -> tuple[list[Tensor], list[Tensor]]:
        """M and H. They are made anew where the state was replaced (loaded, copied) since they were looked up."""
        views = [s[name] for name in (MOMENTUM, PULL) for s in states]
        known, M, H = self._known
        if len(known) == len(views) and all(map(operator.is_, known, views)):
            return M, H
        found: dict[str, list[Tensor]] = {}
        for name in (MOMENTUM, PULL):
            found[name] = []
            for f, own in self._by_layer(states):
                matrix = whole([s[name] for s in own], f.shapes)
                if matrix is None or matrix.dtype != f.dtype or matrix.device != f.anchor.device:
                    matrix = padded(f.rows, f.columns, f.dtype, f.anchor.device)
                    for state, view in zip(own, parts(matrix, f.shapes), strict=True):
                        state[name] = view.copy_(state[name])
                found[name].append(matrix)
        self._known = [s[name] for name in (MOMENTUM, PULL) for s in states], found[MOMENTUM], found[PULL]
        return found[MOMENTUM], found[PULL]

    def _paired(self, values: Sequence[Tensor]) -> list[LayerTensors]:
        return [(values[i], values[i + 1]) if bias else values[i] for i, bias in self._places]

    def _lists(self, grads: Sequence[Tensor | None], states: Sequence[State]) -> Lists:
        M, H = self._matrices(states)
        if all(map(operator.is_not, grads, itertools.repeat(None))):
            given: list[Any] = list(grads)
            return Lists(self.layers, self._paired(self.params), self._paired(given), M, H)
        lists = Lists([], [], [], [], [])
        for (f, own), m, h in zip(self._by_layer(grads), M, H, strict=True):
            if all(g is None for g in own):
                continue
            params = f.params()
            filled = [torch.zeros_like(p) if g is None else g for g, p in zip(own, params, strict=True)]
            lists.layers.append(f)
            lists.params.append(_layer(params))
            lists.grads.append(_layer(filled))
            lists.M.append(m)
            lists.H.append(h)
        return lists


def _layer(own: Sequence[Tensor]) -> LayerTensors:
    """As the ops take it: a weight, or a pair with its bias."""
    return (own[0], own[1]) if len(own) == 2 else own[0]


def _solve(layers: Sequence[Factors], X: Sequence[Tensor]) -> None:
    direct = [(x, f.matrices.inverse) for f, x in zip(layers, X, strict=True) if f.matrices.inverse is not None]
    if direct:
        ops.kron_solve_([x for x, _ in direct], [pair for _, pair in direct])
    for f, x in zip(layers, X, strict=True):
        if (eigen := f.matrices.eigen) is not None:
            rotated = _rotated(eigen, x, back=False).mul_(eigen.scale)
            x.copy_(_rotated(eigen, rotated, back=True))


def _rotated(eigen: Eigen, x: Tensor, back: bool) -> Tensor:
    """``Q_G^T X Q_A``, or back: ``Q_G X Q_A^T``."""
    with torch.autocast(x.device.type, enabled=False):
        A, G = eigen.A_vectors, eigen.G_vectors
        y = x if A is None else x @ (A.T if back else A)
        return y.clone() if G is None else (G if back else G.T) @ y


def _multiply(layers: Sequence[Factors], X: Sequence[Tensor]) -> None:
    shifts = [None if f.matrices.eigen is None else x * f.matrices.eigen.alpha for f, x in zip(layers, X, strict=True)]
    ops.kron_solve_(list(X), [f.matrices.damped for f in layers])
    for x, shift in zip(X, shifts, strict=True):
        if shift is not None:
            x.add_(shift)


def _inverses(layers: Sequence[Factors]) -> list[Pair] | None:
    """The inverse factors; None with damping "exact"."""
    found = [f.matrices.inverse for f in layers]
    return None if None in found else [pair for pair in found if pair is not None]
