"""The kernels of the low-rank family: products with the rows of a basis, combinations of rows, products of rows with each other.

Every launch walks through the diagonal, whose elements stand in row-major order, and beside it through row 0 of the basis; the other rows
are a tensor's number of elements further each. Elements are in the diagonal's precision, sums in float64, and so is everything in the
kernels that run once per task (``gram_kernel``, ``mix_kernel``), whose rows are combined until they are orthonormal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._access import beside, elements, here, numeral, read_list, row_value, write_list
from fastcl.kernels._math import decode, divide, encode, precision, root

ROWS = 4  # rows of the basis that are read at once
_ROWS = tl.constexpr(ROWS)
SOLVED, MULTIPLIED, STEP = 0, 1, 2
_MULTIPLIED = tl.constexpr(MULTIPLIED)
_STEP = tl.constexpr(STEP)


@triton.jit  # type: ignore[untyped-decorator]
def existing(x: tl.tensor, at: tl.tuple, OTHER: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """OTHER where the tensor has no elements any more."""
    if MASKED:
        x = tl.where(tl.arange(0, SHAPE.BLOCK) < at[2], x, OTHER)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _width(lists: tl.tuple, at: tl.tuple, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """``D^1/2``."""
    return root(existing(read_list(lists, at, 0, SHAPE, MASKED), at, 1.0, SHAPE, MASKED))


@triton.jit  # type: ignore[untyped-decorator]
def _stride(lengths: tl.tuple, lists: tl.tuple, at: tl.tuple, ALIGN: tl.constexpr, SHAPE: tl.constexpr) -> tl.tensor:
    """From one row of the basis to the next."""
    return row_value(lengths, lists, at, SHAPE).to(tl.int64) * ALIGN


@triton.jit  # type: ignore[untyped-decorator]
def _first_row(lists: tl.tuple, at: tl.tuple, SHAPE: tl.constexpr) -> tl.tensor:
    return elements(beside(lists, at, 1, SHAPE), lists, at, 1, SHAPE)


@triton.jit  # type: ignore[untyped-decorator]
def _kept(
    lists: tl.tuple, at: tl.tuple, numbers: tl.tuple, MOMENTUM: tl.constexpr, STRENGTH: tl.constexpr, DTYPE: tl.constexpr,
    SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``u = rho V + lambda (W - mu)``."""
    u = tl.zeros((SHAPE.BLOCK,), DTYPE)
    if MOMENTUM:
        u += numeral(numbers, 0, DTYPE) * read_list(lists, at, 4, SHAPE, MASKED)
    if STRENGTH:
        w = decode(read_list(lists, at, 2, SHAPE, MASKED), DTYPE)
        u += numeral(numbers, 1, DTYPE) * (w - read_list(lists, at, 4 + MOMENTUM, SHAPE, MASKED))
    return u


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(
    lists: tl.tuple, at: tl.tuple, numbers: tl.tuple, FORM: tl.constexpr, MOMENTUM: tl.constexpr, STRENGTH: tl.constexpr,
    DTYPE: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The vectors that are multiplied with the rows: ``D^-1/2 x`` or ``D^1/2 x``; of a step ``D^-1/2 g`` and ``D^1/2 u``."""
    width = _width(lists, at, SHAPE, MASKED)
    x = decode(read_list(lists, at, 3 if FORM == _STEP else 2, SHAPE, MASKED), DTYPE)
    if FORM == _MULTIPLIED:
        z = (existing(x * width, at, 0.0, SHAPE, MASKED),)
    elif FORM == _STEP:
        u = _kept(lists, at, numbers, MOMENTUM, STRENGTH, DTYPE, SHAPE, MASKED)
        z = (existing(divide(x, width), at, 0.0, SHAPE, MASKED), existing(u * width, at, 0.0, SHAPE, MASKED))
    else:
        z = (existing(divide(x, width), at, 0.0, SHAPE, MASKED),)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _products(
    lists: tl.tuple, at: tl.tuple, stride: tl.tensor, rank: tl.tensor, z: tl.tuple, out: tl.tensor, blocks: tl.tensor,
    SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> None:  # fmt: skip
    first = _first_row(lists, at, SHAPE)
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    j = rank * 0
    while j < rank:
        row = j + tl.arange(0, _ROWS)
        some = row < rank
        q_at = first[None, :] + row[:, None].to(tl.int64) * stride
        if MASKED:
            q = tl.load(q_at, mask=some[:, None] & exists[None, :], other=0).to(tl.float64)
        else:
            q = tl.load(q_at, mask=some[:, None], other=0).to(tl.float64)
        for b in tl.static_range(len(z)):
            tl.store(out + (b * rank + row).to(tl.int64) * blocks, tl.sum(q * z[b].to(tl.float64)[None, :], 1), mask=some)
        j += _ROWS
    out += (len(z) * rank).to(tl.int64) * blocks
    for a in tl.static_range(len(z)):
        for b in tl.static_range(a, len(z)):
            tl.store(out, tl.sum(z[a].to(tl.float64) * z[b].to(tl.float64), 0))
            out += blocks


@triton.jit(do_not_specialize=["rank", "first", "blocks"])  # type: ignore[untyped-decorator]
def products_kernel(
    lists: tl.tuple,
    lengths: tl.tuple,
    numbers: tl.tuple,
    rank: tl.tensor,
    partials: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    FORM: tl.constexpr,
    MOMENTUM: tl.constexpr,
    STRENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block's part of the products of each vector with every row, and of the vectors with each other.

    ``partials`` has ``blocks`` places per product, of which this launch owns those from ``first``.
    """
    at = here(lists, SHAPE)
    stride = _stride(lengths, lists, at, ALIGN, SHAPE)
    out = partials + (first + tl.program_id(0)).to(tl.int64)
    if at[2] == SHAPE.BLOCK:
        z = _scaled(lists, at, numbers, FORM, MOMENTUM, STRENGTH, DTYPE, SHAPE, False)
        _products(lists, at, stride, rank, z, out, blocks, SHAPE, False)
    else:
        z = _scaled(lists, at, numbers, FORM, MOMENTUM, STRENGTH, DTYPE, SHAPE, True)
        _products(lists, at, stride, rank, z, out, blocks, SHAPE, True)


@triton.jit  # type: ignore[untyped-decorator]
def _row(at: tl.tensor, exists: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    if MASKED:
        return tl.load(at, mask=exists, other=0)
    return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def _solved(
    x: tl.tensor, lists: tl.tuple, at: tl.tuple, stride: tl.tensor, rank: tl.tensor, coefficients: tl.tensor,
    SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``D^-1/2 (z - sum_j c_j q_j)``, ``z = D^-1/2 x``."""
    width = _width(lists, at, SHAPE, MASKED)
    z = divide(x, width)
    q_at = _first_row(lists, at, SHAPE)
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    j = rank * 0
    # Several rows are under way at once.
    while j + _ROWS <= rank:
        for n in tl.static_range(_ROWS):
            z -= tl.load(coefficients + j + n).to(z.dtype) * _row(q_at + n * stride, exists, MASKED)
        q_at += _ROWS * stride
        j += _ROWS
    while j < rank:
        z -= tl.load(coefficients + j).to(z.dtype) * _row(q_at, exists, MASKED)
        q_at += stride
        j += 1
    return divide(z, width)


@triton.jit  # type: ignore[untyped-decorator]
def _update(
    lists: tl.tuple, at: tl.tuple, stride: tl.tensor, rank: tl.tensor, coefficients: tl.tensor, step: tl.tensor, numbers: tl.tuple,
    FORM: tl.constexpr, MOMENTUM: tl.constexpr, STRENGTH: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr,
) -> None:  # fmt: skip
    g = read_list(lists, at, 3 if FORM == _STEP else 2, SHAPE, MASKED)
    v = _solved(decode(g, DTYPE), lists, at, stride, rank, coefficients, SHAPE, MASKED)
    if FORM == _STEP:
        v += _kept(lists, at, numbers, MOMENTUM, STRENGTH, DTYPE, SHAPE, MASKED)
        if MOMENTUM:
            write_list(lists, at, 4, v, SHAPE, MASKED)
        w = read_list(lists, at, 2, SHAPE, MASKED)
        moved = (tl.load(step).to(DTYPE) * v).to(precision(w.dtype, DTYPE))
        write_list(lists, at, 2, encode(decode(w, moved.dtype) - moved, w.dtype), SHAPE, MASKED)
    else:
        write_list(lists, at, 2, encode(v, g.dtype), SHAPE, MASKED)


@triton.jit(do_not_specialize=["rank"])  # type: ignore[untyped-decorator]
def update_kernel(
    lists: tl.tuple,
    lengths: tl.tuple,
    numbers: tl.tuple,
    rank: tl.tensor,
    coefficients: tl.tensor,
    step: tl.tensor,
    FORM: tl.constexpr,
    MOMENTUM: tl.constexpr,
    STRENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block of ``x <- D^-1/2 (z - sum_j c_j q_j)``, or of a whole step."""
    at = here(lists, SHAPE)
    stride = _stride(lengths, lists, at, ALIGN, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _update(lists, at, stride, rank, coefficients, step, numbers, FORM, MOMENTUM, STRENGTH, DTYPE, SHAPE, False)
    else:
        _update(lists, at, stride, rank, coefficients, step, numbers, FORM, MOMENTUM, STRENGTH, DTYPE, SHAPE, True)
