"""The Fisher information by its definition: one backward pass per sample and class, everything dense and in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

F64 = torch.float64


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().to(F64).flatten() for t in tensors])


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [t.numel() for t in like]
    return [part.view(t.shape).to(t.dtype) for part, t in zip(vector.split(sizes), like, strict=True)]


def fisher(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean over samples of ``E[g g^T]``, over the labels of the model's softmax, or for true ``labels``."""
    params = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros((sum(p.numel() for p in params),) * 2, dtype=F64)
    for n in range(len(x)):
        log_p = log_softmax(model(x[n : n + 1]), -1)[0]
        for c in range(len(log_p)):
            share = float(log_p[c].detach().exp()) if labels is None else float(labels[n] == c)
            if share:
                found = torch.autograd.grad(-log_p[c], params, retain_graph=True, allow_unused=True)
                g = flat([torch.zeros_like(p) if t is None else t for t, p in zip(found, params, strict=True)])
                total += share * torch.outer(g, g)
    return total / len(x)


def dense_low_rank(diagonal: Sequence[Tensor], basis: Sequence[Tensor], sigma: Tensor) -> Tensor:
    """``D^1/2 (I + Q^T sigma^2 Q) D^1/2``."""
    d = flat(diagonal)
    q = torch.cat([b.to(F64).flatten(1) for b in basis], 1)
    root = d.sqrt()
    return d.diag() + (root[:, None] * (q.T * sigma**2)) @ (q * root)


def dense_of(precision) -> Tensor:
    """Lambda by its products with unit vectors."""
    params = [p for p in precision.model.parameters() if p.requires_grad]
    eye = torch.eye(sum(p.numel() for p in params), dtype=F64)
    return torch.stack([flat(precision.multiply(split(row, params))) for row in eye])
