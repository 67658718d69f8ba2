"""Child-Tuning-F's random mask on Triton; the definition is fastcl.reference.child_mask."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import first_index, here, indices, numeral, read_list, row_value, whole, write_list
from fastcl.kernels._indices import Place, indexed, whole_indices
from fastcl.kernels._lists import number, on_device, words
from fastcl.kernels._math import decode, encode, precision

DRAW = 8  # values that :func:`drawing` makes


@triton.jit  # type: ignore[untyped-decorator]
def _one_of_four(words: tl.tuple, n: tl.tensor) -> tl.tensor:
    return tl.where(n < 2, tl.where(n == 0, words[0], words[1]), tl.where(n == 2, words[2], words[3]))


@triton.jit  # type: ignore[untyped-decorator]
def _in_turn(words: tl.tuple) -> tl.tensor:
    """The four words of the first draw, then those of the second, and so on, along a last dim of two dims of 2."""
    return tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))


@triton.jit  # type: ignore[untyped-decorator]
def _philox(block: tl.tensor, tensor: tl.tensor, step: tl.tensor, SECOND: tl.constexpr, key: tl.tuple) -> tl.tuple:
    high = (block >> 32).to(tl.uint32)
    if SECOND:
        high |= 0x80000000
    return tl.philox_impl(block.to(tl.uint32), high, tensor, step, key[0], key[1])


@triton.jit  # type: ignore[untyped-decorator]
def child(
    lists: tl.tuple,
    at: tl.tuple,
    draw: tl.tuple,
    FIRST: tl.constexpr,
    tensor: tl.tensor,
    step: tl.tensor,
    INDEX: tl.constexpr,
    GROUPED: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """Which elements of a block are kept. ``draw[FIRST:]`` is what :func:`drawing` makes; INDEX is the list of indices.

    GROUPED: the indices follow one another from a multiple of 8, so that a block of Philox serves eight elements.
    """
    limit = whole(draw, FIRST, 2)
    rest = whole(draw, FIRST + 2, 2)
    key = (whole(draw, FIRST + 4, 2), whole(draw, FIRST + 6, 2))
    e = indices(lists, at, INDEX, SHAPE)
    first = first_index(lists, at, INDEX, SHAPE)
    if GROUPED:
        w = _in_turn(_philox((first >> 3) + tl.arange(0, SHAPE.BLOCK // 8), tensor, step, False, key))
        u = tl.reshape(tl.join(w & 0xFFFF, w >> 16), (SHAPE.BLOCK,))
    else:
        w = _one_of_four(_philox(e >> 3, tensor, step, False, key), (e >> 1) & 3)
        u = tl.where((e & 1) == 0, w & 0xFFFF, w >> 16)
    kept = u < limit
    # One block of 16 has an element that its 16 bits leave undecided; all of it draws again.
    tie = (u == limit).to(tl.int32)
    if (rest != 0) & (tl.max(tie, 0) != 0):
        if GROUPED:
            r = tl.reshape(_in_turn(_philox((first >> 2) + tl.arange(0, SHAPE.BLOCK // 4), tensor, step, True, key)), (SHAPE.BLOCK,))
        else:
            r = _one_of_four(_philox(e >> 2, tensor, step, True, key), e & 3)
        kept = kept | ((tie != 0) & (r < rest))
    return kept


def drawing(keep: float, seed: int) -> tuple[int, ...]:
    """What :func:`child` needs to know of a mask: :data:`DRAW` values."""
    limit, rest = divmod(round(keep * 2**48), 2**32)
    return (*words(limit, 2), *words(rest, 2), *words(seed, 4))


@triton.jit  # type: ignore[untyped-decorator]
def _mask(lists: tl.tuple, at: tl.tuple, kept: tl.tensor, scale: tl.tuple, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    grad = read_list(lists, at, 0, SHAPE, MASKED)
    dtype: tl.constexpr = precision(grad.dtype, grad.dtype)
    factor = tl.where(kept, numeral(scale, 0, dtype), 0.0)
    write_list(lists, at, 0, encode(decode(grad, dtype) * factor, grad.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def child_mask_kernel(
    lists: tl.tuple,
    tensors: tl.tuple,
    draw: tl.tuple,
    scale: tl.tuple,
    INDEX: tl.constexpr,
    GROUPED: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block of one gradient: ``g <- g * Bernoulli(keep) / keep``."""
    at = here(lists, SHAPE)
    tensor = row_value(tensors, lists, at, SHAPE).to(tl.uint32)
    kept = child(lists, at, draw, 0, tensor, whole(draw, 8, 2), INDEX, GROUPED, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _mask(lists, at, kept, scale, SHAPE, False)
    else:
        _mask(lists, at, kept, scale, SHAPE, True)


def child_mask_at_(grads: Sequence[Tensor], keep: float, seed: int, step: int, places: Sequence[Place] | None) -> None:
    """:func:`child_mask_` for tensors that are parts of parameters; see :func:`fastcl.reference.child_mask.child_mask_at_`."""
    draw = (*drawing(keep, seed), *words(step, 2))
    for launch, column in indexed(grads, whole_indices(grads, places)):
        with on_device(grads[0]):
            child_mask_kernel[launch.grid](
                launch.lists,
                launch.per_row([m if places is None else places[m][0] for m in launch.members]),
                draw,
                number(1 / keep, launch.double),
                INDEX=column,
                GROUPED=launch.aligned(column),
                **launch.options,
            )


def child_mask_(grads: Sequence[Tensor], keep: float, seed: int, step: int) -> None:
    """``g <- g * Bernoulli(keep) / keep``; see :func:`fastcl.ops.child_mask_`."""
    child_mask_at_(grads, keep, seed, step, None)
