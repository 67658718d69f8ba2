"""Device functions over a launch's lists (``Launch.lists``) and its compiled shape (``Launch.options``): a kernel's way to its elements."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._math import address, pick, place, read, write

_WIDE_BIAS = tl.constexpr((1 << 40) + 1)


@triton.jit  # type: ignore[untyped-decorator]
def here(lists: tl.tuple, SHAPE: tl.constexpr) -> tl.tuple:
    """Where a program works: its encoded number, its block within its tensor, and how many elements of the block exist."""
    code, block, valid = place(lists.starts, lists.tails, SHAPE.T, SHAPE.BLOCK)
    return code, block, valid


@triton.jit  # type: ignore[untyped-decorator]
def beside(lists: tl.tuple, at: tl.tuple, C: tl.constexpr, SHAPE: tl.constexpr) -> tl.tensor:
    """The pointer to this program's tensor of list C."""
    return pick(lists.pointers, lists.starts, at[0], SHAPE.T, 1, C * SHAPE.T)


@triton.jit  # type: ignore[untyped-decorator]
def row_value(values: tl.tuple, lists: tl.tuple, at: tl.tuple, SHAPE: tl.constexpr) -> tl.tensor:
    """This program's number of ``Launch.per_row``."""
    return (pick(values, lists.starts, at[0], SHAPE.T) - 3) >> 1


@triton.jit  # type: ignore[untyped-decorator]
def elements(base: tl.tensor, lists: tl.tuple, at: tl.tuple, C: tl.constexpr, SHAPE: tl.constexpr) -> tl.tensor:
    """Addresses of the block's elements in list C, counted from ``base``."""
    s: tl.constexpr = SHAPE
    return address(base, at[1], at[0], lists.starts, lists.sizes, lists.strides, s.KINDS[C], s.T, s.D, s.BIAS, s.BLOCK, C, s.GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def read_list(lists: tl.tuple, at: tl.tuple, C: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """This program's block of list C."""
    return read(elements(beside(lists, at, C, SHAPE), lists, at, C, SHAPE), at[2], SHAPE.KINDS[C], MASKED, SHAPE.BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def write_list(lists: tl.tuple, at: tl.tuple, C: tl.constexpr, value: tl.tensor, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    """Store this program's block of list C."""
    write(elements(beside(lists, at, C, SHAPE), lists, at, C, SHAPE), value, at[2], MASKED, SHAPE.BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def base_index(lists: tl.tuple, at: tl.tuple, C: tl.constexpr, SHAPE: tl.constexpr) -> tl.tensor:
    """What list C of ``_indices`` counts from; if C < 0, the walk counts by itself."""
    if C < 0:
        base = at[1].to(tl.int64) * 0
    else:
        base = (beside(lists, at, C, SHAPE) - _WIDE_BIAS) >> 1
    return base


@triton.jit  # type: ignore[untyped-decorator]
def first_index(lists: tl.tuple, at: tl.tuple, C: tl.constexpr, SHAPE: tl.constexpr) -> tl.tensor:
    """The index of the block's first element, where list C is walked through in order."""
    return base_index(lists, at, C, SHAPE) + at[1].to(tl.int64) * SHAPE.BLOCK


@triton.jit  # type: ignore[untyped-decorator]
def indices(lists: tl.tuple, at: tl.tuple, C: tl.constexpr, SHAPE: tl.constexpr) -> tl.tensor:
    """The indices of the block's elements."""
    if C < 0:
        e = first_index(lists, at, C, SHAPE) + tl.arange(0, SHAPE.BLOCK)
    else:
        e = elements(base_index(lists, at, C, SHAPE), lists, at, C, SHAPE)
    return e


@triton.jit  # type: ignore[untyped-decorator]
def whole(words: tl.tuple, FIRST: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """The whole number that ``_lists.words`` has taken apart: uint32 of up to two words, else int64."""
    value = ((words[FIRST] - 3) >> 1).to(tl.uint32 if COUNT <= 2 else tl.int64)
    for n in tl.static_range(1, COUNT):
        value |= ((words[FIRST + n] - 3) >> 1).to(value.dtype) << (16 * n)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def numeral(numbers: tl.tuple, N: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """The N-th of the numbers that ``_lists.number`` has made for this precision."""
    if DTYPE == tl.float64:
        value = whole(numbers, 4 * N, 4).to(tl.float64, bitcast=True)
    else:
        value = tl.cast(numbers[N], tl.float32)
    return value
