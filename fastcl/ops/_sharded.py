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
    def call(*args: Any, **keywords: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **keywords)

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
    if not is_sharded([t]):
        return torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
    from torch.distributed.tensor import DTensor

    d = cast(DTensor, t)
    zeros = zeros_like(shards([d])[0])
    return DTensor.from_local(zeros, d.device_mesh, d.placements, run_check=False, shape=d.shape, stride=d.stride())


def mesh_of(*named: Named) -> DeviceMesh:
    """The mesh of all DTensors in the lists, of which there is at least one.

    Raises:
        TypeError: a DTensor with a Partial placement.
        ValueError: two meshes, or this process is not part of the mesh.
    """
    from torch.distributed.tensor import DTensor

    first = ""
    mesh: Any = None
    summed: list[Any] = []  # placements that have been looked at
    for name, tensors in named:
        for i, t in enumerate(tensors):
            if not isinstance(t, DTensor):
                continue
            if t.placements not in summed:
                if any(p.is_partial() for p in t.placements):
                    raise TypeError(
                        f"{name}[{i}] has the placements {t.placements}: a Partial one is a sum that the ranks have not made yet; accepted "
                        f"are Shard and Replicate, pass {name}[{i}].redistribute(placements=[...])"
                    )
                summed.append(t.placements)
            if mesh is None:
                first, mesh = f"{name}[{i}]", t.device_mesh
            elif t.device_mesh is not mesh and t.device_mesh != mesh:
                raise ValueError(
                    f"{name}[{i}] lives on {t.device_mesh} and {first} on {mesh}; one call takes the DTensors of one mesh: call the op "
                    "once for each mesh, or redistribute"
                )
    if mesh is None:
        raise ValueError("there is no DTensor in the lists")
    if mesh.get_coordinate() is None:
        raise ValueError(f"{first} lives on {mesh}, of which this process is not part; call the op on the ranks of the mesh")
    return cast("DeviceMesh", mesh)


def local(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's memory of every tensor: a DTensor's shard (perhaps without elements), a plain tensor itself.

    Raises as :func:`mesh_of`. Writes to a shard are writes to its DTensor; tell autograd with :func:`bump_versions`.
    """
    if is_sharded(tensors):
        mesh_of((name, tensors))
    return shards(tensors)


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`local`, of lists that have been checked."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        # The result of a collective may still be under way.
        return [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in own]


def check_apart(written_name: str, written: Sequence[Tensor], *others: Named) -> None:
    """No tensor is given twice where it is written: what every rank sees alike, whether or not it holds a part of it.

    Raises ValueError. Views that share memory in part are told apart on each rank, by the ops.
    """
    first = {id(_own(t)): i for i, t in reversed(list(enumerate(written)))}
    for i, t in enumerate(written):
        if first[id(_own(t))] != i:
            raise ValueError(f"{written_name}[{i}] and {written_name}[{first[id(_own(t))]}] share memory: they are one tensor; pass a copy")
    for name, tensors in others:
        for i, t in enumerate(tensors):
            if id(_own(t)) in first:
                raise ValueError(f"{name}[{i}] and {written_name}[{first[id(_own(t))]}] share memory: they are one tensor; pass a copy")


def _own(t: Tensor) -> Tensor:
    own: Tensor = getattr(t, "_local_tensor", t)  # not to_local(), which makes another object each time
    return own


def counted(tensors: Sequence[Tensor], mesh: DeviceMesh) -> list[bool]:
    """Which of this rank's local tensors a sum over all ranks counts: of a replicated one, as plain ones are, one rank's only."""
    from torch.distributed.tensor import DTensor

    at = mesh.get_coordinate() or ()
    plain = not any(at)
    known: dict[Any, bool] = {}
    result = []
    for t in tensors:
        if not isinstance(t, DTensor):
            result.append(plain)
            continue
        placements = t.placements
        if placements not in known:
            known[placements] = all(c == 0 for c, p in zip(at, placements, strict=True) if p.is_replicate())
        result.append(known[placements])
    return result


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
    from torch.distributed.tensor import DTensor

    _dispatch.bump_versions([t for t in written if isinstance(t, DTensor)])


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
    op(shards(written), shards(read))
    bump_versions(written)


def check_matching(name: str, value: Sequence[Tensor], other_name: str, other: Sequence[Tensor], *, one_element: bool = True) -> None:
    """Each local ``value`` belongs to the same elements as its partner's local tensor. The whole shapes are known to broadcast.

    A DTensor's partner is a DTensor on the same mesh with the same placements, a dimension of size 1 that broadcasts being replicated; or,
    if ``one_element`` allows it, a plain tensor of one element. A plain tensor's partner is plain.

    Raises:
        TypeError: a Partial placement, or a plain tensor beside a DTensor.
        ValueError: other placements, or two meshes.
    """
    from torch.distributed.tensor import DTensor

    mesh_of((other_name, other), (name, value))
    for i, (t, partner) in enumerate(zip(value, other, strict=True)):
        a, b = t if isinstance(t, DTensor) else None, partner if isinstance(partner, DTensor) else None
        if a is not None and b is not None and a.placements == b.placements and a.shape == b.shape:
            continue
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
