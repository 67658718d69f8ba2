"""All layers with low-rank Kronecker factors as one block: two passes over each layer in blocks of rows, and no matrix of its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from fastcl.precision._blocks import State
from fastcl.precision._buffers import parts
from fastcl.precision._factors import Factors
from fastcl.precision._kronecker_block import KroneckerBlock, LayerTensors, Lists
from fastcl.precision._low_rank_form import Form, Products, Rows
from fastcl.precision._skinny_factors import SkinnyFactors


class SkinnyBlock(KroneckerBlock):
    """Lambda is block diagonal over the layers, ``Lambda vec(X) = vec(G X A)`` with ``A = a I + U_A^T S_A U_A`` and G likewise."""

    def __init__(self, layers: Sequence[SkinnyFactors]) -> None:
        super().__init__(layers)
        self._passed: tuple[Lists, list[Products]] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without the direction that was kept for apply()."""
        return {**super().__getstate__(), "_passed": None}

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """Both passes over a layer while it may still be in a cache."""
        lists = self._lists(grads, states)
        for i in range(len(lists.layers)):
            _second(lists, i, _first(lists, i, momentum, strength)[0], lr)

    @torch.no_grad()
    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """<M, V> of the skinny products; V is not formed."""
        lists = self._lists(grads, states)
        found = [_first(lists, i, momentum, strength) for i in range(len(lists.layers))]
        self._passed = lists, [products for products, _ in found]
        if not found:
            return torch.zeros((), dtype=torch.float64, device=self.layers[0].anchor.device)
        return torch.stack([square for _, square in found]).sum()

    @torch.no_grad()
    def apply(self, states: Sequence[State], step: Tensor) -> None:  # noqa: ARG002 (direction has them)
        """The second pass."""
        if self._passed is not None:
            (lists, passed), self._passed = self._passed, None
            for i, products in enumerate(passed):
                _second(lists, i, products, step)

    @torch.no_grad()
    def solve_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- G^-1 X A^-1."""
        self._through(tensors, lambda layers, X: _each(layers, X, _inverse))

    @torch.no_grad()
    def multiply_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- G X A."""
        self._through(tensors, lambda layers, X: _each(layers, X, _product))

    @torch.no_grad()
    def quadratic(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Sum of <X, G X A>, with damping "exact" and alpha <X, X>, from the first pass."""
        layers, X = self._gathered(tensors)
        if not X:
            return torch.zeros((), dtype=torch.float64, device=self.layers[0].anchor.device)
        return torch.stack([_fed(_product(f), x).finish() for f, x in zip(layers, X, strict=True)]).sum()

    def _multiply(self, layers: Sequence[Factors], X: Sequence[Tensor]) -> None:
        _each(layers, X, _product)


def _product(f: Factors) -> Form:
    return cast(SkinnyFactors, f).product


def _inverse(f: Factors) -> Form:
    return cast(SkinnyFactors, f).inverse


def _fed(form: Form, x: Tensor) -> Products:
    products = Products(form, x.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for s in Rows(*x.shape).slices:
            products.feed(s, x[s])
    return products


def _each(layers: Sequence[Factors], X: Sequence[Tensor], which: Callable[[Factors], Form]) -> None:
    """X <- f(Lambda) X, in place but for a block of rows."""
    for f, x in zip(layers, X, strict=True):
        products, rows = _fed(which(f), x), Rows(*x.shape)
        products.finish()
        scratch = rows.scratch(x)
        with torch.autocast(x.device.type, enabled=False):
            for s in rows.slices:
                x[s] = products.result(s, x[s], scratch)


def _tuple(own: LayerTensors) -> tuple[Tensor, ...]:
    return (own,) if isinstance(own, Tensor) else own


def _first(lists: Lists, i: int, momentum: float, strength: float) -> tuple[Products, Tensor]:
    """``M <- rho M + g + lambda H``, and the products of ``V = Lambda^-1 M`` with what is then still in the cache."""
    f, grads, M, H = lists.layers[i], _tuple(lists.grads[i]), lists.M[i], lists.H[i]
    products = Products(_inverse(f), f.rows)
    with torch.autocast(M.device.type, enabled=False):
        for s in Rows(*M.shape).slices:
            m = M[s].mul_(momentum)
            if strength:
                m.add_(H[s], alpha=strength)
            for part, g in zip(parts(m, f.shapes), grads, strict=True):
                part.add_(g[s])
            products.feed(s, m)
        return products, products.finish()


def _second(lists: Lists, i: int, products: Products, step: Tensor | float) -> None:
    """``W <- W - s V``, ``H <- H - s M``."""
    f, params, M, H = lists.layers[i], _tuple(lists.params[i]), lists.M[i], lists.H[i]
    rows = Rows(*M.shape)
    scratch = rows.scratch(M)
    s = step.to(f.dtype) if isinstance(step, Tensor) else step
    with torch.autocast(M.device.type, enabled=False):
        for at in rows.slices:
            v = products.result(at, M[at], scratch)
            if isinstance(s, Tensor):
                v.mul_(s)
                H[at].addcmul_(M[at], s, value=-1)
            else:
                H[at].sub_(M[at], alpha=s)
            for p, part in zip(params, parts(v, f.shapes), strict=True):
                p[at].sub_(part, alpha=1 if isinstance(s, Tensor) else s)
