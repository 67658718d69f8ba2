"""SGD's sweep; see ``optimizers``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._access import here, numeral, read_list, row_value, write_list
from fastcl.kernels._math import decode, encode
from fastcl.kernels._transforms import own_row, transformed


@triton.jit  # type: ignore[untyped-decorator]
def _sgd(
    lists: tl.tuple,
    at: tl.tuple,
    row: tl.tensor,
    tensor: tl.tensor,
    numbers: tl.tuple,
    own: tl.tuple,
    draws: tl.tuple,
    PLAN: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
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
    if DECAY:
        x = tl.fma(numeral(own, 0, x.dtype), p, x)
    if MOMENTUM:
        if FIRST:
            buffer = x
        else:
            old = read_list(lists, at, 2, SHAPE, MASKED)
            buffer = tl.fma(numeral(own, 2, x.dtype), x, old * numeral(own, 1, x.dtype))
        write_list(lists, at, 2, buffer, SHAPE, MASKED)
        if NESTEROV:
            x = tl.fma(numeral(own, 1, x.dtype), buffer, x)
        else:
            x = buffer
    write_list(lists, at, 0, encode(tl.fma(tl.load(row + 3), x, p), stored.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def sgd_kernel(
    lists: tl.tuple,
    members: tl.tuple,
    tensors: tl.tuple,
    rows: tl.tensor,
    numbers: tl.tuple,
    own: tl.tuple,
    draws: tl.tuple,
    PLAN: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block of one parameter and of its momentum; nothing happens where found_inf is set."""
    at = here(lists, SHAPE)
    row = own_row(rows, members, lists, at, SHAPE)
    tensor = row_value(tensors, lists, at, SHAPE).to(tl.uint32)
    # fmt: off
    if tl.load(row + 2) == 0:
        if at[2] == SHAPE.BLOCK:
            _sgd(lists, at, row, tensor, numbers, own, draws, PLAN, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, SHAPE, False)
        else:
            _sgd(lists, at, row, tensor, numbers, own, draws, PLAN, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, SHAPE, True)
    # fmt: on
