"""What tests/wheel_check.py runs inside each of its environments: small, but every promise of the compiled module is touched once.

Prints one line of JSON: versions, a digest of the compiled ops' results, and for each check "ok" or what went wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy
import torch

import fastcl
from fastcl import _native, backends, ops, reference
from fastcl.methods import SPG

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STORED = (*FLOATING, torch.uint8)
SHAPES = ((), (1,), (63,), (65,), (40, 30), (3, 5, 2, 2), (70_000,))


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, unit: bool = False) -> torch.Tensor:
    """Numbers from NumPy's frozen generator, so that every torch starts from the same bits."""
    state = numpy.random.RandomState(seed)
    values = torch.from_numpy(numpy.asarray(state.uniform(0 if unit else -2, 1 if unit else 2, shape)))
    return (values * 255).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def lists(dtype: torch.dtype, stored: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [drawn(n, s, dtype) for n, s in enumerate(SHAPES)], [drawn(50 + n, s, stored, unit=True) for n, s in enumerate(SHAPES)]


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and bits(a) == bits(b) for a, b in zip(left, right, strict=True))


def raised_by(call: Callable[[], object], error: type[Exception]) -> str | None:
    try:
        call()
    except error as raised:
        return str(raised)
    return None


digest = hashlib.sha256()


def keep(tensors: list[torch.Tensor]) -> None:
    for t in tensors:
        digest.update(bits(t))


@contextlib.contextmanager
def direct_path_only() -> Iterator[None]:
    """Any detour through the dispatcher's implementations raises."""
    with mock.patch.object(backends, "implementation", side_effect=RuntimeError("the compiled module refused the direct path")):
        yield


def compiled_module_is_loaded() -> None:
    loaded = _native.load("_C")
    expect(not isinstance(loaded, str), str(loaded))
    expect("site-packages" in str(loaded.__file__), f"the module comes from {loaded.__file__}, not from the wheel")
    expect(backends.serving("cpu") == "cpp", f"the CPU is served by {backends.serving('cpu')}")


def soft_mask_is_the_reference_bitwise() -> None:
    for dtype in FLOATING:
        for stored in STORED:
            grads, importance = lists(dtype, stored)
            expected = [g.clone() for g in grads]
            with direct_path_only():
                ops.soft_mask_(grads, importance, 0.75)
            reference.soft_mask_(expected, importance, 0.75)
            expect(same_bits(grads, expected), f"{dtype} with {stored} differs from the reference")
            keep(grads)


def emax_is_the_reference_bitwise() -> None:
    for stored in STORED:
        for new in STORED:
            fresh, importance = lists(new, stored)
            fresh = [t.abs() / 2 if t.is_floating_point() else t for t in fresh]
            expected = [i.clone() for i in importance]
            with direct_path_only():
                ops.emax_(importance, fresh)
            reference.emax_(expected, fresh)
            expect(same_bits(importance, expected), f"{stored} with {new} differs from the reference")
            keep(importance)


def spg_importance_is_the_reference() -> None:
    grads = [[drawn(100 * h + n, s, torch.float64) for n, s in enumerate(SHAPES)] for h in range(3)]
    got, expected = ([torch.zeros_like(g) for g in grads[0]] for _ in range(2))
    mean, expected_mean = ops.spg_importance_(got, grads), reference.spg_importance_(expected, grads)
    worst = max(float((a - b).abs().max()) for a, b in zip([*got, mean], [*expected, expected_mean], strict=True))
    expect(worst < 1e-13, f"differs from the reference by {worst}")
    keep([*got, mean])


def one_and_many_threads_agree_bitwise() -> None:
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        got = [drawn(3, (300_000,), torch.float32, unit=True)]
        mean = ops.spg_importance_(got, [[drawn(4, (300_000,), torch.float32)]])
        results.append([*got, mean])
    expect(same_bits(*results), "1 and 3 threads differ")
    keep(results[0])


def torch_threads_do_the_work() -> None:
    module = _native.module("_C")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        expect(module.threads() == threads, f"torch has {threads} threads, the module sees {module.threads()}")
    code = """
import os, torch
from fastcl import ops
torch.set_num_threads(1)
grads, importance = [torch.ones(1 << 22)], [torch.zeros(1 << 22)]
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
ops.soft_mask_(grads, importance)
between = len(os.listdir("/proc/self/task"))
torch.add(grads[0], 1)
print(between - before, len(os.listdir("/proc/self/task")) - between)
"""
    if not Path("/proc/self/task").is_dir():
        return
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    expect(out == ["3", "0"], f"an op on 4 threads started {out[0]} threads and torch's own op after it {out[1]}; expected 3 and 0")


def refusals_name_the_argument() -> None:
    ones = [torch.ones(3)]
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: ops.soft_mask_(ones, [torch.ones(3), torch.ones(3)]), ValueError, "importance"),
        (lambda: ops.soft_mask_(ones, [torch.ones(4)]), ValueError, "importance[0]"),
        (lambda: ops.soft_mask_(ones, [torch.ones(3)], 1.5), ValueError, "strength"),
        (lambda: ops.soft_mask_([torch.ones(3, dtype=torch.int64)], [torch.ones(3)]), TypeError, "grads[0]"),
        (lambda: ops.soft_mask_(ones, [torch.ones(3, device="meta")]), ValueError, "importance[0]"),
        (lambda: ops.emax_(ones, [torch.ones(3).to_sparse()]), TypeError, "new[0]"),
        (lambda: ops.emax_(ones, [None]), TypeError, "new[0]"),  # type: ignore[list-item]
        (lambda: ops.emax_([torch.ones(1).expand(3)], ones), ValueError, "importance[0]"),
        (lambda: ops.spg_importance_(ones, [[torch.ones(4)]]), ValueError, "grads_by_head[0]"),
    ]
    for number, (call, error, name) in enumerate(cases):
        message = raised_by(call, error)
        expect(message is not None, f"case {number} raised no {error.__name__}")
        expect(name in str(message), f"case {number}: the message does not name {name}: {message}")
    expect(torch.equal(ones[0], torch.ones(3)), "a refused call has written")


def versions_are_bumped() -> None:
    w = torch.ones(3, requires_grad=True)
    inner = w * 2
    loss = (inner * inner).sum()
    before = inner._version
    with torch.no_grad():
        ops.soft_mask_([inner], [torch.zeros(3)])
    expect(inner._version == before + 1, f"the version went from {before} to {inner._version}")
    try:
        loss.backward()
    except RuntimeError as error:
        expect("modified by an inplace operation" in str(error), str(error))
    else:
        raise RuntimeError("backward through an overwritten tensor did not raise")


def compile_export_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step(g: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        ops.soft_mask_([g], [i], 0.5)
        return g + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expect(torch.equal(compiled(torch.ones(9), torch.full((9,), 0.5)), step(torch.ones(9), torch.full((9,), 0.5))), "compiled differs")
    with FakeTensorMode():
        ops.soft_mask_([torch.ones(9)], [torch.ones(9)])
    with torch.inference_mode():
        ops.soft_mask_([torch.ones(9)], [torch.ones(9)])


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(5, 7)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(7, 3) for _ in range(2))

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        return self.heads[task](torch.tanh(self.body(x)))


def spg_protects_saves_and_loads() -> None:
    torch.manual_seed(0)
    model = Net()
    spg = SPG(model, heads=model.heads, dtype=torch.uint8)
    loss = torch.nn.functional.cross_entropy
    data = [(drawn(n, (8, 5), torch.float32), torch.arange(8) % 3) for n in range(3)]
    spg.end_task(data, loss)
    loss(model(data[0][0], 1), data[0][1]).backward()
    raw = model.body.weight.grad.clone()
    spg.after_backward()
    masked = model.body.weight.grad
    expect(bool((masked.abs() <= raw.abs()).all()) and not torch.equal(masked, raw), "gradients are not masked")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "spg.safetensors")
        spg.save(path)
        copy = Net()
        other = SPG(copy, heads=copy.heads, dtype=torch.uint8)
        other.load(path)
    equal = all(torch.equal(a, other.importance[name]) for name, a in spg.importance.items())
    expect(equal and other.tasks_seen == 1, "what was loaded is not what was saved")


def report_runs() -> None:
    done = subprocess.run([sys.executable, "-I", "-m", "fastcl", "--json"], capture_output=True, text=True, check=False)
    expect(done.returncode == 0, done.stderr[-500:])
    served = {op: row["devices"]["cpu"]["served_by"] for op, row in json.loads(done.stdout)["ops"].items()}
    expect(len(served) >= 3 and set(served.values()) == {"cpp"}, f"python -m fastcl says {served}")


CHECKS = (
    compiled_module_is_loaded,
    soft_mask_is_the_reference_bitwise,
    emax_is_the_reference_bitwise,
    spg_importance_is_the_reference,
    one_and_many_threads_agree_bitwise,
    torch_threads_do_the_work,
    refusals_name_the_argument,
    versions_are_bumped,
    compile_export_and_fake_tensors,
    spg_protects_saves_and_loads,
    report_runs,
)


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # every failure belongs in the report
        return f"{type(error).__name__}: {error}"
    return "ok"


def main() -> None:
    os.environ.pop("FASTCL_BACKEND", None)
    results = {check.__name__: outcome(check) for check in CHECKS}
    versions = {"fastcl": fastcl.__version__, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    print(json.dumps({**versions, "digest": digest.hexdigest(), "checks": results}))


if __name__ == "__main__":
    main()
