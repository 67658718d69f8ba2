"""What every rank checks of fastcl.optim; sharded_ranks.py runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fastcl import BitMask, backends, use_backend
from fastcl.optim import SGD, AdamW, ChildMask, FixedMask, Project, Pull, SoftMask
from layouts import identical

CHECKS: dict[str, tuple[tuple[int, ...], Callable[[int], None]]] = {}
PLAIN = "plain"
LINE = [((5, 3), [Shard(0)]), ((3, 5), [Shard(1)]), ((2, 4), [Shard(0)]), ((4, 3), [Replicate()]), ((1,), [Shard(0)]), ((6,), PLAIN)]
GRID = [((5, 3), [Replicate(), Shard(0)]), ((5, 6), [Shard(0), Shard(1)]), ((3, 7), [Shard(0), Shard(0)]), ((6,), PLAIN)]


def check(*worlds: int) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    def add(function: Callable[[int], None]) -> Callable[[int], None]:
        CHECKS[f"optim_{function.__name__}"] = (worlds, function)
        return function

    return add


def serving():
    for name in ("cpp", "reference"):
        if backends.why_not(name, "cpu") is None:
            with use_backend(name):
                yield name


def meshes(world: int) -> list[tuple[DeviceMesh, list[Any]]]:
    line = [(init_device_mesh("cpu", (world,)), LINE)]
    return [*line, (init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), GRID)] if world == 4 else line


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spread(t: Tensor, mesh: DeviceMesh | None, placements: Any) -> Tensor:
    own = t.clone()
    return own if mesh is None or placements == PLAIN else distribute_tensor(own, mesh, placements)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def train(
    mesh: DeviceMesh | None,
    cases: Sequence[Any],
    own: type,
    kinds: Sequence[str],
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[list[Tensor], Any, list[int]]:
    """A few steps on the same gradients; with a mesh everything is a DTensor. The collectives of each step are counted."""

    def tensors(seed: int, change: Callable[[Tensor], Tensor] = lambda t: t, kind: torch.dtype = dtype) -> list[Tensor]:
        return [spread(change(draw(s, seed + 10 * n, kind)), mesh, p) for n, (s, p) in enumerate(cases)]

    params = [nn.Parameter(t) for t in tensors(0)]
    masks = [None if n == 3 else t for n, t in enumerate(tensors(3, lambda t: t > 0))]
    makers = {
        "soft": lambda: SoftMask(tensors(1, torch.sigmoid), 0.7),
        "child": lambda: ChildMask(0.4, 9),
        "fixed": lambda: FixedMask(masks),
        "project": lambda: Project(tensors(100, lambda t: -t)),
        "pull": lambda: Pull(tensors(4, torch.abs), tensors(5), 0.3),
    }
    optimizer = own(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], lr=0.05, transforms=[makers[k]() for k in kinds], **settings
    )
    counts = []
    for step in range(steps):
        for n, (p, g) in enumerate(zip(params, tensors(100 + step), strict=True)):
            p.grad = None if step == 1 and n == 0 else g
        with CommDebugMode() as communication:
            optimizer.step()
        counts.append(communication.get_total_counts())
    return params, optimizer, counts


@check(1, 2, 4)
def steps_are_the_whole_ones(world: int) -> None:
    for _ in serving():
        for mesh, cases in meshes(world):
            for own, settings in ((AdamW, {}), (AdamW, {"decay": "hf"}), (SGD, {"momentum": 0.9})):
                for kinds in ((), ("soft", "child", "pull"), ("fixed", "child")):
                    for dtype in (torch.float32, torch.bfloat16):
                        run = {"own": own, "kinds": kinds, "dtype": dtype, **settings}
                        params, a, counts = train(mesh, cases, **run)
                        exact, b, _ = train(None, cases, **run)
                        assert counts == [0, 0, 0]
                        for n, (p, e) in enumerate(zip(params, exact, strict=True)):
                            assert identical(whole(p.detach()), e.detach()), (run, cases[n])
                            assert {k: v.shape for k, v in a.state[p].items()} == {k: v.shape for k, v in b.state[e].items()}
                            assert all(identical(whole(v), b.state[e][k]) for k, v in a.state[p].items())


@check(1, 2, 4)
def projections_and_clipping_take_one_collective_each(world: int) -> None:
    for _ in serving():
        for mesh, cases in meshes(world):
            for kinds, clip, wanted in ((("soft", "project"), None, 1), ((), 0.5, 1), (("child", "project", "soft"), 0.5, 2)):
                params, _, counts = train(mesh, cases, AdamW, kinds, clip_norm=clip, dtype=torch.float64)
                exact, _, none = train(None, cases, AdamW, kinds, clip_norm=clip, dtype=torch.float64)
                assert counts == [wanted] * 3
                assert none == [0] * 3
                for p, e in zip(params, exact, strict=True):
                    torch.testing.assert_close(whole(p.detach()), e.detach(), rtol=1e-11, atol=1e-12)


@check(1, 2, 4)
def compact_state(world: int) -> None:
    for _ in serving():
        for mesh, cases in meshes(world):
            params, a, _ = train(mesh, cases, AdamW, ("soft", "fixed"), compact_state=True)
            exact, b, _ = train(None, cases, AdamW, ("soft", "fixed"))
            for p, e in zip(params, exact, strict=True):
                assert identical(whole(p.detach()), e.detach())
            saved, dense = a.state_dict()["state"], b.state_dict()["state"]
            assert all(identical(whole(saved[k][n]), dense[k][n]) for k in dense for n in dense[k])
            before = [{n: t.clone() for n, t in a.state[p].items()} for p in params]
            a.load_state_dict(a.state_dict())
            for p, state in zip(params, before, strict=True):
                # Each rank its own memory: where a rank holds no elements nothing is compact.
                assert all(identical(local(a.state[p][n]), local(t)) for n, t in state.items())
            other, c, _ = train(mesh, cases, AdamW, ("soft", "fixed"))
            c.load_state_dict(a.state_dict())
            assert all(isinstance(c.state[p]["exp_avg"], DTensor) == isinstance(p, DTensor) for p in other)


@check(2)
def what_does_not_fit(world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    t = draw((4, 6), 0)
    p = nn.Parameter(spread(t, mesh, [Shard(0)]))
    across = spread(t, mesh, [Shard(1)])
    for transform, kind, message in (
        (SoftMask([t]), TypeError, r"importance\[0\] is a plain tensor"),
        (SoftMask([across]), ValueError, r"importance\[0\] has the placements .*Shard\(dim=1\)"),
        (FixedMask([t > 0]), ValueError, r"masks\[0\] has the placements None"),
        (FixedMask([BitMask.from_bool(across > 0)]), ValueError, r"masks\[0\] has the placements"),
        (Project([t]), TypeError, r"reference\[0\] is a plain tensor"),
    ):
        with pytest.raises(kind, match=message):
            AdamW([p], transforms=[transform])
    a = AdamW([p])
    p.grad = spread(t, mesh, [Shard(0)])
    a.step()
    plain = AdamW([nn.Parameter(t.clone())])
    plain.param_groups[0]["params"][0].grad = t.clone()
    plain.step()
    with pytest.raises((TypeError, ValueError), match=r"exp_avg.* of the state_dict\[0\] is a plain tensor"):
        a.load_state_dict(plain.state_dict())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second, self.scale = nn.Linear(7, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def fit(model: nn.Module, optimizer: Any, steps: Sequence[int], ranks: int) -> None:
    for step in steps:
        x = draw((8, 7), step, torch.float64)
        optimizer.zero_grad()
        model(x.chunk(ranks)[dist.get_rank()] if ranks > 1 else x).square().mean().backward()
        optimizer.step()


@check(2, 4)
def training_under_fully_shard(world: int) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    for _ in serving():
        shapes = [p.shape for p in Net().parameters()]
        importance = [torch.sigmoid(draw(s, n, torch.float64)) for n, s in enumerate(shapes)]
        for mesh in [m for m, _ in meshes(world)]:
            single, model = Net(), Net()
            fully_shard(model.first, mesh=mesh)
            fully_shard(model, mesh=mesh)
            params = list(model.parameters())
            values = [distribute_tensor(i, p.device_mesh, p.placements) for i, p in zip(importance, params, strict=True)]
            reference = [i - 0.5 for i in importance]
            shards = [distribute_tensor(r, p.device_mesh, p.placements) for r, p in zip(reference, params, strict=True)]
            settings = {"lr": 0.05, "clip_norm": 0.5}
            a = AdamW(single.parameters(), transforms=[SoftMask(importance), ChildMask(0.6, 1), Project(reference)], **settings)
            b = AdamW(params, transforms=[SoftMask(values), ChildMask(0.6, 1), Project(shards)], **settings)
            fit(single, a, range(4), 1)
            fit(model, b, range(4), world)
            for p, q in zip(single.parameters(), params, strict=True):
                torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=1e-9, atol=1e-10)
            saved, kept = copy.deepcopy(get_optimizer_state_dict(model, b)), [p.detach().clone() for p in params]
            fit(model, b, range(4, 6), world)
            with torch.no_grad():
                for p, k in zip(params, kept, strict=True):
                    p.copy_(k)
            set_optimizer_state_dict(model, b, saved)
            assert all(isinstance(b.state[p]["exp_avg"], DTensor) and float(b.state[p]["step"]) == 4 for p in params)
            fit(single, a, range(6, 9), 1)
            fit(model, b, range(6, 9), world)
            for p, q in zip(single.parameters(), params, strict=True):
                torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=1e-9, atol=1e-10)
