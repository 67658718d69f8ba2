"""The hyper-parameters of a group, and its gradients, before anything is written."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.ops import _checks
from fastcl.optim import _projection


def check_numbers(group: Mapping[str, Any], **named: str) -> None:
    """The learning rate and other numbers of a group that are >= 0, with torch.optim's words. Raises TypeError or ValueError."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point() or lr.layout != torch.strided or lr.is_meta):
        raise ValueError("Tensor lr must be 1-element and floating-point")
    for name, words in {"lr": "learning rate", **named}.items():
        value = group[name]
        if (isinstance(value, bool) or not isinstance(value, numbers.Real)) and not (name == "lr" and isinstance(value, Tensor)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0.0 <= group[name] < math.inf:
            raise ValueError(f"Invalid {words}: {value}; {name} must be a finite number >= 0")
    for name in ("maximize", "nesterov"):
        if not isinstance(group.get(name, False), bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Dense gradients of their parameters' shapes and devices. Raises TypeError or ValueError naming the gradient."""
    # This is asked once more by the operator, with the rest; only what does not fit is worth a message here.
    kinds = {(type(g), g.layout, g.dtype) for g in grads}
    fits = all(kind is Tensor and layout == torch.strided and dtype in _checks.FLOATING for kind, layout, dtype in kinds)
    if fits and [g.device for g in grads] == [p.device for p in params] and all(map(Tensor.is_same_size, grads, params)):
        return
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.same_device("grads", grads, "params", params)
    _checks.same_shape("grads", grads, "params", params)


def device_lr(group: Mapping[str, Any], like: Tensor) -> Any:
    """The group's learning rate; a tensor as the operator reads it on the device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    dtype = lr.dtype if lr.dtype == torch.float64 else torch.float32
    return _projection.plain(lr).detach().reshape(()).to(like.device, dtype, non_blocking=True)
