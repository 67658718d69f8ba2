"""Lists of DTensors (FSDP2's parameters and gradients): unwrapped to each rank's own memory, with what has to be summed over ranks.

DTensor's dispatcher is not asked: its rules for operators that write into lists lose the writes. Element-wise ops work on the local
shards alone; reductions sum what :func:`counted` names and then over the ranks of the mesh, so that every element counts once.

torch.distributed is imported only when a DTensor is there, which cannot be before the caller has imported it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fastcl.ops import _checks, _dispatch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Named: TypeAlias = tuple[str, Sequence[Tensor]]
F = TypeVar("F", bound=Callable[..., Any])


def is_sharded(*lists: Sequence[Any]) -> bool:
    """Whether a DTensor is among the members of the lists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for tensors in lists for t in tensors)


def outside_graphs(function: F) -> F:
    """torch.compile leaves its graph for such a function, which runs collectives and implementations; with fullgraph=True it says so."""
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*args)

    return cast(F, call)


def reshard(model: nn.Module) -> None:
    """Put an FSDP2 model's sharded parameters in their places: a forward pass without a backward leaves whole ones there."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        for m in model.modules():
            if isinstance(m, module.FSDPModule):
                m.reshard()


def zeros_like(t: Tensor) -> Tensor:
    """Zeros that take no memory, sharded as ``t`` is."""
    d = _as_dtensor(t)
    if d is None:
        return torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
    from torch.distributed.tensor import DTensor

    zeros = zeros_like(_local(d))
    return DTensor.from_local(zeros, d.device_mesh, d.placements, run_check=False, shape=d.shape, stride=d.stride())


def _as_dtensor(t: Any) -> DTensor | None:
    from torch.distributed.tensor import DTensor

    return t if isinstance(t, DTensor) else None


def mesh_of(*named: Named) -> DeviceMesh:
    """The mesh of all DTensors in the lists, of which there is at least one.

    Raises:
        TypeError: a DTensor with a Partial placement.
        ValueError: two meshes, or this process is not part of the mesh.
    """
    first: tuple[str, DeviceMesh] | None = None
    for name, tensors in named:
        for i, t in enumerate(tensors):
            d = _as_dtensor(t)
            if d is None:
                continue
            if any(p.is_partial() for p in d.placements):
                raise TypeError(
                    f"{name}[{i}] has the placements {d.placements}: a Partial one is a sum that the ranks have not made yet; accepted are "
                    f"Shard and Replicate, pass {name}[{i}].redistribute(placements=[...])"
                )
            first = first or (f"{name}[{i}]", d.device_mesh)
            if d.device_mesh != first[1]:
                raise ValueError(
                    f"{name}[{i}] lives on {d.device_mesh} and {first[0]} on {first[1]}; one call takes the DTensors of one mesh: call the "
                    "op once for each mesh, or redistribute"
                )
    if first is None:
        raise ValueError("there is no DTensor in the lists")
    if first[1].get_coordinate() is None:
        raise ValueError(f"{first[0]} lives on {first[1]}, of which this process is not part; call the op on the ranks of the mesh")
    return first[1]


def local(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's memory of every tensor: a DTensor's shard (perhaps without elements), a plain tensor itself.

    Raises as :func:`mesh_of`. Writes to a shard are writes to its DTensor; tell autograd with :func:`bump_versions`.
    """
    if is_sharded(tensors):
        mesh_of((name, tensors))
    with torch.no_grad():
        return [_local(t) for t in tensors]


def _local(t: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    d = _as_dtensor(t)
    if d is None:
        return t
    shard = d.to_local()
    # The result of a collective that may still be under way.
    return shard.wait() if isinstance(shard, AsyncCollectiveTensor) else shard


def counted(tensors: Sequence[Tensor], mesh: DeviceMesh) -> list[bool]:
    """Which of this rank's local tensors a sum over all ranks counts: of a replicated one, as plain ones are, one rank's only."""
    at = mesh.get_coordinate() or ()
    return [all(c == 0 for c, p in zip(at, _placements(t, mesh), strict=True) if p.is_replicate()) for t in tensors]


def _placements(t: Tensor, mesh: DeviceMesh) -> Sequence[Placement]:
    from torch.distributed.tensor import Replicate

    d = _as_dtensor(t)
    return d.placements if d is not None else [Replicate()] * mesh.ndim


def all_reduce_sum(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum of every rank's plain ``value`` over the whole mesh; all ranks get the same bits.

    One collective where a group of all the mesh's ranks exists, else one for each dimension of the mesh.
    """
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional

    groups: list[Any] = [(mesh, d) for d in range(mesh.ndim)]
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        groups = [dist.group.WORLD]
    with torch.no_grad():
        for group in groups:
            value = functional.wait_tensor(functional.all_reduce(value, "sum", group))  # type: ignore[no-untyped-call]
    return value


def all_gather(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Every rank's plain ``value``, stacked in the order of the mesh: [ranks, ...]. Made of few numbers, so a sum with zeros is enough."""
    place = 0
    for size, at in zip(mesh.shape, mesh.get_coordinate() or (), strict=True):
        place = place * size + at
    slots = value.new_zeros((mesh.size(), *value.shape))
    slots[place] = value
    return all_reduce_sum(slots, mesh)


def bump_versions(written: Sequence[Tensor]) -> None:
    """Tell autograd about a write to local tensors: a DTensor's version counter is its own."""
    _dispatch.bump_versions([t for t in written if _as_dtensor(t) is not None])


def elementwise(
    op: Callable[[list[Tensor], list[Tensor]], None], written_name: str, written: Sequence[Tensor], read_name: str, read: Sequence[Tensor]
) -> None:
    """Run ``op(written, read)``, in which an element meets only the element that broadcasts to it, on this rank's memory.

    Raises as :func:`mesh_of` and :func:`check_matching`, and as the op does for pairs; nothing has been written then.
    """
    _checks.not_recorded(written_name, written)
    _checks.same_length(read_name, read, written_name, written)
    _checks.broadcasts(read_name, read, written_name, written)
    check_matching(read_name, read, written_name, written)
    op(local(written_name, written), local(read_name, read))
    bump_versions(written)


def check_matching(name: str, value: Sequence[Tensor], other_name: str, other: Sequence[Tensor], *, one_element: bool = True) -> None:
    """Each local ``value`` belongs to the same elements as its partner's local tensor. The whole shapes are known to broadcast.

    A DTensor's partner is a DTensor on the same mesh with the same placements, a dimension of size 1 that broadcasts being replicated; or,
    if ``one_element`` allows it, a plain tensor of one element. A plain tensor's partner is plain.

    Raises:
        TypeError: a Partial placement, or a plain tensor beside a DTensor.
        ValueError: other placements, or two meshes.
    """
    mesh_of((other_name, other), (name, value))
    for i, (t, partner) in enumerate(zip(value, other, strict=True)):
        a, b = _as_dtensor(t), _as_dtensor(partner)
        if b is None and a is not None:
            raise TypeError(
                f"{name}[{i}] is a DTensor with the placements {a.placements} and {other_name}[{i}] a plain tensor; accepted are two of a "
                f"kind, pass {name}[{i}].full_tensor() or {_distributed(other_name, i, f'{name}[{i}]', a.placements)}"
            )
        if b is None:
            continue
        wanted = _wanted(b, t, one_element)
        placements = [options[0] for options in wanted]
        if a is None and not (one_element and t.numel() == 1):
            raise TypeError(
                f"{name}[{i}] is a plain tensor of shape {tuple(t.shape)} and {other_name}[{i}] a DTensor with the placements "
                f"{b.placements}; accepted are a DTensor{' or a plain tensor of one element' if one_element else ''}, pass "
                f"{_distributed(name, i, f'{other_name}[{i}]', placements)}"
            )
        if a is not None and not all(p in options for p, options in zip(a.placements, wanted, strict=True)):
            raise ValueError(
                f"{name}[{i}] has the placements {a.placements} and {other_name}[{i}] {b.placements}; the placements must match (a "
                f"dimension of size 1 that broadcasts is replicated), pass {name}[{i}].redistribute(placements={placements})"
            )


def _wanted(partner: DTensor, t: Tensor, one_element: bool) -> list[list[Placement]]:
    """For each dimension of the mesh the placements of ``t`` that give every rank what its shard of ``partner`` needs."""
    from torch.distributed.tensor import Replicate, Shard

    missing = partner.dim() - t.dim()
    wanted: list[list[Placement]] = []
    for p in partner.placements:
        dim = getattr(p, "dim", None)
        if dim is None:
            wanted.append([p])
        elif dim < missing or (t.shape[dim - missing] == 1 and partner.shape[dim] != 1):
            wanted.append([Replicate()])
        else:
            factor = getattr(p, "split_factor", None)  # of FSDP2 over tensor-parallel shards
            moved = Shard(dim - missing) if factor is None else type(p)(dim - missing, split_factor=factor)  # type: ignore[call-arg]
            # One element or none on every rank: a replicated one broadcasts to both.
            wanted.append([moved, Replicate()] if one_element and partner.shape[dim] == 1 else [moved])
    return wanted


def _distributed(name: str, i: int, like: str, placements: Sequence[Placement]) -> str:
    return f"torch.distributed.tensor.distribute_tensor({name}[{i}], {like}.device_mesh, {list(placements)})"
