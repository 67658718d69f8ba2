"""What every rank of a gloo group checks; test_sharded.py starts the ranks: RANK WORLD STORE RESULTS."""

from __future__ import annotations

import copy
import datetime
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import sharded_low_rank
import sharded_optimizers
import sharded_precision
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from fastcl import (
    BitMask,
    apply_gradient_mask_,
    backends,
    capture_gradients,
    child_mask_gradients_,
    gem_project_gradients_,
    mask_gradients_,
    ops,
    project_gradients_,
    reference,
    top_fraction_mask,
    use_backend,
)
from fastcl.data import ReservoirBuffer
from fastcl.methods import AGEM, GEM, SPG
from fastcl.reference._storage import decode
from fastcl.testing import CASES, clone, largest_error, unit_roundoff
from layouts import identical

CHECKS: dict[str, tuple[tuple[int, ...], Callable[[int], None]]] = {}
WORLDS = (1, 2, 4)
F64, F32, BF16, U8 = torch.float64, torch.float32, torch.bfloat16, torch.uint8
PLAIN = "plain"


def check(*worlds: int) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    def add(function: Callable[[int], None]) -> Callable[[int], None]:
        CHECKS[function.__name__] = (worlds, function)
        return function

    return add


def serving() -> Iterator[str]:
    for name in ("cpp", "reference"):
        if backends.why_not(name, "cpu") is None:
            with use_backend(name):
                yield name


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(whole: Tensor, mesh: DeviceMesh, placements: Any) -> Tensor:
    own = whole.clone()  # of which one rank alone would make its shard without a copy
    return own if placements == PLAIN else distribute_tensor(own, mesh, placements)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


# Shape and placement of what is written, and of what broadcasts to it.
LINE = [
    ((5, 3), [Shard(0)], (5, 3), [Shard(0)]),
    ((5, 3), [Shard(0)], (5, 1), [Shard(0)]),
    ((5, 3), [Shard(0)], (1, 3), [Replicate()]),
    ((5, 3), [Shard(0)], (3,), [Replicate()]),
    ((5, 3), [Shard(0)], (), PLAIN),
    ((5, 3), [Shard(0)], (1, 1), PLAIN),
    ((5, 3), [Shard(0)], (), [Replicate()]),
    ((3, 5), [Shard(1)], (3, 5), [Shard(1)]),
    ((3, 5), [Shard(1)], (5,), [Shard(0)]),
    ((3, 5), [Shard(1)], (3, 1), [Replicate()]),
    ((2, 4), [Shard(0)], (2, 4), [Shard(0)]),
    ((1, 4), [Shard(0)], (1, 4), [Shard(0)]),
    ((1, 4), [Shard(0)], (1, 4), [Replicate()]),
    ((1,), [Shard(0)], (), PLAIN),
    ((0, 3), [Shard(0)], (0, 3), [Shard(0)]),
    ((4, 3), [Replicate()], (4, 3), [Replicate()]),
    ((6,), PLAIN, (6,), PLAIN),
    ((2, 3), PLAIN, (3,), PLAIN),
]
GRID = [
    ((5, 3), [Replicate(), Shard(0)], (5, 3), [Replicate(), Shard(0)]),
    ((5, 3), [Shard(0), Shard(1)], (5, 3), [Shard(0), Shard(1)]),
    ((5, 3), [Shard(0), Shard(1)], (3,), [Replicate(), Shard(0)]),
    ((5, 3), [Shard(1), Shard(0)], (5, 1), [Replicate(), Shard(0)]),
    ((3, 7), [Shard(0), Shard(0)], (3, 7), [Shard(0), Shard(0)]),
    ((1, 7), [Shard(0), Replicate()], (1, 7), [Shard(0), Replicate()]),
    ((4, 2), [Replicate(), Replicate()], (), PLAIN),
    ((6,), PLAIN, (6,), PLAIN),
]


def meshes(world: int) -> list[tuple[DeviceMesh, list[Any]]]:
    line = [(init_device_mesh("cpu", (world,)), LINE)]
    return [*line, (init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), GRID)] if world == 4 else line


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    value = torch.rand(tuple(shape), generator=seeded(seed), dtype=F64)
    return (value * 255).to(U8) if dtype == U8 else value.to(dtype)


def elementwise(op: str, world: int, *extra: float) -> None:
    for backend in serving():
        for mesh, cases in meshes(world):
            for dtype, stored in [(F32, F32), (BF16, U8), (F64, BF16)] if op == "soft_mask_" else [(U8, F32), (BF16, BF16), (F64, U8)]:
                written = [random(c[0], dtype, n) for n, c in enumerate(cases)]
                read = [random(c[2], stored, 50 + n) for n, c in enumerate(cases)]
                if dtype != U8:
                    written[0][4, 1] = float("nan")
                if stored != U8:
                    read[0][0, 2] = float("nan")
                shards = [spread(t, mesh, c[1]) for t, c in zip(written, cases, strict=True)]
                others = [spread(t, mesh, c[3]) for t, c in zip(read, cases, strict=True)]
                before = [whole(t) for t in others]
                with CommDebugMode() as communication:
                    getattr(ops, op)(shards, others, *extra)
                assert communication.get_total_counts() == 0
                getattr(reference, op)(written, read, *extra)
                for n, (a, b) in enumerate(zip(shards, written, strict=True)):
                    assert identical(whole(a), b), (backend, mesh, cases[n], dtype, stored)
                assert all(identical(whole(a), b) for a, b in zip(others, before, strict=True))


@check(*WORLDS)
def soft_mask(world: int) -> None:
    elementwise("soft_mask_", world, 0.75)


@check(*WORLDS)
def emax(world: int) -> None:
    elementwise("emax_", world)


def spg_gradients(cases: Sequence[Any], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Normal ones with various means; one constant, one with a mean far above its spread, one whose first element lies far outside."""
    out = [torch.randn(tuple(c[0]), generator=seeded(seed + n), dtype=F64) * 10.0 ** -(n % 5) + n % 3 for n, c in enumerate(cases)]
    out[1].fill_(0.3)
    out[2].mul_(1e-3).add_(1000)
    out[3][0, 0] = 1e5
    return [t.to(dtype) for t in out]


@check(*WORLDS)
def spg_importance(world: int) -> None:
    for backend in serving():
        for mesh, cases in meshes(world):
            for dtype, stored, heads in [(F32, F32, 1), (F64, F64, 3), (BF16, U8, 2), (F32, BF16, 1), (F64, U8, 5)]:
                accumulated = [
                    (random(c[0], F64, n) * 0.2 * (255 if stored == U8 else 1)).to(stored) for n, c in enumerate(cases)
                ]  # a maximum that both sides win
                gradients = [spg_gradients(cases, dtype, 100 * h) for h in range(heads)]
                exact = clone(accumulated, F64)
                reference.spg_importance_(exact, clone(gradients, F64))
                dense = clone(accumulated)
                ops.spg_importance_(dense, gradients)
                shards = [spread(t, mesh, c[1]) for t, c in zip(accumulated, cases, strict=True)]
                by_head = [[spread(t, mesh, c[1]) for t, c in zip(g, cases, strict=True)] for g in gradients]
                with CommDebugMode() as communication:
                    mean = ops.spg_importance_(shards, by_head)
                assert communication.get_total_counts() == 2
                result = [whole(t) for t in shards]
                case = (backend, mesh, dtype, stored, heads)
                for n, (r, e) in enumerate(zip(result, exact, strict=True)):
                    # As good as the dense op, or by the rule of its own tests: at most twice torch's error in the same dtypes.
                    allowed = 2 * largest_error([dense[n]], [e]) + (4 * unit_roundoff(F64) if F64 == stored == dtype else 0)
                    if e.numel() > 1:
                        torchs = [accumulated[n].clone()]
                        CASES["spg_importance_"].providers["eager"](torchs, [[g[n]] for g in gradients])
                        theirs = largest_error(torchs, [e])
                        allowed += 2 * theirs if math.isfinite(theirs) else 0
                    assert largest_error([r], [e]) <= allowed, (case, cases[n], largest_error([r], [e]), allowed)
                # The mean is that of what is stored, over all elements of the whole tensors, on every rank.
                values = torch.cat([decode(t, F64).flatten() for t in result])
                assert mean.dtype == F64
                assert not isinstance(mean, DTensor)
                assert abs(float(mean - values.mean())) <= values.numel() * unit_roundoff(F64), case
                everyone = [torch.zeros_like(mean) for _ in range(world)]
                dist.all_gather(everyone, mean)
                assert all(torch.equal(m, mean) for m in everyone), case


@check(*WORLDS)
def spg_nan_and_no_heads(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for _ in serving():
        stored = [torch.full((5, 2), 0.25), torch.full((3,), 0.5), torch.full((2,), 0.75)]
        placements = [[Shard(0)], [Replicate()], PLAIN]
        shards = [spread(t, mesh, p) for t, p in zip(stored, placements, strict=True)]
        mean = ops.spg_importance_(shards, [])
        assert float(mean) == pytest.approx((2.5 + 1.5 + 1.5) / 15, rel=1e-15)
        for place, value in ((0, float("nan")), (4, float("inf"))):
            g = [torch.randn(t.shape, generator=seeded(1)) for t in stored]
            g[0][place, 1] = value
            mean = ops.spg_importance_(shards, [[spread(t, mesh, p) for t, p in zip(g, placements, strict=True)]])
            assert whole(shards[0]).isnan().all()
            assert not whole(shards[1]).isnan().any()
            assert mean.isnan()


@check(*WORLDS)
def child_mask(world: int) -> None:
    """The mask of the whole tensors, however they are placed."""
    for backend in serving():
        for mesh, cases in meshes(world):
            for dtype in (F32, BF16, F64):
                grads = [random(c[0], dtype, n) + 1 for n, c in enumerate(cases)]
                grads += [random((37, 65), dtype, 50) + 1, random((7, 3, 9), dtype, 51) + 1, random((64, 40), dtype, 52).t() + 1]
                placements = [c[1] for c in cases] + [[Shard(d)] * mesh.ndim for d in (1, 2, 0)]
                shards = [spread(g, mesh, p) for g, p in zip(grads, placements, strict=True)]
                with CommDebugMode() as communication:
                    ops.child_mask_(shards, 0.4, 2**64 - 5, 3)
                assert communication.get_total_counts() == 0
                reference.child_mask_(grads, 0.4, 2**64 - 5, 3)
                for n, (a, b) in enumerate(zip(shards, grads, strict=True)):
                    assert identical(whole(a), b), (backend, mesh, placements[n], dtype)


@check(*WORLDS)
def child_mask_of_models(world: int) -> None:
    """FSDP2's gradients, some of which are missing, and every step another mask."""
    for mesh in training_meshes(world):
        single, model = Net(), sharded(Net(), mesh)
        for step in range(3):
            x, y = data(step)
            for m in (single, model):
                m.zero_grad()
                nn.functional.cross_entropy(m(x), y).backward()
                m.second.bias.grad = None
                child_mask_gradients_(m, 0.5, seed=11, step=step)
            masked = 0
            for (name, p), own in zip(names(model).items(), single.parameters(), strict=True):
                assert (p.grad is None) == (own.grad is None), name
                if own.grad is not None:
                    close(p.grad, own.grad)
                    assert torch.equal(whole(p.grad) == 0, own.grad == 0), name
                    masked += int((own.grad == 0).sum())
            assert masked


@check(*WORLDS)
def ewc_pull(world: int) -> None:
    for backend in serving():
        for mesh, cases in meshes(world):
            for dtypes in [(F32,) * 4, (BF16, F32, F32, BF16), (F64, BF16, F32, F64)]:
                lists = [[random(c[0], d, 10 * k + n) for n, c in enumerate(cases)] for k, d in enumerate(dtypes)]
                shards = [[spread(t, mesh, c[1]) for t, c in zip(tensors, cases, strict=True)] for tensors in lists]
                with CommDebugMode() as communication:
                    ops.ewc_pull_(*shards, 0.7)
                assert communication.get_total_counts() == 0
                reference.ewc_pull_(*lists, 0.7)
                for n, (a, b) in enumerate(zip(shards[0], lists[0], strict=True)):
                    assert identical(whole(a), b), (backend, mesh, cases[n], dtypes)


@check(*WORLDS)
def low_rank_step(world: int) -> None:
    for backend in serving():
        for mesh, cases in meshes(world):
            for dtype, kept, rank in [(F32, F32, 3), (BF16, F32, 5), (F64, F64, 3), (F32, F32, 0)]:
                sharded_low_rank.same_as_whole(mesh, cases, dtype, kept, rank, (backend, mesh, dtype, kept, rank))


@check(*WORLDS)
def low_rank_append(world: int) -> None:
    for backend in serving():
        for mesh, cases in meshes(world):
            for kept, rank in [(F32, 3), (F64, 5), (F32, 0)]:
                sharded_low_rank.appends(mesh, cases, kept, rank, (backend, mesh, kept, rank))


@check(2)
def low_rank_errors(world: int) -> None:
    sharded_low_rank.errors(init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [1, 0]), refused)


@check(*WORLDS)
def fisher_add(world: int) -> None:
    """The norm is that of the whole tensor."""
    for backend in serving():
        for mesh, cases in meshes(world):
            for stored, dtype in [(F32, F32), (F64, F64), (F32, BF16), (BF16, F32)]:
                for max_norm in (None, 0.7, 1e3):
                    fisher = [random(c[0], stored, n) for n, c in enumerate(cases)]
                    grads = [random(c[0], dtype, 50 + n) - 0.5 for n, c in enumerate(cases)]
                    shards, others = ([spread(t, mesh, c[1]) for t, c in zip(x, cases, strict=True)] for x in (fisher, grads))
                    with CommDebugMode() as communication:
                        ops.fisher_add_(shards, others, 0.25, max_norm)
                    assert communication.get_total_counts() == (max_norm is not None)
                    reference.fisher_add_(fisher, grads, 0.25, max_norm)
                    case = (backend, mesh, stored, dtype, max_norm)
                    for n, (a, b) in enumerate(zip(shards, fisher, strict=True)):
                        if max_norm is None:
                            assert identical(whole(a), b), (case, cases[n])
                        else:
                            wide = unit_roundoff(F64 if F64 in (stored, dtype) else F32)
                            torch.testing.assert_close(whole(a), b, rtol=2 * unit_roundoff(stored) + 8 * wide, atol=0, msg=str(case))


@check(2)
def fisher_without_a_number(world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for _ in serving():
        g = [torch.ones(6, 2), torch.ones(3)]
        g[0][5, 1] = float("nan")
        shards = [spread(torch.zeros_like(t), mesh, [Shard(0)]) for t in g]
        ops.fisher_add_(shards, [spread(t, mesh, [Shard(0)]) for t in g], 1.0, 1.0)
        assert whole(shards[0]).isnan().all()
        assert whole(shards[1]).isfinite().all()


@check(2)
def masks_errors(world: int) -> None:
    mesh, other = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [1, 0])
    a, b = torch.rand(4, 6), torch.rand(4, 6)
    shard, across = ([spread(t, mesh, [p]) for t in (a, b)] for p in (Shard(0), Shard(1)))
    partial = DTensor.from_local(a.clone(), mesh, [Partial()])
    elsewhere = spread(b, other, [Shard(0)])
    child = ops.child_mask_
    refused(TypeError, r"grads\[1\] has the placements .*Partial", child, [shard[0], partial], 0.5, 0, 0)
    refused(ValueError, r"grads\[1\] lives on", child, [shard[0], elsewhere], 0.5, 0, 0)
    refused(ValueError, "keep must be in", child, shard, 0.0, 0, 0)
    refused(ValueError, "step must be an integer in", child, shard, 0.5, 0, 2**32)
    refused(ValueError, r"grads\[0\] requires grad", child, [shard[0].detach().requires_grad_()], 0.5, 0, 0)
    refused(ValueError, "share memory", child, [shard[0], shard[0]], 0.5, 0, 0)
    for max_norm in (None, 1.0):
        fisher = lambda f, g, norm=max_norm: ops.fisher_add_(f, g, 1.0, norm)  # noqa: E731
        refused(ValueError, r"grads\[0\] has the placements .*must match", fisher, shard[:1], across[:1])
        refused(TypeError, r"grads\[0\] is a plain tensor", fisher, shard[:1], [b])
        refused(TypeError, r"fisher\[0\] has the placements .*Partial", fisher, [partial], shard[:1])
        refused(ValueError, "has 1 tensors", fisher, shard, shard[:1])
        refused(ValueError, r"grads\[0\] has shape \(4, 1\)", fisher, shard[:1], [spread(b[:, :1], mesh, [Shard(0)])])
        refused(ValueError, r"fisher\[0\] requires grad", fisher, [shard[0].detach().requires_grad_()], shard[1:])
    refused(ValueError, "max_norm must be", ops.fisher_add_, shard[:1], shard[1:], 1.0, 0.0)
    pull = ops.ewc_pull_
    refused(ValueError, r"params\[0\] has the placements .*must match", pull, shard[:1], across[:1], shard[1:], shard[1:], 1.0)
    refused(TypeError, r"precision\[0\] is a plain tensor", pull, shard[:1], shard[1:], [b], shard[1:], 1.0)
    refused(ValueError, r"anchor\[0\] lives on", pull, shard[:1], shard[1:], shard[1:], [elsewhere], 1.0)
    refused(ValueError, "strength must be", pull, shard[:1], shard[1:], shard[1:], shard[1:], -1.0)


@check(4)
def strided_shards(world: int) -> None:
    """Tensor parallelism under FSDP2 along one dimension: a rank's rows do not lie in one piece."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own = spread(torch.ones(8, 3), mesh, [Shard(0), Shard(0)]).to_local().clone()
    t = DTensor.from_local(own, mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False)
    refused(ValueError, r"grads\[0\] has the placements .*_StridedShard", ops.child_mask_, [t], 0.5, 0, 0)


@check(2, 4)
def ranks_differ_in_size_of_mean(world: int) -> None:
    """Every rank holds another constant: all of the variance lies between the ranks, far from the first part's shift."""
    mesh = init_device_mesh("cpu", (world,))
    for _ in serving():
        g = torch.arange(world, dtype=F64).repeat_interleave(3) * 1e-6 + 1e6
        exact = [torch.zeros(3 * world, dtype=F64)]
        reference.spg_importance_(exact, [[g]])
        a = spread(torch.zeros(3 * world, dtype=F64), mesh, [Shard(0)])
        ops.spg_importance_([a], [[spread(g, mesh, [Shard(0)])]])
        assert largest_error([whole(a)], exact) <= 8 * unit_roundoff(F64)


def refused(kind: type[Exception], message: str, call: Callable[..., Any], *args: Any) -> None:
    """An error that names the argument, on every rank, and nothing written."""
    tensors = [t for a in args for t in (a if isinstance(a, list) else [])]
    tensors = [u for t in tensors for u in (t if isinstance(t, list) else [t]) if u is not None]
    before = [t.to_local().clone() if isinstance(t, DTensor) else t.clone() for t in tensors]
    with pytest.raises(kind, match=message):
        call(*args)
    for t, old in zip(tensors, before, strict=True):
        assert identical(t.to_local() if isinstance(t, DTensor) else t, old)


@check(2)
def errors(world: int) -> None:
    mesh, other = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [1, 0])
    a, b = torch.rand(4, 6), torch.rand(4, 6)
    shard, across, copy = ([spread(t, mesh, [p]) for t in (a, b)] for p in (Shard(0), Shard(1), Replicate()))
    partial = DTensor.from_local(a.clone(), mesh, [Partial()])
    elsewhere = spread(b, other, [Shard(0)])
    for op, written, read in ((ops.soft_mask_, "grads", "importance"), (ops.emax_, "importance", "new")):
        refused(TypeError, rf"{read}\[1\] has the placements .*Partial.*redistribute", op, shard, [shard[1], partial])
        refused(TypeError, rf"{written}\[0\] has the placements .*Partial", op, [partial], [b])
        refused(
            ValueError, rf"{read}\[1\] has the placements .*Shard\(dim=1\).*{written}\[1\] .*must match", op, shard, [b.mean(), across[0]]
        )
        refused(
            ValueError,
            rf"{read}\[0\] has the placements .*Replicate.*redistribute\(placements=\[Shard\(dim=0\)\]\)",
            op,
            shard[:1],
            copy[:1],
        )
        refused(TypeError, rf"{read}\[0\] is a plain tensor.*distribute_tensor\({read}\[0\]", op, shard[:1], [b])
        refused(TypeError, rf"{read}\[0\] is a plain tensor", op, copy[:1], [b[:, :1]])
        refused(TypeError, rf"{read}\[0\] is a DTensor.*full_tensor\(\)", op, [a], shard[1:])
        refused(ValueError, rf"{read}\[0\] lives on .* and {written}\[0\] on", op, shard[:1], [elsewhere])
        refused(ValueError, rf"{written}\[1\] lives on", op, [shard[0], elsewhere], [shard[1], elsewhere.clone()])
        refused(ValueError, "has 1 tensors", op, shard, shard[:1])
        refused(ValueError, rf"{read}\[0\] has shape \(4, 5\)", op, shard[:1], [spread(torch.rand(4, 5), mesh, [Shard(0)])])
        refused(ValueError, rf"{written}\[0\] requires grad", op, [shard[0].detach().requires_grad_()], shard[1:])
        refused(TypeError, "int64", op, [spread(torch.arange(4), mesh, [Shard(0)])], [spread(torch.rand(4), mesh, [Shard(0)])])
        refused(ValueError, "share memory", op, [shard[0], shard[0]], [shard[1], shard[1]])
    refused(ValueError, "strength must be in", ops.soft_mask_, shard[:1], shard[1:], 1.5)
    spg = ops.spg_importance_
    refused(TypeError, r"grads_by_head\[0\]\[0\] has the placements .*Partial", spg, shard[:1], [[partial]])
    refused(TypeError, r"accumulated\[0\] has the placements .*Partial", spg, [partial], [shard[:1]])
    refused(ValueError, r"grads_by_head\[1\]\[0\] has the placements .*must match", spg, shard[:1], [shard[1:], across[1:]])
    refused(TypeError, r"grads_by_head\[0\]\[0\] is a plain tensor.*accepted are a DTensor, pass", spg, shard[:1], [[b]])
    refused(TypeError, r"grads_by_head\[0\]\[0\] is a DTensor.*full_tensor", spg, [a], [shard[1:]])
    one = spread(torch.rand(1), mesh, [Shard(0)])
    refused(TypeError, r"grads_by_head\[0\]\[0\] is a plain tensor", spg, [one], [[torch.rand(1)]])
    refused(ValueError, r"grads_by_head\[0\]\[0\] has shape", spg, shard[:1], [[spread(torch.rand(4, 1), mesh, [Shard(0)])]])
    refused(ValueError, r"grads_by_head\[0\]\[0\] lives on", spg, shard[:1], [[elsewhere]])
    refused(ValueError, r"accumulated\[0\] requires grad", spg, [shard[0].detach().requires_grad_()], [shard[1:]])
    # What the messages tell to do.
    ops.soft_mask_(shard[:1], [distribute_tensor(b, mesh, shard[0].placements)])
    ops.soft_mask_(shard[:1], [copy[1].redistribute(placements=[Shard(0)])])
    ops.soft_mask_([partial.redistribute(placements=[Shard(0)])], shard[1:])
    alone = DeviceMesh("cpu", [0])
    t = [distribute_tensor(torch.rand(3), alone, [Shard(0)]) for _ in range(2)]
    if dist.get_rank() == 0:
        ops.soft_mask_(t[:1], t[1:])
        assert float(ops.spg_importance_(t[:1], [t[1:]])) > 0
    else:
        refused(ValueError, "this process is not part", ops.soft_mask_, t[:1], t[1:])


@check(2)
def versions(world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    i = spread(torch.rand(5, 3), mesh, [Shard(0)])
    for call in (
        lambda y: ops.soft_mask_([y], [i]),
        lambda y: ops.emax_([y], [i]),
        lambda y: ops.spg_importance_([y], [[i]]),
        lambda y: ops.child_mask_([y], 0.5, 0, 0),
        lambda y: ops.fisher_add_([y], [i]),
        lambda y: ops.fisher_add_([y], [i], 1.0, 1.0),
        lambda y: ops.ewc_pull_([y], [i], [i], [i], 1.0),
    ):
        for of in (lambda y: y, lambda y: y.to_local()):
            x = spread(torch.rand(5, 3), mesh, [Shard(0)]).requires_grad_()
            y = x * 1
            loss = of(y).square().sum()
            with torch.no_grad():
                call(y)
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation|has been modified inplace"):
                (loss.full_tensor() if isinstance(loss, DTensor) else loss).backward()


@check(2)
def compiled(world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def mask(g: Tensor, i: Tensor) -> Tensor:
        double = g * 2
        ops.soft_mask_([g, double], [i, i], 0.5)
        return g + double

    def accumulate(a: Tensor, g: Tensor) -> Tensor:
        mean = ops.spg_importance_([a], [[g * 2]])
        return a * mean

    def child(g: Tensor, i: Tensor) -> Tensor:
        double = g * 2
        ops.child_mask_([g, double, i], 0.5, 1, 2)
        return g + double + i

    def fisher(f: Tensor, g: Tensor) -> Tensor:
        ops.fisher_add_([f], [g * 2], 0.5, 1.0)
        return f + g

    for function, modes in ((mask, (True, False)), (child, (False,)), (accumulate, (False,)), (fisher, (False,))):
        for fullgraph in modes:
            eager = [spread(random((5, 3), F32, n), mesh, [Shard(0)]) for n in (1, 2)]
            traced = [t.clone() for t in eager]
            expected = function(*eager)
            torch._dynamo.reset()
            result = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)(*traced)
            assert identical(result.to_local(), expected.to_local())
            assert identical(traced[0].to_local(), eager[0].to_local())
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"spg_importance_|_sharded_spg|disable"):
        torch.compile(accumulate, backend="aot_eager", fullgraph=True)(*traced)


class Net(nn.Module):
    """Sizes that no number of ranks divides, a parameter with fewer rows than ranks, a head per task."""

    def __init__(self, tasks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(tasks))
        self.double()

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x))) * self.scale
        return self.heads[head](torch.tanh(hidden))


def sharded(model: Net, mesh: DeviceMesh) -> Net:
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def training_meshes(world: int) -> list[DeviceMesh]:
    line = [init_device_mesh("cpu", (world,))]
    return [*line, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))] if world == 4 else line


def data(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 7, generator=seeded(seed), dtype=F64), torch.randint(2, (8,), generator=seeded(seed))


def part(t: Tensor, world: int) -> Tensor:
    return t.chunk(world)[dist.get_rank()]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(whole(a.detach()), whole(b.detach()), rtol=1e-11, atol=1e-13)


def names(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


@check(*WORLDS)
def training_with_mask_gradients(world: int) -> None:
    def train(model: nn.Module, importance: Callable[[Tensor, Tensor], Tensor], ranks: int) -> dict[str, Tensor]:
        values = {
            n: importance(torch.rand(p.shape, generator=seeded(k), dtype=F64), p) for k, (n, p) in enumerate(model.named_parameters())
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        for step in range(4):
            x, y = data(step)
            if ranks > 1:
                x, y = part(x, ranks), part(y, ranks)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            mask_gradients_(model, {n: v for n, v in values.items() if "heads" not in n}, strength=0.9)
            mask_gradients_(model.module.heads if isinstance(model, DistributedDataParallel) else model.heads, [torch.tensor(0.5)] * 4)
            optimizer.step()
        return names(model)

    def like(value: Tensor, p: Tensor) -> Tensor:
        return distribute_tensor(value, p.device_mesh, p.placements)

    single = train(Net(), lambda value, _: value, 1)
    runs = [train(sharded(Net(), mesh), like, world) for mesh in training_meshes(world)]
    runs.append(train(DistributedDataParallel(Net(), find_unused_parameters=True), lambda value, _: value, world))
    for run in runs:
        assert run.keys() == single.keys()
        for name, p in single.items():
            close(run[name], p)


def spg_run(model: nn.Module, heads: nn.ModuleList, ranks: int, shard: Callable[[], Any] | None = None) -> SPG:
    spg = SPG(model, heads)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for task in range(2):
        if task == 1 and shard is not None:
            shard()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        batches = [(part(x, ranks), part(y, ranks)) if ranks > 1 else (x, y) for x, y in (data(10 * task + n) for n in range(3))]
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x, task), y).backward()
            spg.after_backward()
            optimizer.step()
        parameters = names(model)
        before = {n: None if p.grad is None else whole(p.grad).clone() for n, p in parameters.items()}
        with torch.no_grad():  # an evaluation: FSDP2 leaves whole parameters behind it
            model.eval()
            model(batches[0][0], task)
            model.train()
        mean = spg.end_task(batches, nn.functional.cross_entropy)
        assert float(mean) == float(spg.mean) > 0
        for n, p in parameters.items():
            assert (p.grad is None) == (before[n] is None), n
            assert p.grad is None or torch.equal(whole(p.grad), before[n])
    return spg


@check(*WORLDS)
def spg_method(world: int) -> None:
    plain = Net()
    single = spg_run(plain, plain.heads, 1)
    runs = []
    for mesh in training_meshes(world):
        model = sharded(Net(), mesh)
        runs.append((spg_run(model, model.heads, world), model))
        assert all(isinstance(t, DTensor) for t in runs[-1][0].importance.values())
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    runs.append((spg_run(model, model.module.heads, world), model))
    late = Net()
    mesh = training_meshes(world)[0]
    if world == 1:  # the first task is trained whole, the second sharded
        runs.append((spg_run(late, late.heads, 1, lambda: sharded(late, mesh)), late))
        assert all(isinstance(t, DTensor) for t in runs[-1][0].importance.values())
    for spg, model in runs:
        close(spg.mean, single.mean)
        for name, value in single.importance.items():
            found = {n.removeprefix("module."): t for n, t in spg.importance.items()}[name]
            torch.testing.assert_close(whole(found), value, rtol=0, atol=2e-6)  # float32 importance
        for name, p in names(plain).items():
            torch.testing.assert_close(whole(names(model)[name].detach()), p.detach(), rtol=1e-6, atol=1e-7)


@check(*WORLDS)
def spg_state(world: int) -> None:
    mesh = training_meshes(world)[-1]
    model = sharded(Net(), mesh)
    spg = spg_run(model, model.heads, world)
    path = Path(sys.argv[3]).with_name(f"spg-{world}.safetensors")
    spg.save(path)
    assert path.is_file()  # on every rank when it returns
    values = {name: whole(t) for name, t in spg.importance.items()}
    # From shards to shards, from shards to a whole model, from whole to shards; from the file to both.
    for source in ("sharded", "whole", "file"):
        for target in (sharded(Net(), mesh), Net()):
            fresh = SPG(target, target.heads)
            if source == "file":
                fresh.load(path)
            else:
                state = spg.state_dict()
                if source == "whole":
                    state["importance"] = values
                fresh.load_state_dict(state)
            assert fresh.tasks_seen == 2
            close(fresh.mean, spg.mean)
            for name, t in fresh.importance.items():
                assert isinstance(t, DTensor) == isinstance(dict(target.named_parameters())[name], DTensor)
                assert identical(whole(t), values[name])
    bad = spg.state_dict()
    local = bad["importance"]["first.weight"].to_local()
    if dist.get_rank() == 0:
        local[0, 0] = 1.5
    with pytest.raises(ValueError, match=r"importance\['first.weight'\] has values outside \[0, 1\]"):
        spg.load_state_dict(bad)
    with pytest.raises(OSError, match="missing"):
        spg.save(path.with_name("missing") / "spg.safetensors")
    x, y = data(0)
    x[0, 0] = float("nan") if dist.get_rank() == 0 else 0
    fresh = SPG(model, model.heads)
    with pytest.raises(ValueError, match="has a NaN or an Inf"):
        fresh.end_task([(x, y)], nn.functional.cross_entropy)
    hook = model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"'first.weight' has a post-accumulate-grad hook"):
        fresh.end_task([data(0)], nn.functional.cross_entropy)
    hook.remove()
    fresh.end_task([data(0)], nn.functional.cross_entropy)
    assert fresh.tasks_seen == 1


def projection_lists(cases: Sequence[Any], dtype: torch.dtype, count: int) -> list[list[Tensor]]:
    return [
        [torch.randn(tuple(c[0]), generator=seeded(100 * k + n), dtype=F64).to(dtype) for n, c in enumerate(cases)] for k in range(count)
    ]


def spread_all(tensors: Sequence[Tensor], mesh: DeviceMesh, cases: Sequence[Any]) -> list[Tensor]:
    return [spread(t, mesh, c[1]) for t, c in zip(tensors, cases, strict=True)]


def same_everywhere(*values: Tensor) -> None:
    """The decision is the same on all ranks, bit for bit."""
    own = torch.cat([v.double().flatten() for v in values])
    everyone = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    assert all(identical(other, own) for other in everyone)


def nearly(a: Tensor, b: Tensor, scale: float) -> None:
    assert not isinstance(a, DTensor)
    torch.testing.assert_close(a, b, rtol=0, atol=64 * unit_roundoff(F64) * scale)


@check(*WORLDS)
def projection(world: int) -> None:
    for _ in serving():
        for mesh, cases in meshes(world):
            for dtype in (F32, F64, BF16):
                for sign in (-1, 1):
                    g, r = projection_lists(cases, dtype, 2)
                    r = [sign * a + b * 0.5 for a, b in zip(g, r, strict=True)]
                    scale = sum(float((a.double() * b.double()).abs().sum()) for a, b in zip(g, r, strict=True))
                    shards, others = (spread_all(t, mesh, cases) for t in (g, r))
                    expected = ops.grad_dot(g, r)
                    with CommDebugMode() as communication:
                        dot = ops.grad_dot(shards, others)
                    assert communication.get_total_counts() == 1
                    nearly(dot, expected, scale)
                    nearly(ops.gram([shards, others]), ops.gram([g, r]), 4 * scale)
                    missing = [others[0], None, *others[2:-1], None]
                    nearly(ops.grad_dot(shards, missing), ops.grad_dot(g, [r[0], None, *r[2:-1], None]), scale)
                    versions = [t._version for t in shards]
                    with CommDebugMode() as communication:
                        info = ops.project_(shards, others)
                    assert communication.get_total_counts() == 1
                    wanted = ops.project_(g, r)
                    assert bool(info.violated) == bool(wanted.violated) == (sign < 0)
                    nearly(info.dot, wanted.dot, scale)
                    nearly(info.reference_sq, wanted.reference_sq, 4 * scale)
                    same_everywhere(*info)
                    assert all(t._version > v for t, v in zip(shards, versions, strict=True))
                    for a, b in zip(shards, g, strict=True):
                        if sign > 0:
                            assert identical(whole(a), b)
                        else:  # one rounding more where the coefficient's last bit differs
                            torch.testing.assert_close(whole(a), b, rtol=4 * unit_roundoff(dtype), atol=4 * unit_roundoff(dtype))


@check(*WORLDS)
def gem(world: int) -> None:
    for _ in serving():
        for mesh, cases in meshes(world):
            for dtype, count in ((F64, 1), (F32, 3), (F64, 5)):
                g, *memories = projection_lists(cases, dtype, 1 + count)
                memories[0] = [m - a for m, a in zip(memories[0], g, strict=True)]
                shards, *others = (spread_all(t, mesh, cases) for t in (g, *memories))
                others[-1][3] = None
                memories[-1][3] = None
                with CommDebugMode() as communication:
                    info = ops.gem_project_(shards, others, 0.5, 1e-3)
                assert communication.get_total_counts() == 1
                wanted = ops.gem_project_(g, memories, 0.5, 1e-3)
                assert bool(info.violated)
                assert bool(wanted.violated)
                torch.testing.assert_close(info.coefficients, wanted.coefficients, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(info.dots, wanted.dots, rtol=1e-12, atol=1e-11)
                same_everywhere(*info)
                for a, b in zip(shards, g, strict=True):
                    torch.testing.assert_close(whole(a), b, rtol=1e-11 if dtype == F64 else 1e-6, atol=1e-11 if dtype == F64 else 1e-6)


@check(*WORLDS)
def projection_of_nan(world: int) -> None:
    """One NaN on one rank and every element on every rank is NaN."""
    mesh = init_device_mesh("cpu", (world,))
    for _ in serving():
        g = [torch.ones(5, 2), torch.ones(3), torch.ones(1)]
        r = [-t for t in g]
        r[0][4, 1] = float("nan")
        placements = [[Shard(0)], PLAIN, [Shard(0)]]
        for call in (lambda a, b: ops.project_(a, b), lambda a, b: ops.gem_project_(a, [b])):
            shards, others = ([spread(t, mesh, p) for t, p in zip(x, placements, strict=True)] for x in (g, r))
            info = call(shards, others)
            assert bool(info.violated)
            assert all(whole(t).isnan().all() for t in shards)


@check(2)
def projection_errors(world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    a, b = torch.rand(4, 6), torch.rand(4, 6)
    shard, across = ([spread(t, mesh, [p]) for t in (a, b)] for p in (Shard(0), Shard(1)))
    partial = DTensor.from_local(a.clone(), mesh, [Partial()])
    refused(ValueError, r"b\[0\] has the placements .*must match", ops.grad_dot, shard[:1], across[:1])
    refused(TypeError, r"a\[0\] has the placements .*Partial", ops.grad_dot, [partial], shard[:1])
    refused(TypeError, r"vectors\[1\]\[0\] is a plain tensor", ops.gram, [shard[:1], [a]])
    refused(ValueError, r"reference\[0\] has the placements", ops.project_, shard[:1], across[:1])
    refused(TypeError, r"reference\[0\] is a DTensor", ops.project_, [a], shard[:1])
    refused(ValueError, r"grads\[0\] requires grad", ops.project_, [shard[0].detach().requires_grad_()], shard[1:])
    refused(ValueError, "share memory", ops.project_, shard[:1], shard[:1])
    refused(ValueError, r"grads\[1\] is None and reference\[1\] is not", ops.project_, [shard[0], None], [shard[1], shard[1]])
    refused(ValueError, r"memories\[1\]\[0\] has the placements", ops.gem_project_, shard[:1], [shard[1:], across[:1]])
    refused(ValueError, r"ridge", ops.gem_project_, shard[:1], [shard[1:]], 0.5, -1.0)
    refused(TypeError, "int64", ops.grad_dot, [spread(torch.arange(4), mesh, [Shard(0)])], [spread(torch.arange(4), mesh, [Shard(0)])])
    # What one rank alone counts or holds: all of them have to raise, or the others would wait in the sum.
    ones, plain = torch.ones(2), torch.ones(2)
    for placement, t in ((Replicate(), ones), (Shard(0), ones[:1])):
        good, bad = spread(t, mesh, [placement]), spread(t.long(), mesh, [placement])
        refused(TypeError, r"reference\[0\] has dtype int64", ops.project_, [good], [bad])
        refused(TypeError, r"memories\[1\]\[0\] has dtype int64", ops.gem_project_, [good], [[good.clone()], [bad]])
        refused(TypeError, r"b\[0\] has dtype int64", ops.grad_dot, [good], [bad])
        refused(ValueError, "share memory", ops.project_, [good], [good])
        refused(ValueError, "share memory", ops.project_, [good, good], [good.clone(), good.clone()])
        refused(ValueError, "share memory", ops.spg_importance_, [good, good], [[good.clone(), good.clone()]])
    refused(TypeError, r"reference\[1\] has dtype int64", ops.project_, [shard[0], plain], [shard[1], plain.long()])
    with pytest.raises(Exception, match=r"disable|_sharded_projection"):
        torch.compile(lambda g, r: ops.project_([g], [r]).dot, backend="aot_eager", fullgraph=True)(*shard)
    torch._dynamo.reset()
    copies = [t.clone() for t in shard]
    expected = ops.project_(copies[:1], copies[1:])
    found = torch.compile(lambda g, r: ops.project_([g], [r]).dot * 2, backend="aot_eager")(*shard)
    assert identical(found, expected.dot * 2)
    torch._dynamo.reset()


@check(*WORLDS)
def training_with_projection(world: int) -> None:
    """A-GEM's and GEM's steps of a model, with a head that only the memory uses, and an evaluation in between."""

    def train(model: nn.Module, ranks: int, gem: bool) -> tuple[dict[str, Tensor], list[bool]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        violated = []

        def backward(seed: int, head: int, sign: float = 1) -> None:
            x, y = data(seed)
            if ranks > 1:
                x, y = part(x, ranks), part(y, ranks)
            (sign * nn.functional.cross_entropy(model(x, head), y)).backward()

        for step in range(4):
            optimizer.zero_grad()
            with torch.no_grad():
                model(data(0)[0])
            with capture_gradients(model) as reference:
                backward(step, 1, -1 if step % 2 else 1)
            backward(step, 0)
            before = [None if p.grad is None else whole(p.grad).clone() for p in model.parameters()]
            with capture_gradients(model) as second:
                backward(7, 0)
            for p, old in zip(model.parameters(), before, strict=True):
                assert (p.grad is None) == (old is None)
                assert old is None or torch.equal(whole(p.grad), old)
            info = gem_project_gradients_(model, [reference, second]) if gem else project_gradients_(model, reference)
            violated.append(bool(info.violated))
            optimizer.step()
        return names(model), violated

    for gem in (False, True):
        single, decided = train(Net(), 1, gem)
        assert gem or set(decided) == {False, True}
        runs = [train(sharded(Net(), mesh), world, gem) for mesh in training_meshes(world)]
        for views, size in ((False, 25), (True, 25), (True, 1e-6)):  # MiB of a buffer of gradients: for all, for one
            model = DistributedDataParallel(Net(), find_unused_parameters=True, gradient_as_bucket_view=views, bucket_cap_mb=size)
            runs.append(train(model, world, gem))
        for n, (run, violated) in enumerate(runs):
            assert violated == decided, n
            for name, p in single.items():
                torch.testing.assert_close(whole(run[name].detach()), p.detach(), rtol=1e-9, atol=1e-10)


@check(2, 4)
def methods_with_a_memory(world: int) -> None:
    """A-GEM and GEM on a model whose ranks share the batches and remember the same samples."""

    def train(model: nn.Module, ranks: int, method: Callable[[nn.Module, ReservoirBuffer], AGEM | GEM]) -> tuple[dict[str, Tensor], int]:
        cl = method(model, ReservoirBuffer(64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        projected = 0
        for task in range(3):
            for step in range(3):
                x, y = data(10 * task + step)
                if ranks > 1:
                    x, y = part(x, ranks), part(y, ranks)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                info = cl.after_backward()
                projected += int(info is not None and bool(info.violated))
                optimizer.step()
            cl.end_task([data(10 * task)])
        return names(model), projected

    makers = (lambda m, b: AGEM(m, b, nn.functional.cross_entropy), lambda m, b: GEM(m, b, nn.functional.cross_entropy))
    for method in makers:
        single, projected = train(Net(1), 1, method)
        assert projected
        runs = [train(sharded(Net(1), mesh), world, method) for mesh in training_meshes(world)]
        runs.append(train(DistributedDataParallel(Net(1)), world, method))
        for run, times in runs:
            assert times == projected
            for name, p in single.items():
                torch.testing.assert_close(whole(run[name].detach()), p.detach(), rtol=1e-9, atol=1e-10)


@check(*WORLDS)
def quantiles(world: int) -> None:
    """The whole tensors' quantile, with the same bits on every rank; one sum over the ranks for each digit."""
    for _ in serving():
        for mesh, cases in meshes(world):
            for dtypes, levels in (((F32, F32), 3), ((BF16, F32), 3), ((F64, F32), 6)):
                held = [random(c[0], F64, n).mul(8).round().div(9).to(dtypes[n % 2]) for n, c in enumerate(cases)]
                shards = [spread(t, mesh, c[1]) for t, c in zip(held, cases, strict=True)]
                for q in (0.0, 0.3, 1 / 3, 1.0):
                    with CommDebugMode() as communication:
                        value = ops.quantile(shards, q)
                    assert communication.get_total_counts() == levels
                    expected = numpy.quantile(torch.cat([t.double().flatten() for t in held]).numpy(), q)
                    assert not isinstance(value, DTensor)
                    assert float(value) == float(expected), (mesh, dtypes, q)
                    same_everywhere(value)
                masks = top_fraction_mask(shards, 0.4)
                threshold = reference.quantile(held, (100 * (1 - 0.4)) / 100)
                for n, (m, t, s) in enumerate(zip(masks, held, shards, strict=True)):
                    assert torch.equal(whole(m.to_bool()), t.double() >= threshold), (mesh, cases[n])
                    assert isinstance(m.to_bool(), DTensor) == isinstance(s, DTensor)
                    assert m.shape == t.shape
                    assert int(m.count()) == int((t.double() >= threshold).sum()), (mesh, cases[n])
                    assert BitMask.from_bool(m.to_bool()) == m
                nan = [t.clone() for t in held]
                nan[0][4, 1] = float("nan")
                value = ops.quantile([spread(t, mesh, c[1]) for t, c in zip(nan, cases, strict=True)], 0.5)
                assert value.isnan()


@check(*WORLDS)
def bit_masks(world: int) -> None:
    for _ in serving():
        for mesh, cases in meshes(world):
            for dtype in (F32, BF16, F64):
                held = [random(c[0], dtype, n) for n, c in enumerate(cases)]
                chosen = [random(c[0], F64, 70 + n) < 0.5 for n, c in enumerate(cases)]
                shards = spread_all(held, mesh, cases)
                masks = [BitMask.from_bool(spread(m, mesh, c[1])) for m, c in zip(chosen, cases, strict=True)]
                versions = [t._version for t in shards]
                with CommDebugMode() as communication:
                    ops.bit_mask_(shards, masks)
                assert communication.get_total_counts() == 0
                assert all(t._version > v for t, v in zip(shards, versions, strict=True))
                for s, t, m in zip(shards, held, chosen, strict=True):
                    assert identical(whole(s), torch.where(m, t, torch.zeros_like(t)))
    model = sharded(Net(), init_device_mesh("cpu", (world,)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    chosen_by_name = {"first.weight": torch.zeros_like(model.first.weight, dtype=torch.bool)}
    apply_gradient_mask_(model, chosen_by_name)
    for name, p in model.named_parameters():
        assert bool((whole(p.grad) == (name not in chosen_by_name)).all()), name


@check(2)
def bit_mask_errors(world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    a = torch.rand(4, 6)
    mask = a < 0.5
    shard, plain = spread(a, mesh, [Shard(0)]), BitMask.from_bool(mask)
    placed = BitMask.from_bool(spread(mask, mesh, [Shard(0)]))
    across = BitMask.from_bool(spread(mask, mesh, [Shard(1)]))
    refused(ValueError, r"grads\[0\] is a DTensor with the placements .* is no mask of a DTensor", ops.bit_mask_, [shard], (plain,))
    refused(ValueError, r"grads\[0\] is a DTensor .* and masks\[0\] is no mask", ops.bit_mask_, [shard], (placed.bits,))
    refused(ValueError, r"masks\[0\] has .*Shard\(dim=1\)", ops.bit_mask_, [shard], (across,))
    refused(TypeError, r"masks\[0\] is of a DTensor .* and grads\[0\] a plain tensor", ops.bit_mask_, [a], (placed,))
    refused(ValueError, "share memory", ops.bit_mask_, [shard, shard], (placed, placed))
    refused(ValueError, r"grads\[0\] requires grad", ops.bit_mask_, [shard.detach().requires_grad_()], (placed,))
    refused(TypeError, r"tensors\[0\] has the placements .*Partial", ops.quantile, [DTensor.from_local(a.clone(), mesh, [Partial()])], 0.5)
    refused(TypeError, r"tensors\[0\] has dtype int64", ops.quantile, [spread(torch.arange(4), mesh, [Shard(0)])], 0.5)
    refused(TypeError, r"tensors\[1\] has dtype int64", ops.quantile, [shard, torch.arange(4)], 0.5)
    refused(ValueError, "tensors has no element", ops.quantile, [spread(torch.zeros(0, 3), mesh, [Shard(0)])], 0.5)
    refused(ValueError, r"q must be in", ops.quantile, [shard], 1.5)
    with pytest.raises(ValueError, match="belongs to a DTensor"):
        placed.to_tensors()
    assert copy.deepcopy(placed) == placed
    assert placed != plain
    assert placed != across


CHECKS |= sharded_optimizers.CHECKS | sharded_precision.CHECKS


def main() -> None:
    rank, world, store, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    found = {}
    try:
        for name, (worlds, function) in CHECKS.items():
            if world in worlds:
                function(world)
                found[name] = "ok"
    except BaseException:
        found[name] = traceback.format_exc()
    results.write_text(json.dumps(found))
    if all(v == "ok" for v in found.values()):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
