"""The low_rank ops straight on the compiled stages: whatever is not plain goes to the dispatcher, which says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _sharded
from fastcl.ops._low_rank_checks import MOST_ROWS
from fastcl.ops._low_rank_stages import Gate, Place, Refused

_GATE = Gate()


def run(op: Callable[..., Any], first: object, basis: object, sigma: object, *args: Any) -> bool:
    """Call ``op(place, *args)`` on the compiled module. False: it was refused and nothing has been written."""
    if _dispatch.traced() or not (_is_list(first) and _is_list(basis) and first and basis):
        return False
    if not isinstance(sigma, Tensor) or not _plain(sigma, 1) or len(sigma) != _rows(basis[0]):  # type: ignore[index]
        return False
    try:
        op(Place(_GATE, sigma.device), *args)
    except Refused:
        return False
    return True


def _is_list(value: object) -> bool:
    return type(value) in (list, tuple)


def _plain(t: Tensor, dim: int) -> bool:
    return type(t) is Tensor and t.dtype == torch.float64 and t.dim() == dim and t.is_contiguous() and not t.requires_grad


def _rows(basis: object) -> int:
    return basis.shape[0] if isinstance(basis, Tensor) and basis.dim() else -1


def numbers(sigma: object, lr: object, *others: object) -> bool:
    """Whether the rate and the other numbers (or None) are such that no check has anything to say."""
    if isinstance(lr, Tensor):
        plain = type(lr) is Tensor and lr.dim() == 0 and lr.dtype in (torch.float32, torch.float64)
        if not plain or lr.requires_grad or not isinstance(sigma, Tensor) or lr.device != sigma.device:
            return False
    elif not _number(lr):
        return False
    return all(_number(x) for x in others)


def _number(x: object) -> bool:
    return type(x) in (int, float) and 0 <= x < math.inf  # type: ignore[operator]


def is_zero(x: object) -> bool:
    return type(x) in (int, float) and x == 0


def listed(sigma: object, lists: Sequence[tuple[str, object]]) -> None:
    for name, value in lists:
        _checks.listed(name, value)
    if not isinstance(sigma, Tensor):
        raise TypeError(f"sigma must be a tensor, got {type(sigma).__name__}")
    if _sharded.is_sharded([sigma]):
        raise TypeError("sigma is a DTensor; accepted is a plain tensor that is the same on all ranks, pass sigma.full_tensor()")


def lists_of(name: str, value: object) -> list[tuple[str, Sequence[Tensor]]]:
    """A list of K >= 1 lists with what each is called."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of lists of tensors, got {type(value).__name__}")
    if not 1 <= len(value) <= MOST_ROWS:
        raise ValueError(f"{name} has {len(value)} lists; accepted are 1 to {MOST_ROWS}")
    return [(f"{name}[{k}]", v) for k, v in enumerate(value)]
