"""NCL's step with its three forms of precision, and the merging of posteriors, next to the same work as it is done outside of fastcl.

Every provider has parameters, momentum and state of its own and shares gradients, factors and anchor. ``official`` works as the methods'
public code does: it inverts both factors of every layer in every step and forms the penalty by autograd. ``torch`` is the best that plain
torch can do: inverses kept, the four lines of the step on whole matrices (a batched product per shape where layers are small). Steps are
tiny and gradients are only read, so that nothing has to be restored between calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import measure, yardstick
from fastcl import KroneckerPrecision, ops, optim

Call = Callable[[], object]
LR, MOMENTUM, STRENGTH = 1e-7, 0.9, 1.0
MLP = ((400, 785), (400, 401), (10, 401))
SMALL = ((32, 33),) * 64 + ((64, 65),) * 16
MERGED = 400
TRAINED, BATCH = "MLP 784-400-400-10", 256


def _definite(n: int, generator: torch.Generator) -> Tensor:
    """A well-conditioned factor: the second moment of n + 64 samples, and some of the prior."""
    x = torch.randn(n + 64, n, generator=generator)
    return x.T @ x / len(x) + 0.1 * torch.eye(n)


def _padded(m: int, n: int) -> Tensor:
    return torch.zeros(m, (n + 15) // 16 * 16)[:, :n]


class Layers:
    """Gradients and factors of layers with a bias in their last column, and parameters for every provider."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        g = torch.Generator().manual_seed(0)
        self.shapes = shapes
        self.grads = [(torch.randn(m, n - 1, generator=g), torch.randn(m, generator=g)) for m, n in shapes]
        factors = {k: _definite(k, g) for k in sorted({k for shape in shapes for k in shape})}
        self.factors = [(factors[n].clone(), factors[m].clone()) for m, n in shapes]
        self.inverses = [(self._inverse(a), self._inverse(b)) for a, b in self.factors]
        self._start = [(torch.randn(m, n - 1, generator=g), torch.randn(m, generator=g)) for m, n in shapes]

    @staticmethod
    def _inverse(factor: Tensor) -> Tensor:
        kept = _padded(*factor.shape)
        return kept.copy_(torch.linalg.inv(factor.double()))

    def parameters(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases, for one provider."""
        return [(w.clone(), b.clone()) for w, b in self._start]

    def buffers(self) -> list[Tensor]:
        """One zero matrix per layer, its rows padded."""
        return [_padded(m, n) for m, n in self.shapes]


def ours(layers: Layers) -> Call:
    """One call for all layers."""
    params, momenta, pulls = layers.parameters(), layers.buffers(), layers.buffers()
    return lambda: ops.ncl_step_(params, layers.grads, momenta, pulls, layers.inverses, LR, MOMENTUM, STRENGTH)


def official(layers: Layers) -> Call:
    """Two inverses per layer and step; Lambda (W - mu) as the gradient of a penalty."""
    weights = [torch.cat([w, b[:, None]], 1).requires_grad_() for w, b in layers.parameters()]
    anchors, momenta = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]

    def run() -> None:
        penalty = sum(
            0.5 * STRENGTH * ((w - c) * (g @ (w - c) @ a)).sum() for w, c, (a, g) in zip(weights, anchors, layers.factors, strict=True)
        )
        pulls = torch.autograd.grad(penalty, weights)  # type: ignore[arg-type]
        with torch.no_grad():
            for w, pull, own, momentum, (a, g) in zip(weights, pulls, layers.grads, momenta, layers.factors, strict=True):
                total = torch.cat([own[0], own[1][:, None]], 1) + pull
                momentum.mul_(MOMENTUM).add_(torch.linalg.inv(g) @ total @ torch.linalg.inv(a))
                w.sub_(momentum, alpha=LR)

    return run


@torch.no_grad()
def eager(layers: Layers) -> Call:
    """Kept inverses, four lines for each layer."""
    params, momenta, pulls = layers.parameters(), layers.buffers(), layers.buffers()

    def run() -> None:
        for (w, b), (gw, gb), m, h, (a, g) in zip(params, layers.grads, momenta, pulls, layers.inverses, strict=True):
            m.mul_(MOMENTUM).add_(torch.cat([gw, gb[:, None]], 1)).add_(h, alpha=STRENGTH)
            v = g @ m @ a
            w.sub_(v[:, :-1], alpha=LR)
            b.sub_(v[:, -1], alpha=LR)
            h.sub_(m, alpha=LR)

    return run


@torch.no_grad()
def batched(layers: Layers) -> Call:
    """Kept inverses, torch.bmm for all layers of one shape."""
    params, groups = layers.parameters(), []
    for shape, found in itertools.groupby(range(len(layers.shapes)), lambda i: layers.shapes[i]):
        of = list(found)
        a, g = (torch.stack([layers.inverses[i][side] for i in of]) for side in range(2))
        groups.append((of, a, g, torch.zeros(len(of), *shape), torch.zeros(len(of), *shape)))

    def run() -> None:
        for of, a, g, m, h in groups:
            gw, gb = (torch.stack([layers.grads[i][part] for i in of]) for part in range(2))
            m.mul_(MOMENTUM).add_(torch.cat([gw, gb[:, :, None]], 2)).add_(h, alpha=STRENGTH)
            v = torch.bmm(torch.bmm(g, m), a)
            torch._foreach_sub_([params[i][0] for i in of], list(v[:, :, :-1].unbind()), alpha=LR)
            torch._foreach_sub_([params[i][1] for i in of], list(v[:, :, -1].unbind()), alpha=LR)
            h.sub_(m, alpha=LR)

    return run


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
        """8 r + 28 bytes per element, a step without momentum: 8 of them and half of Q before the sweep that writes."""
        sweep = 12 * self.elements
        return yardstick.build(yardstick.Traffic((8 * self.rank + 16) * self.elements, sweep), "cpu")


def merge_ours(factors: Sequence[Tensor]) -> Call:
    """Four scalars, after two generalised eigenvalue problems."""
    return lambda: ops.kron_merge(*factors)


def merge_official(factors: Sequence[Tensor]) -> Call:
    """The same optimum by turns on whole matrices, whose inverses come from eigendecompositions, until they are still."""
    b_l, b_r, c_l, c_r = (f.double() for f in factors)

    def inverse(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors / values) @ vectors.T

    def run() -> tuple[Tensor, Tensor]:
        left, right = b_l, b_r
        for _ in range(1000):
            inverted = inverse(right)
            fresh = (b_l * (inverted * b_r).sum() + c_l * (inverted * c_r).sum()) / len(right)
            inverted = inverse(fresh)
            right = (b_r * (inverted * b_l).sum() + c_r * (inverted * c_l).sum()) / len(fresh)
            still = (fresh - left).norm() <= 1e-10 * fresh.norm()
            left = fresh
            if still:
                break
        return left, right

    return run


def posteriors() -> list[Tensor]:
    """B_L, B_R, C_L, C_R of one layer; C of fewer samples than its size, as a task's factors may be."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(MERGED // 2, MERGED, generator=g) for _ in range(2))
    return [_definite(MERGED, g), _definite(MERGED, g), x.T @ x / len(x), y.T @ y / len(y)]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is measured, on what, and who measures."""

    op: str
    size: str
    build: Callable[[], Mapping[str, Call]]
    memory: int = 0  # elements of the parameters, where the extra memory of a call is measured


def _layers(shapes: Sequence[tuple[int, int]], rivals: Mapping[str, Callable[[Layers], Call]]) -> Mapping[str, Call]:
    layers = Layers(shapes)
    return {name: make(layers) for name, make in {**rivals, "fastcl": ours}.items()}


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
    return {"official": merge_official(factors), "fastcl": merge_ours(factors)}


def _count(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(m * n for m, n in shapes)


ROWS = (
    Row("ncl_step_", TRAINED, lambda: _layers(MLP, {"official": official, "torch": eager}), _count(MLP)),
    Row("ncl_step_", "64 of 32x33, 16 of 64x65", lambda: _layers(SMALL, {"torch": eager, "torch.bmm": batched})),
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
        precision = KroneckerPrecision(nets[1], n_data=60_000)
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
    elements = _count(MLP)
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
