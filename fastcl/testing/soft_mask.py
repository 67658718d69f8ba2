"""Soft masking: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import decode, gradients, importances


def _soft_mask_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return gradients(shapes, dtype, device, seed), importances(shapes, stored, device, seed + 1), 0.75


def _soft_mask_official(grads: list[Tensor], importance: list[Tensor], strength: float = 1.0) -> None:
    for n, g in enumerate(grads):
        mask = 1 - strength * decode(importance[n])
        grads[n].copy_(g * mask)


def _soft_mask_eager(grads: list[Tensor], importance: list[Tensor], strength: float = 1.0) -> None:
    for g, i in zip(grads, importance, strict=True):
        g.mul_(1 - strength * decode(i))


def _soft_mask_foreach(grads: list[Tensor], importance: list[Tensor], strength: float = 1.0) -> None:
    if any(i.dtype != g.dtype for g, i in zip(grads, importance, strict=True)):
        importance = [decode(i).to(g.dtype) for g, i in zip(grads, importance, strict=True)]
    torch._foreach_addcmul_(grads, grads, importance, value=-strength)


CASES = (
    OpCase(
        name="soft_mask_",
        call=ops.soft_mask_,
        reference=reference.soft_mask_,
        make=_soft_mask_args,
        providers={"official": _soft_mask_official, "eager": _soft_mask_eager, "foreach": _soft_mask_foreach},
        bytes_per_element=lambda gradient, stored: 2 * gradient + stored,
        bitwise=True,
        broadcasts=True,
    ),
)
