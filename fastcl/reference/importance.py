"""Accumulated importance: element-wise maximum and SPG's normalised gradients. The definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.reference._storage import compute_dtype, decode, encode_
from fastcl.reference.projection import grad_dot


def emax_(importance: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """``I <- max(I, new)``; see :func:`fastcl.ops.emax_`."""
    for stored, other in zip(importance, new, strict=True):
        dtype = compute_dtype(stored, other)
        encode_(stored, torch.maximum(decode(stored, dtype), decode(other, dtype)))


def fisher_squares(grads: Sequence[Tensor]) -> Tensor:
    """First part of :func:`fisher_add_`, for tensors that are shards: ``sum g^2`` of each, [tensors], float64. There is a tensor."""
    return torch.stack([grad_dot([g], [g]) for g in grads])


def fisher_coefficients(squares: Tensor, max_norm: float) -> Tensor:
    """What clips each tensor by its norm: ``min(1, max_norm / (norm + 1e-6))`` as in torch's clip_grad_norm_, [tensors], float64."""
    return (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1)  # NaN stays


def fisher_update_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, coefficients: Tensor) -> None:
    """Last part of :func:`fisher_add_`, with each tensor's coefficient."""
    for stored, g, c in zip(fisher, grads, coefficients, strict=True):
        dtype = compute_dtype(stored, g)
        x = g.to(dtype) * c.to(dtype)
        stored.copy_(stored.to(dtype) + weight * (x * x))


def fisher_add_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0, max_norm: float | None = None) -> None:
    """``F <- F + weight * (c g)^2``, c clipping each tensor by its own norm; see :func:`fastcl.ops.fisher_add_`."""
    if not grads:
        return
    squares = torch.zeros(len(grads), dtype=torch.float64, device=grads[0].device) if max_norm is None else fisher_squares(grads)
    fisher_update_(fisher, grads, weight, fisher_coefficients(squares, 1.0 if max_norm is None else max_norm))


def _moments(grad: Tensor) -> Tensor:
    """Shift, count, mean relative to the shift, and sum of squared deviations: [4], float64."""
    x = grad.double()
    if not x.numel():
        return x.new_zeros(4)
    shift = x.flatten()[0]  # a constant tensor becomes exactly zero, whatever the rounding of its mean
    x = x - shift
    mean = x.mean()
    x = x - mean
    return torch.stack([shift, torch.full_like(shift, x.numel()), mean, (x * x).sum()])


def _standardised(grad: Tensor, moments: Tensor) -> Tensor:
    shift, count, mean, m2 = moments.unbind()
    std = (m2 / (count - 1).clamp(min=1)).sqrt()
    x = (grad.double() - shift) - mean
    return torch.where(std == 0, torch.zeros_like(x), (x / std).tanh().abs())


def spg_normalise(grad: Tensor) -> Tensor:
    """``|tanh((g - mean g) / std g)|`` in float64, std unbiased; 0 where the standard deviation is 0 and for one element."""
    return _standardised(grad, _moments(grad))


def spg_importance_(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:
    """EMax of every head's normalised gradients into ``accumulated``, and its mean; see :func:`fastcl.ops.spg_importance_`."""
    for stored, *heads in zip(accumulated, *grads_by_head, strict=True):
        for grad in heads:
            encode_(stored, torch.maximum(decode(stored, torch.float64), spg_normalise(grad)))
    return _mean(accumulated)


def _mean(accumulated: Sequence[Tensor]) -> Tensor:
    device = accumulated[0].device if accumulated else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for stored in accumulated:
        total += decode(stored, torch.float64).sum().to(total.device)
    return total / max(1, sum(stored.numel() for stored in accumulated))


def spg_moments(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:  # noqa: ARG001
    """First half of :func:`spg_importance_`, for tensors that are shards: [heads, tensors, 4], float64.

    A row is ``[shift, count, mean - shift, sum of (g - mean)^2]`` of one gradient. There is a head and a tensor.
    """
    return torch.stack([torch.stack([_moments(grad) for grad in head]) for head in grads_by_head])


def spg_update_(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]], rows: Sequence[Tensor]) -> Tensor:
    """Second half of :func:`spg_importance_`: the same, with the rows (one tensor in a list) of the whole tensors."""
    for head, moments in zip(grads_by_head, rows[0], strict=True):
        for stored, grad, row in zip(accumulated, head, moments, strict=True):
            encode_(stored, torch.maximum(decode(stored, torch.float64), _standardised(grad, row)))
    return _mean(accumulated)
