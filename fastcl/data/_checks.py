"""Checks that the modules of this package share."""

from __future__ import annotations

import torch
from torch import Tensor


def whole(name: str, value: int, least: int, most: int | None = None) -> int:
    """The value, if it is an int from ``least`` to ``most``. Raises TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value


def dense(name: str, t: Tensor) -> None:
    """Raises ValueError unless the tensor is a plain one whose values can be copied."""
    if t.is_nested or t.layout != torch.strided:
        got = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise ValueError(f"{name} must be a dense tensor (torch.strided), got {got}")
    if t.is_quantized:
        raise ValueError(f"{name} must not be quantized, got {t.dtype}")
    if t.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor of the meta device")


def rows(name: str, t: Tensor, n: int, *shape: int, dtype: torch.dtype = torch.int64) -> None:
    """Raises ValueError unless the state's tensor is [n, *shape] of the dtype."""
    if tuple(t.shape) != (n, *shape) or t.dtype != dtype:
        raise ValueError(f"state[{name!r}] must be {dtype} of shape {(n, *shape)}, got {t.dtype} of shape {tuple(t.shape)}")
