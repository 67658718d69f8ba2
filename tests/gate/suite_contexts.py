"""The op under every context that wants to see it or changes how torch runs: modes, transforms, tracing, threads, forks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl import _native, ops

C = _native.module("_C")


class Seen(TorchDispatchMode):
    """Remembers the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Forwards every torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def mask(size: int = 5) -> Tensor:
    g = torch.ones(size)
    ops.soft_mask_([g], [torch.full((size,), 0.25)])
    return g


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "default device": lambda: torch.device("cpu"),
    "torch function mode": Functions,
    "dispatch mode": Seen,
    "deterministic": lambda: torch.backends.mkldnn.flags(enabled=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "saved tensors hooks": lambda: torch.autograd.graph.save_on_cpu(),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_contexts_change_nothing(name: str) -> None:
    with CONTEXTS[name]():
        g = mask()
        a = torch.zeros(3)
        mean = ops.spg_importance_([a], [[torch.tensor([0.0, 1.0, 2.0])]])
    assert g.tolist() == [0.75] * 5
    assert abs(mean.item() - 2 / 3 * torch.tanh(torch.ones(())).item()) < 1e-6


def test_a_default_device_that_is_no_device_of_ours() -> None:
    g, i = torch.ones(5), torch.full((5,), 0.25)
    with torch.device("meta"):
        ops.soft_mask_([g], [i])
        assert torch.ones(1).is_meta
    assert g.tolist() == [0.75] * 5


def test_the_profiler_and_dispatch_modes_see_the_operator() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mask()
    assert "fastcl::soft_mask_" in {event.key for event in profile.key_averages()}
    with torch.autograd.profiler.profile() as old:
        mask()
    assert "fastcl::soft_mask_" in {event.key for event in old.key_averages()}
    with Seen() as seen:
        mask()
    assert "fastcl::soft_mask_" in seen.names


def test_fake_tensors_in_their_mode() -> None:
    with FakeTensorMode() as mode:
        g, i = torch.ones(5), torch.ones(5)
        ops.soft_mask_([g], [i])
        assert ops.spg_importance_([g], [[i]]).shape == ()
        with pytest.raises(ValueError, match=r"importance\[0\] has shape \(4,\)"):
            ops.soft_mask_([g], [torch.ones(4)])
    real, other = torch.ones(5), torch.rand(5)
    with mode:
        assert isinstance(C.soft_mask_([g], [other], 1.0, True), str)
        with pytest.raises(RuntimeError, match=r"memory|allocate"):  # torch hands out a tensor without memory
            C.spg_importance_([real], [[other]], True)
    assert real.equal(torch.ones(5))


def test_functorch_tensors_are_not_read_as_memory() -> None:
    """Their type is exactly torch.Tensor."""
    ones = torch.ones(3, 5)
    refusals: list[Any] = []

    def inside(x: Tensor) -> Tensor:
        refusals.append(C.soft_mask_([x], [x.clone()], 1.0, False))
        refusals.append(C.soft_mask_([x], [x.clone()], 1.0, True))
        refusals.append(C.emax_([x], [x], True))
        return (x * x).sum()

    torch.vmap(inside)(ones)
    torch.func.grad(inside)(ones)
    torch.func.jvp(inside, (ones,), (ones,))
    torch.func.vjp(inside, ones)
    torch.vmap(torch.func.grad(inside))(ones)
    torch.func.functionalize(inside)(ones)
    assert len(refusals) == 18
    assert all(isinstance(r, str) for r in refusals), refusals
    assert ones.equal(torch.ones(3, 5))


def test_functorch_through_the_public_op_is_right_or_raises() -> None:
    for transform in (torch.vmap, torch.func.grad, torch.func.functionalize):
        x = torch.ones(3, 5) if transform is torch.vmap else torch.ones(5)

        def inside(x: Tensor) -> Tensor:
            g = x * 2
            ops.soft_mask_([g], [torch.full_like(g, 0.5)])
            return g.sum()

        try:
            result = transform(inside)(x)
        except (RuntimeError, ValueError):
            pass
        else:
            assert transform is torch.func.functionalize or result.isfinite().all()
        assert x.equal(torch.ones_like(x))


def test_compile_with_graph_breaks_and_without() -> None:
    def step(g: Tensor, i: Tensor) -> Tensor:
        h = g * 2
        ops.soft_mask_([h], [i])
        torch._dynamo.graph_break()
        ops.soft_mask_([h], [i])
        return h + 1

    whole = torch.compile(lambda g, i: ops.soft_mask_([g], [i]), backend="eager", fullgraph=True)
    broken = torch.compile(step, backend="aot_eager")
    g, i = torch.ones(6), torch.full((6,), 0.5)
    assert broken(g, i).tolist() == [1.5] * 6
    whole(g, i)
    assert g.tolist() == [0.5] * 6


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_is_refused_because_it_would_drop_the_operator() -> None:
    def function(g: Tensor, i: Tensor) -> Tensor:
        h = g * 1
        ops.soft_mask_([h], [i])
        return h

    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace loses"):
        torch.jit.trace(function, (torch.ones(3), torch.full((3,), 0.5)), check_trace=False)
    assert mask().tolist() == [0.75] * 5


@pytest.mark.parametrize("call", [
    lambda t: ops.soft_mask_([t], [torch.zeros(4)]),
    lambda t: ops.emax_([t], [torch.zeros(4)]),
    lambda t: ops.spg_importance_([t], [[torch.randn(4)]]),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_backward_through_the_old_value_raises(call: Callable[[Tensor], Any], backend: str) -> None:
    leaf = torch.rand(4, requires_grad=True)
    saved = torch.rand(4)
    version = saved._version
    loss = (leaf * saved).sum()
    with fastcl.use_backend(backend):
        call(saved)
    assert saved._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_in_use_by_double_backward() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    before = {p: p.grad._version for p in model.parameters()}
    fastcl.mask_gradients_(model, [torch.full_like(p, 0.5) for p in model.parameters()])
    assert all(p.grad._version > before[p] for p in model.parameters())
    assert model.bias.grad.tolist() == [0.5] * 2


def test_many_threads_at_once() -> None:
    wrong: list[Any] = []

    def work(seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        g, i = torch.rand(50_000, generator=gen), torch.rand(50_000, generator=gen)
        for _ in range(20):
            want = g * (1 - i)
            ops.soft_mask_([g], [i])
            if not g.equal(want):
                wrong.append(seed)
            g = torch.rand(50_000, generator=gen)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_number_of_threads_does_not_show() -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gen = torch.Generator().manual_seed(0)
        a, g = [torch.zeros(100_003)], [torch.randn(100_003, generator=gen)]
        mean = ops.spg_importance_(a, [g])
        ops.soft_mask_(g, a, 0.7)
        results.append((mean, a[0], g[0]))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_flushing_denormals_keeps_ordinary_numbers() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    assert mask(40_000).eq(0.75).all()
    half = torch.full((100,), 6e-8, dtype=torch.float16)  # the smallest denormal half is a normal float
    ops.soft_mask_([half], [torch.zeros(100)])
    assert half.ne(0).all()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_after_the_pool_was_used_does_not_hang() -> None:
    torch.set_num_threads(2)
    g, i, a = torch.ones(1 << 20), torch.full((1 << 20,), 0.25), torch.zeros(1 << 20)
    ops.soft_mask_([g], [i])
    child = os.fork()
    if child == 0:  # no torch op of many elements may run here: torch's own pool would hang
        refused = C.soft_mask_([g], [i], 1.0, False)
        ops.emax_([a], [g])
        values = (g[0].item(), g[-1].item(), a[-1].item())
        os._exit(0 if refused is None and values == (0.5625,) * 3 else 3)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hung")
    assert os.waitstatus_to_exitcode(status) == 0
    assert g.eq(0.75).all()


def test_dtensors_in_one_process() -> None:
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            g = distribute_tensor(torch.ones(4, 3), mesh, [placement])
            i = distribute_tensor(torch.full((4, 3), 0.25), mesh, [placement])
            assert isinstance(C.soft_mask_([g], [i], 1.0, True), str)
            before = g.to_local().clone()
            try:
                ops.soft_mask_([g], [i])
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                assert g.to_local().equal(before)
            else:
                assert g.to_local().eq(0.75).all()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_memory() -> None:
    g = torch.ones(5).pin_memory()
    ops.soft_mask_([g], [torch.full((5,), 0.25).pin_memory()])
    assert g.tolist() == [0.75] * 5


def test_derivatives_that_would_be_silently_wrong_raise() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        g = x * 1
        ops.soft_mask_([g], [torch.tensor([1.0, 0.5, 0.0])])
        return g.sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match="not differentiable"):
            transform(masked)(torch.ones(3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(RuntimeError, match="not differentiable"):
            ops.soft_mask_([dual], [torch.ones(3)])
