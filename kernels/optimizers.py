"""AdamW and SGD with the gradient transforms in their sweep, on Triton; the definition is fastcl.reference.optimizers.

What depends on a parameter's step count is a row of a small tensor that a few of torch's own operations make on the device: powers of beta
in float64, as the definition has them. The sweep's kernels know no float64 but the parameters'.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, read_list, row_value
from fastcl.kernels._adamw import adamw_kernel
from fastcl.kernels._indices import Place
from fastcl.kernels._lists import number, on_device
from fastcl.kernels._math import decode
from fastcl.kernels._products import CHUNK, sum_kernel
from fastcl.kernels._sgd import sgd_kernel
from fastcl.kernels._transforms import COLUMNS, Sweep, Transform, own_row, sweeps, transformed

Number = float | Tensor
Compact = tuple[Sequence[Tensor], Sequence[Tensor]]


@triton.jit  # type: ignore[untyped-decorator]
def _products(
    lists: tl.tuple,
    at: tl.tuple,
    row: tl.tensor,
    tensor: tl.tensor,
    numbers: tl.tuple,
    draws: tl.tuple,
    out: tl.tensor,
    blocks: tl.tensor,
    PLAN: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    p = decode(read_list(lists, at, 0, SHAPE, MASKED), row.dtype.element_ty)
    step = tl.load(row).to(tl.int64).to(tl.uint32)
    x = transformed(p, tl.load(row + 1), lists, at, numbers, draws, tensor, step, PLAN, SHAPE, MASKED).to(tl.float64)
    r = decode(read_list(lists, at, 2, SHAPE, MASKED), tl.float64)
    exists = tl.arange(0, SHAPE.BLOCK) < at[2]
    tl.store(out, tl.sum(tl.where(exists, x * r, 0.0), 0))
    tl.store(out + blocks.to(tl.int64), tl.sum(tl.where(exists, r * r, 0.0), 0))


@triton.jit(do_not_specialize=["first", "blocks"])  # type: ignore[untyped-decorator]
def dot_kernel(
    lists: tl.tuple,
    members: tl.tuple,
    tensors: tl.tuple,
    rows: tl.tensor,
    numbers: tl.tuple,
    draws: tl.tuple,
    partials: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    PLAN: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One block's part of ``T(g).r`` and of ``r.r``."""
    at = here(lists, SHAPE)
    row = own_row(rows, members, lists, at, SHAPE)
    tensor = row_value(tensors, lists, at, SHAPE).to(tl.uint32)
    out = partials + (first + tl.program_id(0)).to(tl.int64)
    if at[2] == SHAPE.BLOCK:
        _products(lists, at, row, tensor, numbers, draws, out, blocks, PLAN, SHAPE, False)
    else:
        _products(lists, at, row, tensor, numbers, draws, out, blocks, PLAN, SHAPE, True)


def _single(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    single: float = rounded
    return single


def _rows(params: Sequence[Tensor], steps: Sequence[Tensor], scale: Tensor | None, found_inf: Tensor | None = None) -> Tensor:
    """[tensors, COLUMNS] in float64: the first three columns filled."""
    rows = torch.zeros(len(params), COLUMNS, dtype=torch.float64, device=params[0].device)
    if steps:
        rows[:, 0] = torch.stack(list(steps))
    rows[:, 1] = 1 if scale is None else scale.reshape(())
    if found_inf is not None:
        rows[:, 2] = found_inf.reshape(())
    return rows


def _in_both(rows: Tensor) -> dict[bool, Tensor]:
    """The rows for parameters that are computed in float32 and in float64."""
    return {False: rows.float(), True: rows}


def _args(sweep: Sweep, rows: dict[bool, Tensor]) -> tuple[Any, ...]:
    per_row = sweep.launch.per_row
    return sweep.launch.lists, per_row(sweep.members), per_row(sweep.tensors), rows[sweep.double]


def _advance_(steps: Sequence[Tensor], found_inf: Tensor | None) -> None:
    if steps:
        one = 1 if found_inf is None else (found_inf.reshape(()) == 0).to(steps[0].dtype)
        torch._foreach_add_(list(steps), one)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    compact: Compact | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    hf: bool,
    maximize: bool,
) -> None:
    """One step of AdamW; see :func:`fastcl.ops.adamw_`."""
    if not params:
        return
    with on_device(params[0]):
        rows = _rows(params, steps, scale, found_inf)
        t = rows[:, 0] + 1
        # A number divided by a tensor would be multiplied by its reciprocal, so the rate is a tensor too.
        rate = lr.double() if isinstance(lr, Tensor) else torch.full_like(t, lr)
        bias1, bias2 = 1 - torch.pow(beta1, t), 1 - torch.pow(beta2, t)
        rows[:, 3] = -(rate * bias2.sqrt() / bias1) if hf else -(rate / bias1)
        # As Python's x ** 0.5, which torch's own loop takes: now and then one ulp of double from the square root.
        rows[:, 4] = 1 if hf else torch.pow(bias2, torch.full_like(bias2, 0.5))
        rows[:, 5] = -rate * weight_decay if hf else 1 - rate * weight_decay
        both = _in_both(rows)
        for small in (False, True):
            members = [n for n, p in enumerate(params) if p.numel() and (compact is not None and compact[0][n].numel() > 0) == small]
            lists, others = [params, grads], [exp_avgs, exp_avg_sqs, *(compact or ())]
            for sweep in sweeps(members, *((lists, others) if small else (lists + others[:2], [])), transforms, places):
                own = [number(value, sweep.double) for value in (1 - beta1, beta1, 1 - beta2, beta2, eps)]
                adamw_kernel[sweep.launch.grid](
                    *_args(sweep, both),
                    sweep.numbers,
                    sum(own, ()),
                    sweep.draws,
                    PLAN=sweep.plan,
                    COMPACT=small,
                    HF=hf,
                    FAR=(1 - beta1 if sweep.double else _single(1 - beta1)) >= 0.5,
                    DECAY=weight_decay != 0,
                    MAXIMIZE=maximize,
                    **sweep.launch.options,
                )
        _advance_(steps, found_inf)


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: Number,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """One step of stochastic gradient descent; see :func:`fastcl.ops.sgd_`."""
    if not params:
        return
    with on_device(params[0]):
        rows = _rows(params, steps, scale, found_inf)
        rows[:, 3] = -lr
        both = _in_both(rows)
        members = [n for n, p in enumerate(params) if p.numel()]
        lists = [params, grads, momentum_buffers] if momentum != 0 else [params, grads]
        for sweep in sweeps(members, lists, [], transforms, places):
            own = [number(value, sweep.double) for value in (weight_decay, momentum, 1 - dampening)]
            sgd_kernel[sweep.launch.grid](
                *_args(sweep, both),
                sweep.numbers,
                sum(own, ()),
                sweep.draws,
                PLAN=sweep.plan,
                MOMENTUM=momentum != 0,
                FIRST=first,
                NESTEROV=nesterov,
                DECAY=weight_decay != 0,
                MAXIMIZE=maximize,
                **sweep.launch.options,
            )
        _advance_(steps, found_inf)


def transformed_dot(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    scale: Tensor | None,
    reference: Sequence[Tensor],
) -> Tensor:
    """``[T(g).r, r.r]``, float64; see :func:`fastcl.ops.transformed_dot`."""
    members = [n for n, p in enumerate(params) if p.numel()]
    out = torch.zeros(2, dtype=torch.float64, device=params[0].device if params else None)
    if not members:
        return out
    with on_device(params[0]):
        both = _in_both(_rows(params, steps, scale))
        plan = list(sweeps(members, [params, grads, reference], [], transforms, places))
        blocks = sum(sweep.launch.grid[0] for sweep in plan)
        partials = torch.empty(2 * blocks, dtype=torch.float64, device=out.device)
        begin = 0
        for sweep in plan:
            dot_kernel[sweep.launch.grid](
                *_args(sweep, both), sweep.numbers, sweep.draws, partials, begin, blocks, PLAN=sweep.plan, **sweep.launch.options
            )
            begin += sweep.launch.grid[0]
        sum_kernel[(2,)](partials, out, blocks, 0, 0, 1, 1, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
    return out
