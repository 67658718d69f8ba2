"""Gradient transforms inside another kernel's sweep on Triton; the definition is fastcl.reference._transforms.

Parameters that the same transforms act on share launches. Such a launch walks through its caller's lists, then through the transforms'
operands and the elements' indices. Beside them lie the caller's other lists, then bits and coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import beside, numeral, read_list, row_value
from fastcl.kernels._indices import Place, counts_itself, index, row_major
from fastcl.kernels._lists import Launch, launches, number
from fastcl.kernels._math import decode
from fastcl.kernels.bit_mask import chosen
from fastcl.kernels.child_mask import child, drawing

_SOFT_MASK, _CHILD_MASK, _FIXED_MASK, _PROJECT, _PULL = (tl.constexpr(n) for n in range(5))
_SCALAR = tl.constexpr(1)

BLOCK = 2048  # half of what others take: parameter, gradient, two moments and operands wait in registers at once

COLUMNS = (
    6  # of a parameter's row of numbers: steps before this one, scale of the gradient, found_inf, and what the optimizer's rule asks for
)
_COLUMNS = tl.constexpr(COLUMNS)
_WALKED = {"soft_mask": 1, "project": 1, "pull": 2}  # operands that are walked through

Transform = tuple[Any, ...]


class Plan(NamedTuple):
    """What is compiled in: per transform its kind and its places among lists, numbers and draws; the lists of indices."""

    STAGES: tuple[tuple[int, int, int, int], ...]
    OWN: int
    OWN_GROUPED: bool
    WHOLE: int
    WHOLE_GROUPED: bool


class Sweep(NamedTuple):
    """A launch and what its kernel hands to :func:`transformed`; ``members`` are the parameters' places in the lists."""

    launch: Launch
    members: tuple[int, ...]
    double: bool
    numbers: tuple[Any, ...]
    draws: tuple[int, ...]
    tensors: tuple[int, ...]
    plan: Plan


@triton.jit  # type: ignore[untyped-decorator]
def own_row(rows: tl.tensor, members: tl.tuple, lists: tl.tuple, at: tl.tuple, SHAPE: tl.constexpr) -> tl.tensor:
    """The pointer to this program's row of :data:`COLUMNS` numbers."""
    return rows + row_value(members, lists, at, SHAPE).to(tl.int64) * _COLUMNS


@triton.jit  # type: ignore[untyped-decorator]
def _stage(
    x: tl.tensor,
    p: tl.tensor,
    lists: tl.tuple,
    at: tl.tuple,
    numbers: tl.tuple,
    draws: tl.tuple,
    tensor: tl.tensor,
    step: tl.tensor,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    PLAN: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    if KIND == _SOFT_MASK:
        result = x * (1 - numeral(numbers, N, x.dtype) * decode(read_list(lists, at, A, SHAPE, MASKED), x.dtype))
    elif KIND == _CHILD_MASK:
        kept = child(lists, at, draws, A, tensor, step, PLAN.WHOLE, PLAN.WHOLE_GROUPED, SHAPE)
        result = x * tl.where(kept, numeral(numbers, N, x.dtype), 0.0)
    elif KIND == _FIXED_MASK:
        kept = chosen(beside(lists, at, A, SHAPE), lists, at, PLAN.OWN, PLAN.OWN_GROUPED, SHAPE, MASKED)
        result = tl.where(kept, x, 0.0)
    elif KIND == _PROJECT:
        v = tl.load(beside(lists, at, B, SHAPE))
        moved = x.to(tl.float64) + v * decode(read_list(lists, at, A, SHAPE, MASKED), tl.float64)
        result = tl.where(v == 0, x, moved.to(x.dtype))
    else:
        pull = decode(read_list(lists, at, A, SHAPE, MASKED), x.dtype) * (p - decode(read_list(lists, at, B, SHAPE, MASKED), x.dtype))
        result = x + numeral(numbers, N, x.dtype) * pull
    return result


@triton.jit  # type: ignore[untyped-decorator]
def transformed(
    p: tl.tensor,
    scale: tl.tensor,
    lists: tl.tuple,
    at: tl.tuple,
    numbers: tl.tuple,
    draws: tl.tuple,
    tensor: tl.tensor,
    step: tl.tensor,
    PLAN: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """The gradient, list 1, of the parameter ``p``, scaled and after all transforms, in the precision of ``p``."""
    x = decode(read_list(lists, at, 1, SHAPE, MASKED), p.dtype) * scale
    if SHAPE.KINDS[1] == _SCALAR:
        x = tl.broadcast_to(x, (SHAPE.BLOCK,))
    for n in tl.static_range(len(PLAN.STAGES)):
        # fmt: off
        x = _stage(x, p, lists, at, numbers, draws, tensor, step,
                   PLAN.STAGES[n][0], PLAN.STAGES[n][1], PLAN.STAGES[n][2], PLAN.STAGES[n][3], PLAN, SHAPE, MASKED)
        # fmt: on
    return x


def sweeps(
    rows: Sequence[int],
    lists: Sequence[Sequence[Tensor]],
    others: Sequence[Sequence[Tensor]],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
) -> Iterator[Sweep]:
    """Launches that visit the parameters ``rows`` of ``lists[0]``, whose gradients are ``lists[1]``; beside each are ``others``."""
    groups: dict[Any, list[int]] = {}
    for n in rows:
        p = lists[0][n]
        active = tuple(k for k, (kind, operand, *_) in enumerate(transforms) if kind == "child_mask" or operand[n].numel())
        kinds = {transforms[k][0] for k in active}
        whole = "child_mask" in kinds and places is not None
        own = not counts_itself(p) and ("fixed_mask" in kinds or ("child_mask" in kinds and not whole))
        groups.setdefault((active, own, whole), []).append(n)
    for (active, own, whole), members in groups.items():
        yield from _group([transforms[k] for k in active], own, places if whole else None, members, lists, others)


def _group(
    transforms: Sequence[Transform],
    own: bool,
    places: Sequence[Place] | None,
    members: Sequence[int],
    lists: Sequence[Sequence[Tensor]],
    others: Sequence[Sequence[Tensor]],
) -> Iterator[Sweep]:
    walked, aside = ([[column[n] for n in members] for column in columns] for columns in (lists, others))
    numbers: list[float] = []
    draws: list[int] = []
    last = len(walked) + sum(_WALKED.get(kind, 0) for kind, *_ in transforms) + own + (places is not None)
    stages: list[tuple[int, int, int, int]] = []
    for kind, *operands in transforms:
        if kind == "soft_mask":
            stages.append((_SOFT_MASK.value, len(walked), 0, len(numbers)))
            walked.append([operands[0][n] for n in members])
            numbers.append(operands[1])
        elif kind == "child_mask":
            stages.append((_CHILD_MASK.value, len(draws), 0, len(numbers)))
            draws += drawing(*operands)
            numbers.append(1 / operands[0])
        elif kind == "fixed_mask":
            stages.append((_FIXED_MASK.value, last + len(aside), 0, 0))
            aside.append([operands[0][n] for n in members])
        elif kind == "project":
            stages.append((_PROJECT.value, len(walked), last + len(aside), 0))
            walked.append([operands[0][n] for n in members])
            aside.append([operands[1]] * len(members))
        else:
            stages.append((_PULL.value, len(walked), len(walked) + 1, len(numbers)))
            walked += [[operand[n] for n in members] for operand in operands[:2]]
            numbers.append(2 * operands[2])
    own_column = whole_column = -1
    if own:
        own_column = len(walked)
        walked.append([row_major(lists[0][n].shape) for n in members])
        whole_column = own_column
    if places is not None:
        whole_column = len(walked)
        walked.append([index(lists[0][n].shape, places[n][1], places[n][2]) for n in members])
    for launch in launches(*walked, beside=aside, values=2, block=BLOCK):
        here = tuple(members[m] for m in launch.members)
        double = lists[0][here[0]].dtype == torch.float64
        yield Sweep(
            launch,
            here,
            double,
            sum((number(value, double) for value in numbers), ()) or (0,),
            tuple(draws) or (0,),
            tuple(here if places is None else (places[n][0] for n in here)),
            Plan(tuple(stages), own_column, launch.aligned(own_column), whole_column, launch.aligned(whole_column)),
        )
