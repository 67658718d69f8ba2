"""Mean and standard deviation of every tensor of a list, in a fixed order: a partial result per block, then one program per tensor.

Element arithmetic is in the tensor's precision (float32 for 16-bit floats), because float64 runs at 1/64 of the speed on most GPUs. It
is enough: each block is shifted twice, by its first element (which makes a constant block exactly zero) and then by its rough mean, so
that what is squared has the size of the deviation and not of the value. What leaves a block is float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, read_list, row_value
from fastcl.kernels._lists import CAPACITIES, encode, launches, padded_capacity
from fastcl.kernels._math import decode

_CHUNK = 1024  # partial results that one step of the combining program takes


@triton.jit  # type: ignore[untyped-decorator]
def _block_moments(x: tl.tensor, valid: tl.tensor, at: tl.tensor, BLOCK: tl.constexpr) -> None:
    lane = tl.arange(0, BLOCK)
    exists = lane < valid
    if x.dtype == tl.float32:
        # By a power of two, so that squares of tiny or huge gradients stay in range; exact.
        exponent = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        up = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        down = 1.0
        up = 1.0
    y = x * down
    first = tl.sum(tl.where(lane == 0, y, 0.0), 0)
    rough = first + tl.sum(tl.where(exists, y - first, 0.0), 0) / valid.to(x.dtype)
    d = tl.where(exists, y - rough, 0.0)
    count = valid.to(tl.float64)
    total = tl.sum(d, 0).to(tl.float64)
    squares = tl.sum(d * d, 0).to(tl.float64)
    # The mean as two numbers: their sum would round away what distinguishes tensors whose deviation is tiny beside their mean.
    tl.store(at, count)
    tl.store(at + 1, rough.to(tl.float64) * up)
    tl.store(at + 2, total / count * up)
    # Not clamped at 0 by a max, which would hide a NaN; rounding may leave a tiny negative value.
    m2 = squares - total * total / count
    tl.store(at + 3, tl.where(m2 < 0, 0.0, m2) * up * up)


@triton.jit  # type: ignore[untyped-decorator]
def moments_kernel(lists: tl.tuple, bases: tl.tuple, partials: tl.tensor, DTYPE: tl.constexpr, SHAPE: tl.constexpr) -> None:
    """Count, mean (in two parts) and sum of squared deviations of one block."""
    at = here(lists, SHAPE)
    out = partials + (row_value(bases, lists, at, SHAPE) + at[1]).to(tl.int64) * 4
    if at[2] == SHAPE.BLOCK:
        _block_moments(decode(read_list(lists, at, 0, SHAPE, False), DTYPE), at[2], out, SHAPE.BLOCK)
    else:
        _block_moments(decode(read_list(lists, at, 0, SHAPE, True), DTYPE), at[2], out, SHAPE.BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _store_scaling(shift: tl.tensor, count: tl.tensor, rest: tl.tensor, m2: tl.tensor, singles: tl.tensor, doubles: tl.tensor) -> None:
    std = tl.sqrt(m2 / tl.maximum(count - 1, 1))
    constant = std == 0
    divisor = tl.where(constant, 1.0, std)
    # A constant tensor comes out as 0, because its inverse is 0 and not 1 / 0.
    tl.store(doubles, 1.0)
    tl.store(doubles + 1, shift)
    tl.store(doubles + 2, rest)
    tl.store(doubles + 3, tl.where(constant, 0.0, 1 / divisor))
    # For float32: x is scaled by a power of two near 1 / std, and the mean is split in two, which subtracts it as if it were exact.
    exponent = ((divisor.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    mean = (shift + rest) * scale
    high = mean.to(tl.float32)
    tl.store(singles, scale.to(tl.float32))
    tl.store(singles + 1, high)
    tl.store(singles + 2, (mean - high.to(tl.float64)).to(tl.float32))
    tl.store(singles + 3, tl.where(constant, 0.0, 1 / (divisor * scale)).to(tl.float32))


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def combine_kernel(
    partials: tl.tensor,
    begins: tl.tuple,
    singles: tl.tensor,
    doubles: tl.tensor,
    first: tl.tensor,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    APART: tl.constexpr,
) -> None:
    """Chan's formula over one tensor's blocks, shifted by the first block's mean, and the constants that the second sweep needs.

    Of a shard (``APART``) the moments themselves, since the constants are those of the whole tensor.
    """
    pair = tl.program_id(0)
    begin = begins[0]
    end = begins[1]
    for t in tl.static_range(1, T):
        begin = tl.where(pair >= t, begins[t], begin)
        end = tl.where(pair >= t, begins[t + 1], end)
    begin = (begin - 3) >> 1
    end = (end - 3) >> 1
    lane = tl.arange(0, CHUNK)
    shift = tl.load(partials + begin.to(tl.int64) * 4 + 1)
    # while, not range: with numpy >= 2.4 the interpreter of Triton 3.6 cannot iterate over a range whose bounds are tensors.
    count = tl.full((CHUNK,), 0, tl.float64)
    moved = tl.full((CHUNK,), 0, tl.float64)
    chunk = begin
    while chunk < end:
        at = partials + (chunk + lane).to(tl.int64) * 4
        exists = chunk + lane < end
        n = tl.load(at, mask=exists, other=0)
        off = (tl.load(at + 1, mask=exists, other=0) - shift) + tl.load(at + 2, mask=exists, other=0)
        count += n
        moved += tl.where(exists, n * off, 0)
        chunk += CHUNK
    elements = tl.sum(count, 0)
    rest = tl.sum(moved, 0) / elements
    m2 = tl.full((CHUNK,), 0, tl.float64)
    chunk = begin
    while chunk < end:
        at = partials + (chunk + lane).to(tl.int64) * 4
        exists = chunk + lane < end
        off = (tl.load(at + 1, mask=exists, other=0) - shift) + (tl.load(at + 2, mask=exists, other=0) - rest)
        m2 += tl.where(exists, tl.load(at + 3, mask=exists, other=0) + tl.load(at, mask=exists, other=0) * off * off, 0)
        chunk += CHUNK
    row = (first + pair).to(tl.int64) * 4
    if APART:
        tl.store(doubles + row, shift)
        tl.store(doubles + row + 1, elements)
        tl.store(doubles + row + 2, rest)
        tl.store(doubles + row + 3, tl.sum(m2, 0))
    else:
        _store_scaling(shift, elements, rest, tl.sum(m2, 0), singles + row, doubles + row)


@triton.jit  # type: ignore[untyped-decorator]
def scaling_kernel(moments: tl.tensor, singles: tl.tensor, doubles: tl.tensor) -> None:
    """The constants of one tensor from its row ``[shift, count, mean - shift, m2]``."""
    row = tl.program_id(0).to(tl.int64) * 4
    at = moments + row
    _store_scaling(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), singles + row, doubles + row)


def _constants(tensors: int, device: torch.device) -> tuple[Tensor, Tensor]:
    singles, doubles = (torch.empty(4 * tensors, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64))
    return singles, doubles


def moments(tensors: Sequence[Tensor], double: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """What standardises each non-empty tensor: rows ``[s, high, low, inverse]`` for ``((x * s - high) - low) * inverse``.

    The first result is in float32, the second in float64.
    ``double`` says which tensors are worked on in float64.
    """
    singles, doubles = _constants(len(tensors), tensors[0].device)
    _measure(tensors, double, singles, doubles, apart=False)
    return singles, doubles


def statistics(tensors: Sequence[Tensor], double: Sequence[bool]) -> Tensor:
    """Moments of each non-empty tensor: rows ``[shift, count, mean - shift, m2]``, [tensors, 4] in float64."""
    rows = torch.empty(4 * len(tensors), dtype=torch.float64, device=tensors[0].device)
    _measure(tensors, double, rows, rows, apart=True)
    return rows.view(-1, 4)


def scaling(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`moments` returns, from rows as of :func:`statistics`."""
    singles, doubles = _constants(len(rows), rows.device)
    scaling_kernel[(len(rows),)](rows.contiguous(), singles, doubles, enable_fp_fusion=True)
    return singles, doubles


def _measure(tensors: Sequence[Tensor], double: Sequence[bool], singles: Tensor, doubles: Tensor, *, apart: bool) -> None:
    device = tensors[0].device
    plan = list(launches(tensors, tags=double))
    blocks = [0] * len(tensors)
    for launch in plan:
        for member, n in zip(launch.members, launch.row_blocks, strict=True):
            blocks[member] += n
    edges = [0, *itertools.accumulate(blocks)]
    partials = torch.empty(4 * edges[-1], dtype=torch.float64, device=device)
    cursor = list(edges)
    for launch in plan:
        bases = []
        for member, n in zip(launch.members, launch.row_blocks, strict=True):
            bases.append(cursor[member])
            cursor[member] += n
        dtype = tl.float64 if launch.tag else tl.float32
        options = launch.options | {"enable_fp_fusion": True}
        moments_kernel[launch.grid](launch.lists, launch.per_row(bases), partials, DTYPE=dtype, **options)
    for at in range(0, len(tensors), CAPACITIES[-1]):
        part = edges[at : at + CAPACITIES[-1] + 1]
        count = len(part) - 1
        capacity = padded_capacity(count)
        begins = encode([*part, *part[-1:] * (capacity - count)])
        combine_kernel[(count,)](partials, begins, singles, doubles, at, T=capacity, CHUNK=_CHUNK, APART=apart, enable_fp_fusion=True)
