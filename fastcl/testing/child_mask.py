"""The child mask: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import gradients

KEEP = 0.3


def _args(shapes: Sequence[Shape], dtype: torch.dtype, other: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:  # noqa: ARG001
    return gradients(shapes, dtype, device, seed), KEEP, seed + 1, 3


def _official(grads: list[Tensor], keep: float, seed: int, step: int) -> None:  # noqa: ARG001
    """A distribution for each tensor, with a probability for each of its elements."""
    for n, g in enumerate(grads):
        mask = torch.distributions.Bernoulli(g.new_full(g.size(), keep)).sample()  # type: ignore[no-untyped-call]
        grads[n] *= mask / keep


def _eager(grads: list[Tensor], keep: float, seed: int, step: int) -> None:  # noqa: ARG001
    for g in grads:
        g.mul_(torch.empty_like(g).bernoulli_(keep).div_(keep))


def _foreach(grads: list[Tensor], keep: float, seed: int, step: int) -> None:  # noqa: ARG001
    torch._foreach_mul_(grads, [torch.empty_like(g).bernoulli_(keep) for g in grads])
    torch._foreach_mul_(grads, 1 / keep)


CASES = (
    OpCase(
        name="child_mask_",
        call=ops.child_mask_,
        reference=reference.child_mask_,
        make=_args,
        providers={"official": _official, "eager": _eager, "foreach": _foreach},
        bytes_per_element=lambda gradient, other: 2 * gradient,  # noqa: ARG005
        bitwise=True,
        uint8=False,
        alone=True,
        random=True,
    ),
)
