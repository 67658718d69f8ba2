"""NCL's step with its three forms of precision, and the merging of posteriors, next to the same work as it is done outside of fastcl.

Every provider has a copy of its own of the same layers. ``official`` works as the methods' public code does: it inverts both factors of
every layer in every step and forms the penalty by autograd. ``torch`` is the best that plain torch can do: inverses kept, the four lines of
the step on whole matrices (a batched product per shape where layers are small). Gradients are only read, and steps are so
small or so well damped that nothing has to be restored between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import measure, yardstick
from fastcl import KroneckerPrecision, ops, optim
from fastcl.testing import kronecker

Call = Callable[[], object]
LR, MOMENTUM, STRENGTH = 1e-7, 0.9, 1.0  # of the low-rank steps
TRAINED, SMALL = "MLP 784-400-400-10", "64 of 32x33, 16 of 64x65"
MERGED, BATCH, N_DATA = 400, 256, 60_000
STEPS = {"official": kronecker.official, "torch": kronecker.eager, "torch.bmm": kronecker.bmm, "fastcl": kronecker.fastcl}


def step_of(size: str, provider: str) -> Call:
    """One provider on a copy of its own of the same layers; in its best layout, which is whole batches for torch.bmm."""
    step = kronecker.make(kronecker.SIZES[size], pad=provider != "torch.bmm")
    run = STEPS[provider]
    return lambda: run(step)


class LowRank:
    """One flat parameter whose precision is D + U U^T."""

    def __init__(self, elements: int, rank: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.elements, self.rank = elements, rank
        self.basis = torch.randn(rank, elements, generator=g).mul_(elements**-0.5)  # orthonormal but for rounding of the large numbers
        self.grad, self.start, self.anchor = (torch.randn(elements, generator=g) for _ in range(3))
        self.diagonal = torch.rand(elements, generator=g).add_(0.5)
        self.sigma = torch.linspace(3.0, 0.5, rank, dtype=torch.float64)

    def ours(self, momentum: float) -> Call:
        """Two sweeps."""
        w, v = [self.start.clone()], [torch.zeros_like(self.start)] if momentum else []
        rest = ([self.grad], v, [self.anchor], [self.diagonal], [self.basis], self.sigma)
        return lambda: ops.low_rank_step_(w, *rest, LR, momentum, STRENGTH)

    @torch.no_grad()
    def eager(self, momentum: float, transposed: bool) -> Call:
        """Kept D^-1/2 and products with Q as torch's matrix-vector products, Q [r, P] or [P, r]."""
        w, v = self.start.clone(), torch.zeros_like(self.start)
        root, basis = self.diagonal.rsqrt(), self.basis.T.contiguous() if transposed else self.basis
        shrink = (self.sigma**2 / (1 + self.sigma**2)).float()

        def run() -> None:
            z = self.grad * root
            if transposed:
                z.addmv_(basis, shrink * torch.mv(basis.T, z), alpha=-1)
            else:
                z.addmv_(basis.T, shrink * torch.mv(basis, z), alpha=-1)
            z.mul_(root)
            if momentum:
                v.mul_(momentum).add_(w, alpha=STRENGTH).sub_(self.anchor, alpha=STRENGTH).add_(z)
                w.sub_(v, alpha=LR)
            else:
                z.add_(w, alpha=STRENGTH).sub_(self.anchor, alpha=STRENGTH)
                w.sub_(z, alpha=LR)

        return run

    def yardstick(self) -> Call:
        """8 r + 28 bytes per element, a step without momentum: twice Q, g and D, then the anchor beside the sweep that writes."""
        return yardstick.over([self.basis, self.grad, self.diagonal], self.start.clone(), self.anchor, passes=2)


def posteriors() -> list[Tensor]:
    """B_L, B_R, C_L, C_R of a layer: the prior and one task, and the next task. Their spectra are power laws, as those of real factors."""
    g = torch.Generator().manual_seed(0)

    def task(scale: float) -> Tensor:
        basis, _ = torch.linalg.qr(torch.randn(MERGED, MERGED, generator=g))
        samples = scale * torch.randn(4 * MERGED, MERGED, generator=g) * torch.arange(1, MERGED + 1) ** -0.5 @ basis
        return samples.T @ samples / len(samples)

    prior = torch.eye(MERGED) / N_DATA**0.5
    return [task(1.0) + prior, task(0.1) + prior, task(1.0), task(0.1)]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is measured, on what, and who measures."""

    op: str
    size: str
    build: Callable[[], Mapping[str, Call]]
    memory: int = 0  # elements of the parameters, where the extra memory of a call is measured


def _layers(size: str, *providers: str) -> Mapping[str, Call]:
    return {name: step_of(size, name) for name in (*providers, "fastcl")}


def _low_rank(elements: int, rank: int, momentum: float) -> Mapping[str, Call]:
    problem = LowRank(elements, rank)
    return {
        "torch [r, P]": problem.eager(momentum, transposed=False),
        "torch [P, r]": problem.eager(momentum, transposed=True),
        "fastcl": problem.ours(momentum),
        "yardstick": problem.yardstick(),
    }


def _merge() -> Mapping[str, Call]:
    factors = posteriors()
    return {"official": lambda: kronecker.merge_official(*factors), "fastcl": lambda: ops.kron_merge(*factors)}


def _count(size: str) -> int:
    return sum(m * (n + 1) for m, n in kronecker.SIZES[size])


ROWS = (
    Row("ncl_step_", TRAINED, lambda: _layers(TRAINED, "official", "torch"), _count(TRAINED)),
    Row("ncl_step_", SMALL, lambda: _layers(SMALL, "torch", "torch.bmm")),
    Row("low_rank_step_", "10 M, r = 16", lambda: _low_rank(10_000_000, 16, 0.0), 10_000_000),
    Row("low_rank_step_", "124 M, r = 8", lambda: _low_rank(124_000_000, 8, 0.0), 124_000_000),
    Row("low_rank_step_, momentum", "10 M, r = 16", lambda: _low_rank(10_000_000, 16, MOMENTUM), 10_000_000),
    Row("low_rank_step_, momentum", "124 M, r = 8", lambda: _low_rank(124_000_000, 8, MOMENTUM), 124_000_000),
    Row("kron_merge, kl", f"n = m = {MERGED}", _merge),
)
PROVIDERS = ("official", "torch", "torch.bmm", "torch [r, P]", "torch [P, r]", "fastcl", "yardstick")


def _nothing() -> None:
    """Gradients are only read."""


def measure_row(row: Row, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """One row's record, in the form of a cell's."""
    calls = row.build()
    times = measure.interleave(calls, _nothing, seconds=seconds, rounds=rounds)
    found = {name: measure.Spread.of(measure.flat(by_round)).row() for name, by_round in times.items()}
    providers: dict[str, Any] = dict(found)
    if row.memory:
        providers["fastcl"] = {**found["fastcl"], "extra_bytes": measure.extra_bytes(calls["fastcl"], _nothing)}
    shared = {"op": row.op, "size": row.size, "dtype": "fp32", "elements": row.memory, "rounds": len(times["fastcl"])}
    return {**shared, "providers": providers, "not_run": {}}


class Training:
    """The training step of a multi-layer perceptron under SGD, and under NCL with the factors of a task that it has learned."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))

    def build(self) -> Mapping[str, Call]:
        """Both steps, each on a model of its own."""
        nets = [nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)) for _ in range(2)]
        precision = KroneckerPrecision(nets[1], n_data=N_DATA)
        with precision.collect(seed=0) as fisher:
            fisher.backward(nets[1](torch.randn(1024, 784)))
        precision.merge_()
        precision.anchor_()
        steps = (torch.optim.SGD(nets[0].parameters(), 1e-3, MOMENTUM), optim.NCL(nets[1], precision, 1e-3, MOMENTUM))
        return {name: self._step(net, step) for name, net, step in zip(("none", "fastcl"), nets, steps, strict=True)}

    def _step(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> Call:
        def run() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(net(self.x), self.y).backward()
            optimizer.step()

        return run


def measure_training(seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """NCL's share of the training step, in the form of bench_step's records."""
    times = measure.interleave(Training().build(), _nothing, seconds=seconds, rounds=rounds)
    bare = measure.Spread.of(measure.flat(times["none"]))
    variants: dict[str, Any] = {}
    for name, by_round in times.items():
        more = measure.Spread.of([a[0] - b[0] for a, b in zip(by_round, times["none"], strict=True)])
        percent = {k: getattr(more, k) / bare.median * 100 for k in ("median", "low", "high")}
        spread = measure.Spread.of(measure.flat(by_round)).row()
        variants[name] = {**spread, "overhead_percent": percent, "peak_bytes_over_none": None}
    model = f"{TRAINED}, batch {BATCH}"
    elements = _count(TRAINED)
    return {"model": model, "method": "NCL's step over SGD's", "parameters": elements, "rounds": len(times["none"]), "variants": variants}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.op} {r.size}")
def test_ncl(benchmark: Any, row: Row, provider: str) -> None:
    """For pytest-benchmark: one row per provider, grouped by op and size."""
    calls = row.build()
    if provider not in calls:
        pytest.skip(f"{provider} is no rival of {row.op}, {row.size}")
    benchmark.group = f"{row.op}, {row.size}"
    benchmark.pedantic(calls[provider], rounds=5, warmup_rounds=1)
