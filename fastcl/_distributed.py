"""Models that are trained by several processes: DistributedDataParallel, and FSDP2's fully_shard with DTensors as parameters."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcl._model import Slot
from fastcl.gradients import capture_gradients
from fastcl.ops import _sharded


def _class(module: str, name: str) -> tuple[type[Any], ...]:
    """A class of a module that may never have been imported; then no instance of it exists."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if found is not None else ()


def prepare(model: nn.Module) -> None:
    """Put the sharded parameters in their places.

    Raises TypeError for FSDP1, whose flat parameters have lost the tensors that importance is about.
    """
    if not isinstance(model, nn.Module):
        return
    _sharded.reshard(model)
    for module in model.modules():
        if isinstance(module, _class("torch.distributed.fsdp", "FullyShardedDataParallel")):
            raise TypeError("model holds a FullyShardedDataParallel, whose parameters are flattened; use fully_shard (FSDP2) instead")


def joins_in_backward(model: nn.Module) -> bool:
    """Whether the ranks' gradients meet in ``backward()`` and nowhere else; torch.autograd.grad would give one rank's part, or nothing."""
    kinds = _class("torch.distributed.fsdp", "FSDPModule") + _class("torch.nn.parallel", "DistributedDataParallel")
    return any(isinstance(m, kinds) for m in model.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel wraps, whose parameters have the names that they have without it; else ``model``."""
    found: nn.Module = model.module if isinstance(model, _class("torch.nn.parallel", "DistributedDataParallel")) else model
    return found


class DataParallel(NamedTuple):
    """The ranks whose gradients are averaged: how many, which this one is, and the sums of a number and of a tensor over them."""

    size: int
    rank: int
    total: Callable[[int], int]
    reduce: Callable[[Tensor], Tensor]


def data_parallel(model: nn.Module, slots: Sequence[Slot]) -> DataParallel:
    """The ranks that share the batches of a model.

    Raises TypeError for sharded parameters whose mesh does not tell that its ranks share the data: that of tensor parallelism.
    """
    from torch import distributed as dist

    device = slots[0].parameter().device
    for module in model.modules():
        if isinstance(module, _class("torch.nn.parallel", "DistributedDataParallel")):
            group = module.process_group
            total, summed = functools.partial(_total, group, device), functools.partial(_reduce, group)
            return DataParallel(dist.get_world_size(group), dist.get_rank(group), total, summed)
    parameters = [slot.parameter() for slot in slots]
    if not _sharded.is_sharded(parameters):
        return DataParallel(1, 0, int, lambda t: t)
    mesh = _sharded.mesh_of(("parameters", parameters))
    for slot, p in zip(slots, parameters, strict=True):
        kinds = "".join("S" if at.is_shard() else "R" for at in getattr(p, "placements", ()))
        if not joins_in_backward(model) or kinds not in {"S", "RS"}:
            raise TypeError(
                f"the parameter {slot.name!r} is sharded by other means than fully_shard: the ranks that average gradients are "
                "not known. Accepted are DistributedDataParallel, and fully_shard on a 1-D or a (replicate, shard) mesh"
            )
    rank = 0
    for size, at in zip(mesh.shape, mesh.get_coordinate() or (), strict=True):
        rank = rank * size + at

    def reduce(value: Tensor) -> Tensor:
        return _sharded.all_reduce_sum(value, mesh)

    return DataParallel(mesh.size(), rank, lambda count: int(reduce(torch.tensor(count, device=device))), reduce)


def _total(group: Any, device: torch.device, count: int) -> int:
    value = torch.tensor(count, device=device)
    torch.distributed.all_reduce(value, group=group)
    return int(value)


def _reduce(group: Any, value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value, group=group)
    return value


def gradients(output: Tensor, parameters: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of ``output`` as ``backward()`` leaves them; every ``.grad`` is afterwards as it was.

    ``parameters`` are all of the model's, listed before the forward pass: FSDP2 puts others in their places until backward has come by.
    """
    with capture_gradients(parameters) as captured:
        output.backward()  # type: ignore[no-untyped-call]
    by_parameter = {id(p): g for p, g in zip(parameters, captured, strict=True)}
    return [by_parameter[id(p)] for p in wanted]


def check_hooks(slots: Sequence[Slot]) -> None:
    """No hook would take a gradient for one of training. On plain parameters they may be DistributedDataParallel's own."""
    for slot in slots:
        if _sharded.is_sharded([p := slot.parameter()]) and p._post_accumulate_grad_hooks:
            raise ValueError(
                f"the parameter {slot.name!r} has a post-accumulate-grad hook, which would run (and perhaps step an optimizer) while "
                "importance is computed; remove it for the time of end_task"
            )


def first_failing(tensors: Sequence[Tensor], holds: Callable[[Tensor], Tensor]) -> int | None:
    """The first tensor of which some element does not hold, on any rank; all ranks get the same answer."""
    if not _sharded.is_sharded(tensors):
        return next((i for i, t in enumerate(tensors) if not bool(holds(t).all())), None)
    failing = torch.stack([(~holds(t)).any() for t in _sharded.local("tensors", tensors)]).double()
    return next((i for i, n in enumerate(_sharded.all_reduce_sum(failing, _sharded.mesh_of(("tensors", tensors))).tolist()) if n), None)


def whole(value: Tensor) -> Tensor:
    """All of a DTensor, gathered; a plain tensor as it is."""
    gathered: Tensor = value.detach().full_tensor() if _sharded.is_sharded([value]) else value  # type: ignore[attr-defined]
    return gathered


def laid_out(value: Tensor, like: Tensor) -> bool:
    """Whether ``value`` is on the device of ``like`` and sharded as it is."""
    sharding = [(t.device_mesh, t.placements) if _sharded.is_sharded([t]) else None for t in (value, like)]  # type: ignore[attr-defined]
    return value.device == like.device and sharding[0] == sharding[1]


def lay_out(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like`` and sharded as it is. A plain ``value`` is the whole tensor, the same on every rank."""
    value = value.detach()
    if laid_out(value, like):
        return value
    if not _sharded.is_sharded([like]):
        whole: Tensor = value.full_tensor() if _sharded.is_sharded([value]) else value  # type: ignore[attr-defined]
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded: Any = like
    moved = value.to(like.device)
    if isinstance(moved, DTensor):
        return moved.redistribute(sharded.device_mesh, sharded.placements)
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements, src_data_rank=None)


def once(tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None], what: str) -> None:
    """Call ``write`` with whole tensors: on the only process, or on the first of the mesh; return when it is done everywhere.

    Raises OSError on every rank if it fails on the first.
    """
    values = list(tensors.values())
    if not _sharded.is_sharded(values):
        write(tensors)
        return
    mesh = _sharded.mesh_of(("importance", values))
    whole = {name: t.full_tensor() if _sharded.is_sharded([t]) else t for name, t in tensors.items()}  # type: ignore[attr-defined]
    problem: OSError | None = None
    if not any(mesh.get_coordinate() or ()):
        try:
            write(whole)
        except OSError as error:
            problem = error
    failed = _sharded.all_reduce_sum(torch.tensor(float(problem is not None), device=values[0].device), mesh)
    if problem is not None:
        raise problem
    if bool(failed):
        raise OSError(f"{what} cannot be written by the first rank of the mesh, whose error says why")
