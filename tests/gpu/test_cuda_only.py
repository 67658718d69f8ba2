"""What only a GPU can show. The families' own tests run on the device too; here is what they do not ask."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastcl import _native, backends, ops, reference, use_backend
from fastcl.testing import CASES, clone, gradients, importances, largest_error, unit_roundoff
from layouts import FLOATING, LAYOUTS, STORED, identical

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")]

SHAPES = [(300, 257), (64,), (), (0, 3), (3, 5, 7, 9), (20000,)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.why_not(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cuda() -> Iterator[None]:
    reason = backends.why_not("cuda", "cuda")
    if reason is not None:
        pytest.fail(f"the machine has a GPU, but the CUDA library cannot serve: {reason}")
    with use_backend("cuda"):
        yield


def arguments(op: str, dtype=torch.float32, stored=torch.float32, seed=0, shapes=SHAPES):
    if op == "spg_importance_":
        return CASES[op].make(shapes, dtype, stored, "cuda", seed, heads=2)
    return CASES[op].make(shapes, dtype, stored, "cuda", seed)


def test_the_cuda_library_serves_by_itself():
    assert backends.why_not("cuda", "cuda") is None
    assert backends.serving("cuda") == "cuda"
    info = _native.module("_C_cuda").info()
    assert info["problem"] is None
    assert len(info["capabilities"]) == torch.cuda.device_count()


@pytest.mark.parametrize("op", CASES)
def test_no_host_sync(backend, op):
    args = arguments(op)
    warm = clone(args)
    CASES[op].call(*warm)  # Triton compiles at the first call, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = CASES[op].call(*args)
        if isinstance(result, torch.Tensor):
            ops.soft_mask_([torch.ones(5, device="cuda")], [result])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _results(value) -> list[torch.Tensor]:
    return [] if value is None else [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("op", CASES)
def test_graph_capture_and_replay(backend, op):
    case = CASES[op]
    args, fresh = arguments(op), arguments(op, seed=5)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        case.call(*clone(args))
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    expected_first, expected_fresh = clone(args), clone(fresh)
    results = [_results(case.call(*expected_first)), _results(case.call(*expected_fresh))]
    with torch.cuda.graph(graph):
        captured = _results(case.call(*args))
    for inputs, expected, result in ((None, expected_first, results[0]), (fresh, expected_fresh, results[1])):
        if inputs is not None:
            for old, new in zip(_flat(args), _flat(inputs), strict=True):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(identical(a, e) for a, e in zip(_flat(args), _flat(expected), strict=True))
        assert all(torch.equal(c, r) for c, r in zip(captured, result, strict=True))


def test_a_first_call_can_be_captured():
    """The driver loads kernels lazily, which a strict capture forbids."""
    program = """
import torch
from fastcl import ops, use_backend
g, i = [torch.rand(1000, device='cuda')], [torch.rand(1000, device='cuda')]
expected = g[0] * (1 - i[0])
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with use_backend('cuda'), torch.cuda.graph(graph):
    ops.soft_mask_(g, i)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(g[0], expected)
print('captured')
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert "captured" in result.stdout, result.stderr


def _flat(args) -> list[torch.Tensor]:
    return [t for a in args for t in (_flat(a) if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("op", CASES)
def test_runs_on_the_current_stream(backend, op):
    case = CASES[op]
    target, values = arguments(op), arguments(op, seed=3)
    expected = clone(values)
    case.call(*expected)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds in which a kernel on another stream would read the old values
        for old, new in zip(_flat(target), _flat(values), strict=True):
            old.copy_(new)
        case.call(*target)
    stream.synchronize()
    assert all(identical(a, e) for a, e in zip(_flat(target), _flat(expected), strict=True))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_spg_is_the_same_in_every_run(cuda, dtype):
    args = arguments("spg_importance_", dtype, dtype, shapes=[(1000, 777), (64,)] * 3)
    results = []
    for _ in range(5):
        own = clone(args)
        results.append([ops.spg_importance_(*own), *_flat(own)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _projections(count, sign=-1.0, shapes=SHAPES, dtype=torch.float32):
    """Gradients, and memories that they violate for a negative sign."""
    grads = gradients(shapes, dtype, "cuda", 0)
    noise = [gradients(shapes, torch.float32, "cuda", 1 + k) for k in range(count)]
    return grads, [[(sign * g.float() + 0.5 * n).to(dtype) for g, n in zip(grads, own, strict=True)] for own in noise]


def test_readers_neither_wait_nor_escape_capture(backend):
    grads, memories = _projections(3)
    expected = [ops.grad_dot(grads, memories[0]), ops.gram([grads, *memories])]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [ops.grad_dot(grads, memories[0]), ops.gram([grads, *memories])]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [ops.grad_dot(grads, memories[0]), ops.gram([grads, *memories])]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True))
    assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))
    for g in grads:  # the graph reads what is there when it is replayed
        g.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], 2 * expected[0])
    assert torch.equal(captured[1][0, 0], 4 * expected[1][0, 0])


@pytest.mark.parametrize("count", [1, 10, 64])
def test_a_captured_projection_decides_anew_at_every_replay(backend, count):
    grads, memories = _projections(count)
    kept, agreeing = _projections(count, sign=1.0)
    start = clone(grads)
    ops.gem_project_(clone(grads), memories)
    ops.project_(clone(grads), agreeing[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        info = ops.gem_project_(grads, memories)
        one = ops.project_(grads, agreeing[0])
    for violated, inputs in ((True, (start, memories)), (False, (kept, agreeing)), (True, (start, memories))):
        for old, new in zip(_flat((grads, memories)), _flat(clone(inputs)), strict=True):
            old.copy_(new)
        expected = clone(grads)
        own = ops.gem_project_(expected, memories)
        ops.project_(expected, agreeing[0])
        graph.replay()
        torch.cuda.synchronize()
        assert bool(info.violated) == bool(own.violated) == violated
        assert all(torch.equal(a, b) for a, b in zip(info, own, strict=True))
        assert all(identical(a, b) for a, b in zip(grads, expected, strict=True))
        if not violated:
            assert not bool(one.violated)
            assert all(identical(a, b) for a, b in zip(grads, kept, strict=True))


@pytest.mark.parametrize("count", [1, 10, 64])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_projections_are_the_same_in_every_run(cuda, dtype, count):
    grads, memories = _projections(count, shapes=[(500, 777), (64,), (3, 5)] * 3, dtype=dtype)
    results = []
    for _ in range(5):
        own, other = clone(grads), clone(grads)
        infos = [*ops.gem_project_(own, memories), *ops.project_(other, memories[0])]
        results.append([*own, *other, *infos, ops.gram(memories), ops.grad_dot(grads, memories[0])])
    for repeated in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], repeated, strict=True))


def test_gram_is_symmetric_and_holds_the_dots(cuda):
    _, vectors = _projections(65, shapes=[(300, 41), (7,)])
    products = ops.gram(vectors)
    assert torch.equal(products, products.t())
    for i, j in ((0, 0), (64, 0), (31, 62), (64, 64)):
        dot = ops.grad_dot(vectors[i], vectors[j])
        magnitude = sum(float((a.double() * b.double()).abs().sum()) for a, b in zip(vectors[i], vectors[j], strict=True))
        assert abs(float(products[i, j] - dot)) <= 8 * 2.0**-53 * magnitude


def test_projections_of_ten_thousand_tensors(cuda):
    shapes = [(n % 90,) for n in range(10_000)]
    grads, memories = _projections(3, shapes=shapes)
    joined, whole = torch.cat(grads), [torch.cat(m) for m in memories]
    info, expected = ops.gem_project_(grads, memories), ops.gem_project_([joined], [[m] for m in whole])
    assert bool(info.violated)
    assert bool(expected.violated)
    torch.testing.assert_close(info.coefficients, expected.coefficients, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.cat(grads), joined, rtol=1e-6, atol=1e-6)


def test_other_streams_may_run_between_the_calls_of_one(cuda):
    """The workspace goes back to torch's allocator when a call returns, for later work on the same stream only."""
    grads, memories = _projections(10, shapes=[(1000, 700)])
    expected = [clone(grads) for _ in range(2)]
    for e in expected:
        ops.gem_project_(e, memories)
    results, streams = [clone(grads) for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(3):
        for own, stream in zip(results, streams, strict=True):
            with torch.cuda.stream(stream):
                for g, fresh in zip(own, grads, strict=True):
                    g.copy_(fresh)
                ops.gem_project_(own, memories)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for r, e in zip(results, expected, strict=True) for a, b in zip(r, e, strict=True))


@pytest.mark.parametrize("op", ["soft_mask_", "emax_"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_the_cpu_bit_for_bit(cuda, op, layout):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 6e-8, 65520.0, 3e38])
    for dtype, stored in itertools.product(FLOATING, STORED):
        args = CASES[op].make([(40, 65), (300,), (2, 3, 16, 5)], dtype, stored, "cpu", 1)
        for t in _flat(args):
            if t.is_floating_point():
                t.view(-1)[: len(special)] = special.to(t.dtype)
        args = tuple([LAYOUTS[layout](t) for t in a] if isinstance(a, list) else a for a in args)
        on_gpu = tuple([LAYOUTS[layout](t.cuda()) for t in a] if isinstance(a, list) else a for a in args)
        CASES[op].call(*on_gpu)
        with use_backend("cpp" if backends.why_not("cpp", "cpu") is None else "reference"):
            CASES[op].call(*args)
        for a, b in zip(_flat(on_gpu), _flat(args), strict=True):
            assert identical(a.cpu(), b), f"{dtype} {stored}"


@pytest.mark.parametrize("op", ["soft_mask_", "emax_"])
def test_triton_equals_cuda_bit_for_bit(cuda, op):
    reason = backends.why_not("triton", "cuda")
    if reason is not None:
        pytest.skip(reason)
    for dtype, stored in itertools.product(FLOATING, STORED):
        args = CASES[op].make([(300, 257), (64,), ()], dtype, stored, "cuda", 1)
        other = clone(args)
        CASES[op].call(*args)
        with use_backend("triton"):
            CASES[op].call(*other)
        assert all(identical(a, b) for a, b in zip(_flat(args), _flat(other), strict=True)), f"{dtype} {stored}"


@pytest.mark.parametrize(("dtype", "stored"), itertools.product(FLOATING, STORED), ids=lambda d: str(d)[6:])
def test_spg_error(cuda, dtype, stored):
    """At most twice torch's error in the same dtypes, and a rounding."""
    shapes = [(1000, 777), (257,), (3, 5), (100_000,)]
    args = CASES["spg_importance_"].make(shapes, dtype, stored, "cuda", 0)
    args[1][0][3][0] = 1000.0  # a first element far from the others
    exact, eager = clone(args, torch.float64), clone(args)
    exact_mean = reference.spg_importance_(*exact)
    CASES["spg_importance_"].provider("eager")(*eager)
    mean = ops.spg_importance_(*args)
    allowed = 2 * largest_error(eager[0], exact[0]) + 2 * unit_roundoff(stored)
    assert largest_error(args[0], exact[0]) <= allowed
    assert abs(float(mean - exact_mean)) <= allowed


@pytest.mark.parametrize("heads", [0, 1, 7, 8, 9, 20])
def test_spg_takes_any_number_of_heads(cuda, heads):
    args = CASES["spg_importance_"].make([(100, 33), (7,)], torch.float32, torch.float32, "cuda", 0, heads=heads)
    exact = clone(args, torch.float64)
    exact_mean = reference.spg_importance_(*exact)
    mean = ops.spg_importance_(*args)
    assert largest_error(args[0], exact[0]) < 1e-6
    assert abs(float(mean - exact_mean)) < 1e-6


def test_spg_mixed_dtypes(cuda):
    dtypes = list(itertools.product(STORED, FLOATING, FLOATING))
    stored = [importances([(333,)], s, "cuda", n)[0] for n, (s, _, _) in enumerate(dtypes)]
    heads = [[gradients([(333,)], d[1 + h], "cuda", n + h)[0] for n, d in enumerate(dtypes)] for h in (0, 1)]
    exact = clone((stored, heads), torch.float64)
    exact_mean = reference.spg_importance_(*exact)
    mean = ops.spg_importance_(stored, heads)
    for s, e in zip(stored, exact[0], strict=True):
        assert largest_error([s], [e]) <= 2 * unit_roundoff(s.dtype) + 1e-6
    assert abs(float(mean - exact_mean)) < 5e-3


def test_ten_thousand_tensors(cuda):
    grads, importance = gradients([(n % 90,) for n in range(10_000)], torch.float32, "cuda", 0), None
    importance = [torch.rand_like(g) for g in grads]
    expected = [g * (1 - i) for g, i in zip(grads, importance, strict=True)]
    ops.soft_mask_(grads, importance)
    assert torch.equal(torch.cat(grads), torch.cat(expected))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    n = 2**31 + 12345
    grads, importance = torch.ones(n, dtype=torch.bfloat16, device="cuda"), torch.zeros(n, dtype=torch.uint8, device="cuda")
    importance[2**31 - 3 :] = 255
    ops.soft_mask_([grads], [importance])
    assert int(torch.count_nonzero(grads)) == 2**31 - 3
    assert not grads[2**31 - 3 :].any()
    ops.emax_([importance], [torch.full((), 0.5, device="cuda")])
    assert int((importance == 128).sum()) == 2**31 - 3
    wide = torch.ones(3, n // 2 + 1, dtype=torch.bfloat16, device="cuda")
    ops.soft_mask_([wide.t()], [torch.tensor([0.0, 1.0, 0.5], device="cuda")])
    assert wide.float().mean(dim=1).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.slow
def test_projection_of_more_than_2_to_the_31_elements(cuda):
    n = 2**31 + 12345
    grad, memory = torch.ones(n, dtype=torch.bfloat16, device="cuda"), torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    memory[2**31 - 3 :] = -1
    last = n - (2**31 - 3)
    assert float(ops.grad_dot([grad], [memory])) == -last
    assert ops.gram([[grad], [memory]]).tolist() == [[n, -last], [-last, last]]
    info = ops.project_([grad], [memory])
    assert (float(info.dot), float(info.reference_sq)) == (-last, last)
    assert int(torch.count_nonzero(grad)) == 2**31 - 3


@pytest.mark.parametrize("op", CASES)
def test_memory(cuda, op):
    """No temporary of the size of the parameters."""
    args = arguments(op, shapes=[(4096, 4096), (1000,)])
    CASES[op].call(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    CASES[op].call(*args)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096 * 4 // 100


def test_mixed_devices_in_one_list():
    grads = [torch.ones(5), torch.ones(7, device="cuda"), torch.ones(3)]
    importance = [torch.full_like(g, 0.25) for g in grads]
    ops.soft_mask_(grads, importance)
    assert all((g == 0.75).all() for g in grads)
    ops.emax_(importance, grads)
    assert all((i == 0.75).all() for i in importance)
    mean = ops.spg_importance_(importance, [grads])
    assert mean.device.type == "cpu"
    assert abs(float(mean) - 0.75) < 1e-12


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current(cuda):
    grads = [torch.ones(1000, device="cuda:1"), torch.ones(1000, device="cuda:0")]
    ops.soft_mask_(grads, [torch.full_like(g, 0.5) for g in grads])
    assert torch.cuda.current_device() == 0
    assert all((g == 0.5).all() for g in grads)


def test_too_many_dimensions_are_an_error_with_a_name(cuda):
    grad = torch.ones([4] * 13, device="cuda", dtype=torch.float16)[(slice(None, None, 2),) * 13]
    with pytest.raises(RuntimeError, match=r"grads\[0\].*12 dimensions"):
        ops.soft_mask_([grad], [torch.ones_like(grad)])
    assert (grad == 1).all()


def test_yardsticks(cuda):
    module = _native.module("_C_cuda")
    for n in (8, 4096, 1_000_003):
        a, b = (torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda") for _ in range(2))
        expected = a ^ b
        assert module.yardstick_([a], [b]) is None
        assert torch.equal(a, expected)
        folded = int(module.yardstick_read([a]))
        whole = n // 8 * 8
        words = a[:whole].cpu().view(torch.int64).tolist()
        for value in (*words, *a[whole:].tolist()):
            folded ^= value
        assert folded == 0
