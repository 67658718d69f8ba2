"""The sum of two Kronecker products as one: the rules, and the checks of the matrices' values.

It runs once per task and waits for the device: what it decides by is read on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SYMMETRIC = 1e-5  # relative: what float32 sums may differ by
STILL = 1e-14  # relative change of the scalars
MOST_ROUNDS = 200

Merge = tuple[Tensor, Tensor]


def kron_merge(B_L: Tensor, B_R: Tensor, C_L: Tensor, C_R: Tensor, rule: str = "kl") -> Merge:
    """``L x R`` close to ``B_L x B_R + C_L x C_R``; see :func:`fastcl.ops.kron_merge`."""
    named = {"B_L": B_L, "B_R": B_R, "C_L": C_L, "C_R": C_R}
    wide = [_symmetric(name, value.detach().double()) for name, value in named.items()]
    dtype = torch.float32
    for value in named.values():
        dtype = torch.promote_types(dtype, value.dtype)
    left, right = RULES[rule](*wide)
    return left.to(dtype), right.to(dtype)


def _symmetric(name: str, X: Tensor) -> Tensor:
    """The symmetric part of a matrix that is symmetric but for roundings; a vector of not negative numbers as it is."""
    if not bool(X.isfinite().all()):
        raise ValueError(f"{name} has NaN or Inf among its {X.numel()} elements; accepted are finite factors")
    if X.dim() == 1:
        if bool((X < 0).any()):
            raise ValueError(f"{name} is a diagonal and has the element {float(X.min()):.3g}; accepted are elements >= 0")
        return X
    difference, scale = float((X - X.mT).abs_().amax()) if X.numel() else 0.0, float(X.abs().amax()) if X.numel() else 0.0
    if difference > SYMMETRIC * scale:
        raise ValueError(
            f"{name} is not symmetric: elements differ from their mirror images by up to {difference:.3g}, the largest is {scale:.3g}; "
            f"accepted is a difference of {SYMMETRIC:g} of the largest"
        )
    return (X + X.mT).mul_(0.5)


def _kl(B_L: Tensor, B_R: Tensor, C_L: Tensor, C_R: Tensor) -> Merge:
    d_L, d_R = _relative("B_L", B_L, "C_L", C_L), _relative("B_R", B_R, "C_R", C_R)
    e, f = _fixed_point(d_L, d_R)
    return (e[0] * B_L).add_(C_L, alpha=e[1]), (f[0] * B_R).add_(C_R, alpha=f[1])


def _fixed_point(d_L: Tensor, d_R: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """The scalars of ``E = e0 B_L + e1 C_L`` and ``F = f0 B_R + f1 C_R`` at the optimum, from the generalised eigenvalues.

    A round maps the ratio e1 / e0 to the next one. Where few directions are much better known than the rest it moves by a millionth of
    its way, so its fixed point, which is the only one (the objective is geodesically convex), is found by regula falsi.
    """
    e0, e1 = 1.0, math.exp(_still(d_L, d_R)) if len(d_R) and float(d_R.amax()) > 0 else 0.0
    f = _means(e0, e1, d_L)
    e = _means(*f, d_R)
    return e, _means(*e, d_L)


def _still(d_L: Tensor, d_R: Tensor) -> float:
    """The logarithm of the ratio that a round leaves as it is. A ratio is a weighted mean of d, of smaller weights for larger elements."""

    def change(u: float) -> float:
        return math.log(_ratio(_ratio(math.exp(u), d_L), d_R)) - u

    low, high = (math.log(_ratio(float(y), d_R)) for y in (d_L.amax(), d_L.amin()))
    at_low, at_high = change(low), change(high)
    u, side = math.inf, 0
    for _ in range(MOST_ROUNDS):
        between = high - at_high * (high - low) / (at_high - at_low) if at_high < at_low else low
        before, u = u, between if low < between < high else (low + high) / 2
        if abs(u - before) <= STILL * max(1.0, abs(u)):
            break
        moved = change(u)
        # The end that stays for the second time counts half (the Illinois rule), or it would stay for ever.
        if moved > 0:
            low, at_low, at_high, side = u, moved, at_high / 2 if side > 0 else at_high, 1
        else:
            high, at_high, at_low, side = u, moved, at_low / 2 if side < 0 else at_low, -1
    return u


def _ratio(x: float, d: Tensor) -> float:
    first, second = _means(1.0, x, d)
    return second / first


def _means(x0: float, x1: float, d: Tensor) -> tuple[float, float]:
    inverse = (x0 + x1 * d).reciprocal_()
    return float(inverse.mean()), float((d * inverse).mean())


def _relative(b_name: str, B: Tensor, c_name: str, C: Tensor) -> Tensor:
    """The generalised eigenvalues of (C, B), on the CPU."""
    if B.dim() == 1:
        if bool((B <= 0).any()):
            raise ValueError(f"{b_name} must be positive definite, and its diagonal has the element {float(B.min()):.3g}")
        return (C / B).cpu()
    factor, info = torch.linalg.cholesky_ex(B)
    if int(info):
        raise ValueError(
            f"{b_name} must be positive definite: its Cholesky factorisation stops at row {int(info)} of {len(B)}; the sum of all tasks so "
            "far includes the prior, which is"
        )
    half = torch.linalg.solve_triangular(factor, C, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    d: Tensor = torch.linalg.eigvalsh(whole)
    if len(d) and float(d[0]) < 0:
        _check_semidefinite(c_name, C)
    return d.clamp_(min=0).cpu()


def _check_semidefinite(name: str, C: Tensor) -> None:
    # A factor of few samples is singular and gets here by roundings: one Cholesky factorisation settles nearly all of them.
    shifted = C + SYMMETRIC * C.diagonal().amax().clamp(min=0) * torch.eye(len(C), dtype=C.dtype, device=C.device)
    if not int(torch.linalg.cholesky_ex(shifted)[1]):
        return
    values = torch.linalg.eigvalsh(C)
    if float(values[0]) < -SYMMETRIC * float(values.abs().amax()):
        raise ValueError(f"{name} must be positive semi-definite, and has the eigenvalue {float(values[0]):.3g}")


def _pi(B_L: Tensor, B_R: Tensor, C_L: Tensor, C_R: Tensor) -> Merge:
    b_left, b_right, c_left, c_right = (float(_trace(X)) for X in (B_L, B_R, C_L, C_R))
    if c_left * c_right == 0:  # C is no more than zero
        return B_L.clone(), B_R.clone()
    if b_left * b_right == 0:
        return C_L.clone(), C_R.clone()
    pi = (b_left / c_left * (c_right / b_right)) ** 0.5
    return B_L + pi * C_L, B_R + C_R / pi


def _trace(X: Tensor) -> Tensor:
    return X.sum() if X.dim() == 1 else X.trace()


def _frobenius(B_L: Tensor, B_R: Tensor, C_L: Tensor, C_R: Tensor) -> Merge:
    """The best matrix of rank one to ``[b_L c_L] [b_R c_R]^T`` (Van Loan and Pitsianis 1993), from the Grams of both sides."""
    g_bb, g_bc, g_cc = (float((x * y).sum()) for x, y in ((B_L, B_L), (B_L, C_L), (C_L, C_L)))
    h_bb, h_bc, h_cc = (float((x * y).sum()) for x, y in ((B_R, B_R), (B_R, C_R), (C_R, C_R)))
    # The leading eigenvector of the product of both Grams, whose elements are not negative: no difference cancels.
    p, q = h_bb * g_bb + h_bc * g_bc, h_bb * g_bc + h_bc * g_cc
    r, s = h_bc * g_bb + h_cc * g_bc, h_bc * g_bc + h_cc * g_cc
    root = (((p - s) / 2) ** 2 + q * r) ** 0.5 + abs(p - s) / 2
    a0, a1 = (root, r) if p >= s else (q, root)
    square = a0 * (g_bb * a0 + g_bc * a1) + a1 * (g_bc * a0 + g_cc * a1)
    if square == 0:
        return torch.zeros_like(B_L), torch.zeros_like(B_R)
    scale = max(a0, a1)
    a0, a1, square = a0 / scale, a1 / scale, square / scale**2
    f0, f1 = (g_bb * a0 + g_bc * a1) / square, (g_bc * a0 + g_cc * a1) / square
    return a0 * B_L + a1 * C_L, f0 * B_R + f1 * C_R


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Merge]] = {"kl": _kl, "pi": _pi, "frobenius": _frobenius}
