"""Checks that the modules of this package share."""

from __future__ import annotations

import torch
from torch import Tensor


def whole(name: str, value: int, least: int) -> int:
    """The value, if it is an int of at least ``least``. Raises TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def rows(name: str, t: Tensor, n: int, *shape: int, dtype: torch.dtype = torch.int64) -> None:
    """Raises ValueError unless the state's tensor is [n, *shape] of the dtype."""
    if tuple(t.shape) != (n, *shape) or t.dtype != dtype:
        raise ValueError(f"state[{name!r}] must be {dtype} of shape {(n, *shape)}, got {t.dtype} of shape {tuple(t.shape)}")
