"""Sums of two Kronecker products as one, when the factors are low-rank or diagonal: the rules of :func:`fastcl.ops.kron_merge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastcl.precision._low_rank_factor import LowRankFactor, fitted
from fastcl.reference.kronecker_merge import _fixed_point

RULES = ("kl", "pi", "frobenius")
Factor: TypeAlias = LowRankFactor | Tensor


class Side(NamedTuple):
    """What the rules need to know of two factors ``B`` and ``C`` of one side, and how to mix them.

    ``ratios`` and ``counts``: the generalised eigenvalues of ``(C, B)`` and how often each occurs; ``inner``: the Frobenius products
    ``[[<B, B>, <B, C>], [<C, B>, <C, C>]]``; ``traces``: of ``B`` and ``C``. All on the host, float64 but for ``counts``.
    """

    ratios: Tensor
    counts: Tensor
    inner: Tensor
    traces: tuple[float, float]
    mix: Callable[[float, float], Factor]


def merge(left: tuple[Factor, Factor], right: tuple[Factor, Factor], rule: str, ranks: tuple[int, int]) -> tuple[Factor, Factor]:
    """``(L, R)`` with ``L x R`` near ``B_L x B_R + C_L x C_R``, for ``left = (B_L, C_L)`` and ``right = (B_R, C_R)``.

    All rules give ``L = e0 B_L + e1 C_L`` and ``R = f0 B_R + f1 C_R``; low-rank ones are then cut back to ``ranks`` with their trace. Where
    ``C_L`` or ``C_R`` is zero the result is ``(B_L, B_R)``. A diagonal factor is a float64 tensor [n]; a factor as for
    :class:`LowRankFactor` a named tuple.

    Raises ValueError for another rule, or a ``B`` that is not positive definite under "kl".
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    one, other = _side(*left, ranks[0]), _side(*right, ranks[1])
    if one.traces[1] <= 0 or other.traces[1] <= 0:
        return left[0], right[0]
    e0, e1, f0, f1 = {"kl": _kl, "pi": _pi, "frobenius": _frobenius}[rule](one, other)
    return one.mix(e0, e1), other.mix(f0, f1)


def _side(b: Factor, c: Factor, rank: int) -> Side:
    if isinstance(b, LowRankFactor) and isinstance(c, LowRankFactor):
        return _low_rank_side(b, c, rank)
    if isinstance(b, Tensor) and isinstance(c, Tensor):
        return _diagonal_side(b, c)
    raise TypeError(f"two factors of one side must be of one kind, got {type(b).__name__} and {type(c).__name__}")


def _diagonal_side(b: Tensor, c: Tensor) -> Side:
    b, c = b.double(), c.double()
    inner = torch.stack([torch.stack([b @ b, b @ c]), torch.stack([c @ b, c @ c])]).cpu()
    ratios = (c / b).cpu()
    return Side(ratios, torch.ones_like(ratios, dtype=torch.long), inner, (float(b.sum()), float(c.sum())), lambda x, y: x * b + y * c)


def _low_rank_side(b: LowRankFactor, c: LowRankFactor, rank: int) -> Side:
    """Both factors in a frame of their joint span; orthogonal to it they are multiples of the identity."""
    frame, _ = torch.linalg.qr(torch.cat([b.basis, c.basis]).double().T)
    inside, outside = frame.shape[1], frame.shape[0] - frame.shape[1]
    small = []
    for factor in (b, c):
        rows = factor.basis.double() @ frame
        own = (rows.T * factor.values.to(rows.device)) @ rows
        own.diagonal().add_(factor.scale)
        small.append((own + own.T) / 2)
    sb, sc = small
    inner = torch.tensor([[float((x * y).sum()) for y in small] for x in small], dtype=torch.float64)
    scales = torch.tensor([b.scale, c.scale], dtype=torch.float64)
    inner += outside * torch.outer(scales, scales)
    lower, failed = torch.linalg.cholesky_ex(sb)
    if bool(failed) or not b.scale > 0:
        raise ValueError("B is not positive definite; the prior that precisions start from is")
    half = torch.linalg.solve_triangular(lower, sc, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    ratios = torch.cat([torch.linalg.eigvalsh((whitened + whitened.T) / 2).cpu().clamp_min(0), scales[1:] / scales[:1]])
    counts = torch.tensor([1] * inside + [outside])

    def mix(x: float, y: float) -> LowRankFactor:
        return fitted(x * sb + y * sc, frame, x * b.scale + y * c.scale, rank, b.basis.dtype)

    return Side(ratios, counts, inner, (b.trace(), c.trace()), mix)


def _kl(left: Side, right: Side) -> tuple[float, float, float, float]:
    e, f = _fixed_point(*(side.ratios.repeat_interleave(side.counts) for side in (left, right)))
    return e[0], e[1], f[0], f[1]


def _pi(left: Side, right: Side) -> tuple[float, float, float, float]:
    pi = (left.traces[0] * right.traces[1] / (left.traces[1] * right.traces[0])) ** 0.5
    return 1.0, pi, 1.0, 1.0 / pi


def _frobenius(left: Side, right: Side) -> tuple[float, float, float, float]:
    """The first singular pair of the two terms, each a point of its side's space: ``e`` is an eigenvector of ``P_R P_L``."""
    # With P_L = K^2 it is P_R K times one of the symmetric K P_R K. The left terms are scaled to norm 1, so that nothing overflows.
    norms = left.inner.diagonal().sqrt()
    p, q = left.inner / torch.outer(norms, norms), right.inner * torch.outer(norms / norms[0], norms / norms[0])
    q = q / q.diagonal().sum()
    values, vectors = torch.linalg.eigh(p)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    top = torch.linalg.eigh(root @ q @ root)[1][:, -1]
    e = q @ (root @ top) / norms
    e = e / e[0]
    f = left.inner @ e / (e @ left.inner @ e)
    return float(e[0]), float(e[1]), float(f[0]), float(f[1])
