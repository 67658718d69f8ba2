"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import ops
from fastcl.ops import _sharded
from fastcl.ops._transforms import select
from fastcl.optim import _saved
from fastcl.optim._base import Rows, State, Swept, check_numbers, device_lr
from fastcl.optim.transforms import Transform


class SGD(Swept):
    """Stochastic gradient descent with momentum in one sweep, with gradient transforms inside of it.

    A torch.optim.Optimizer with torch.optim.SGD's state and, without transforms, its bits: those of its default on the CPU, in float32 and
    float64. :func:`fastcl.ops.sgd_` has the formulas. Buffers are float32 beside half-precision parameters. A ChildMask counts steps
    per parameter in the state ("step"). What is said of torch.compile, GradScaler and what is not offered in :class:`AdamW` holds here too;
    if a scaler skips the very first step, buffers start from zero, which is the same unless dampening is used.

    Args:
        params, lr, weight_decay, maximize, transforms, clip_norm: as in :class:`AdamW`.
        momentum: number >= 0.
        dampening: number >= 0.
        nesterov: Nesterov's momentum; it needs a momentum and no dampening.

    Raises:
        TypeError, ValueError: arguments outside of their ranges; transforms that do not fit the parameters.
    """

    _state_names = frozenset({"step", "momentum_buffer"})
    _needed_state = ()
    _group_keys = ("lr", "momentum", "dampening", "nesterov", "weight_decay")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        transforms: Iterable[Transform] = (),
        *,
        clip_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            # torch.optim.SGD's, which loads our groups
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(params, defaults, transforms, clip_norm)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(group, momentum="momentum value", dampening="dampening value", weight_decay="weight_decay value")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _incomplete(self, group: dict[str, Any], states: Sequence[State]) -> bool:
        if group["momentum"] != 0 and any(s.get("momentum_buffer") is None for s in states):
            return True
        return self._places is not None and any("step" not in s for s in states)

    def _begin(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        local: Sequence[Tensor],
        positions: Sequence[int],  # noqa: ARG002
    ) -> list[bool]:
        fresh = []
        for p, own in zip(params, local, strict=True):
            state = self.state[p]
            fresh.append(group["momentum"] != 0 and state.get("momentum_buffer") is None)
            if fresh[-1]:
                state["momentum_buffer"] = _saved.zeros(p)
            if self._places is not None and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=own.device)
        return fresh

    def _update(self, rows: Rows, transforms: list[Any], places: list[Any] | None, scale: Tensor | None, found_inf: Tensor | None) -> None:
        # One call has buffers that hold something, or none that do.
        for first in (False, True):
            members = [i for i, fresh in enumerate(rows.fresh) if fresh == first] if rows.fresh is not None else None
            if members is None and not first:
                self._call(rows, transforms, places, scale, found_inf, first=False)
            elif members:
                placed = None if places is None else [places[i] for i in members]
                self._call(rows.select(members), select(transforms, members), placed, scale, found_inf, first=first)

    def _call(
        self,
        rows: Rows,
        transforms: Sequence[Any],
        places: Sequence[Any] | None,
        scale: Tensor | None,
        found_inf: Tensor | None,
        first: bool,
    ) -> None:
        group, states = rows.group, rows.states
        buffers = [s["momentum_buffer"] for s in states] if group["momentum"] != 0 else []
        if rows.local is not rows.params:
            buffers = _sharded.shards(buffers)
        ops.sgd_(
            rows.local,
            rows.local_grads,
            buffers,
            [s["step"] for s in states] if self._places is not None else [],
            lr=device_lr(group, rows.local[0]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first=first,
            transforms=transforms,
            places=places,
            scale=scale,
            found_inf=found_inf,
        )
