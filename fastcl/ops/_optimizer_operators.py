"""The optimizers in torch's dispatcher: flat arguments, checks, fakes and the way to an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.ops import _dispatch, _optimizer_checks, _places, _transforms
from fastcl.ops._optimizer_checks import Compact, Named
from fastcl.ops._transforms import Transform
from fastcl.reference.child_mask import Place

TAIL = "Tensor[] operands, int[] kinds, float[] numbers, int[] seeds, int[] places"


def pairs(compact: Compact | None) -> list[Tensor]:
    """Bits and ranks in one list."""
    return [] if compact is None else [*compact[0], *compact[1]]


def _compact(tensors: Sequence[Tensor], count: int) -> Compact | None:
    if not tensors:
        return None
    if len(tensors) != 2 * count:
        raise ValueError(f"compact has {len(tensors)} tensors; accepted are bits and ranks for each of {count} parameters")
    return tensors[:count], tensors[count:]


def _moved(t: Any, device: torch.device) -> Any:
    return t.to(device, non_blocking=True) if isinstance(t, Tensor) and t.device != device else t


def _run_by_device(
    op: str,
    lists: Sequence[Sequence[Tensor]],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    compact: Compact | None,
    tensors: tuple[Tensor | None, Tensor | None, float | Tensor],
    *numbers: Any,
) -> None:
    """Run checked arguments, device by device. ``lists`` are the parameters, their gradients and all other state, perhaps empty."""
    params = lists[0]
    by_device: dict[torch.device, list[int]] = {}
    for i, p in enumerate(params):
        by_device.setdefault(p.device, []).append(i)
    for device, members in by_device.items():
        whole = len(members) == len(params)
        own = [[_dispatch.plain(column[i]) for i in members] if column else [] for column in lists]
        here = list(transforms) if whole else _transforms.select(transforms, members)
        here = [(kind, *rest[:-1], _moved(rest[-1], device)) if kind == "project" else (kind, *rest) for kind, *rest in here]
        # A mask draws by the tensor's index among all of them.
        placed = places if whole else [(places or _places.whole(params))[i] for i in members]
        small = None if compact is None else ([compact[0][i] for i in members], [compact[1][i] for i in members])
        scale, found_inf, lr = (_moved(t, device) for t in tensors)
        middle = (here, placed, small, scale, found_inf) if op == "adamw_" else (here, placed, scale, found_inf)
        _dispatch.run(op, device, own[0], *own[1:], *middle, lr, *numbers)
        for written in own[2:]:
            _dispatch.bump_versions(written)


def _prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Named],
    steps: Sequence[Tensor],
    flat: tuple[Any, ...],
    places: Sequence[int],
    compact: Sequence[Tensor],
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float | Tensor,
) -> tuple[Any, ...]:
    transforms = _transforms.unflatten(len(params), *flat)
    small = _compact(compact, len(params))
    _optimizer_checks.swept(params, grads, states, steps, transforms, scale, found_inf, lr, small)
    return transforms, _places.unflat(places, params), small


def _check_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    operands: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    seeds: Sequence[int],
    places: Sequence[int],
    compact: Sequence[Tensor],
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    hf: bool,  # noqa: ARG001
    maximize: bool,  # noqa: ARG001
) -> tuple[Any, ...]:
    rate = lr if lr_tensor is None else lr_tensor
    _optimizer_checks.hyper_parameters(rate, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    states = [("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)]
    flat = operands, kinds, numbers, seeds
    prepared = _prepare(params, grads, states, steps, flat, places, compact, scale, found_inf, rate)
    return (*prepared, (scale, found_inf, rate))


def _fake_adamw(*args: Any) -> None:
    _check_adamw(*args)


def _run_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *rest: Any,
) -> None:
    prepared = _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, *rest)
    _run_by_device("adamw_", [params, grads, exp_avgs, exp_avg_sqs, steps], *prepared, *rest[-6:])


def _check_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    operands: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    seeds: Sequence[int],
    places: Sequence[int],
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,  # noqa: ARG001
    maximize: bool,  # noqa: ARG001
    first: bool,  # noqa: ARG001
) -> tuple[Any, ...]:
    rate = lr if lr_tensor is None else lr_tensor
    _optimizer_checks.hyper_parameters(rate, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    if momentum == 0 and momentum_buffers:
        raise ValueError(f"momentum_buffers has {len(momentum_buffers)} tensors and momentum is 0; pass none")
    states = [("momentum_buffers", momentum_buffers)] if momentum != 0 else []
    prepared = _prepare(params, grads, states, steps, (operands, kinds, numbers, seeds), places, [], scale, found_inf, rate)
    return (*prepared, (scale, found_inf, rate))


def _fake_sgd(*args: Any) -> None:
    _check_sgd(*args)


def _run_sgd(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], steps: Sequence[Tensor], *rest: Any
) -> None:
    prepared = _check_sgd(params, grads, momentum_buffers, steps, *rest)
    _run_by_device("sgd_", [params, grads, momentum_buffers, steps], *prepared, *rest[-6:])


def _check_dot(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    operands: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    seeds: Sequence[int],
    places: Sequence[int],
    scale: Tensor | None,
    reference: Sequence[Tensor],
) -> tuple[Any, ...]:
    transforms = _transforms.unflatten(len(params), operands, kinds, numbers, seeds)
    _optimizer_checks.read(params, grads, steps, transforms, scale, reference)
    return transforms, _places.unflat(places, params), scale, reference


def _fake_dot(params: Sequence[Tensor], *args: Any) -> Tensor:
    _check_dot(params, *args)
    return torch.empty(2, dtype=torch.float64, device=params[0].device if params else "cpu")


def _run_dot(params: Sequence[Tensor], grads: Sequence[Tensor], steps: Sequence[Tensor], *rest: Any) -> Tensor:
    transforms, places, scale, reference = _check_dot(params, grads, steps, *rest)
    lists = [[_dispatch.plain(t) for t in column] for column in (params, grads, steps, reference)]
    device = params[0].device if params else torch.device("cpu")
    total: Tensor = _dispatch.run_reading("transformed_dot", device, *lists[:3], transforms, places, scale, lists[3])
    return total


_dispatch.define(
    "adamw_",
    "optimizers",
    f"(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, {TAIL}, Tensor[] compact, "
    "Tensor? scale, Tensor? found_inf, Tensor? lr_tensor, float lr, float beta1, float beta2, float eps, float weight_decay, bool hf, "
    "bool maximize) -> ()",
    implementation=_run_adamw,
    fake=_fake_adamw,
)
_dispatch.define(
    "sgd_",
    "optimizers",
    f"(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, {TAIL}, Tensor? scale, Tensor? found_inf, "
    "Tensor? lr_tensor, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()",
    implementation=_run_sgd,
    fake=_fake_sgd,
)
_dispatch.define(
    "transformed_dot",
    "optimizers",
    f"(Tensor[] params, Tensor[] grads, Tensor[] steps, {TAIL}, Tensor? scale, Tensor[] reference) -> Tensor",
    implementation=_run_dot,
    fake=_fake_dot,
)
