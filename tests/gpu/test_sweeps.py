"""Masks, quantiles and optimizers on a GPU: what their own tests, which run on the device too, do not ask."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import backends, ops, reference, use_backend
from fastcl.bit_mask import BitMask
from fastcl.ops.child_mask import child_mask_at_
from fastcl.testing import clone, gradients, importances
from layouts import FLOATING, LAYOUTS, STORED, identical

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")]

DEVICE = "cuda"
SHAPES = [(300, 257), (64,), (), (0, 3), (3, 5, 7, 9), (20000,)]
KINDS = ("soft_mask", "child_mask", "fixed_mask", "project", "pull")
PROGRAMS = [(), *((kind,) for kind in KINDS), KINDS, ("pull",) * 8]


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


def on_device(value: Any, device: str) -> Any:
    """A copy there, with the same strides."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(v, device) for v in value)
    if isinstance(value, dict):
        return {key: on_device(v, device) for key, v in value.items()}
    return value


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in flat(v)]
    return [value] if isinstance(value, Tensor) else []


def on_the_cpu() -> use_backend:
    return use_backend("cpp" if backends.why_not("cpp", "cpu") is None else "reference")


SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 6e-8, 65520.0, 3e38])


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    t = gradients([shape], dtype, "cpu", seed)[0] if dtype != torch.uint8 else importances([shape], dtype, "cpu", seed)[0]
    if dtype != torch.uint8 and t.numel() >= len(SPECIAL):
        t.view(-1)[: len(SPECIAL)] = SPECIAL.to(dtype)
    return LAYOUTS[layout](t)


def bits_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return BitMask.from_bool(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3).bits


MASKS: dict[str, tuple[Callable[..., Any], Callable[[torch.dtype, str], list[Any]]]] = {
    "child_mask_": (
        lambda g: ops.child_mask_([g], 0.3, 2**63 + 5, 2**31 + 1),
        lambda dtype, layout: [values((40, 65), dtype, 0, layout)],
    ),
    "child_mask_at_": (
        lambda g: child_mask_at_([g], 0.3, 7, 2, [(3, 2**33 + 5, (1000, 3))]),
        lambda dtype, layout: [values((40, 65), dtype, 0, layout)],
    ),
    "bit_mask_": (
        lambda g, b: ops.bit_mask_([g], [b]),
        lambda dtype, layout: [values((40, 65), dtype, 0, layout), bits_of((40, 65), 1)],
    ),
    "ewc_pull_": (
        lambda g, p, a, c: ops.ewc_pull_([g], [p], [a], [c], 0.35),
        lambda dtype, layout: [values((40, 65), d, n, layout) for n, d in enumerate((dtype, dtype, torch.float32, torch.bfloat16))],
    ),
    "fisher_add_": (
        lambda f, g: ops.fisher_add_([f], [g], 0.3),
        lambda dtype, layout: [values((40, 65), d, n, layout) for n, d in enumerate((dtype, torch.bfloat16))],
    ),
}


@pytest.mark.parametrize("op", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_the_cpu_bit_for_bit(backend, op, layout):
    call, make = MASKS[op]
    for dtype in FLOATING:
        args = make(dtype, layout)
        others = on_device(args, DEVICE)
        call(*others)
        with on_the_cpu():
            call(*args)
        assert all(identical(a, b.cpu()) for a, b in zip(args, others, strict=True)), dtype


def test_a_shard_of_columns_has_the_mask_of_the_whole(cuda):
    whole = torch.ones(96, 160, device=DEVICE)
    ops.child_mask_([whole], 0.5, 11, 4)
    for first, width in ((0, 64), (64, 96), (3, 9)):
        shard = torch.ones(96, width, device=DEVICE)
        child_mask_at_([shard], 0.5, 11, 4, [(0, first, (160, 1))])
        assert torch.equal(shard, whole[:, first : first + width])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_clipped_fisher(cuda, dtype):
    """The norms are summed in another order than on the CPU."""
    shapes = [(300, 257), (64,), (), (5,)]
    fisher, grads = importances(shapes, torch.float64, "cpu", 0), gradients(shapes, dtype, "cpu", 1)
    own, others = on_device(fisher, DEVICE), on_device(grads, DEVICE)
    for max_norm in (0.5, 1e9):
        ops.fisher_add_(own, others, 0.25, max_norm)
        reference.fisher_add_(fisher, grads, 0.25, max_norm)
    for a, b in zip(own, fisher, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=0)
    repeated = [on_device(fisher, DEVICE) for _ in range(3)]
    for f in repeated:
        ops.fisher_add_(f, others, 0.25, 0.5)
    assert all(torch.equal(a, b) for r in repeated[1:] for a, b in zip(repeated[0], r, strict=True))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_quantiles_equal_the_cpu(backend, dtype):
    cases = [
        [values((300, 65), dtype, 0).nan_to_num(0, 0, 0), values((64,), dtype, 1).nan_to_num(0, 0, 0).relu()],
        [torch.zeros(70000, dtype=dtype), torch.tensor(-0.0, dtype=dtype)],
        [torch.tensor([float("inf")] * 3 + [-float("inf")] * 2 + [1.0], dtype=dtype)],
        [values((300, 65), dtype, 0)],  # a NaN
    ]
    for tensors, q in itertools.product(cases, (0.0, 0.3, 0.5, 0.999, 1.0)):
        with on_the_cpu():
            expected = ops.quantile(tensors, q)
        assert identical(ops.quantile(on_device(tensors, DEVICE), q).cpu(), expected), q


def test_counts_of_every_level(cuda):
    for wide, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.float64)):
        tensors = [values((300, 257), dtype, 3), values((9, 65), dtype, 4, "transposed")]
        prefixes = torch.zeros(2, dtype=torch.int64)
        for level in range(6 if wide else 3):
            with on_the_cpu():
                expected = backends.implementation("radix_counts", torch.device("cpu"))(tensors, prefixes, level, wide)
            counts = backends.implementation("radix_counts", torch.device(DEVICE))(
                on_device(tensors, DEVICE), prefixes.to(DEVICE), level, wide
            )
            assert torch.equal(counts.cpu(), expected)
            width = 11 if level < (5 if wide else 2) else 0
            prefixes = (prefixes << width) | expected[:, :2048].argmax(dim=1)


def test_thresholds(cuda):
    threshold = torch.tensor(0.25, dtype=torch.float64)
    for dtype, layout in itertools.product(FLOATING, LAYOUTS):
        t = values((40, 65), dtype, 0, layout)
        own, expected = (torch.full((325,), 170, dtype=torch.uint8, device=d) for d in (DEVICE, "cpu"))
        backends.implementation("threshold_bits_", torch.device(DEVICE))([own], [on_device(t, DEVICE)], threshold.to(DEVICE))
        with on_the_cpu():
            backends.implementation("threshold_bits_", torch.device("cpu"))([expected], [t], threshold)
        assert torch.equal(own.cpu(), expected), (dtype, layout)


# ---- optimizers


def program(kinds: tuple[str, ...], shapes: list[tuple[int, ...]], seed: int) -> list[tuple[Any, ...]]:
    """The transforms on the CPU, with operands of all dtypes, one of them absent."""
    out: list[tuple[Any, ...]] = []
    for n, kind in enumerate(kinds):
        operands = [gradients([s], FLOATING[(k + n) % 4], "cpu", seed + k)[0] for k, s in enumerate(shapes)]
        absent = [torch.empty(0) if k == 1 else t for k, t in enumerate(operands)]
        if kind == "soft_mask":
            stored = [importances([s], STORED[k % 5], "cpu", seed + k)[0] for k, s in enumerate(shapes)]
            out.append((kind, [t[:, :1].clone() if t.dim() == 2 else t for t in stored], 0.75))
        elif kind == "child_mask":
            out.append((kind, 0.3, 2**63 + n))
        elif kind == "fixed_mask":
            out.append((kind, [bits_of(s, seed + k) for k, s in enumerate(shapes)]))
        elif kind == "project":
            out.append((kind, absent, torch.tensor([0.4], dtype=torch.float64)))
        else:
            out.append((kind, absent, [t.clone() for t in operands], 0.2))
    return out


def adamw_arguments(kinds: tuple[str, ...], shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype | None = None):
    dtypes = [dtype or FLOATING[k % 4] for k in range(len(shapes))]
    wide = [torch.float64 if d == torch.float64 else torch.float32 for d in dtypes]
    params, grads = ([gradients([s], d, "cpu", seed + k)[0] for k, (s, d) in enumerate(zip(shapes, dtypes, strict=True))] for _ in range(2))
    moments = [gradients([s], w, "cpu", seed + 50 + k)[0] for k, (s, w) in enumerate(zip(shapes, wide, strict=True))]
    lists = [params, grads, moments, [m.square() for m in moments], [torch.tensor(float(k % 4)) for k in range(len(shapes))]]
    options = {
        "transforms": program(kinds, shapes, seed),
        "scale": torch.tensor(0.3),
        "found_inf": torch.zeros(1),
        "lr": torch.tensor(0.01),
        "weight_decay": 0.05,
    }
    return lists, options


def close(a: Tensor, b: Tensor) -> None:
    """The scalars of a step are powers in double, which CUDA rounds otherwise than the CPU; everything else has the same bits."""
    units = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    torch.testing.assert_close(a.cpu(), b, rtol=units[b.dtype], atol=units[b.dtype] * 1e-3, equal_nan=True)


@pytest.mark.parametrize("kinds", PROGRAMS, ids="+".join)
@pytest.mark.parametrize("decay", ["torch", "hf"])
def test_adamw_as_on_the_cpu(backend, kinds, decay):
    lists, options = adamw_arguments(kinds)
    own, own_options = on_device(lists, DEVICE), on_device(options, DEVICE)
    for _ in range(3):
        ops.adamw_(*own, decay=decay, **own_options)
        with on_the_cpu():
            ops.adamw_(*lists, decay=decay, **options)
    for a, b in zip(flat(own), flat(lists), strict=True):
        close(a, b)


@pytest.mark.parametrize("kinds", PROGRAMS, ids="+".join)
def test_sgd_equals_the_cpu_bit_for_bit(backend, kinds):
    (params, grads, buffers, _, steps), options = adamw_arguments(kinds)
    lists = [params, grads, buffers, steps if "child_mask" in kinds else []]
    own, own_options = on_device(lists, DEVICE), on_device(options, DEVICE)
    for first in (True, False):
        ops.sgd_(*own, momentum=0.9, nesterov=True, first=first, **own_options)
        with on_the_cpu():
            ops.sgd_(*lists, momentum=0.9, nesterov=True, first=first, **options)
    assert all(identical(a.cpu(), b) for a, b in zip(flat(own), flat(lists), strict=True))


def test_compact_state_has_the_bits_of_the_dense_form(backend):
    shapes = [(300, 257), (64,), (20001,), (1,)]
    lists, options = adamw_arguments(("fixed_mask",), shapes, dtype=torch.float32)
    masks = [BitMask(b, s) for b, s in zip(options["transforms"][0][1], shapes, strict=True)]
    for m, moments in itertools.product(range(len(shapes)), (lists[2], lists[3])):
        moments[m] = moments[m] * masks[m].to_bool()
    dense, options = on_device(lists, DEVICE), on_device(options, DEVICE)
    packed = on_device([lists[0], lists[1], *([t[m.to_bool()] for t, m in zip(own, masks, strict=True)] for own in lists[2:4])], DEVICE)
    compact = (options["transforms"][0][1], [m.ranks.to(DEVICE) for m in masks])
    steps = clone(dense[4])
    for _ in range(3):
        ops.adamw_(*dense, **options)
        ops.adamw_(*packed, steps, compact=compact, **options)
    assert all(identical(a, b) for a, b in zip(dense[0], packed[0], strict=True))
    for own, other in zip(packed[2:], dense[2:4], strict=True):
        assert all(identical(a, b[m.to_bool().to(DEVICE)]) for a, b, m in zip(own, other, masks, strict=True))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_steps_in_a_graph(cuda, found):
    """Every replay draws anew and counts; with an Inf found, nothing changes. Nothing waits for the GPU."""
    lists, options = on_device(adamw_arguments(KINDS), DEVICE)
    expected = clone(lists)
    options["found_inf"].fill_(found)
    before = clone(lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adamw_(*lists, **options)
    torch.cuda.synchronize()
    assert all(identical(a, b) for a, b in zip(flat(lists), flat(before), strict=True)), "capture runs nothing"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            graph.replay()
            ops.adamw_(*expected, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(identical(a, b) for a, b in zip(flat(lists), flat(expected), strict=True))
    assert all(identical(a, b) for a, b in zip(flat(lists), flat(before), strict=True)) == bool(found)
    assert all(float(t) == float(b) + 3 * (1 - found) for t, b in zip(lists[4], before[4], strict=True))


def test_a_first_step_can_be_captured():
    program = """
import torch
from fastcl import ops, use_backend
make = lambda: [torch.rand(1000, device='cuda')]
p, g, m, v, t = make(), make(), make(), make(), [torch.zeros((), device='cuda')]
q, other = make(), make()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with use_backend('cuda'), torch.cuda.graph(graph):
    ops.adamw_(p, g, m, v, t, lr=1e-3, transforms=[('child_mask', 0.5, 3)])
    ops.sgd_(q, g, lr=1e-3)
    result = ops.quantile(other, 0.5)
graph.replay()
torch.cuda.synchronize()
assert float(t[0]) == 1
assert float(result) == other[0].double().quantile(0.5).item()
print('captured')
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert "captured" in result.stdout, result.stderr


def test_steps_run_on_the_current_stream(cuda):
    lists, options = on_device(adamw_arguments(KINDS), DEVICE)
    fresh, _ = on_device(adamw_arguments(KINDS, seed=9), DEVICE)
    expected = clone(fresh)
    ops.adamw_(*expected, **options)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(flat(lists), flat(fresh), strict=True):
            old.copy_(new)
        ops.adamw_(*lists, **options)
    stream.synchronize()
    assert all(identical(a, b) for a, b in zip(flat(lists), flat(expected), strict=True))


def test_transformed_dots(cuda):
    (params, grads, _, _, steps), options = adamw_arguments(KINDS, dtype=torch.float32)
    reference_ = gradients(SHAPES, torch.bfloat16, "cpu", 77)
    call = lambda p, g, s, r, o: ops.optimizers.transformed_dot(p, g, s, o["transforms"], None, o["scale"], r)  # noqa: E731
    with on_the_cpu():
        expected = call(params, grads, steps, reference_, options)
    own = on_device((params, grads, steps, reference_, options), DEVICE)
    results = [call(*own) for _ in range(4)]
    assert all(torch.equal(results[0], r) for r in results[1:])
    torch.testing.assert_close(results[0].cpu(), expected, rtol=1e-9, atol=1e-6)


def test_ten_thousand_tensors_step(cuda):
    shapes = [(n % 90,) for n in range(10_000)]
    lists, options = on_device(adamw_arguments(("soft_mask", "child_mask"), shapes, dtype=torch.float32), DEVICE)
    options["transforms"] = [("soft_mask", [torch.rand_like(g) for g in lists[1]], 0.5), options["transforms"][1]]
    expected = clone(lists)
    ops.adamw_(*lists, **options)
    for part in range(0, 10_000, 2500):
        own = slice(part, part + 2500)
        soft, child = options["transforms"]
        places = [(n, 0, (1,)) for n in range(part, part + 2500)]
        changed = {**options, "transforms": [(soft[0], soft[1][own], soft[2]), child]}
        ops.adamw_(*(column[own] for column in expected), places=places, **changed)
    assert all(identical(a, b) for a, b in zip(flat(lists), flat(expected), strict=True))


def test_half_parameters_keep_float_moments(cuda):
    lists, options = on_device(adamw_arguments((), [(257, 65)], dtype=torch.bfloat16), DEVICE)
    exact = [[t.float().clone() for t in column] for column in lists]
    ops.adamw_(*lists, **options)
    ops.adamw_(*exact, **options)
    assert identical(lists[2][0], exact[2][0])
    assert identical(lists[3][0], exact[3][0])
    assert identical(lists[0][0], exact[0][0].bfloat16())
