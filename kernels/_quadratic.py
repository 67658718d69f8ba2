"""GEM's quadratic programme, in one program on the device: the twin of csrc/core/projection.h.

Lawson and Hanson's active set (Solving Least Squares Problems, 1974, chapter 23). The passive block of Q is inverted in place by
Gauss-Jordan sweeps, and each solution is refined twice against Q itself. The variables are scaled so that Q has a unit diagonal; one that
depends linearly on the passive ones stays at 0. Q and the inverse are tiles that a few warps hold in registers; a row or a column is
taken out of a tile by a masked sum, which is exact. What lies beyond the n variables is 0 and never enters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._math import float64

_SETTLED = tl.constexpr(1e-9)  # as in csrc/core/projection.h
_ROUNDOFF = tl.constexpr(2.0**-52)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(inverse: tl.tensor, k: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Exchange variable ``k``: solve its equation for it and put it into the others."""
    lane = tl.arange(0, N)
    own, in_row, in_column = lane == k, lane[:, None] == k, lane[None, :] == k
    row = tl.sum(tl.where(in_row, inverse, 0.0), 0)
    column = tl.sum(tl.where(in_column, inverse, 0.0), 1)
    pivot = tl.sum(tl.where(own, row, 0.0), 0)
    row = tl.where(own, 1.0, row) / pivot
    rest = tl.where(in_column, -(column / pivot)[:, None], inverse - column[:, None] * row[None, :])
    return tl.where(in_row, row[None, :], rest)


@triton.jit  # type: ignore[untyped-decorator]
def _factor(q: tl.tensor, passive: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The inverse from Q anew: what was swept in is not swept out, so that no rounding piles up."""
    lane = tl.arange(0, N)
    inverse = q
    k = tl.min(tl.where(passive != 0, lane, N), 0)
    while k < N:
        inverse = _sweep(inverse, k, N)
        k = tl.min(tl.where((passive != 0) & (lane > k), lane, N), 0)
    return inverse


@triton.jit  # type: ignore[untyped-decorator]
def _minimum(q: tl.tensor, inverse: tl.tensor, p: tl.tensor, passive: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The minimum over the passive variables, the others 0."""
    s = tl.zeros((N,), tl.float64)
    for _ in range(3):
        residual = tl.where(passive != 0, p + tl.sum(q * s[None, :], 1), 0.0)
        s = tl.where(passive != 0, s - tl.sum(inverse * residual[None, :], 1), 0.0)
    return s


@triton.jit  # type: ignore[untyped-decorator]
def _steepest(q: tl.tensor, p: tl.tensor, u: tl.tensor, passive: tl.tensor, blocked: tl.tensor, n: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The free variable along which the objective falls most steeply, beyond rounding; N if there is none."""
    lane = tl.arange(0, N)
    gradient = p + tl.sum(q * u[None, :], 1)
    magnitude = tl.abs(p) + tl.sum(tl.abs(q) * u[None, :], 1)
    falls = (passive == 0) & (blocked == 0) & (gradient < -4 * _ROUNDOFF * n.to(tl.float64) * magnitude)
    least = tl.min(tl.where(falls, gradient, 0.0), 0)
    return tl.min(tl.where(falls & (gradient == least), lane, N), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _ratios(u: tl.tensor, s: tl.tensor, passive: tl.tensor) -> tl.tensor:
    """How far towards ``s`` each passive variable stays positive; 2 if all the way, or if ``u`` and ``s`` are 0."""
    leaving = (passive != 0) & (s <= 0) & (u - s > 0)
    return tl.where(leaving, u / tl.where(leaving, u - s, 1.0), 2.0)


@triton.jit  # type: ignore[untyped-decorator]
def nonnegative_qp(q: tl.tensor, p: tl.tensor, n: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """``min_u 1/2 u^T Q u + p^T u  subject to  u >= 0`` for a positive semi-definite ``Q`` with a unit diagonal."""
    lane = tl.arange(0, N)
    u = tl.zeros((N,), tl.float64)
    s = tl.zeros((N,), tl.float64)
    passive = tl.zeros((N,), tl.int32)
    blocked = tl.zeros((N,), tl.int32)
    inverse = q
    step = n * 0
    entering = _steepest(q, p, u, passive, blocked, n, N)
    while (entering < N) & (step < 16 * n + 16):
        own = lane == entering
        trial = tl.where(own, 1, passive)
        pivot = tl.sum(tl.sum(tl.where((lane[:, None] == entering) & (lane[None, :] == entering), inverse, 0.0), 1), 0)
        enters = pivot > 16 * _ROUNDOFF * n.to(tl.float64)
        swept = inverse
        if enters:
            swept = _sweep(inverse, entering, N)
            s = _minimum(q, swept, p, trial, N)
            # Where the passive equations are dependent but for rounding, refinement does not converge.
            left = tl.max(tl.where(trial != 0, tl.abs(p + tl.sum(q * s[None, :], 1)), 0.0), 0)
            enters = (tl.sum(tl.where(own, s, 0.0), 0) > 0) & (left <= _SETTLED * tl.max(tl.abs(p), 0))
        if enters:
            inverse = swept
            ratio = _ratios(u, s, trial)
            shortest = tl.min(ratio, 0)
            while shortest < 2:
                # From u towards s as far as no variable becomes negative; those that reach 0 are fixed there.
                leaves = ratio <= shortest
                u = tl.where(leaves, 0.0, tl.where(trial != 0, u + shortest * (s - u), u))
                trial = tl.where(leaves, 0, trial)
                inverse = _factor(q, trial, N)
                s = _minimum(q, inverse, p, trial, N)
                ratio = _ratios(u, s, trial)
                shortest = tl.min(ratio, 0)
            u = s
            passive = trial
            blocked = tl.zeros((N,), tl.int32)
        else:
            blocked = tl.where(own, 1, blocked)
        step += 1
        entering = _steepest(q, p, u, passive, blocked, n, N)
    return u


@triton.jit(do_not_specialize=["k", "margin_high", "margin_low", "ridge_high", "ridge_low"])  # type: ignore[untyped-decorator]
def gem_kernel(
    products: tl.tensor,
    out: tl.tensor,
    k: tl.tensor,
    margin_high: tl.tensor,
    margin_low: tl.tensor,
    ridge_high: tl.tensor,
    ridge_low: tl.tensor,
    N: tl.constexpr,
) -> None:
    """``[violated, v, dots]`` from the Gram matrix [k + 1, k + 1] of the memories and, last, the gradient; k <= N."""
    lane = tl.arange(0, N)
    exists = lane < k
    i, j = lane[:, None], lane[None, :]
    inside = (i < k) & (j < k)
    element = tl.load(products + i * (k + 1) + j, mask=inside, other=0)
    dots = tl.load(products + lane * (k + 1) + k, mask=exists, other=0)
    diagonal = tl.load(products + lane * (k + 2), mask=exists, other=0)
    kept = (dots >= 0) & (diagonal < float("inf"))
    finite = (tl.abs(dots) < float("inf")) & (tl.min((tl.abs(element) < float("inf")).to(tl.int32), 1) != 0)
    violated = tl.min(kept.to(tl.int32), 0) == 0
    numbers = tl.min(finite.to(tl.int32), 0) != 0
    v = tl.zeros((N,), tl.float64)
    if violated:
        if numbers:
            margin, ridge = float64(margin_high, margin_low), float64(ridge_high, ridge_low)
            element = tl.where((i == j) & inside, element + ridge, element)
            diagonal = tl.where(exists, diagonal + ridge, 0.0)
            scale = tl.where(diagonal > 0, 1 / tl.sqrt(tl.where(diagonal > 0, diagonal, 1.0)), 0.0)
            q = tl.where(i == j, tl.where(diagonal > 0, 1.0, 0.0)[:, None], scale[:, None] * element * scale[None, :])
            # u = v - margin turns the bound into u >= 0 and the linear term into b + margin Q 1.
            p = scale * (dots + margin * tl.sum(element, 1))
            v = margin + scale * nonnegative_qp(q, p, k, N)
        else:
            v = tl.full((N,), float("nan"), tl.float64)
    tl.store(out, violated.to(tl.float64))
    tl.store(out + 1 + lane, v, mask=exists)
    tl.store(out + 1 + k + lane, dots, mask=exists)
