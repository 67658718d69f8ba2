"""The low_rank ops on DTensors; sharded_ranks.py runs these checks on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fastcl import ops
from fastcl.testing import clone, gradients
from fastcl.testing.low_rank import low_rank_precision

PLAIN = "plain"
RANK = 3


def spread(whole: Tensor, mesh: DeviceMesh, placements: Any) -> Tensor:
    own = whole.clone()  # of which one rank alone would make its shard without a copy
    return own if placements == PLAIN else distribute_tensor(own, mesh, placements)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def behind_rows(placements: Any) -> Any:
    return placements if placements == PLAIN else [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in placements]


def spread_list(tensors: Sequence[Tensor], mesh: DeviceMesh, cases: Sequence[Any], rows: bool = False) -> list[Tensor]:
    return [spread(t, mesh, behind_rows(c[1]) if rows else c[1]) for t, c in zip(tensors, cases, strict=True)]


def spread_form(form: Any, mesh: DeviceMesh, cases: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    diagonal, basis, sigma = form
    return spread_list(diagonal, mesh, cases), spread_list(basis, mesh, cases, rows=True), sigma.clone()


def near(a: Sequence[Tensor], b: Sequence[Tensor], case: Any) -> None:
    for x, y in zip(a, b, strict=True):
        limit = 16 * torch.finfo(y.dtype).eps if y.dtype != torch.float64 else 1e-12
        torch.testing.assert_close(whole(x), y, rtol=limit, atol=limit * (1 + float(y.abs().max()) if y.numel() else 1), msg=str(case))


def alike(value: Tensor) -> None:
    """All ranks have the same bits."""
    everyone = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, value)
    assert all(torch.equal(t, value) for t in everyone)


def same_as_whole(mesh: DeviceMesh, cases: Sequence[Any], dtype: torch.dtype, kept: torch.dtype, rank: int, case: Any) -> None:
    """What whole tensors give, with one sum over the ranks for each op."""
    shapes = [c[0] for c in cases]
    groups = 1 if mesh.ndim == 1 or mesh.size() == dist.get_world_size() else mesh.ndim
    form = low_rank_precision(shapes, kept, rank)
    lists = [gradients(shapes, d, "cpu", n) for n, d in enumerate((dtype, dtype, kept, kept))]
    for momentum, strength, radius in ((0.9, 0.7, None), (0.9, 0.7, 0.2), (0.0, 0.0, None), (0.0, 0.7, 0.1)):
        dense, shards = clone(lists), [spread_list(x, mesh, cases) for x in lists]
        kinds = spread_form(form, mesh, cases)
        with CommDebugMode() as communication:
            ops.low_rank_step_(*shards, *kinds, 0.05, momentum, strength, radius)
        assert communication.get_total_counts() == (groups if rank or radius is not None else 0), case
        ops.low_rank_step_(*dense, *form, 0.05, momentum, strength, radius)
        near(shards[0], dense[0], (case, momentum, strength, radius))
        near(shards[2], dense[2], (case, momentum, strength, radius))
    dense_grads, grads = clone(lists[1]), spread_list(lists[1], mesh, cases)
    kinds = spread_form(form, mesh, cases)
    with CommDebugMode() as communication:
        square = ops.low_rank_quadratic(grads, *kinds)
        ops.low_rank_solve_(grads, *kinds)
    assert communication.get_total_counts() == groups * (2 if rank else 1), case
    wanted = ops.low_rank_quadratic(dense_grads, *form)
    assert math.isclose(float(square), float(wanted), rel_tol=1e-5 if kept == torch.float32 else 1e-12), case
    alike(square)
    ops.low_rank_solve_(dense_grads, *form)
    near(grads, dense_grads, case)


def appends(mesh: DeviceMesh, cases: Sequence[Any], kept: torch.dtype, rank: int, case: Any) -> None:
    shapes = [c[0] for c in cases]
    form = low_rank_precision(shapes, kept, rank)
    kinds = spread_form(form, mesh, cases)
    for n in range(2):
        vectors = [[t * 10.0**-k for t in gradients(shapes, kept, "cpu", 5 * n + k)] for k in range(2)]
        ops.low_rank_append_(*kinds, [spread_list(v, mesh, cases) for v in vectors], 0.5)
        ops.low_rank_append_(*form, vectors, 0.5)
        alike(kinds[2])
        # Rows are unique but for their signs, and near where singular values are: what they give is compared.
        torch.testing.assert_close(kinds[2], form[2], rtol=1e-5, atol=1e-5)
        near(kinds[0], form[0], case)
        rows = [whole(b) for b in kinds[1]]
        for d, e, a, b in zip(kinds[0], form[0], rows, form[1], strict=True):
            got = whole(d) * (1 + ((kinds[2].view(-1, *[1] * (a.dim() - 1)) * a) ** 2).sum(0))
            wanted = e * (1 + ((form[2].view(-1, *[1] * (b.dim() - 1)) * b) ** 2).sum(0))
            torch.testing.assert_close(got, wanted, rtol=1e-4 if kept == torch.float32 else 1e-9, atol=0)


def errors(mesh: DeviceMesh, other: DeviceMesh, refused: Any) -> None:
    case = [((4, 6), [Shard(0)])]
    form = spread_form(low_rank_precision([(4, 6)], torch.float32, 2), mesh, case)
    diagonal, basis, sigma = form
    g = torch.rand(4, 6)
    shard, across, elsewhere = spread(g, mesh, [Shard(0)]), spread(g, mesh, [Shard(1)]), spread(g, other, [Shard(0)])
    partial = DTensor.from_local(g.clone(), mesh, [Partial()])
    solve = ops.low_rank_solve_
    refused(TypeError, r"grads\[0\] has the placements .*Partial", solve, [partial], diagonal, basis, sigma)
    refused(ValueError, r"grads\[0\] lives on", solve, [elsewhere], diagonal, basis, sigma)
    refused(ValueError, r"grads\[0\] has the placements", solve, [across], diagonal, basis, sigma)
    refused(TypeError, r"grads\[0\] is a plain tensor", solve, [g], diagonal, basis, sigma)
    refused(ValueError, r"basis\[0\] has the placements", solve, [shard], diagonal, [spread(whole(basis[0]), mesh, [Shard(2)])], sigma)
    refused(ValueError, r"basis\[0\] has the placements", solve, [shard], diagonal, [spread(whole(basis[0]), mesh, [Replicate()])], sigma)
    refused(TypeError, r"of basis\[0\] and diagonal\[0\] one is a DTensor", solve, [shard], diagonal, [whole(basis[0])], sigma)
    refused(TypeError, "sigma is a DTensor", solve, [shard], diagonal, basis, spread(sigma, mesh, [Replicate()]))
    refused(ValueError, r"share memory", solve, diagonal, diagonal, basis, sigma)
    nan = g.clone()
    nan[0, 0] = math.nan
    refused(ValueError, r"vectors\[0\] holds NaN", ops.low_rank_append_, *form, [[spread(nan, mesh, [Shard(0)])]])
