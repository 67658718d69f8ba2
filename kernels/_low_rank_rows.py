"""The kernels of the low-rank family that run once per task: products of rows with each other, and new rows of old ones; all in float64.

The rows are ``sigma_j q_j`` of the basis and then ``D^-1/2 v_k`` of the vectors. A program takes a stretch of the elements, part by part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._access import beside, elements, here, read_list, row_value, write_list
from fastcl.kernels._low_rank import existing
from fastcl.kernels._math import decode

_FIRST = tl.constexpr(2)  # the list after the diagonal and the basis


@triton.jit  # type: ignore[untyped-decorator]
def _scale(d: tl.tensor) -> tl.tensor:
    """``D^-1/2``, made once for all vectors."""
    return 1 / tl.sqrt(d.to(tl.float64))


@triton.jit  # type: ignore[untyped-decorator]
def _vector(lists: tl.tuple, at: tl.tuple, scale: tl.tensor, K: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """``D^-1/2 v_k``."""
    return scale * existing(decode(read_list(lists, at, _FIRST + K, SHAPE, MASKED), tl.float64), at, 0.0, SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(
    lists: tl.tuple, at: tl.tuple, sigma: tl.tensor, stride: tl.tensor,
    BEGIN: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, SCALED: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The rows from BEGIN, N of them: [N, elements]."""
    row = BEGIN + tl.arange(0, N)
    kept = row < RANK
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    first = elements(beside(lists, at, 1, SHAPE), lists, at, 1, SHAPE)
    wanted = kept[:, None] & exists[None, :] if MASKED else kept[:, None]
    y = tl.load(first[None, :] + row[:, None].to(tl.int64) * stride, mask=wanted, other=0).to(tl.float64)
    if SCALED:
        y *= tl.load(sigma + row, mask=kept, other=0)[:, None]
    if len(SHAPE.KINDS) > _FIRST:
        scale = _scale(existing(read_list(lists, at, 0, SHAPE, MASKED), at, 1.0, SHAPE, MASKED))
    for k in tl.static_range(len(SHAPE.KINDS) - _FIRST):
        if RANK + k >= BEGIN and RANK + k < BEGIN + N:
            y = tl.where((row == RANK + k)[:, None], _vector(lists, at, scale, k, SHAPE, MASKED)[None, :], y)
    return y


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def gram_kernel(
    lists: tl.tuple,
    lengths: tl.tuple,
    sigma: tl.tensor,
    partials: tl.tensor,
    first: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGN: tl.constexpr,
    SHAPE: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """One stretch's part of the products of the N rows from LEFT with those from RIGHT: the matrix ``first + program`` of ``partials``."""
    code, stretch, count = here(lists, SHAPE)
    stride = row_value(lengths, lists, (code, stretch, count), SHAPE).to(tl.int64) * ALIGN
    sums = tl.zeros((N, N), tl.float64)
    done = count * 0
    while done < count:
        at = (code, stretch * (SHAPE.BLOCK // PART.BLOCK) + done // PART.BLOCK, count - done)
        if count - done >= PART.BLOCK:
            left = _rows(lists, at, sigma, stride, LEFT, N, RANK, SCALED, PART, False)
        else:
            left = _rows(lists, at, sigma, stride, LEFT, N, RANK, SCALED, PART, True)
        right = left
        if LEFT != RIGHT:
            if count - done >= PART.BLOCK:
                right = _rows(lists, at, sigma, stride, RIGHT, N, RANK, SCALED, PART, False)
            else:
                right = _rows(lists, at, sigma, stride, RIGHT, N, RANK, SCALED, PART, True)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee", out_dtype=tl.float64)
        done += PART.BLOCK
    row = tl.arange(0, N)
    tl.store(partials + (first + tl.program_id(0)).to(tl.int64) * (N * N) + (row[:, None] * N + row[None, :]), sums)


@triton.jit  # type: ignore[untyped-decorator]
def _mix(
    lists: tl.tuple, at: tl.tuple, sigma: tl.tensor, mix: tl.tensor, stride: tl.tensor,
    N: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, COMPRESS: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, N)
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    q_at = elements(beside(lists, at, 1, SHAPE), lists, at, 1, SHAPE)
    new = tl.zeros((N, SHAPE.BLOCK), tl.float64)
    for i in range(RANK):
        y = (tl.load(q_at + i * stride, mask=exists, other=0) if MASKED else tl.load(q_at + i * stride)).to(tl.float64)
        if COMPRESS:
            y *= tl.load(sigma + i)
        new += tl.load(mix + i * COUNT + row, mask=row < COUNT, other=0)[:, None] * y[None, :]
    if COMPRESS:
        d = existing(read_list(lists, at, 0, SHAPE, MASKED), at, 1.0, SHAPE, MASKED)
        scale = _scale(d)
    for k in tl.static_range(COUNT - RANK):
        weights = tl.load(mix + (RANK + k) * COUNT + row, mask=row < COUNT, other=0)
        new += weights[:, None] * _vector(lists, at, scale, k, SHAPE, MASKED)[None, :]
    if COMPRESS:
        factor = 1 + tl.sum(tl.where((row >= RANK)[:, None], new * new, 0.0), 0)
        new = new / tl.sqrt(factor)[None, :]
    # What one thread of the program writes others have read.
    tl.debug_barrier()
    if COMPRESS:
        write_list(lists, at, 0, (d.to(tl.float64) * factor).to(d.dtype), SHAPE, MASKED)
    to = q_at[None, :] + row[:, None].to(tl.int64) * stride
    wanted = (row < RANK)[:, None] & exists[None, :] if MASKED else (row < RANK)[:, None]
    tl.store(to, new.to(q_at.dtype.element_ty), mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def mix_kernel(
    lists: tl.tuple,
    lengths: tl.tuple,
    sigma: tl.tensor,
    mix: tl.tensor,
    N: tl.constexpr,
    RANK: tl.constexpr,
    COUNT: tl.constexpr,
    COMPRESS: tl.constexpr,
    ALIGN: tl.constexpr,
    SHAPE: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """One stretch of ``y' = mix^T y``: the first RANK become the basis; if ``COMPRESS``, the others' squares go to the diagonal."""
    code, stretch, count = here(lists, SHAPE)
    stride = row_value(lengths, lists, (code, stretch, count), SHAPE).to(tl.int64) * ALIGN
    done = count * 0
    while done < count:
        at = (code, stretch * (SHAPE.BLOCK // PART.BLOCK) + done // PART.BLOCK, count - done)
        if count - done >= PART.BLOCK:
            _mix(lists, at, sigma, mix, stride, N, RANK, COUNT, COMPRESS, PART, False)
        else:
            _mix(lists, at, sigma, mix, stride, N, RANK, COUNT, COMPRESS, PART, True)
        done += PART.BLOCK
