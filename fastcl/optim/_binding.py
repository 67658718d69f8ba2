"""A transform's values in the order of an optimizer's parameters: checked, and of DTensors this rank's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.bit_mask import BitMask
from fastcl.ops import _checks, _sharded
from fastcl.optim.transforms import Transform


class Bound:
    """The tensors of one transform: for each operand one per parameter, an empty one where the transform leaves a parameter out."""

    def __init__(self, transform: Transform, params: Sequence[Tensor], names: Sequence[str] | None) -> None:
        self.version = transform.version
        self.present = [False] * len(params)
        self.lists: list[list[Tensor]] = []
        self.masks: list[BitMask | None] = []
        self._operands: tuple[str, ...] = ()
        self._sizes: list[list[int]] = []
        if not transform.active:
            return
        self._operands = transform.operands
        for n, operand in enumerate(transform.operands):
            entries = _aligned(operand, transform.values(operand), params, names)
            if n == 0:
                self.present = [e is not None for e in entries]
            elif self.present != [e is not None for e in entries]:
                i = next(i for i, e in enumerate(entries) if (e is not None) != self.present[i])
                raise ValueError(
                    f"{operand} and {transform.operands[0]} do not belong to the same parameters: one of them has none for params[{i}]"
                )
            if operand == "masks":
                self.masks = entries
                _check_masks(entries, params)
                entries = [m if m is None else m.bits for m in entries]
            else:
                _check_tensors(operand, entries, params)
            local = _sharded.shards(params) if _sharded.is_sharded(params) else params
            self.lists.append(_filled(entries, local, torch.uint8 if operand == "masks" else torch.float32))
        self._sizes = [[t.numel() for t in own] for own in self.lists]

    def check_sizes(self) -> None:
        """Raises ValueError if a tensor was resized since."""
        for operand, own, sizes in zip(self._operands, self.lists, self._sizes, strict=True):
            now = [t.numel() for t in own]
            if now != sizes:
                i = next(i for i, (a, b) in enumerate(zip(now, sizes, strict=True)) if a != b)
                raise ValueError(f"{operand}[{i}] had {sizes[i]} elements and has {now[i]} now; assign what fits")


def _aligned(operand: str, values: Any, params: Sequence[Tensor], names: Sequence[str] | None) -> list[Any]:
    if not isinstance(values, Mapping):
        if len(values) != len(params):
            raise ValueError(
                f"{operand} has {len(values)} entries and the optimizer {len(params)} parameters; pass one for each, in the order of the "
                "groups, or a mapping from parameters"
            )
        return list(values)
    place: dict[Any, int] = {name: i for i, name in enumerate(names or ())}
    place.update({id(p): i for i, p in enumerate(params)})
    entries: list[Any] = [None] * len(params)
    for key, value in values.items():
        i = place.get(key if isinstance(key, str) else id(key))
        if i is None:
            told = repr(key) if isinstance(key, str) else f"a {type(key).__name__}"
            named = "" if names is not None else ": it has no names, pass named_parameters()"
            raise ValueError(
                f"{operand} has an entry for {told}, which is no parameter of the optimizer{named if isinstance(key, str) else ''}"
            )
        entries[i] = value
    return entries


def _check_tensors(operand: str, entries: list[Tensor | None], params: Sequence[Tensor]) -> None:
    """Replaces DTensors by this rank's shards."""
    # A parameter fits itself, so that messages count as the caller does.
    own = [p if e is None else e for e, p in zip(entries, params, strict=True)]
    _checks.dense(
        operand, [e for e in own if not _sharded.is_sharded([e])], _checks.STORED if operand == "importance" else _checks.FLOATING
    )
    _checks.same_device(operand, own, "params", params)
    broadcasts = operand == "importance"
    (_checks.broadcasts if broadcasts else _checks.same_shape)(operand, own, "params", params)
    if _sharded.is_sharded(own, params):
        _sharded.check_matching(operand, own, "params", params, one_element=broadcasts)
        entries[:] = [None if e is None else shard for e, shard in zip(entries, _sharded.shards(own), strict=True)]


def _check_masks(masks: Sequence[BitMask | None], params: Sequence[Tensor]) -> None:
    for i, (m, p) in enumerate(zip(masks, params, strict=True)):
        if m is None:
            continue
        if m.shape != p.shape:
            raise ValueError(f"masks[{i}] is for the shape {tuple(m.shape)} and params[{i}] has shape {tuple(p.shape)}")
        if m.device != p.device:
            raise ValueError(f"masks[{i}] is on {m.device} and params[{i}] is on {p.device}; move it with .to('{p.device}')")
        placements = getattr(p, "placements", None)
        if m.placements != placements or m.device_mesh != getattr(p, "device_mesh", None):
            raise ValueError(
                f"masks[{i}] has the placements {m.placements} and params[{i}] {placements}; accepted is BitMask.from_bool of a mask with "
                "the parameter's mesh and placements"
            )


def _filled(entries: Sequence[Tensor | None], params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    empty: dict[torch.device, Tensor] = {}
    filled = []
    for e, p in zip(entries, params, strict=True):
        if e is None:
            if p.device not in empty:
                empty[p.device] = torch.empty(0, dtype=dtype, device=p.device)
            # A parameter without elements has none to leave out; what stands there must only have its shape.
            e = empty[p.device] if p.numel() or dtype == torch.uint8 else torch.empty(p.shape, dtype=dtype, device=p.device)
        filled.append(e)
    return filled
