"""Vectors over all parameters, as callers give them: by name, or in the order of ``model.parameters()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import _distributed
from fastcl._model import FLOATING, Slot, some
from fastcl.precision._layers import compute_dtype


@torch.no_grad()
def named_copies(argument: str, values: Any, slots: Sequence[Slot], sharded: bool) -> dict[str, Tensor]:
    """Contiguous copies of what was given, in the factors' dtypes."""
    given = _by_name(argument, values, [slot.name for slot in slots])
    result = {}
    for slot in slots:
        t, p = given.get(slot.name), slot.parameter()
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{argument}[{slot.name!r}] must be a tensor, got {type(t).__name__}")
        if t.layout != torch.strided or t.is_nested or t.is_quantized or t.dtype not in FLOATING:
            kind = (
                "quantized" if t.is_quantized else "nested" if t.is_nested else str(t.layout) if t.layout != torch.strided else str(t.dtype)
            )
            raise TypeError(f"{argument}[{slot.name!r}] must be a dense tensor of dtype float64, float32, bfloat16 or float16, got {kind}")
        if t.shape != p.shape:
            raise ValueError(f"{argument}[{slot.name!r}] has shape {tuple(t.shape)}; the parameter has {tuple(p.shape)}")
        own = t.detach() if sharded else _distributed.whole(t.detach())
        result[slot.name] = torch.empty_like(own, dtype=compute_dtype(p), memory_format=torch.contiguous_format).copy_(own)
    return result


def _by_name(argument: str, values: Any, names: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(values, Mapping):
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"{argument} has {some(unknown)}, which the model's trainable parameters are not: {some(names)}")
        return values
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{argument} must be a mapping from parameter names to tensors or a list of tensors, got {type(values).__name__}")
    if len(values) != len(names):
        raise ValueError(f"{argument} has {len(values)} tensors; the model has {len(names)} trainable parameters: {some(names)}")
    return dict(zip(names, values, strict=True))
