"""Functions of a Kronecker product of low-rank factors, applied to a layer in two passes over it: skinny products, then one update."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.precision._low_rank_factor import LowRankFactor
from fastcl.precision._low_rank_merge import Factor

SCRATCH = 1 << 18  # elements of a block of rows: it stays in a core's cache


class Form(NamedTuple):
    """``f(Lambda)`` for a scalar function ``f``, where ``Lambda vec(X) = vec(G X A)``; with ``U`` the bases' rows::

        Y = t X + (P1 o D_A) U_A + U_G^T (d_G P2) + U_G^T (E o P3) U_A
        P1 = X U_A^T [m, k_A]      P2 = U_G X [k_G, n]      P3 = U_G X U_A^T [k_G, k_A]

    ``t`` is ``f`` of the product of both scales, and the others are what ``f`` adds to it on the bases' directions. Where G is diagonal,
    ``t`` and the rows of ``D_A`` are those of each row of X, and there are no ``U_G``, ``d_G`` and ``E``.
    """

    right: Tensor  # U_A [k_A, n]
    left: Tensor | None  # U_G^T [m, k_G]
    base: float | Tensor  # t; [m, 1] where G is diagonal
    on_right: Tensor  # D_A, [k_A] or [m, k_A]
    on_left: Tensor | None  # d_G [k_G, 1]
    on_both: Tensor | None  # E [k_G, k_A]
    bound: float  # f is at least this


def form(a: LowRankFactor, g: Factor, function: Callable[[Tensor], Tensor]) -> Form:
    """The form of ``function`` (on float64 eigenvalues) of the product. Computed on the host, for a task."""
    device, dtype = a.basis.device, a.basis.dtype
    on_a = torch.cat([torch.zeros(1, dtype=torch.float64), a.values]) + a.scale
    if isinstance(g, LowRankFactor):
        on_g = torch.cat([torch.zeros(1, dtype=torch.float64), g.values]) + g.scale
        f = function(torch.outer(on_g, on_a))
        plain = f[0, 0]
        on_left = (f[1:, :1] - plain).to(device, dtype)
        on_both = (f[1:, 1:] - f[1:, :1] - f[:1, 1:] + plain).to(device, dtype)
        extremes = function(torch.stack([on_g.amin() * on_a.amin(), on_g.amax() * on_a.amax()]))
        on_right = (f[0, 1:] - plain).to(device, dtype)
        return Form(a.basis, g.basis.T.contiguous(), float(plain), on_right, on_left, on_both, float(extremes.amin()))
    f = function(torch.outer(g.double().cpu(), on_a))
    return Form(a.basis, None, f[:, :1].to(device, dtype), (f[:, 1:] - f[:, :1]).to(device, dtype), None, None, float(f.amin()))


def moved(form: Form, device: torch.device) -> Form:
    """The same form on another device."""
    return Form(*(part.to(device) if isinstance(part, Tensor) else part for part in form))


class Rows:
    """Blocks of rows of a layer, few enough for a scratch of :data:`SCRATCH` elements."""

    def __init__(self, m: int, n: int) -> None:
        step = max(1, SCRATCH // max(n, 1))
        self.slices = [slice(start, min(start + step, m)) for start in range(0, m, step)]

    def scratch(self, like: Tensor) -> Tensor:
        """Memory for the largest block."""
        rows = max((s.stop - s.start for s in self.slices), default=0)
        return torch.empty((rows, like.shape[1]), dtype=like.dtype, device=like.device)


class Products:
    """The first pass: fed with all rows of X, it has ``<X, f(Lambda) X>`` and the skinny matrices of the second."""

    def __init__(self, form: Form, m: int) -> None:
        self.form, width = form, form.right.shape[0] + (0 if form.left is None else form.left.shape[1])
        options = {"dtype": form.right.dtype, "device": form.right.device}
        self.left = torch.empty((m, width), **options)  # type: ignore[call-overload]  # P1, U_G^T
        self.right = torch.zeros((width, form.right.shape[1]), **options)  # type: ignore[call-overload]  # U_A, P2
        self.squares = torch.zeros((), dtype=torch.float64, device=form.right.device)
        self.norms = torch.zeros((), dtype=torch.float64, device=form.right.device)
        self.rank = form.right.shape[0]

    def feed(self, rows: slice, x: Tensor) -> None:
        """Take in ``X[rows]``."""
        p1 = self.left[rows, : self.rank]
        torch.mm(x, self.form.right.T, out=p1)
        if self.form.left is not None:
            self.right[self.rank :].addmm_(self.form.left[rows].T, x)
        square = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
        self.norms += square.sum()
        base = self.form.base
        self.squares += (square * base[rows, 0]).sum() if isinstance(base, Tensor) else square.sum() * base

    def finish(self) -> Tensor:
        """``<X, f(Lambda) X>``, float64 on the device; afterwards :meth:`result` may be called."""
        form, k = self.form, self.rank
        p1, p2 = self.left[:, :k], self.right[k:]
        q = self.squares + (p1.double().square() * form.on_right.double()).sum()
        if form.left is not None and form.on_left is not None and form.on_both is not None:
            p3 = p2 @ form.right.T
            q = q + (p2.double().square() * form.on_left.double()).sum() + (p3.double().square() * form.on_both.double()).sum()
            torch.addmm(p1 * form.on_right, form.left, form.on_both * p3, out=p1)
            p2.mul_(form.on_left)
            self.left[:, k:] = form.left
        else:
            p1.mul_(form.on_right)
        self.right[:k] = form.right
        # Where the large eigenvalues' parts cancel, rounding may leave less than f's smallest value allows, or a negative number.
        return torch.maximum(q, self.norms * form.bound)

    def result(self, rows: slice, x: Tensor, out: Tensor) -> Tensor:
        """``(f(Lambda) X)[rows]`` from ``X[rows]``, in ``out``'s first rows, which may not be ``x``'s."""
        base, out = self.form.base, out[: x.shape[0]]
        if isinstance(base, Tensor):
            return torch.mul(x, base[rows], out=out).addmm_(self.left[rows], self.right)
        return torch.addmm(x, self.left[rows], self.right, beta=base, out=out)
