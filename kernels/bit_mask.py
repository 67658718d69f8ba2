"""Masks of one bit per element on Triton; the definition is fastcl.reference.bit_mask."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import beside, first_index, here, indices, read_list, write_list
from fastcl.kernels._indices import indexed, own_indices, row_major
from fastcl.kernels._lists import MOST_DIMS, launches, on_device
from fastcl.kernels._math import decode, precision


@triton.jit  # type: ignore[untyped-decorator]
def spread(codes: tl.tensor) -> tl.tensor:
    """The bits of bytes, lowest first: eight times as many int32, 0 or 1."""
    return tl.reshape((codes[:, None] >> tl.arange(0, 8)[None, :]) & 1, (codes.shape[0] * 8,))


@triton.jit  # type: ignore[untyped-decorator]
def chosen(
    bits: tl.tensor,
    lists: tl.tuple,
    at: tl.tuple,
    INDEX: tl.constexpr,
    GROUPED: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Which elements of a block have their bit set. GROUPED: the block's bits follow one another from the start of a byte."""
    if GROUPED:
        byte = tl.arange(0, SHAPE.BLOCK // 8)
        at_bits = bits + (first_index(lists, at, INDEX, SHAPE) >> 3) + byte
        if MASKED:
            codes = tl.load(at_bits, mask=8 * byte < at[2], other=0)
        else:
            codes = tl.load(at_bits)
        set_bits = spread(codes.to(tl.int32))
    else:
        e = indices(lists, at, INDEX, SHAPE)
        if MASKED:
            codes = tl.load(bits + (e >> 3), mask=tl.arange(0, SHAPE.BLOCK) < at[2], other=0)
        else:
            codes = tl.load(bits + (e >> 3))
        set_bits = (codes.to(tl.int32) >> (e & 7).to(tl.int32)) & 1
    return set_bits != 0


@triton.jit  # type: ignore[untyped-decorator]
def _select(
    lists: tl.tuple, at: tl.tuple, BITS: tl.constexpr, INDEX: tl.constexpr, GROUPED: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr
) -> None:
    kept = chosen(beside(lists, at, BITS, SHAPE), lists, at, INDEX, GROUPED, SHAPE, MASKED)
    grad = read_list(lists, at, 0, SHAPE, MASKED)
    write_list(lists, at, 0, tl.where(kept, grad, tl.zeros_like(grad)), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def bit_mask_kernel(lists: tl.tuple, BITS: tl.constexpr, INDEX: tl.constexpr, GROUPED: tl.constexpr, SHAPE: tl.constexpr) -> None:
    """One block of one gradient: ``g`` where its bit is set, else ``+0``."""
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _select(lists, at, BITS, INDEX, GROUPED, SHAPE, False)
    else:
        _select(lists, at, BITS, INDEX, GROUPED, SHAPE, True)


def bit_mask_(grads: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
    """``g <- g`` where the bit is set, else ``+0``; see :func:`fastcl.ops.bit_mask_`."""
    for launch, column in indexed(grads, own_indices(grads), [bits]):
        with on_device(grads[0]):
            # Where the walk is in order from 0, a byte serves eight elements.
            bit_mask_kernel[launch.grid](
                launch.lists, BITS=len(launch.columns) - 1, INDEX=column, GROUPED=launch.aligned(column), **launch.options
            )


@triton.jit  # type: ignore[untyped-decorator]
def _at_least(threshold: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The smallest number of this precision that is not below the threshold: compared with it, values need not become float64."""
    if DTYPE == tl.float64:
        limit = threshold
    else:
        near = threshold.to(tl.float32)
        bits = near.to(tl.int32, bitcast=True)
        above = tl.where(bits < 0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
        limit = tl.where(near.to(tl.float64) < threshold, above, near)
    return limit


@triton.jit  # type: ignore[untyped-decorator]
def _compare(
    lists: tl.tuple, at: tl.tuple, threshold: tl.tensor, BITS: tl.constexpr, VALUES: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr
) -> None:
    value = read_list(lists, at, VALUES, SHAPE, MASKED)
    dtype: tl.constexpr = precision(value.dtype, value.dtype)
    places = tl.arange(0, 8)[None, :]
    above = tl.reshape((decode(value, dtype) >= _at_least(tl.load(threshold), dtype)).to(tl.int32), (SHAPE.BLOCK // 8, 8))
    byte = tl.arange(0, SHAPE.BLOCK // 8)
    if MASKED:
        above = tl.where(8 * byte[:, None] + places < at[2], above, 0)
    codes = tl.sum(above << places, 1).to(tl.uint8)
    at_bits = beside(lists, at, BITS, SHAPE) + (first_index(lists, at, -1, SHAPE) >> 3) + byte
    if MASKED:
        tl.store(at_bits, codes, mask=8 * byte < at[2])
    else:
        tl.store(at_bits, codes)


@triton.jit  # type: ignore[untyped-decorator]
def threshold_kernel(lists: tl.tuple, threshold: tl.tensor, BITS: tl.constexpr, VALUES: tl.constexpr, SHAPE: tl.constexpr) -> None:
    """The bits of one block: ``value >= threshold``."""
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _compare(lists, at, threshold, BITS, VALUES, SHAPE, False)
    else:
        _compare(lists, at, threshold, BITS, VALUES, SHAPE, True)


def threshold_bits_(bits: Sequence[Tensor], tensors: Sequence[Tensor], threshold: Tensor) -> None:
    """``bit <- value >= threshold`` in float64; see :func:`fastcl.reference.bit_mask.threshold_bits_`."""
    # Bits are written in row-major order, so a list of indices leads the walk where the tensor would not lead it in this order.
    plain = [t.contiguous() if t.dim() > MOST_DIMS else t for t in tensors]
    for in_order in (True, False):
        rows = [(t, b) for t, b in zip(plain, bits, strict=True) if t.is_contiguous() == in_order]
        values = [t for t, _ in rows]
        lists = [values] if in_order else [[row_major(t.shape) for t in values], values]
        for launch in launches(*lists, beside=[[b for _, b in rows]]):
            with on_device(tensors[0]):
                threshold_kernel[launch.grid](launch.lists, threshold, BITS=len(lists), VALUES=len(lists) - 1, **launch.options)
