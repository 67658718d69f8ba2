"""The counting sweep of the exact quantile on Triton; the definition is fastcl.reference.quantile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, read_list
from fastcl.kernels._lists import BLOCK, launches, on_device
from fastcl.kernels._math import decode, precision

DIGITS = {False: (11, 11, 10), True: (11, 11, 11, 11, 11, 9)}  # bits of a key's digits, most significant first
BINS = 2048
STRETCH = 8  # blocks that a program counts before it adds its counts to all others'
_BINS = tl.constexpr(BINS)
_LOWEST = tl.constexpr({False: -(1 << 31), True: -(1 << 63)})


@triton.jit  # type: ignore[untyped-decorator]
def _keys(value: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Whole numbers whose bits are ordered, as unsigned ones, as the values are; -0 counts as +0."""
    lowest: tl.constexpr = _LOWEST[WIDE]
    if WIDE:
        bits = value.to(tl.float64).to(tl.int64, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == lowest, 0, bits)
    return tl.where(bits < 0, ~bits, bits ^ lowest)


@triton.jit  # type: ignore[untyped-decorator]
def counts_kernel(
    lists: tl.tuple,
    prefixes: tl.tensor,
    out: tl.tensor,
    ABOVE: tl.constexpr,
    WIDTH: tl.constexpr,
    BELOW: tl.constexpr,
    WIDE: tl.constexpr,
    SHAPE: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """The digits of a stretch, PART.BLOCK elements at a time: WIDTH bits, beneath ABOVE bits that are a prefix, over BELOW bits."""
    code, stretch, count = here(lists, SHAPE)
    lane = tl.arange(0, PART.BLOCK)
    bins = tl.arange(0, _BINS)
    first = tl.zeros((_BINS,), tl.int32)
    second = tl.zeros((_BINS,), tl.int32)
    missing = tl.zeros((PART.BLOCK,), tl.int32)
    wanted = tl.load(prefixes)
    other = tl.load(prefixes + 1)
    # While, so that a short tensor ends early. Whole numbers are added: in any order they give the same.
    done = count * 0
    while done < count:
        at = (code, stretch * (SHAPE.BLOCK // PART.BLOCK) + done // PART.BLOCK, count - done)
        if count - done >= PART.BLOCK:
            stored = read_list(lists, at, 0, PART, False)
        else:
            stored = read_list(lists, at, 0, PART, True)
        # Of an expanded tensor one element stands for all.
        value = tl.broadcast_to(decode(stored, precision(stored.dtype, stored.dtype)), (PART.BLOCK,))
        exists = lane < count - done
        keys = _keys(value, WIDE)
        digits = ((keys >> BELOW) & ((1 << WIDTH) - 1)).to(tl.int32)
        chosen = exists & (value == value)
        if ABOVE:
            high = (keys >> (BELOW + WIDTH)) & ((1 << ABOVE) - 1)
            first += tl.histogram(digits, _BINS, mask=chosen & (high == wanted.to(high.dtype)))
            if wanted != other:
                second += tl.histogram(digits, _BINS, mask=chosen & (high == other.to(high.dtype)))
        else:
            first += tl.histogram(digits, _BINS, mask=chosen)
            missing += (exists & (value != value)).to(tl.int32)
        done += PART.BLOCK
    if not ABOVE:
        second = first
        absent = tl.sum(missing, 0).to(tl.int64)
        tl.atomic_add(out + _BINS, absent, sem="relaxed")
        tl.atomic_add(out + 2 * _BINS + 1, absent, sem="relaxed")
    elif wanted == other:
        second = first
    tl.atomic_add(out + bins, first.to(tl.int64), mask=first != 0, sem="relaxed")
    tl.atomic_add(out + _BINS + 1 + bins, second.to(tl.int64), mask=second != 0, sem="relaxed")


def radix_counts(tensors: Sequence[Tensor], prefixes: Tensor, level: int, wide: bool) -> Tensor:
    """How many elements have each digit; see :func:`fastcl.reference.quantile.radix_counts`."""
    widths = DIGITS[wide]
    counts = torch.zeros(2, BINS + 1, dtype=torch.int64, device=prefixes.device)
    with on_device(prefixes):
        for launch in launches(tensors, block=STRETCH * BLOCK):
            counts_kernel[launch.grid](
                launch.lists,
                prefixes,
                counts,
                ABOVE=sum(widths[:level]),
                WIDTH=widths[level],
                BELOW=sum(widths[level + 1 :]),
                WIDE=wide,
                PART=launch.shape._replace(BLOCK=min(launch.shape.BLOCK, BLOCK)),
                **launch.options,
            )
    return counts
