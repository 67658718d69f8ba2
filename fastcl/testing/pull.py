"""EWC's pull: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import gradients, importances

STRENGTH = 0.35


def _args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    """Gradients and parameters of one dtype, precision and anchor of another."""
    grads, params = (gradients(shapes, dtype, device, seed + n) for n in range(2))
    return grads, params, importances(shapes, stored, device, seed + 2), gradients(shapes, stored, device, seed + 3), STRENGTH


def _official(grads: list[Tensor], params: list[Tensor], precision: list[Tensor], anchor: list[Tensor], strength: float) -> None:
    """The penalty as a term of the loss, through autograd."""
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in params]
        penalty = torch.stack([(a * (p - c) ** 2).sum() for p, a, c in zip(leaves, precision, anchor, strict=True)]).sum()
        found = torch.autograd.grad(strength * penalty, leaves)
    for g, f in zip(grads, found, strict=True):
        g += f


def _eager(grads: list[Tensor], params: list[Tensor], precision: list[Tensor], anchor: list[Tensor], strength: float) -> None:
    for g, p, a, c in zip(grads, params, precision, anchor, strict=True):
        g.add_(a * (p - c), alpha=2 * strength)


def _foreach(grads: list[Tensor], params: list[Tensor], precision: list[Tensor], anchor: list[Tensor], strength: float) -> None:
    distance = torch._foreach_sub(params, anchor)
    torch._foreach_mul_(distance, precision)
    torch._foreach_add_(grads, distance, alpha=2 * strength)


CASES = (
    OpCase(
        name="ewc_pull_",
        call=ops.ewc_pull_,
        reference=reference.ewc_pull_,
        make=_args,
        providers={"official": _official, "eager": _eager, "foreach": _foreach},
        bytes_per_element=lambda gradient, stored: 3 * gradient + 2 * stored,
        bitwise=True,
        uint8=False,
    ),
)
