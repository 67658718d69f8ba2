"""The kernels of the Kronecker family: one program solves a small layer, and two sweeps serve layers of any size.

A program computes ``V = G (X A)`` by rows of X: as soon as ``ROWS`` rows are multiplied by A, their part of ``G (X A)`` is added. So each
element of X is made once for both products (in a step, the new momentum goes back to memory on the way), and of the products only V and
``ROWS`` rows are held. What is padded is masked, and reaches nothing but padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._access import here, numeral, read_list, write_list
from fastcl.kernels._layers import apart, entries, extent, matrix, place
from fastcl.kernels._math import decode, encode

PRODUCT, QUADRATIC, STEP, DIRECTION = 0, 1, 2, 3
_STEP = tl.constexpr(STEP)
_DIRECTION = tl.constexpr(DIRECTION)
_QUADRATIC = tl.constexpr(QUADRATIC)
_ROWS = tl.constexpr(16)


@triton.jit  # type: ignore[untyped-decorator]
def _multiplied(left: tl.tensor, right: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """``sums + left @ right`` without TF32, which would leave 10 of float32's 23 bits."""
    return tl.dot(left, right, sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _moved(
    at: tl.tensor, m_at: tl.tensor, h_at: tl.tensor, exists: tl.tensor, numbers: tl.tuple, MODE: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """``rho M + g + lambda H``; in a step it becomes M, and ``H <- H - lr M``."""
    m = tl.load(m_at, mask=exists, other=0)
    h = tl.load(h_at, mask=exists, other=0)
    new = numeral(numbers, 0, DTYPE) * m + decode(tl.load(at, mask=exists, other=0), DTYPE) + numeral(numbers, 1, DTYPE) * h
    if MODE == _STEP:
        # Where a tile has fewer elements than the program threads, several threads read what one of them writes.
        tl.debug_barrier()
        tl.store(m_at, new, mask=exists)
        tl.store(h_at, h - numeral(numbers, 2, DTYPE) * new, mask=exists)
    return new


@triton.jit  # type: ignore[untyped-decorator]
def _part(
    at: tl.tensor, m_at: tl.tensor, h_at: tl.tensor, exists: tl.tensor, numbers: tl.tuple, MODE: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """A part of X: what stands there, or of a step the new momentum."""
    if MODE >= _STEP:
        x = _moved(at, m_at, h_at, exists, numbers, MODE, DTYPE)
    else:
        x = decode(tl.load(at, mask=exists, other=0), DTYPE)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _solved(layers: tl.tuple, numbers: tl.tuple, MODE: tl.constexpr, PLAN: tl.constexpr, DTYPE: tl.constexpr) -> tl.tuple:
    """``G X A``: the tile, and the column that stands apart."""
    COLUMNS: tl.constexpr = 16 if DTYPE == tl.float64 else 32
    m, n = extent(layers, PLAN)
    a, a_step = matrix(layers, 0, PLAN)
    g, g_step = matrix(layers, 1, PLAN)
    # Without a step nothing is read there.
    moving, m_step = matrix(layers, 2 if MODE >= _STEP else 0, PLAN)
    pulling, h_step = matrix(layers, 3 if MODE >= _STEP else 0, PLAN)
    lower = tl.arange(0, PLAN.M)
    across = tl.arange(0, PLAN.N)
    v = tl.zeros((PLAN.M, PLAN.N), DTYPE)
    v_tail = tl.zeros((PLAN.M,), DTYPE)
    # while, not range: with numpy >= 2.4 the interpreter of Triton 3.6 cannot iterate over a range whose bounds are tensors.
    begin = m * 0
    while begin < m:
        rows = begin + tl.arange(0, _ROWS)
        some = rows < m
        p = tl.zeros((_ROWS, PLAN.N), DTYPE)
        p_tail = tl.zeros((_ROWS,), DTYPE)
        j = n * 0
        while j < n:
            columns = j + tl.arange(0, COLUMNS)
            m_at = moving + (rows[:, None] * m_step + columns[None, :])
            h_at = pulling + (rows[:, None] * h_step + columns[None, :])
            at = entries(layers, rows, columns, 0, PLAN)
            x = _part(at, m_at, h_at, some[:, None] & (columns < n)[None, :], numbers, MODE, DTYPE)
            a_at = a + (columns[:, None] * a_step + across[None, :])
            p = _multiplied(x, tl.load(a_at, mask=(columns < n)[:, None] & (across < n)[None, :], other=0), p)
            if PLAN.TAIL:
                edge = tl.load(a + (columns * a_step + n), mask=columns < n, other=0)
                p_tail += tl.sum(x * edge[None, :], 1)
            j += COLUMNS
        if PLAN.TAIL:
            at = apart(layers, rows, 0, PLAN)
            x = _part(at, moving + (rows * m_step + n), pulling + (rows * h_step + n), some, numbers, MODE, DTYPE)
            edge = tl.load(a + n * a_step + across, mask=across < n, other=0)
            p += x[:, None] * edge[None, :]
            p_tail += x * tl.load(a + n * a_step + n)
        # A factor's Inf times the padding's 0.
        p = tl.where(some[:, None], p, 0.0)
        p_tail = tl.where(some, p_tail, 0.0)
        part = tl.load(g + (lower[:, None] * g_step + rows[None, :]), mask=(lower < m)[:, None] & some[None, :], other=0)
        v = _multiplied(part, p, v)
        if PLAN.TAIL:
            v_tail += tl.sum(part * p_tail[None, :], 1)
        begin += _ROWS
    return v, v_tail


@triton.jit  # type: ignore[untyped-decorator]
def _dot(x: tl.tensor, v: tl.tensor, exists: tl.tensor) -> tl.tensor:
    # Not by the zeros of masked loads: a NaN of the layer stands in the padding of v too.
    products = tl.where(exists, x.to(tl.float64) * v.to(tl.float64), 0.0)
    return tl.sum(products)


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(layers: tl.tuple, out: tl.tensor, MODE: tl.constexpr, DTYPE: tl.constexpr, PLAN: tl.constexpr) -> None:
    """``X <- G X A`` of one layer; of a quadratic form ``<X, G X A>``, and X stays."""
    v, v_tail = _solved(layers, (), MODE, PLAN, DTYPE)
    m, n = extent(layers, PLAN)
    rows = tl.arange(0, PLAN.M)
    columns = tl.arange(0, PLAN.N)
    exists = (rows < m)[:, None] & (columns < n)[None, :]
    at = entries(layers, rows, columns, 0, PLAN)
    tail_at = apart(layers, rows, 0, PLAN)
    if MODE == _QUADRATIC:
        q = _dot(decode(tl.load(at, mask=exists, other=0), DTYPE), v, exists)
        if PLAN.TAIL:
            q += _dot(decode(tl.load(tail_at, mask=rows < m, other=0), DTYPE), v_tail, rows < m)
        tl.store(out + place(layers, PLAN), q)
    else:
        tl.store(at, encode(v, at.dtype.element_ty), mask=exists)
        if PLAN.TAIL:
            tl.store(tail_at, encode(v_tail, tail_at.dtype.element_ty), mask=rows < m)


@triton.jit  # type: ignore[untyped-decorator]
def _descended(at: tl.tensor, v: tl.tensor, step: tl.tensor, exists: tl.tensor) -> None:
    w = tl.load(at, mask=exists, other=0)
    tl.store(at, encode(decode(w, v.dtype) - step * v, w.dtype), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def step_kernel(layers: tl.tuple, numbers: tl.tuple, MODE: tl.constexpr, DTYPE: tl.constexpr, PLAN: tl.constexpr) -> None:
    """The whole step of one layer, with the step size ``lr``."""
    v, v_tail = _solved(layers, numbers, MODE, PLAN, DTYPE)
    m, n = extent(layers, PLAN)
    rows = tl.arange(0, PLAN.M)
    columns = tl.arange(0, PLAN.N)
    lr = numeral(numbers, 2, DTYPE)
    _descended(entries(layers, rows, columns, 1, PLAN), v, lr, (rows < m)[:, None] & (columns < n)[None, :])
    if PLAN.TAIL:
        _descended(apart(layers, rows, 1, PLAN), v_tail, lr, rows < m)


@triton.jit  # type: ignore[untyped-decorator]
def direction_kernel(
    layers: tl.tuple, numbers: tl.tuple, out: tl.tensor, MODE: tl.constexpr, DTYPE: tl.constexpr, PLAN: tl.constexpr
) -> None:
    """M and V of one layer, and ``<M, V>``."""
    v, v_tail = _solved(layers, numbers, MODE, PLAN, DTYPE)
    m, n = extent(layers, PLAN)
    rows = tl.arange(0, PLAN.M)
    columns = tl.arange(0, PLAN.N)
    exists = (rows < m)[:, None] & (columns < n)[None, :]
    m_base, m_step = matrix(layers, 2, PLAN)
    h_base, h_step = matrix(layers, 3, PLAN)
    v_base, v_step = matrix(layers, 4, PLAN)
    # M is made once more and written at last: a thread that read what others have written would depend on more than a barrier on AMD.
    m_at = m_base + (rows[:, None] * m_step + columns[None, :])
    h_at = h_base + (rows[:, None] * h_step + columns[None, :])
    x = _moved(entries(layers, rows, columns, 0, PLAN), m_at, h_at, exists, numbers, MODE, DTYPE)
    q = _dot(x, v, exists)
    if PLAN.TAIL:
        tail_at = m_base + (rows * m_step + n)
        x_tail = _moved(apart(layers, rows, 0, PLAN), tail_at, h_base + (rows * h_step + n), rows < m, numbers, MODE, DTYPE)
        q += _dot(x_tail, v_tail, rows < m)
    tl.debug_barrier()
    tl.store(m_at, x, mask=exists)
    tl.store(v_base + (rows[:, None] * v_step + columns[None, :]), v, mask=exists)
    if PLAN.TAIL:
        tl.store(tail_at, x_tail, mask=rows < m)
        tl.store(v_base + (rows * v_step + n), v_tail, mask=rows < m)
    tl.store(out + place(layers, PLAN), q)


@triton.jit  # type: ignore[untyped-decorator]
def _momentum(
    lists: tl.tuple, at: tl.tuple, numbers: tl.tuple, MOVE: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr
) -> None:
    g = decode(read_list(lists, at, 0, SHAPE, MASKED), DTYPE)
    m = read_list(lists, at, 1, SHAPE, MASKED)
    h = read_list(lists, at, 2, SHAPE, MASKED)
    new = numeral(numbers, 0, DTYPE) * m + g + numeral(numbers, 1, DTYPE) * h
    write_list(lists, at, 1, new, SHAPE, MASKED)
    if MOVE:
        write_list(lists, at, 2, h - numeral(numbers, 2, DTYPE) * new, SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def momentum_kernel(lists: tl.tuple, numbers: tl.tuple, MOVE: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr) -> None:
    """One block of ``M <- rho M + g + lambda H``, and if ``MOVE``, of ``H <- H - lr M``."""
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _momentum(lists, at, numbers, MOVE, DTYPE, SHAPE, False)
    else:
        _momentum(lists, at, numbers, MOVE, DTYPE, SHAPE, True)


@triton.jit  # type: ignore[untyped-decorator]
def _apply(lists: tl.tuple, at: tl.tuple, step: tl.tensor, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    w = read_list(lists, at, 0, SHAPE, MASKED)
    h = read_list(lists, at, 1, SHAPE, MASKED)
    v = read_list(lists, at, 2, SHAPE, MASKED)
    m = read_list(lists, at, 3, SHAPE, MASKED)
    write_list(lists, at, 0, encode(decode(w, v.dtype) - step * v, w.dtype), SHAPE, MASKED)
    write_list(lists, at, 1, h - step * m, SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def apply_kernel(lists: tl.tuple, step: tl.tensor, DTYPE: tl.constexpr, SHAPE: tl.constexpr) -> None:
    """One block of ``W <- W - s V`` and ``H <- H - s M``."""
    s = tl.load(step).to(DTYPE)
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _apply(lists, at, s, SHAPE, False)
    else:
        _apply(lists, at, s, SHAPE, True)
