"""Gradient directions: A-GEM's and GEM's projection. The definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.reference._quadratic import nonnegative_qp

PART = 4096


def grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``sum a_i b_i`` in float64; see :func:`fastcl.ops.grad_dot`."""
    if not a:
        return torch.zeros((), dtype=torch.float64)
    return _sum(torch.stack([_sum((x.double() * y.double()).flatten()) for x, y in zip(a, b, strict=True)]))


def _sum(x: Tensor) -> Tensor:
    """In parts so small that torch sums each in one thread: the order does not depend on the number of threads."""
    while x.numel() > PART:
        x = torch.nn.functional.pad(x, (0, -x.numel() % PART)).view(-1, PART).sum(dim=1)
    return x.sum()


def gram(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[K, K]`` of all dot products; see :func:`fastcl.ops.gram`."""
    rows = [torch.stack([grad_dot(a, b) for b in vectors]) for a in vectors]
    return torch.stack(rows)


def project_(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """``g <- g - (g.r)/(r.r) r`` if ``g.r < 0``; returns ``[g.r, r.r, coefficient]``; see :func:`fastcl.ops.project_`."""
    dot, square = grad_dot(grads, reference), grad_dot(reference, reference)
    coefficient = project_coefficient(dot, square)
    combine_(grads, [reference], coefficient[None])
    return torch.stack([dot, square, coefficient])


def project_coefficient(dot: Tensor, square: Tensor) -> Tensor:
    """What is added of the reference: ``-(g.r)/(r.r)`` if ``g.r < 0``, else 0; NaN if ``g.r`` is NaN or ``r.r`` not finite."""
    violated = (dot < 0) & (square > 0)
    coefficient = torch.where(violated, -dot / square, 0.0)
    return torch.where((square < torch.inf) & ~dot.isnan(), coefficient, torch.nan)


def gem_project_(grads: Sequence[Tensor], memories: Sequence[Sequence[Tensor]], margin: float, ridge: float) -> Tensor:
    """``g <- g + G^T v``; returns what :func:`gem_coefficients` returns; see :func:`fastcl.ops.gem_project_`."""
    values = gem_coefficients(gram([*memories, grads]), margin, ridge)
    combine_(grads, memories, values[1 : 1 + len(memories)])
    return values


def combine_(grads: Sequence[Tensor], memories: Sequence[Sequence[Tensor]], coefficients: Tensor) -> None:
    """``g <- g + sum_k v_k m_k``, computed in float64 and rounded once; gradients keep their bits when every ``v_k`` is 0."""
    for g, *parts in zip(grads, *memories, strict=True):
        total = g.double()
        for v, m in zip(coefficients, parts, strict=True):
            total = torch.where(v == 0, total, total + v * m.double())
        g.copy_(total)


def gem_coefficients(products: Tensor, margin: float, ridge: float) -> Tensor:
    """GEM's coefficients from the Gram matrix of ``[memory_0, ..., memory_K-1, gradient]``.

    ``min_v 1/2 v^T (G G^T + ridge I) v + (G g)^T v  subject to  v >= margin`` if some ``G_k . g < 0``, else zeros; NaN if a product is
    not finite.

    Returns ``[violated, v_0 ... v_K-1, G_0 . g ... G_K-1 . g]``, float64, on the device of ``products``.
    """
    k = len(products) - 1
    dots, quadratic = products[:k, k], products[:k, :k]
    violated = ~((dots >= 0).all() & (quadratic.diagonal() < torch.inf).all())
    finite = products[:k].isfinite().all()
    definite = quadratic + ridge * torch.eye(k, dtype=torch.float64, device=products.device)
    linear = dots + margin * definite.sum(dim=1)
    solvable = violated & finite
    u = nonnegative_qp(torch.where(solvable, definite, 0), torch.where(solvable, linear, 0))
    v = torch.where(violated, torch.where(finite, margin + u, torch.nan), 0)
    return torch.cat([violated[None].double(), v, dots])
