"""GEM's quadratic programme, solved on the host: the one definition that waits for the device. The kernels solve it where the data is."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def nonnegative_qp(quadratic: Tensor, linear: Tensor) -> Tensor:
    """``min_u 1/2 u^T Q u + p^T u  subject to  u >= 0`` for a positive semi-definite ``Q``: Lawson and Hanson's active set (1974).

    The variables are scaled so that Q has a unit diagonal. A variable that depends linearly on the passive ones is left at 0.
    """
    device, quadratic, linear = linear.device, quadratic.cpu(), linear.cpu()
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
    return (scale * u).to(device)


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
