"""Soft masking of gradients on Triton; the definition is fastcl.reference.soft_mask."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._lists import halves, launches, on_device
from fastcl.kernels._math import address, decode, encode, float64, pick, place, precision, read, write


@triton.jit  # type: ignore[untyped-decorator]
def _scale(
    g_at: tl.tensor,
    i_at: tl.tensor,
    valid: tl.tensor,
    strength: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    grad = read(g_at, valid, 0, MASKED, BLOCK)
    stored = read(i_at, valid, KIND, MASKED, BLOCK)
    dtype: tl.constexpr = precision(grad.dtype, stored.dtype)
    factor = float64(high, low) if dtype == tl.float64 else tl.cast(strength, tl.float32)
    free = 1 - factor * decode(stored, dtype)
    write(g_at, encode(grad.to(dtype) * free, grad.dtype), valid, MASKED, BLOCK)


@triton.jit(do_not_specialize=["strength", "high", "low"])  # type: ignore[untyped-decorator]
def soft_mask_kernel(
    grads: tl.tuple,
    importance: tl.tuple,
    starts: tl.tuple,
    tails: tl.tuple,
    sizes: tl.tuple,
    g_strides: tl.tuple,
    i_strides: tl.tuple,
    strength: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    KINDS: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one gradient: ``g <- g * (1 - strength * I)``."""
    code, block, valid = place(starts, tails, T, BLOCK)
    g = pick(grads, starts, code, T)
    i = pick(importance, starts, code, T)
    g_at = address(g, block, code, starts, sizes, g_strides, KINDS[0], T, D, BIAS, BLOCK)
    i_at = address(i, block, code, starts, sizes, i_strides, KINDS[1], T, D, BIAS, BLOCK)
    if valid == BLOCK:
        _scale(g_at, i_at, valid, strength, high, low, KINDS[1], False, BLOCK)
    else:
        _scale(g_at, i_at, valid, strength, high, low, KINDS[1], True, BLOCK)


def soft_mask_(grads: Sequence[Tensor], importance: Sequence[Tensor], strength: float = 1.0) -> None:
    """``g <- g * (1 - strength * I)``; see :func:`fastcl.ops.soft_mask_`."""
    for launch in launches(grads, importance):
        with on_device(grads[0]):
            # Without contraction: 1 - s * I in one rounding would not be the definition.
            soft_mask_kernel[launch.grid](*launch.args, strength, *halves(strength), **launch.constants, enable_fp_fusion=False)
