"""The low_rank family on lists of DTensors: sums of what this rank holds, one all-reduce of O(r) numbers, this rank's own update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastcl.ops import _checks, _dispatch, _low_rank_checks, _low_rank_compress, _low_rank_stages, _sharded
from fastcl.ops._low_rank_checks import Named
from fastcl.ops._low_rank_stages import Place, Tensors

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


@_sharded.outside_graphs
def solve_(grads: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> None:
    place, lists = _local(basis, sigma, ("diagonal", diagonal), ("grads", grads))
    d, g, b = lists
    _low_rank_checks.solved(g, d, b, sigma)
    _low_rank_stages.solve_(place, g, d, b, sigma)
    _sharded.bump_versions(grads)


@_sharded.outside_graphs
def quadratic(deltas: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> Tensor:
    place, lists = _local(basis, sigma, ("diagonal", diagonal), ("deltas", deltas))
    d, x, b = lists
    _low_rank_checks.read(("deltas", x), d, b, sigma)
    return _low_rank_stages.quadratic(place, x, d, b, sigma)


@_sharded.outside_graphs
def step_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    sigma: Tensor,
    lr: float | Tensor,
    *numbers: Any,
) -> None:
    named: list[Named] = [("diagonal", diagonal), ("params", params), ("grads", grads)]
    named += [(name, value) for name, value in (("momenta", momenta), ("anchors", anchors)) if value]
    place, (d, p, g, *kept, b) = _local(basis, sigma, *named)
    v = kept[0] if momenta else []
    mu = kept[-1] if anchors else []
    _checks.not_recorded("params", params)
    _low_rank_checks.stepped([t.detach() for t in p], g, v, mu, d, b, sigma, lr, *numbers)
    _low_rank_stages.step_(place, p, g, v, mu, d, b, sigma, lr, *numbers)
    _sharded.bump_versions([*params, *momenta])


@_sharded.outside_graphs
def append_(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Named], weight: float) -> None:
    place, (d, *lists, b) = _local(basis, sigma, ("diagonal", diagonal), *vectors)
    own = [(name, v) for (name, _), v in zip(vectors, lists, strict=True)]
    _low_rank_checks.appended(d, b, sigma, own, weight)
    _low_rank_compress.append_(place, d, b, sigma, lists, weight)
    _sharded.bump_versions([*diagonal, *basis])


def _local(basis: Tensors, sigma: Tensor, first: Named, *others: Named) -> tuple[Place, list[list[Tensor]]]:
    """Each list's shards, those of the basis last; all ranks raise alike."""
    mesh = _sharded.mesh_of(first, *others, ("basis", basis))
    _checks.one_device(first, *others, ("basis", basis), ("sigma", [sigma]))
    for name, value in others:
        _checks.same_length(name, value, *first)
        _checks.same_shape(name, value, *first)
        _sharded.check_matching(name, value, *first, one_element=False)
    _check_basis(basis, first[1], len(sigma))
    shards = [[_dispatch.plain(t).detach() for t in _sharded.shards(value)] for _, value in (first, *others, ("basis", basis))]
    counted = _sharded.counted(first[1], mesh)
    members = [i for i, t in enumerate(shards[0]) if t.numel()]
    sums = [i for i in members if counted[i]]
    reduce = functools.partial(_sharded.all_reduce_sum, mesh=mesh)
    return Place(_low_rank_stages.Checked(), sigma.device, members, sums, reduce), shards


def _check_basis(basis: Tensors, diagonal: Tensors, rank: int) -> None:
    """Rows whole, the rest placed as the diagonal is."""
    from torch.distributed.tensor import DTensor

    _checks.same_length("basis", basis, "diagonal", diagonal)
    for i, (b, d) in enumerate(zip(basis, diagonal, strict=True)):
        if tuple(b.shape) != (rank, *d.shape):
            raise ValueError(f"basis[{i}] has shape {tuple(b.shape)}; for diagonal[{i}] of shape {tuple(d.shape)} it is {(rank, *d.shape)}")
        if isinstance(b, DTensor) != isinstance(d, DTensor):
            raise TypeError(f"of basis[{i}] and diagonal[{i}] one is a DTensor and the other a plain tensor; accepted are two of a kind")
        if isinstance(b, DTensor) and isinstance(d, DTensor) and tuple(b.placements) != tuple(_behind_rows(p) for p in d.placements):
            raise ValueError(
                f"basis[{i}] has the placements {b.placements} and diagonal[{i}] {d.placements}; dimension n of the diagonal is n + 1 of "
                f"the basis, so the placements have to be {[_behind_rows(p) for p in d.placements]}"
            )


def _behind_rows(p: Placement) -> Placement:
    from torch.distributed.tensor import Shard

    dim = getattr(p, "dim", None)
    if dim is None:
        return p
    factor = getattr(p, "split_factor", None)  # of FSDP2 over tensor-parallel shards
    moved: Placement = Shard(dim + 1) if factor is None else type(p)(dim + 1, split_factor=factor)  # type: ignore[call-arg]
    return moved
