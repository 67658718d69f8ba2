"""Soft masking of gradients on Triton; the definition is fastcl.reference.soft_mask."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, numeral, read_list, write_list
from fastcl.kernels._lists import launches, number, on_device
from fastcl.kernels._math import decode, encode, precision


@triton.jit  # type: ignore[untyped-decorator]
def _scale(lists: tl.tuple, at: tl.tuple, strength: tl.tuple, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    grad = read_list(lists, at, 0, SHAPE, MASKED)
    stored = read_list(lists, at, 1, SHAPE, MASKED)
    dtype: tl.constexpr = precision(grad.dtype, stored.dtype)
    free = 1 - numeral(strength, 0, dtype) * decode(stored, dtype)
    write_list(lists, at, 0, encode(decode(grad, dtype) * free, grad.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def soft_mask_kernel(lists: tl.tuple, strength: tl.tuple, SHAPE: tl.constexpr) -> None:
    """One block of one gradient: ``g <- g * (1 - strength * I)``."""
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _scale(lists, at, strength, SHAPE, False)
    else:
        _scale(lists, at, strength, SHAPE, True)


def soft_mask_(grads: Sequence[Tensor], importance: Sequence[Tensor], strength: float = 1.0) -> None:
    """``g <- g * (1 - strength * I)``; see :func:`fastcl.ops.soft_mask_`."""
    for launch in launches(grads, importance):
        with on_device(grads[0]):
            soft_mask_kernel[launch.grid](launch.lists, number(strength, launch.double), **launch.options)
