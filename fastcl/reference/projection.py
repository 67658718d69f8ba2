"""Gradient directions: A-GEM's and GEM's projection. The definition.

Where the data decides (GEM's quadratic programme), these functions wait for the device; the kernels do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
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
    """What is added of the reference: ``-(g.r)/(r.r)`` if ``g.r < 0``, else 0."""
    allowed = (dot >= 0) & (square < torch.inf)
    return torch.where(allowed, torch.zeros_like(dot), -dot / square)


def gem_project_(grads: Sequence[Tensor], memories: Sequence[Sequence[Tensor]], margin: float, ridge: float) -> Tensor:
    """``g <- g + G^T v``; returns what :func:`gem_coefficients` returns; see :func:`fastcl.ops.gem_project_`."""
    values = gem_coefficients(gram([*memories, grads]), margin, ridge)
    combine_(grads, memories, values[1 : 1 + len(memories)])
    return values


def combine_(grads: Sequence[Tensor], memories: Sequence[Sequence[Tensor]], coefficients: Tensor) -> None:
    """``g <- g + sum_k v_k m_k``, computed in float64 and rounded once; gradients stay as they are when every ``v_k`` is 0."""
    if not bool((coefficients != 0).any()):
        return
    for g, *parts in zip(grads, *memories, strict=True):
        total = g.double()
        for v, m in zip(coefficients, parts, strict=True):
            total = torch.where(v == 0, total, total + v * m.double())
        g.copy_(total)


def gem_coefficients(products: Tensor, margin: float, ridge: float) -> Tensor:
    """GEM's coefficients from the Gram matrix of ``[memory_0, ..., memory_K-1, gradient]``.

    ``min_v 1/2 v^T (G G^T + ridge I) v + (G g)^T v  subject to  v >= margin`` if some ``G_k . g < 0``, else zeros.

    Returns ``[violated, v_0 ... v_K-1, G_0 . g ... G_K-1 . g]``, float64, on the device of ``products``.
    """
    k = len(products) - 1
    dots = products[:k, k]
    quadratic = products[:k, :k].cpu()
    if bool((dots >= 0).all()) and bool((quadratic.diagonal() < torch.inf).all()):
        return torch.cat([torch.zeros(k + 1, dtype=torch.float64, device=products.device), dots])
    if bool(products[:k].isfinite().all()):
        quadratic = quadratic + ridge * torch.eye(k, dtype=torch.float64)
        v = margin + nonnegative_qp(quadratic, dots.cpu() + margin * quadratic.sum(dim=1))
    else:
        v = torch.full((k,), torch.nan, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64, device=products.device), v.to(products.device), dots])


def nonnegative_qp(quadratic: Tensor, linear: Tensor) -> Tensor:
    """``min_u 1/2 u^T Q u + p^T u  subject to  u >= 0`` for a positive semi-definite ``Q``: Lawson and Hanson's active set (1974).

    The variables are scaled so that Q has a unit diagonal. A variable that depends linearly on the passive ones is left at 0.
    """
    n = len(linear)
    diagonal = quadratic.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    q, p = scale[:, None] * quadratic * scale, scale * linear
    u = torch.zeros_like(p)
    passive, blocked = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for _ in range(16 * n + 16):
        gradient = p + q @ u
        rounding = 4 * n * EPS * (p.abs() + q.abs() @ u)
        free = ~passive & ~blocked & (gradient < -rounding)
        if not free.any():
            break
        j = torch.where(free, gradient, torch.inf).argmin()
        trial = passive.clone()
        trial[j] = True
        if not _independent(q, trial):
            blocked[j] = True
            continue
        s = _minimum(q, p, trial)
        if s[j] <= 0:
            blocked[j] = True
            continue
        while bool((s[trial] <= 0).any()):
            leaving = trial & (s <= 0)
            ratio = torch.where(leaving, u / (u - s), torch.inf)
            u = torch.where(ratio <= ratio.min(), 0, u + ratio.min() * (s - u))
            trial = trial & (ratio > ratio.min())
            s = _minimum(q, p, trial)
        u, passive = s, trial
        blocked[:] = False
    return scale * u


def _minimum(q: Tensor, p: Tensor, passive: Tensor) -> Tensor:
    """The unconstrained minimum over the passive variables, the others 0."""
    index = passive.nonzero().flatten()
    s = torch.zeros_like(p)
    if len(index):
        s[index] = torch.linalg.solve(q[index][:, index], -p[index])
    return s


def _independent(q: Tensor, passive: Tensor) -> bool:
    index = passive.nonzero().flatten()
    return bool(torch.linalg.eigvalsh(q[index][:, index])[0] > 16 * len(q) * EPS)
