"""Accumulated importance: element-wise maximum and SPG's normalised gradients. The definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.reference._storage import compute_dtype, decode, encode_


def emax_(importance: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """``I <- max(I, new)``; see :func:`fastcl.ops.emax_`."""
    for stored, other in zip(importance, new, strict=True):
        dtype = compute_dtype(stored, other)
        encode_(stored, torch.maximum(decode(stored, dtype), decode(other, dtype)))


def spg_normalise(grad: Tensor) -> Tensor:
    """``|tanh((g - mean g) / std g)|`` in float64, std unbiased; 0 where the standard deviation is 0 and for one element."""
    x = grad.double()
    if not x.numel():
        return x
    x = x - x.flatten()[0]  # a constant tensor becomes exactly zero, whatever the rounding of its mean
    x = x - x.mean()
    std = ((x * x).sum() / max(1, x.numel() - 1)).sqrt()
    return torch.where(std == 0, torch.zeros_like(x), (x / std).tanh().abs())


def spg_importance_(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:
    """EMax of every head's normalised gradients into ``accumulated``, and its mean; see :func:`fastcl.ops.spg_importance_`."""
    for stored, *heads in zip(accumulated, *grads_by_head, strict=True):
        for grad in heads:
            encode_(stored, torch.maximum(decode(stored, torch.float64), spg_normalise(grad)))
    device = accumulated[0].device if accumulated else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for stored in accumulated:
        total += decode(stored, torch.float64).sum().to(total.device)
    return total / max(1, sum(stored.numel() for stored in accumulated))
