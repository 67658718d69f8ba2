"""Where the state of a child's elements lies when the others have none."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels._access import beside

RANK_BLOCK = 2048  # elements per entry of the ranks
_RANK_BLOCK = tl.constexpr(RANK_BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _set_bits(codes: tl.tensor) -> tl.tensor:
    """How many bits of each byte are set."""
    pairs = codes - ((codes >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


@triton.jit  # type: ignore[untyped-decorator]
def slots(lists: tl.tuple, at: tl.tuple, BITS: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> tl.tuple:
    """Which elements of a block are the child's, and the place of each in the state.

    Bits and ranks are lists BITS and BITS + 1; the walk is row-major.
    """
    first = at[1].to(tl.int64) * SHAPE.BLOCK
    bits = beside(lists, at, BITS, SHAPE)
    byte = tl.arange(0, SHAPE.BLOCK // 8)
    if MASKED:
        codes = tl.load(bits + (first >> 3) + byte, mask=8 * byte < at[2], other=0).to(tl.int32)
    else:
        codes = tl.load(bits + (first >> 3) + byte).to(tl.int32)
    counts = _set_bits(codes)
    base = tl.load(beside(lists, at, BITS + 1, SHAPE) + first // _RANK_BLOCK)
    if SHAPE.BLOCK < _RANK_BLOCK:
        # The ranks know the sum before the larger block that this one lies in.
        start = first // _RANK_BLOCK * (_RANK_BLOCK // 8)
        lead = tl.arange(0, _RANK_BLOCK // 8)
        earlier = tl.load(bits + start + lead, mask=start + lead < (first >> 3), other=0).to(tl.int32)
        base += tl.sum(_set_bits(earlier), 0)
    place = tl.arange(0, 8)[None, :]
    before = (tl.cumsum(counts, 0) - counts)[:, None] + _set_bits(codes[:, None] & ((1 << place) - 1))
    kept = tl.reshape((codes[:, None] >> place) & 1, (SHAPE.BLOCK,)) != 0
    return kept, base + tl.reshape(before, (SHAPE.BLOCK,))
