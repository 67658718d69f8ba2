"""Accumulated importance on Triton; the definition is fastcl.reference.importance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, read_list, row_value, write_list
from fastcl.kernels._fisher import fisher_add_, fisher_squares, fisher_update_
from fastcl.kernels._lists import launches, on_device
from fastcl.kernels._math import decode, encode, maximum, precision, tanh_abs, total
from fastcl.kernels._moments import moments, scaling, statistics

__all__ = ["emax_", "fisher_add_", "fisher_squares", "fisher_update_", "spg_importance_", "spg_moments", "spg_update_"]

_HEADS = 4  # gradients that one sweep reads beside the accumulator; more heads take more sweeps
_CHUNK = 1024  # partial sums that one step of the last program takes


@triton.jit  # type: ignore[untyped-decorator]
def _larger(lists: tl.tuple, at: tl.tuple, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    old = read_list(lists, at, 0, SHAPE, MASKED)
    new = read_list(lists, at, 1, SHAPE, MASKED)
    if old.dtype == tl.uint8 and new.dtype == tl.uint8:
        # Codes order as what they stand for, and encoding gives a decoded code back.
        write_list(lists, at, 0, tl.maximum(old, new), SHAPE, MASKED)
    else:
        DTYPE: tl.constexpr = precision(old.dtype, new.dtype)
        write_list(lists, at, 0, encode(maximum(decode(old, DTYPE), decode(new, DTYPE)), old.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def emax_kernel(lists: tl.tuple, SHAPE: tl.constexpr) -> None:
    """One block of one tensor: ``I <- max(I, new)``."""
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _larger(lists, at, SHAPE, False)
    else:
        _larger(lists, at, SHAPE, True)


def emax_(importance: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """``I <- max(I, new)``; see :func:`fastcl.ops.emax_`."""
    for launch in launches(importance, new):
        with on_device(importance[0]):
            # Without contraction: the code of a stored uint8 must come back unchanged.
            emax_kernel[launch.grid](launch.lists, **launch.options)


@triton.jit  # type: ignore[untyped-decorator]
def _accumulate(
    lists: tl.tuple,
    at: tl.tuple,
    rows: tl.tensor,
    count: tl.tensor,
    sum_at: tl.tensor,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    DTYPE: tl.constexpr = rows.dtype.element_ty
    stored = read_list(lists, at, 0, SHAPE, MASKED)
    if len(SHAPE.KINDS) > 1:
        largest = decode(stored, DTYPE)
        for h in tl.static_range(1, len(SHAPE.KINDS)):
            x = decode(read_list(lists, at, h, SHAPE, MASKED), DTYPE)
            row = rows + ((h - 1) * count).to(tl.int64) * 4
            z = ((x * tl.load(row) - tl.load(row + 1)) - tl.load(row + 2)) * tl.load(row + 3)
            largest = maximum(largest, tanh_abs(z))
        stored = encode(largest, stored.dtype)
        write_list(lists, at, 0, stored, SHAPE, MASKED)
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    if stored.dtype == tl.uint8:
        # At most 4096 codes: their sum is exact in 32 bits.
        stored_sum = tl.sum(tl.where(exists, stored.to(tl.int32), 0), 0).to(tl.float64) / 255
    else:
        # The only float64 of this sweep, one addition per element: the mean of 10^9 values is as good as that of 10.
        stored_sum = tl.sum(tl.where(exists, stored.to(tl.float64), 0.0), 0)
    tl.store(sum_at, stored_sum)


@triton.jit(do_not_specialize=["first", "count"])  # type: ignore[untyped-decorator]
def spg_kernel(
    lists: tl.tuple,
    members: tl.tuple,
    rows: tl.tensor,
    count: tl.tensor,
    sums: tl.tensor,
    first: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:
    """One block of one tensor: ``a <- max(a, |tanh z| of every head)``, and the sum of what was stored.

    The first list is the accumulator, the others are the heads' gradients. ``rows`` has ``count`` rows per head, ``sums`` one place per
    block of the whole list, of which this launch owns those from ``first``.
    """
    at = here(lists, SHAPE)
    own = rows + row_value(members, lists, at, SHAPE).to(tl.int64) * 4
    sum_at = sums + (first + tl.program_id(0)).to(tl.int64)
    if at[2] == SHAPE.BLOCK:
        _accumulate(lists, at, own, count, sum_at, SHAPE, False)
    else:
        _accumulate(lists, at, own, count, sum_at, SHAPE, True)


@triton.jit(do_not_specialize=["blocks", "elements"])  # type: ignore[untyped-decorator]
def mean_kernel(sums: tl.tensor, mean: tl.tensor, blocks: tl.tensor, elements: tl.tensor, CHUNK: tl.constexpr) -> None:
    """The sums of all blocks, in a fixed order, over the number of elements."""
    tl.store(mean, total(sums, blocks, CHUNK) / elements.to(tl.float64))


def spg_importance_(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:
    """EMax of every head's standardised gradients into ``accumulated``, and its mean; see :func:`fastcl.ops.spg_importance_`."""
    device = accumulated[0].device if accumulated else None
    rows = [row for row in zip(accumulated, *grads_by_head, strict=True) if row[0].numel()]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=device)
    stored, *heads = (list(column) for column in zip(*rows, strict=True))
    return _sweeps(stored, heads, lambda group: moments(*_flat(stored, group)))


def spg_moments(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:
    """First half of :func:`spg_importance_`, for tensors that are shards; see :func:`fastcl.reference.importance.spg_moments`."""
    with on_device(accumulated[0]):
        return statistics(*_flat(accumulated, grads_by_head)).view(len(grads_by_head), len(accumulated), 4)


def spg_update_(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]], rows: Sequence[Tensor]) -> Tensor:
    """Second half of :func:`spg_importance_`, from the whole tensors' rows. No tensor is empty."""
    given = iter(rows[0].split(_HEADS))
    return _sweeps(accumulated, grads_by_head, lambda _: scaling(next(given).flatten(0, 1)))


def _flat(stored: Sequence[Tensor], heads: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[bool]]:
    """The gradients in one list, and which of them are worked on in float64."""
    pairs = [(g, torch.float64 in (a.dtype, g.dtype)) for head in heads for a, g in zip(stored, head, strict=True)]
    return [g for g, _ in pairs], [double for _, double in pairs]


_Heads: TypeAlias = Sequence[Sequence[Tensor]]


def _sweeps(stored: Sequence[Tensor], heads: _Heads, constants: Callable[[_Heads], tuple[Tensor, Tensor]]) -> Tensor:
    with on_device(stored[0]):
        if not heads:
            return _sweep(stored, [], tuple(torch.empty(0, dtype=d, device=stored[0].device) for d in (torch.float32, torch.float64)))
        for at in range(0, len(heads), _HEADS):
            # One group after the other gives what all at once would: rounding keeps order, so the maximum may be rounded on the way.
            group = heads[at : at + _HEADS]
            mean = _sweep(stored, group, constants(group))
    return mean


def _sweep(stored: Sequence[Tensor], heads: _Heads, constants: tuple[Tensor, ...]) -> Tensor:
    """Standardise a few heads, accumulate them, and return the mean of what is stored."""
    device = stored[0].device
    tags = [torch.float64 in (a.dtype, *(g.dtype for g in row)) for a, *row in zip(stored, *heads, strict=True)]
    single_rows, double_rows = constants
    plan = list(launches(stored, *heads, tags=tags))
    blocks = sum(sum(launch.row_blocks) for launch in plan)
    sums = torch.empty(blocks, dtype=torch.float64, device=device)
    first = 0
    for launch in plan:
        rows = double_rows if launch.tag else single_rows
        spg_kernel[launch.grid](
            launch.lists, launch.per_row(launch.members), rows, len(stored), sums, first, **launch.options | {"enable_fp_fusion": True}
        )
        first += sum(launch.row_blocks)
    mean = torch.empty((), dtype=torch.float64, device=device)
    mean_kernel[(1,)](sums, mean, blocks, sum(t.numel() for t in stored), CHUNK=_CHUNK, enable_fp_fusion=True)
    return mean
