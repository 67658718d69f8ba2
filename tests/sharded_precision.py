"""What every rank checks of optim.NCL, its blocks and the methods on them; sharded_ranks.py runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from fastcl import DiagonalPrecision, KroneckerPrecision, backends, use_backend
from fastcl.methods import KFAC_EWC, NCL, OWM
from fastcl.optim import NCL as Optimizer
from layouts import identical

CHECKS: dict[str, tuple[tuple[int, ...], Callable[[int], None]]] = {}
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
loss_fn = nn.functional.cross_entropy


def check(*worlds: int) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    def add(function: Callable[[int], None]) -> Callable[[int], None]:
        CHECKS[f"precision_{function.__name__}"] = (worlds, function)
        return function

    return add


def serving():
    for name in ("cpp", "reference"):
        if backends.why_not(name, "cpu") is None:
            with use_backend(name):
                yield name


def model_of(dtype: torch.dtype = F32) -> nn.Module:
    """Sizes that no number of ranks divides; one has fewer rows than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.Linear(3, 4)).to(dtype)


def sharded(mesh: DeviceMesh, dtype: torch.dtype = F32) -> nn.Module:
    model = model_of(dtype)
    fully_shard(model, mesh=mesh)
    return model


def alone(world: int) -> DeviceMesh:
    """A mesh of this rank alone. Every rank takes part in making everybody's."""
    meshes = [DeviceMesh("cpu", [rank]) for rank in range(world)]
    return meshes[dist.get_rank()]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def give(model: nn.Module, step: int, missing: tuple[int, ...] = ()) -> None:
    """The same gradients, whatever the shards."""
    for n, p in enumerate(model.parameters()):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n), dtype=F64).to(p.dtype)
        if n in missing:
            p.grad = None
        else:
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g


def spd(n: int, seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return root @ root.T / n + 0.3 * torch.eye(n, dtype=F64)


def curved(model: nn.Module, kind: type = KroneckerPrecision) -> Any:
    """A precision that is none of a first task."""
    if kind is DiagonalPrecision:
        precision = DiagonalPrecision(model, n_data=20)
        state = precision.state_dict()
        for n, t in enumerate(state["diagonal"].values()):
            t.copy_(torch.rand(t.shape, generator=torch.Generator().manual_seed(n)) + 0.1)
        precision.load_state_dict(state)
        return precision
    found = KroneckerPrecision(model, n_data=20).factors
    factors = {name: (spd(len(A), 2 * n).to(A.dtype), spd(len(G), 2 * n + 1).to(G.dtype)) for n, (name, (A, G)) in enumerate(found.items())}
    return KroneckerPrecision.from_factors(model, factors, n_data=20)


def run(model: nn.Module, kind: type = KroneckerPrecision, steps: range = range(6), **settings: Any) -> tuple[Any, Any]:
    precision = curved(model, kind)
    optimizer = Optimizer(model, precision, **{"lr": 0.4, "refresh": 4, **settings})
    for step in steps:
        give(model, step, missing={2: (0, 1), 3: (1, 2)}.get(step, ()))
        optimizer.step()
    return precision, optimizer


def states(optimizer: Any) -> list[tuple[str, Tensor]]:
    return [(name, t) for p in optimizer.param_groups[0]["params"] for name, t in sorted(optimizer.state[p].items())]


@check(1, 2, 4)
def steps_have_the_same_bits_on_any_number_of_ranks(world: int) -> None:
    """Against a mesh of this rank alone; and the plain model's values."""
    own = alone(world)
    everyone = init_device_mesh("cpu", (world,))
    for _ in serving():
        for dtype, kind, settings in [
            (F32, KroneckerPrecision, {}),
            (BF16, KroneckerPrecision, {"momentum": 0.0}),
            (F64, KroneckerPrecision, {"strength": 0.0}),
            (F32, DiagonalPrecision, {}),
        ]:
            models = [sharded(everyone, dtype), sharded(own, dtype), model_of(dtype)]
            optimizers = [run(m, kind, **settings)[1] for m in models]
            for p, q, r in zip(*(m.parameters() for m in models), strict=True):
                assert isinstance(p, DTensor)
                assert identical(whole(p.detach()), whole(q.detach())), (dtype, kind)
                tolerance = {F32: 1e-4, F64: 1e-10, BF16: 6e-2}[dtype]
                torch.testing.assert_close(whole(p.detach()), r.detach(), rtol=tolerance, atol=tolerance)
            for (name, a), (other, b) in zip(states(optimizers[0]), states(optimizers[1]), strict=True):
                assert name == other
                assert identical(whole(a), whole(b)), name


@check(1, 2, 4)
def the_radius_has_one_norm(world: int) -> None:
    own = alone(world)
    for _ in serving():
        for kind in (KroneckerPrecision, DiagonalPrecision):
            models = [sharded(init_device_mesh("cpu", (world,)), F64), sharded(own, F64), model_of(F64)]
            free = model_of(F64)
            for m in models:
                run(m, kind, radius=0.05)
            run(free, kind)
            for p, q, r, f in zip(*(m.parameters() for m in [*models, free]), strict=True):
                torch.testing.assert_close(whole(p.detach()), whole(q.detach()), rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(whole(p.detach()), r.detach(), rtol=1e-9, atol=1e-10)
                assert float((f - r).detach().abs().max()) > 1e-2


@check(2, 4)
def state_is_sharded_as_its_parameter_is(world: int) -> None:
    model = sharded(init_device_mesh("cpu", (world,)))
    _, optimizer = run(model)
    for p in model.parameters():
        for t in optimizer.state[p].values():
            assert isinstance(t, DTensor)
            assert t.placements == p.placements
            assert t.to_local().shape == p.to_local().shape
    give(model, 1)
    versions = [p._version for p in model.parameters()]
    with CommDebugMode() as communication:
        optimizer.step()
    # A gather for each weight and bias; normalisation needs none.
    assert communication.get_total_counts() == 5
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))


@check(1, 2, 4)
def a_write_from_outside_is_seen(world: int) -> None:
    model = sharded(init_device_mesh("cpu", (world,)), F64)
    precision, optimizer = run(model, momentum=0.0, refresh=1000)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    other = model_of(F64)
    other.load_state_dict({name: whole(t) for name, t in model.state_dict().items()})
    plain = curved(other)
    plain.load_state_dict(precision.state_dict())
    reference = Optimizer(other, plain, lr=0.4, momentum=0.0)
    for m, o in ((model, optimizer), (other, reference)):
        give(m, 9)
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-10, atol=1e-11)


@check(1, 2, 4)
def a_state_goes_on_with_the_same_bits(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind in (KroneckerPrecision, DiagonalPrecision):
        model, other = sharded(mesh), sharded(mesh)
        precision, optimizer = run(model, kind)
        again_precision, again = run(other, kind, range(2))
        saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        again_precision.load_state_dict(precision.state_dict())
        other.load_state_dict(weights)
        again.load_state_dict(saved)
        for step in range(6, 12):
            for m, o in ((model, optimizer), (other, again)):
                give(m, step)
                o.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert identical(whole(p.detach()), whole(q.detach()))


@check(2)
def gradients_that_are_not_sharded_alike_are_refused(world: int) -> None:
    import pytest

    model = sharded(init_device_mesh("cpu", (world,)))
    _, optimizer = run(model)
    before = [p.to_local().clone() for p in model.parameters()]
    give(model, 1)
    first = next(iter(model.parameters()))
    first.grad = first.grad.redistribute(placements=[Shard(1)])
    with pytest.raises(ValueError, match=r"grads\[0\] has the placements"):
        optimizer.step()
    assert all(identical(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))


METHODS = {
    "ncl": lambda model: NCL(model, KroneckerPrecision(model, n_data=24), fisher="empirical"),
    "ncl diagonal": lambda model: NCL(model, DiagonalPrecision(model, n_data=24), fisher="empirical"),
    "kfac-ewc": lambda model: KFAC_EWC(model, KroneckerPrecision(model, n_data=24), fisher="empirical", strength=0.5),
    "owm": lambda model: OWM(model, alpha=0.3),
}


def batches(task: int, rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of three batches of 8 samples."""
    generator = torch.Generator().manual_seed(task)
    drawn = [(torch.randn(8, 5, generator=generator, dtype=F64), torch.randint(4, (8,), generator=generator)) for _ in range(3)]
    return [(x[rank::world], y[rank::world]) for x, y in drawn]


def train(model: nn.Module, name: str, rank: int, world: int) -> Any:
    """Three tasks, each rank with its part of the data."""
    method = METHODS[name](model)
    own = isinstance(method, (NCL, OWM))
    optimizer = method.optimizer(0.05, 0.5) if own else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    for task in range(3):
        for _ in range(4):
            for x, y in batches(task, rank, world):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                method.after_backward()
                optimizer.step()
        method.end_task(batches(task, rank, world))
    return method


@check(1, 2, 4)
def methods_see_all_ranks_data(world: int) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    for name in METHODS:
        if name == "ncl diagonal":  # squares of single samples' gradients meet in the mean over ranks under fully_shard
            makers: list[Callable[[], nn.Module]] = [lambda: DistributedDataParallel(bare(F64))]
        else:
            makers = [lambda: DistributedDataParallel(bare(F64)), lambda: fully_sharded(bare(F64), mesh)]
        single = bare(F64)
        expected = train(single, name, 0, 1)
        for make in makers:
            model = make()
            method = train(model, name, rank, world)
            inner = model.module if isinstance(model, DistributedDataParallel) else model
            for (n, p), q in zip(inner.named_parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-8, atol=1e-9, msg=lambda m, at=(name, n): f"{at}: {m}")
            if name != "ncl diagonal":
                for layer, pair in method.precision.factors.items():
                    for mine, theirs in zip(pair, expected.precision.factors[layer], strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
                        others = [torch.empty_like(mine.contiguous()) for _ in range(world)]
                        dist.all_gather(others, mine.contiguous())
                        assert all(identical(o, others[0]) for o in others)


def bare(dtype: torch.dtype) -> nn.Module:
    """Linear layers alone, whose statistics need no gradient of a parameter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model
