"""The projection family on lists of DTensors: products of what this rank holds, one sum over the ranks, then this rank's own update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _sharded
from fastcl.ops._sharded import Named
from fastcl.reference.projection import project_coefficient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CheckWritten = Callable[[Sequence[Tensor], Sequence[Named]], None]


@_sharded.outside_graphs
def gram(*named: Named) -> Tensor:
    """Gram matrix of the whole tensors, [K, K], the same bits on every rank."""
    mesh, shards = _local(*named)
    return _products(named[0][1], shards, mesh)


@_sharded.outside_graphs
def project_(grads: Sequence[Tensor], reference: Sequence[Tensor], check: CheckWritten) -> Tensor:
    """``[g.r, r.r, coefficient]``, as the operator returns it."""
    _sharded.check_apart("grads", grads, ("reference", reference))
    mesh, (g, r) = _local(("grads", grads), ("reference", reference))
    _checks.not_recorded("grads", grads)
    _, dot, _, square = _products(grads, [g, r], mesh).flatten().unbind()
    coefficient = project_coefficient(dot, square)
    _combine(grads, g, [("reference", r)], coefficient[None], check)
    return torch.stack([dot, square, coefficient])


@_sharded.outside_graphs
def gem_project_(grads: Sequence[Tensor], memories: Sequence[Named], margin: float, ridge: float, check: CheckWritten) -> Tensor:
    """``[violated, v, dots]``, as the operator returns it."""
    _sharded.check_apart("grads", grads, *memories)
    mesh, (g, *shards) = _local(("grads", grads), *memories)
    _checks.not_recorded("grads", grads)
    products = _products(grads, [*shards, g], mesh)
    values: Tensor = _dispatch.run_reading("gem_coefficients", products.device, products, margin, ridge)
    named = [(name, m) for (name, _), m in zip(memories, shards, strict=True)]
    _combine(grads, g, named, values[1 : 1 + len(shards)], check)
    return values


def _local(*named: Named) -> tuple[DeviceMesh, list[list[Tensor]]]:
    mesh = _sharded.mesh_of(*named)
    _checks.one_device(*named)
    first, *others = named
    for name, value in others:
        _checks.same_shape(name, value, *first)
        _sharded.check_matching(name, value, *first, one_element=False)
    shards = [[_dispatch.plain(t) for t in _sharded.shards(value)] for _, value in named]
    # Here and not in the op, which sees what this rank counts: all ranks have to raise, or the others would wait for this one.
    for (name, _), column in zip(named, shards, strict=True):
        if any(t.dtype not in _checks.FLOATING or t.layout != torch.strided for t in column):
            _checks.dense(name, column, _checks.FLOATING)
    return mesh, shards


def _products(tensors: Sequence[Tensor], shards: Sequence[Sequence[Tensor]], mesh: DeviceMesh) -> Tensor:
    counted = _sharded.counted(tensors, mesh)
    members = [i for i, counts in enumerate(counted) if counts and shards[0][i].numel()]
    own = torch.zeros(len(shards), len(shards), dtype=torch.float64, device=shards[0][0].device)
    if members:
        lists = [[column[i] for i in members] for column in shards]
        found: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate_reading("gram", lists[0], lists)
        # The operator says what is wrong with dtypes and layouts.
        own = torch.ops.fastcl.gram([t for column in lists for t in column], len(lists)) if found is _dispatch.REFUSED else found
    return _sharded.all_reduce_sum(own, mesh)


def _combine(grads: Sequence[Tensor], g: Sequence[Tensor], memories: Sequence[Named], coefficients: Tensor, check: CheckWritten) -> None:
    members = [i for i, t in enumerate(g) if t.numel()]
    if members:
        coefficients = coefficients.contiguous()
        written, *columns = ([column[i] for i in members] for column in (g, *(m for _, m in memories)))
        if _dispatch.traced() or _dispatch.gate("combine_", written, columns, coefficients) is _dispatch.REFUSED:
            check(g, memories)
            _dispatch.run("combine_", written[0].device, written, columns, coefficients)
    _sharded.bump_versions(grads)
