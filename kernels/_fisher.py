"""Sums of squared gradients, each clipped by its own norm; the definition is fastcl.reference.importance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, numeral, read_list, row_value, write_list
from fastcl.kernels._lists import CAPACITIES, MOST_DIMS, encode, launches, number, on_device, padded_capacity
from fastcl.kernels._math import decode, precision, total
from fastcl.kernels._math import encode as rounded
from fastcl.kernels._products import CHUNK, partial_sums


@triton.jit  # type: ignore[untyped-decorator]
def segments_kernel(partials: tl.tensor, begins: tl.tuple, members: tl.tuple, out: tl.tensor, T: tl.constexpr, CHUNK: tl.constexpr) -> None:
    """The sum of one tensor's partial sums."""
    row = tl.program_id(0)
    begin = begins[0]
    end = begins[1]
    member = members[0]
    for t in tl.static_range(1, T):
        begin = tl.where(row >= t, begins[t], begin)
        end = tl.where(row >= t, begins[t + 1], end)
        member = tl.where(row >= t, members[t], member)
    begin = (begin - 3) >> 1
    tl.store(out + ((member - 3) >> 1), total(partials + begin.to(tl.int64), ((end - 3) >> 1) - begin, CHUNK))


@triton.jit  # type: ignore[untyped-decorator]
def _add_square(lists: tl.tuple, at: tl.tuple, clip: tl.tensor, weight: tl.tuple, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    stored = read_list(lists, at, 0, SHAPE, MASKED)
    grad = read_list(lists, at, 1, SHAPE, MASKED)
    dtype: tl.constexpr = precision(stored.dtype, grad.dtype)
    x = decode(grad, dtype) * clip
    write_list(lists, at, 0, rounded(decode(stored, dtype) + numeral(weight, 0, dtype) * (x * x), stored.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def fisher_kernel(lists: tl.tuple, members: tl.tuple, coefficients: tl.tensor, weight: tl.tuple, SHAPE: tl.constexpr) -> None:
    """One block of one tensor: ``F <- F + weight * (c g)^2``."""
    at = here(lists, SHAPE)
    clip = tl.load(coefficients + row_value(members, lists, at, SHAPE))
    if at[2] == SHAPE.BLOCK:
        _add_square(lists, at, clip, weight, SHAPE, False)
    else:
        _add_square(lists, at, clip, weight, SHAPE, True)


def fisher_squares(grads: Sequence[Tensor]) -> Tensor:
    """``sum g^2`` of each tensor, [tensors], float64; see :func:`fastcl.reference.importance.fisher_squares`."""
    # A tensor that does not fit one walk would be cut, and its sum with it.
    plan = list(launches([g.contiguous() if g.dim() > MOST_DIMS else g for g in grads]))
    out = torch.zeros(len(grads), dtype=torch.float64, device=grads[0].device)
    with on_device(out):
        partials, _ = partial_sums(plan, (0,), (0,), out.device)
        members = [m for launch in plan for m in launch.members]
        edges = [0, *itertools.accumulate(n for launch in plan for n in launch.row_blocks)]
        for at in range(0, len(members), CAPACITIES[-1]):
            own = members[at : at + CAPACITIES[-1]]
            begins = edges[at : at + len(own) + 1]
            capacity = padded_capacity(len(own))
            padding = capacity - len(own)
            segments_kernel[(len(own),)](
                partials,
                encode(begins + begins[-1:] * padding),
                encode(own + own[-1:] * padding),
                out,
                T=capacity,
                CHUNK=CHUNK,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return out


def fisher_update_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, coefficients: Tensor) -> None:
    """``F <- F + weight * (c g)^2``; see :func:`fastcl.reference.importance.fisher_update_`."""
    with on_device(coefficients):
        rounded_once = {False: coefficients.float(), True: coefficients.contiguous()}
        for launch in launches(fisher, grads):
            fisher_kernel[launch.grid](
                launch.lists, launch.per_row(launch.members), rounded_once[launch.double], number(weight, launch.double), **launch.options
            )


def fisher_add_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0, max_norm: float | None = None) -> None:
    """``F <- F + weight * (c g)^2``, c clipping each tensor by its own norm; see :func:`fastcl.ops.fisher_add_`."""
    if not grads:
        return
    if max_norm is None:
        coefficients = torch.ones(len(grads), dtype=torch.float64, device=grads[0].device)
    else:
        coefficients = (max_norm / (fisher_squares(grads).sqrt() + 1e-6)).clamp(max=1)  # NaN stays
    fisher_update_(fisher, grads, weight, coefficients)
