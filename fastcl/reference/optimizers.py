"""AdamW and SGD whose one sweep carries gradient transforms. The definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.reference._storage import compute_dtype
from fastcl.reference._transforms import Transform, transformed
from fastcl.reference.bit_mask import unpack
from fastcl.reference.child_mask import Place
from fastcl.reference.projection import grad_dot

Number = float | Tensor
Compact = tuple[Sequence[Tensor], Sequence[Tensor]]


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    compact: Compact | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    hf: bool,
    maximize: bool,
) -> None:
    """One step of AdamW; see :func:`fastcl.ops.adamw_`."""
    for i, (param, grad, first, second, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        dtype = compute_dtype(param)
        child = compact[0][i] if compact is not None and compact[0][i].numel() else None
        mask = unpack(child, param.numel()).view(param.shape) if child is not None else None
        x = transformed(i, param, grad, dtype, step, transforms, places, scale)
        x = -x if maximize else x
        p, m, v = param.to(dtype, copy=True), _spread(first, mask), _spread(second, mask)
        t = step.double() + 1
        # A number divided by a tensor would be multiplied by its reciprocal.
        rate = lr.double() if isinstance(lr, Tensor) else torch.full_like(t, lr)
        bias1, bias2 = 1 - torch.pow(beta1, t), 1 - torch.pow(beta2, t)
        if hf:
            m.mul_(beta1).add_(x, alpha=1 - beta1)
            size, bias = -(rate * bias2.sqrt() / bias1), torch.ones_like(t)
        else:
            p.mul_((1 - rate * weight_decay).to(dtype))
            m.lerp_(x, 1 - beta1)
            # As Python's x ** 0.5, which torch's own loop takes: now and then one ulp of double from the square root.
            size, bias = -(rate / bias1), torch.pow(bias2, torch.full_like(bias2, 0.5))
        v.mul_(beta2).addcmul_(x, x, value=1 - beta2)
        move = size.to(dtype) * m / (_root(v).div_(bias.to(dtype)).add_(eps))
        p = p + move if mask is None else torch.where(mask, p + move, p)  # -0 + 0 would be 0
        if hf and weight_decay > 0:
            p = _fused(p, p, -rate * weight_decay)
        for target, value in ((param, p), (first, _gathered(m, mask, first)), (second, _gathered(v, mask, second)), (step, step + 1)):
            _write_(target, value, found_inf)


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: Number,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """One step of stochastic gradient descent; see :func:`fastcl.ops.sgd_`."""
    lr = lr.double() if isinstance(lr, Tensor) else lr
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        dtype = compute_dtype(param)
        step = steps[i] if steps else None
        x = transformed(i, param, grad, dtype, step, transforms, places, scale)
        x = -x if maximize else x
        p = param.to(dtype)
        if weight_decay != 0:
            x = torch.add(x, p, alpha=weight_decay)
        written = [] if step is None else [(step, step + 1)]
        if momentum != 0:
            buffer = momentum_buffers[i]
            new = x if first else (buffer * momentum).add_(x, alpha=1 - dampening)
            written.append((buffer, new))
            x = torch.add(x, new, alpha=momentum) if nesterov else new
        for target, value in [*written, (param, _fused(p, x, -lr))]:
            _write_(target, value, found_inf)


def transformed_dot(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    scale: Tensor | None,
    reference: Sequence[Tensor],
) -> Tensor:
    """``[T(g).r, r.r]``, float64: what a projection behind the transforms ``T`` decides by. Steps are read."""
    x = [
        transformed(i, p, g, compute_dtype(p), steps[i] if steps else None, transforms, places, scale)
        for i, (p, g) in enumerate(zip(params, grads, strict=True))
    ]
    return torch.stack([grad_dot(x, reference), grad_dot(reference, reference)])


def _fused(p: Tensor, x: Tensor, size: Number) -> Tensor:
    """``p + size * x`` with one rounding on the CPU, as torch's add with alpha."""
    if isinstance(size, Tensor):
        return torch.addcmul(p, x, size.to(p.dtype))
    return torch.add(p, x, alpha=size)


def _root(v: Tensor) -> Tensor:
    """The square root, correctly rounded. torch.sqrt on the CPU may be an ulp off: a vector library's, by processor."""
    if v.dtype == torch.float32:
        return torch.sqrt(v.double()).float()
    if not v.is_cpu:
        return torch.sqrt(v)
    return torch.where(v < 0, torch.nan, torch.sqrt(torch.complex(v, torch.zeros_like(v))).real)  # the C library's, which is exact


def _spread(state: Tensor, mask: Tensor | None) -> Tensor:
    """State for every element: that of the mask's elements in their places, zeros elsewhere."""
    if mask is None:
        return state.clone()
    return torch.zeros(mask.shape, dtype=state.dtype, device=state.device).masked_scatter_(mask, state)


def _gathered(value: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """The elements that the mask selects, in row-major order, without waiting for their number."""
    if mask is None:
        return value
    flat = mask.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, like.numel())
    return value.new_empty(like.numel() + 1).scatter_(0, slot, value.flatten())[:-1]


def _write_(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) != 0, target, value.to(target.dtype)))
