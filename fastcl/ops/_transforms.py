"""Gradient transforms as the dispatcher carries them: flat lists, made here and taken apart here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastcl.ops import _checks, _places

# ("soft_mask", importance, strength), ("child_mask", keep, seed), ("fixed_mask", bits), ("project", reference, coefficient) and
# ("pull", precision, anchor, strength), with one tensor per parameter in each list.
Transform: TypeAlias = tuple[Any, ...]
Flat: TypeAlias = tuple[list[Tensor], list[int], list[float], list[int]]

KINDS = ("soft_mask", "child_mask", "fixed_mask", "project", "pull")
# Which of a transform's operands are lists, by name; and how many operands it has.
LISTS = {
    "soft_mask": ("importance",),
    "child_mask": (),
    "fixed_mask": ("masks",),
    "project": ("reference",),
    "pull": ("precision", "anchor"),
}
OPERANDS = {"soft_mask": 2, "child_mask": 2, "fixed_mask": 1, "project": 2, "pull": 3}


def flatten(transforms: Sequence[Transform]) -> Flat:
    """``operands, kinds, numbers, seeds``: a seed is a signed int64 there."""
    operands: list[Tensor] = []
    kinds: list[int] = []
    values: list[float] = []
    seeds: list[int] = []
    for kind, *rest in transforms:
        kinds.append(KINDS.index(kind))
        for tensors in rest[: len(LISTS[kind])]:
            operands.extend(tensors)
        if kind == "project":
            operands.append(rest[1])
        elif kind == "child_mask":
            values.append(rest[0])
            seeds.append(_places.signed(rest[1]))
        elif kind != "fixed_mask":
            values.append(rest[-1])
    return operands, kinds, values, seeds


def unflatten(
    count: int, operands: Sequence[Tensor], kinds: Sequence[int], values: Sequence[float], seeds: Sequence[int]
) -> list[Transform]:
    """The transforms of ``count`` parameters again. Raises ValueError where the lists do not fit each other."""
    tensors, number, seed = iter(operands), iter(values), iter(seeds)
    transforms: list[Transform] = []
    try:
        for k in kinds:
            kind = KINDS[k]
            lists = [[next(tensors) for _ in range(count)] for _ in LISTS[kind]]
            if kind == "project":
                transforms.append((kind, *lists, next(tensors)))
            elif kind == "child_mask":
                transforms.append((kind, next(number), _places.unsigned(next(seed))))
            else:
                transforms.append((kind, *lists) if kind == "fixed_mask" else (kind, *lists, next(number)))
    except (StopIteration, IndexError, RuntimeError):
        transforms, left = [], True
    else:
        left = any(next(i, None) is not None for i in (tensors, number, seed))
    if left:
        raise ValueError(f"transforms: {len(operands)} operands do not fit {len(kinds)} kinds and {count} parameters")
    return transforms


def select(transforms: Sequence[Transform], members: Sequence[int]) -> list[Transform]:
    """The transforms for some of the parameters."""
    return [
        (kind, *([tensors[i] for i in members] for tensors in rest[: len(LISTS[kind])]), *rest[len(LISTS[kind]) :])
        for kind, *rest in transforms
    ]


def absent(operand: Tensor, p: Tensor) -> bool:
    """Whether a transform leaves this tensor out."""
    return operand.numel() == 0 and p.numel() > 0


def listed(transforms: object, params: Sequence[Tensor]) -> None:
    """That ``transforms`` has the right form, before anything takes it apart.

    Raises TypeError or ValueError naming the transform and its operand.
    """
    if not isinstance(transforms, (list, tuple)):
        raise TypeError(f"transforms must be a list or tuple, got {type(transforms).__name__}")
    for k, transform in enumerate(transforms):
        if not isinstance(transform, (list, tuple)) or not transform or transform[0] not in KINDS:
            raise TypeError(f"transforms[{k}] must be a tuple that begins with one of {', '.join(KINDS)}")
        kind, *rest = transform
        if len(rest) != OPERANDS[kind]:
            raise TypeError(f"transforms[{k}] is a {kind} with {len(rest)} operands; it takes {OPERANDS[kind]}")
        for name, tensors in zip(LISTS[kind], rest, strict=False):
            _checks.listed(name, tensors)
            _checks.same_length(name, tensors, "params", params)
        if kind == "project":
            _checks.listed("coefficient", [rest[1]])
    numbers_in_range(transforms)


def numbers_in_range(transforms: Sequence[Transform]) -> None:
    """The numbers of transforms of the right form. Raises TypeError or ValueError."""
    for kind, *rest in transforms:
        if kind == "child_mask":
            _checks.positive("keep", rest[0], 1)
            _checks.integer("seed", rest[1], 1 << 64)
        elif kind == "soft_mask":
            _checks.unit_interval("strength", rest[1])
        elif kind == "pull":
            _checks.at_least_zero("strength", rest[2])


def check(transforms: Sequence[Transform], params: Sequence[Tensor]) -> list[tuple[str, Sequence[Tensor]]]:
    """What the operands must be for ``params`` that have been checked; returns the lists of tensors that are read, with their names.

    Raises TypeError or ValueError.
    """
    numbers_in_range(transforms)
    read: list[tuple[str, Sequence[Tensor]]] = []
    for kind, *rest in transforms:
        out = [absent(t, p) for t, p in zip(rest[0], params, strict=True)] if LISTS[kind] else []
        for name, tensors in zip(LISTS[kind], rest, strict=False):
            _checks.dense(name, tensors, _DTYPES.get(name, _checks.FLOATING))
            _checks.same_device(name, tensors, "params", params)
            # A parameter fits itself, so that messages count as the caller does.
            own = [p if skipped else t for t, p, skipped in zip(tensors, params, out, strict=True)]
            if name == "masks":
                check_bits(name, tensors, params)
            else:
                (_checks.broadcasts if name == "importance" else _checks.same_shape)(name, own, "params", params)
            read.append((name, tensors))
        if kind == "project":
            _check_coefficient(rest[1], params)
            read.append(("coefficient", [rest[1]]))
    return read


def check_bits(name: str, bits: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """One bit for each element, or none at all."""
    for i, (b, p) in enumerate(zip(bits, params, strict=True)):
        wanted = -(-p.numel() // 8)
        if b.dim() != 1 or b.numel() not in (0, wanted) or not b.is_contiguous():
            raise ValueError(
                f"{name}[{i}] has shape {tuple(b.shape)}; for params[{i}] of shape {tuple(p.shape)} the bits are a contiguous [{wanted}]"
            )


def _check_coefficient(coefficient: Tensor, params: Sequence[Tensor]) -> None:
    _checks.dense("coefficient", [coefficient], (torch.float64,))
    if coefficient.numel() != 1:
        raise ValueError(f"coefficient must have one element, got shape {tuple(coefficient.shape)}")
    _checks.same_device("coefficient", [coefficient], "params", params[:1] or [coefficient])


_DTYPES = {"importance": _checks.STORED, "masks": (torch.uint8,)}
