"""AdamW's sweep; see ``optimizers``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._access import beside, here, numeral, read_list, row_value, write_list
from fastcl.kernels._compact import slots
from fastcl.kernels._math import decode, divide, encode, root
from fastcl.kernels._transforms import own_row, transformed


@triton.jit  # type: ignore[untyped-decorator]
def _average(m: tl.tensor, v: tl.tensor, x: tl.tensor, numbers: tl.tuple, HF: tl.constexpr, FAR: tl.constexpr) -> tl.tuple:
    """Both moments after the gradient x, each with the roundings of torch's lerp, add and addcmul."""
    rate1 = numeral(numbers, 0, x.dtype)
    rate2 = numeral(numbers, 2, x.dtype)
    if HF:
        first = tl.fma(rate1, x, m * numeral(numbers, 1, x.dtype))
    elif FAR:
        first = tl.fma(rate1 - 1, x - m, x)
    else:
        first = tl.fma(rate1, x - m, m)
    return first, tl.fma(rate2 * x, x, v * numeral(numbers, 3, x.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def _adamw(
    lists: tl.tuple,
    at: tl.tuple,
    row: tl.tensor,
    tensor: tl.tensor,
    numbers: tl.tuple,
    own: tl.tuple,
    draws: tl.tuple,
    PLAN: tl.constexpr,
    COMPACT: tl.constexpr,
    HF: tl.constexpr,
    FAR: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    stored = read_list(lists, at, 0, SHAPE, MASKED)
    p = decode(stored, row.dtype.element_ty)
    step = tl.load(row).to(tl.int64).to(tl.uint32)
    x = transformed(p, tl.load(row + 1), lists, at, numbers, draws, tensor, step, PLAN, SHAPE, MASKED)
    if MAXIMIZE:
        x = -x
    if COMPACT:
        kept, slot = slots(lists, at, len(SHAPE.KINDS) + 2, SHAPE, MASKED)
        m_at = beside(lists, at, len(SHAPE.KINDS), SHAPE) + slot
        v_at = beside(lists, at, len(SHAPE.KINDS) + 1, SHAPE) + slot
        m = tl.load(m_at, mask=kept, other=0)
        v = tl.load(v_at, mask=kept, other=0)
    else:
        m = read_list(lists, at, 2, SHAPE, MASKED)
        v = read_list(lists, at, 3, SHAPE, MASKED)
    m, v = _average(m, v, x, own, HF, FAR)
    decay = tl.load(row + 5)
    if DECAY and not HF:
        p = p * decay
    moved = p + divide(tl.load(row + 3) * m, divide(root(v), tl.load(row + 4)) + numeral(own, 4, x.dtype))
    if COMPACT:
        p = tl.where(kept, moved, p)
    else:
        p = moved
    if DECAY and HF:
        p = tl.fma(p, decay, p)
    write_list(lists, at, 0, encode(p, stored.dtype), SHAPE, MASKED)
    if COMPACT:
        tl.store(m_at, m, mask=kept)
        tl.store(v_at, v, mask=kept)
    else:
        write_list(lists, at, 2, m, SHAPE, MASKED)
        write_list(lists, at, 3, v, SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def adamw_kernel(
    lists: tl.tuple,
    members: tl.tuple,
    tensors: tl.tuple,
    rows: tl.tensor,
    numbers: tl.tuple,
    own: tl.tuple,
    draws: tl.tuple,
    PLAN: tl.constexpr,
    COMPACT: tl.constexpr,
    HF: tl.constexpr,
    FAR: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block of one parameter and of its moments; nothing happens where found_inf is set."""
    at = here(lists, SHAPE)
    row = own_row(rows, members, lists, at, SHAPE)
    tensor = row_value(tensors, lists, at, SHAPE).to(tl.uint32)
    # fmt: off
    if tl.load(row + 2) == 0:
        if at[2] == SHAPE.BLOCK:
            _adamw(lists, at, row, tensor, numbers, own, draws, PLAN, COMPACT, HF, FAR, DECAY, MAXIMIZE, SHAPE, False)
        else:
            _adamw(lists, at, row, tensor, numbers, own, draws, PLAN, COMPACT, HF, FAR, DECAY, MAXIMIZE, SHAPE, True)
    # fmt: on
