"""Kronecker-factored and low-rank precisions on a GPU: what their own tests, which run on the device too, do not ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import backends, ops, use_backend
from fastcl.testing import clone, largest_error, unit_roundoff
from layouts import FLOATING

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")]

DEVICE = "cuda"
FACTORS = [torch.float64, torch.float32]
# Outputs, inputs, and whether there is a bias: every tile of the small ones, their limits, and large ones.
SIZES = [(1, 1, True), (10, 64, True), (32, 32, True), (64, 64, True), (64, 80, False), (65, 30, True), (128, 128, True), (128, 129, False)]
LARGE = [(130, 20, True), (40, 300, True), (200, 257, False)]
SHAPES = [(300, 256), (64,), (), (0, 3), (3, 5, 7, 9), (20000,)]
RANK = 5


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.why_not(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cuda() -> Iterator[None]:
    with use_backend("cuda"):
        yield


class Draw:
    """Random tensors on the device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(DEVICE, dtype)

    def padded(self, m: int, n: int, dtype: torch.dtype) -> Tensor:
        out = torch.full((m, -(-n // 16) * 16), float("nan"), dtype=dtype, device=DEVICE)[:, :n]
        return out.copy_(self.normal(m, n))

    def factor(self, n: int, dtype: torch.dtype) -> Tensor:
        x = self.normal(n, n)
        return self.padded(n, n, dtype).copy_(x @ x.mT / n + torch.eye(n, dtype=x.dtype, device=DEVICE))


def layers(sizes: list[tuple[int, int, bool]], dtype: torch.dtype, own: torch.dtype, seed: int = 0) -> list[Any]:
    """Parameters, gradients, M, H and factors; some weights are transposed."""
    draw = Draw(seed)

    def tensors(k: int, m: int, inputs: int, biased: bool) -> Any:
        weight = draw.normal(m, inputs, dtype=dtype)
        weight = weight.t().contiguous().t() if k % 3 == 1 else weight
        return (weight, draw.normal(m, dtype=dtype)) if biased else weight

    out: list[Any] = [[], [], [], [], []]
    for k, (m, inputs, biased) in enumerate(sizes):
        n = inputs + biased
        own_parts = (tensors(k, m, inputs, biased), tensors(k + 1, m, inputs, biased), draw.padded(m, n, own), draw.padded(m, n, own))
        for part, value in zip(out, (*own_parts, (draw.factor(n, own), draw.factor(m, own))), strict=True):
            part.append(value)
    return out


def precision(shapes: list[tuple[int, ...]], own: torch.dtype, rank: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Diagonal, orthonormal rows and singular values."""
    draw = Draw(seed)
    counts = [torch.Size(s).numel() for s in shapes]
    rows = torch.linalg.qr(draw.normal(sum(counts), rank))[0].T if rank else draw.normal(0, sum(counts))
    parts = torch.split(rows, counts, dim=1)
    diagonal = [(0.5 + draw.normal(*s).abs()).to(own) for s in shapes]
    sigma = torch.logspace(1, -1, max(rank, 1), dtype=torch.float64, device=DEVICE)[:rank]
    basis = [torch.empty(rank, *s, dtype=own, device=DEVICE).copy_(p.reshape(rank, *s)) for p, s in zip(parts, shapes, strict=True)]
    return diagonal, basis, sigma


def low_rank(shapes: list[tuple[int, ...]], dtype: torch.dtype, own: torch.dtype, rank: int = RANK, seed: int = 0) -> list[Any]:
    """Parameters, gradients, momenta, anchors, and a precision."""
    draw = Draw(seed + 1)
    lists = [[draw.normal(*s, dtype=d) for s in shapes] for d in (dtype, dtype, own, own)]
    lists[1] = [g.t().contiguous().t() if g.dim() == 2 else g for g in lists[1]]
    return [*lists, *precision(shapes, own, rank, seed)]


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., list[Any]]]] = {
    "kron_solve_": (lambda w, _g, _m, _h, f: ops.kron_solve_(w, f), layers),
    "kron_quadratic": (lambda w, _g, _m, _h, f: ops.kron_quadratic(w, f), layers),
    "ncl_step_": (lambda w, g, m, h, f: ops.ncl_step_(w, g, m, h, f, 0.01), layers),
    "ncl_step_ radius": (lambda w, g, m, h, f: ops.ncl_step_(w, g, m, h, f, 0.01, radius=0.5), layers),
    "low_rank_solve_": (lambda w, _g, _v, _a, d, q, s: ops.low_rank_solve_(w, d, q, s), low_rank),
    "low_rank_quadratic": (lambda w, _g, _v, _a, d, q, s: ops.low_rank_quadratic(w, d, q, s), low_rank),
    "low_rank_step_": (lambda w, g, v, a, d, q, s: ops.low_rank_step_(w, g, v, a, d, q, s, 0.01), low_rank),
    "low_rank_step_ radius": (lambda w, g, v, a, d, q, s: ops.low_rank_step_(w, g, v, a, d, q, s, 0.01, radius=0.5), low_rank),
}


def arguments(op: str, dtype: torch.dtype = torch.float32, own: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
    make = CALLS[op][1]
    return make(SIZES + LARGE if make is layers else SHAPES, dtype, own, seed=seed)


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value or () for t in flat(v)]


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("own", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_error(backend, op, own, dtype):
    """At most twice that of the definition in the same dtypes; in float64, of which the exact values are too, 64 roundings."""
    call = CALLS[op][0]
    args = arguments(op, dtype, own)
    same, exact = clone(args), clone(args, torch.float64)
    with use_backend("reference"):
        results = [flat((call(*same), same)), flat((call(*exact), exact))]
    found = flat((call(*args), args))
    for value, eager, true in zip(found, *results, strict=True):
        scale = float(true.abs().max()) if true.numel() else 0.0
        unit = max(unit_roundoff(own), unit_roundoff(value.dtype))
        allowed = 2 * largest_error([eager], [true]) + (64 if dtype == own == torch.float64 else 8) * unit * scale
        assert largest_error([value], [true]) <= allowed


@pytest.mark.parametrize("op", CALLS)
def test_no_host_sync(backend, op):
    call = CALLS[op][0]
    args = arguments(op)
    call(*clone(args))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_learning_rate_on_the_device_is_not_waited_for(backend):
    step, other = arguments("ncl_step_"), arguments("low_rank_step_")
    rate = torch.tensor(0.01, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.ncl_step_(*step, rate)
        ops.low_rank_step_(*other, rate)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", CALLS)
def test_graph_capture_and_replay(backend, op):
    call = CALLS[op][0]
    args, fresh = arguments(op), arguments(op, seed=5)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(*clone(args))
    side.synchronize()
    expected = [(e, flat(call(*e))) for e in (clone(args), clone(fresh))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(call(*args))
    for inputs, (after, results) in zip((args, fresh), expected, strict=True):
        if inputs is not args:
            for old, new in zip(flat(args), flat(inputs), strict=True):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(flat(args), flat(after), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(captured, results, strict=True))


@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_current_stream(backend, op):
    call = CALLS[op][0]
    target, values = arguments(op), arguments(op, seed=3)
    expected = clone(values)
    call(*expected)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(flat(target), flat(values), strict=True):
            old.copy_(new)
        call(*target)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(flat(target), flat(expected), strict=True))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("own", FACTORS, ids=str)
def test_the_same_in_every_run(cuda, op, own):
    args = arguments(op, torch.float32, own)
    runs = []
    for _ in range(5):
        other = clone(args)
        runs.append(flat((CALLS[op][0](*other), other)))
    for repeated in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], repeated, strict=True))


def test_many_layers_are_as_each_alone(cuda):
    """More than one packet holds, of both tiles."""
    args = layers([(32, 32, True)] * 300 + [(100, 90, True)] * 200 + [(3, 2, False)] * 10, torch.float32, torch.float32)
    alone = clone(args)
    ops.ncl_step_(*args, 0.01)
    for i in range(len(alone[0])):
        ops.ncl_step_(*([part[i]] for part in alone), 0.01)
    assert all(torch.equal(a, b) for a, b in zip(flat(args), flat(alone), strict=True))


@pytest.mark.parametrize("op", ["ncl_step_", "ncl_step_ radius"])
def test_a_nan_stays_in_its_layer_without_a_radius(cuda, op):
    args = arguments(op)
    gradient = args[1][2][0]
    gradient[0, 0] = float("nan")
    CALLS[op][0](*args)
    lost = [bool(w.isnan().all()) for w in flat(args[0])]
    place = [w is args[0][2][0] or w is args[0][2][1] for w in flat(args[0])]
    assert lost == (place if op == "ncl_step_" else [True] * len(lost))


@pytest.mark.parametrize("own", FACTORS, ids=str)
@pytest.mark.parametrize(("rank", "count"), [(5, 3), (0, 2), (40, 30), (1, 100)])
def test_append(backend, own, rank, count):
    """Also more rows than one panel of the products has."""
    shapes = [(30, 16), (7,), (3, 5, 2)]
    kept = precision(shapes, own, rank)
    draw = Draw(9)
    vectors = [[draw.normal(*s, dtype=torch.float32) for s in shapes] for _ in range(count)]
    exact = clone(kept, torch.float64)
    ops.low_rank_append_(*kept, vectors, 0.5)
    with use_backend("reference"):
        ops.low_rank_append_(*exact, vectors, 0.5)
    x = [draw.normal(*s) for s in shapes]
    found, expected = (ops.low_rank_quadratic([t.to(p[0][0].dtype) for t in x], *p) for p in (kept, exact))
    torch.testing.assert_close(found, expected, rtol=1e-9 if own == torch.float64 else 1e-4, atol=0)
    rows = torch.cat([b.reshape(rank, d.numel()).double() for b, d in zip(kept[1], kept[0], strict=True)], dim=1)
    used = int((kept[2] > 0).sum())
    products = (rows @ rows.T)[:used, :used]
    assert float((products - torch.eye(used, dtype=torch.float64, device=DEVICE)).abs().max() if used else 0.0) <= 1e-5


@pytest.mark.parametrize("op", ["ncl_step_", "low_rank_step_", "low_rank_step_ radius"])
def test_memory(cuda, op):
    """No temporary of the size of the parameters; for large layers of an eighth."""
    size = 2048
    make = CALLS[op][1]
    args = make([(size, size, False)] * 4 if make is layers else [(2 * size, 2 * size)], torch.float32, torch.float32)
    CALLS[op][0](*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    CALLS[op][0](*args)
    torch.cuda.synchronize()
    # The vendor's library may take a workspace of its own, once.
    assert torch.cuda.max_memory_allocated() - before < 4 * size * size * 4 // (7 if make is layers else 50)
