"""Dot products of lists of tensors, in two stages, each in a fixed order.

A block leaves one float64 per pair of lists in a workspace, and one program per pair sums these. Products of float32 and of 16-bit floats
are exact in float64. The workspace holds 8 bytes per pair and block: of whole blocks below 2 % of what the lists take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, read_list
from fastcl.kernels._lists import Launch, launches
from fastcl.kernels._math import decode, total

CHUNK = 4096  # partial sums that one step of a last program takes
_SCALAR = tl.constexpr(1)


@triton.jit  # type: ignore[untyped-decorator]
def _products(
    lists: tl.tuple,
    at: tl.tuple,
    out: tl.tensor,
    blocks: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    values = ()
    for c in tl.static_range(len(SHAPE.KINDS)):
        values = values + (decode(read_list(lists, at, c, SHAPE, MASKED), tl.float64),)  # noqa: RUF005
    for n in tl.static_range(len(LEFT)):
        product = values[LEFT[n]] * values[RIGHT[n]]
        if MASKED or (SHAPE.KINDS[LEFT[n]] == _SCALAR and SHAPE.KINDS[RIGHT[n]] == _SCALAR):
            # Not by the zeros of masked loads: what is one value for all elements may be Inf, and Inf * 0 is NaN.
            product = tl.where(exists, product, 0.0)
        tl.store(out + n * blocks.to(tl.int64), tl.sum(product, 0))


@triton.jit(do_not_specialize=["first", "blocks"])  # type: ignore[untyped-decorator]
def products_kernel(
    lists: tl.tuple,
    partials: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block of every list: the dot products of the pairs ``(LEFT[n], RIGHT[n])`` of lists.

    ``partials`` has ``blocks`` places per pair, of which this launch owns those from ``first``.
    """
    at = here(lists, SHAPE)
    out = partials + (first + tl.program_id(0)).to(tl.int64)
    if at[2] == SHAPE.BLOCK:
        _products(lists, at, out, blocks, LEFT, RIGHT, SHAPE, False)
    else:
        _products(lists, at, out, blocks, LEFT, RIGHT, SHAPE, True)


@triton.jit(do_not_specialize=["blocks", "row", "column", "height", "width"])  # type: ignore[untyped-decorator]
def sum_kernel(
    partials: tl.tensor,
    out: tl.tensor,
    blocks: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """One pair of a tile: its element and the mirrored one of the Gram matrix, ``[width, width]``.

    A tile beside the diagonal has ``height`` lists on one side; one on the diagonal has height 0 and the pairs ``i <= j``, ordered by j.
    """
    pair = tl.program_id(0)
    value = total(partials + pair * blocks.to(tl.int64), blocks, CHUNK)
    i = pair
    j = pair * 0
    if height > 0:
        i = pair % height
        j = pair // height
    else:
        while i > j:
            j += 1
            i -= j
    tl.store(out + (row + i) * width + column + j, value)
    tl.store(out + (column + j) * width + row + i, value)


def partial_sums(plan: Sequence[Launch], left: Sequence[int], right: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    """The partial sums of the pairs of lists, pair by pair, and how many each pair has."""
    blocks = sum(launch.grid[0] for launch in plan)
    partials = torch.empty(len(left) * blocks, dtype=torch.float64, device=device)
    first = 0
    for launch in plan:
        options = launch.options | {"enable_fp_fusion": True}
        products_kernel[launch.grid](launch.lists, partials, first, blocks, LEFT=tuple(left), RIGHT=tuple(right), **options)
        first += launch.grid[0]
    return partials, blocks


def fill_tile(out: Tensor, lists: Sequence[Sequence[Tensor]], row: int, height: int, column: int, block: int) -> None:
    """Fill one tile of the Gram matrix, ``lists[:height]`` beside the rest; on the diagonal if ``height`` is 0."""
    plan = list(launches(*lists, block=block))
    sides = (range(height), range(height, len(lists))) if height else (range(len(lists)),) * 2
    pairs = [(i, j) for j in sides[1] for i in sides[0] if height or i <= j]
    left, right = zip(*pairs, strict=True)
    partials, blocks = partial_sums(plan, left, right, out.device)
    sum_kernel[(len(pairs),)](partials, out, blocks, row, column, height, len(out), CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
