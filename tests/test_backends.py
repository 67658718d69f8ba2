"""Which backend serves, what a named one that cannot serve says, and every way in which a compiled module can be missing."""

from __future__ import annotations

import asyncio
import importlib
import json
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from fastcl import BackendUnavailable, _native, backends, ops, reference, use_backend
from processes import package_copy, python

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MISSING = _native.load("_C")
needs_compiled = pytest.mark.skipif(isinstance(MISSING, str), reason=f"the compiled module is not here: {MISSING}")
# What a process prints about itself: who serves, the bits of the results, and what the backend cpp says when it is named.
PROBE = """
import json, torch
from fastcl import backends, ops, use_backend
generator = torch.Generator().manual_seed(7)
draw = lambda: [torch.rand(n, generator=generator) for n in (1, 65, 1000)]
grads, importance, accumulated, fresh = draw(), draw(), draw(), draw()
out = {"serving": None, "error": None, "cpp": None}
try:
    ops.soft_mask_(grads, importance, 0.5)
    ops.emax_(accumulated, fresh)
    mean = ops.spg_importance_(importance, [fresh])
    out["serving"] = backends.serving("cpu")
    out |= {"exact": [t.tolist() for t in grads + accumulated], "close": [t.tolist() for t in importance] + [[mean.item()]]}
except Exception as error:
    out["error"] = [type(error).__name__, str(error)]
try:
    with use_backend("cpp"):
        ops.soft_mask_(grads, importance, 0.5)
except Exception as error:
    out["cpp"] = [type(error).__name__, str(error)]
from fastcl.support import render, support
out["report"] = render(support())
print(json.dumps(out))
"""


def probe(path: Path, before: str = "", **variables: str) -> dict:
    return json.loads(python("-c", before + PROBE, path=path, **variables).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return package_copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The package without compiled modules."""
    return package_copy(tmp_path_factory.mktemp("bare"), compiled=False)


@pytest.fixture
def served(monkeypatch):
    """Counts calls of the implementations themselves, below the dispatcher."""
    counts = dict.fromkeys(("cpp", "reference"), 0)
    running = []  # an implementation may call another of its own backend

    def spy(owner, name, backend):
        original = getattr(owner, name)

        def call(*args):
            counts[backend] += not running
            running.append(name)
            try:
                return original(*args)
            finally:
                running.pop()

        monkeypatch.setattr(owner, name, call)

    for name, family in backends.FAMILIES.items():
        spy(importlib.import_module(f"fastcl.reference.{family}"), name, "reference")
    # An op whose large inputs go to the vendor's libraries has compiled stages alone.
    for name in [*backends.FAMILIES, *backends.STAGES] if not isinstance(MISSING, str) else ():
        if hasattr(_native.module("_C"), name):
            spy(_native.module("_C"), name, "cpp")
    backends._function.cache_clear()
    yield counts
    backends._function.cache_clear()


LAYER = torch.eye(3), torch.eye(2)
CALLS = {
    "soft_mask_": lambda: ops.soft_mask_([torch.ones(3)], [torch.ones(3)]),
    "emax_": lambda: ops.emax_([torch.ones(3)], [torch.ones(3)]),
    "spg_importance_": lambda: ops.spg_importance_([torch.ones(3)], [[torch.ones(3)]]),
    "adamw_": lambda: ops.adamw_([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [torch.ones(())], lr=0.1),
    "sgd_": lambda: ops.sgd_([torch.ones(3)], [torch.ones(3)], lr=0.1),
    "grad_dot": lambda: ops.grad_dot([torch.ones(3)], [torch.ones(3)]),
    "gram": lambda: ops.gram([[torch.ones(3)]]),
    "project_": lambda: ops.project_([torch.ones(3)], [torch.ones(3)]),
    "quantile": lambda: ops.quantile([torch.ones(3)], 0.5),
    "bit_mask_": lambda: ops.bit_mask_([torch.ones(3)], [torch.ones(1, dtype=torch.uint8)]),
    "gem_project_": lambda: ops.gem_project_([torch.ones(3)], [[torch.ones(3)]]),
    "child_mask_": lambda: ops.child_mask_([torch.ones(3)], 0.5, 0, 0),
    "fisher_add_": lambda: ops.fisher_add_([torch.ones(3)], [torch.ones(3)], 1.0, 1.0),
    "kron_solve_": lambda: ops.kron_solve_([torch.ones(2, 3)], [LAYER]),
    "kron_quadratic": lambda: ops.kron_quadratic([torch.ones(2, 3)], [LAYER]),
    "ncl_step_": lambda: ops.ncl_step_([torch.ones(2, 3)], [torch.ones(2, 3)], [torch.ones(2, 3)], [torch.ones(2, 3)], [LAYER], 0.1),
    "ewc_pull_": lambda: ops.ewc_pull_(*[[torch.ones(3)] for _ in range(4)], 1.0),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_compiled)])
def test_the_named_backend_serves_and_no_other(served, backend, op) -> None:
    with use_backend(backend):
        CALLS[op]()
    assert served == {"cpp": 0, "reference": 0} | {backend: 1}


@needs_compiled
@pytest.mark.parametrize("op", CALLS)
def test_auto_takes_the_compiled_one(served, op) -> None:
    with use_backend("auto"):
        CALLS[op]()
    assert served == {"cpp": 1, "reference": 0}


def test_every_op_is_counted_here() -> None:
    assert set(CALLS) == set(backends.FAMILIES)


@needs_compiled
def test_what_the_compiled_function_refuses_after_the_checks_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(_native.module("_C"), "soft_mask_", lambda *args: "no reason at all")
    backends._function.cache_clear()
    try:
        with use_backend("cpp"), pytest.raises(RuntimeError, match=r"soft_mask_: the compiled implementation refused.*no reason at all"):
            CALLS["soft_mask_"]()
    finally:
        backends._function.cache_clear()


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match=r"use_backend\(name\) is 'gpu'; accepted are auto, reference, cpp, cuda, triton"),
        use_backend("gpu"),
    ):
        pass


def test_it_nests_and_restores() -> None:
    outer = backends.requested()
    with use_backend("reference"):
        with use_backend("triton"):
            assert backends.requested() == "triton"
        assert backends.requested() == "reference"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert backends.requested() == "reference"
        with pytest.raises(ValueError, match="nonsense"), use_backend("nonsense"):
            pass
        assert backends.requested() == "reference"
    assert backends.requested() == outer


def test_it_is_per_thread() -> None:
    default, seen = backends.requested(), {}
    other = "triton" if default == "reference" else "reference"
    inside, checked = threading.Event(), threading.Event()

    def work() -> None:
        seen["before"] = backends.requested()
        with use_backend("triton"):
            inside.set()
            checked.wait(10)
            seen["in the thread"] = backends.requested()

    with use_backend(other):
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(10)
        assert backends.requested() == other
        checked.set()
        thread.join()
    assert seen == {"before": default, "in the thread": "triton"}


def test_it_is_per_task() -> None:
    async def task(name: str) -> str:
        with use_backend(name):
            await asyncio.sleep(0.01)
            return backends.requested()

    async def both() -> list[str]:
        return list(await asyncio.gather(task("reference"), task("triton")))

    assert asyncio.run(both()) == ["reference", "triton"]


@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
@pytest.mark.skipif(torch.cuda.is_available() or backends._interpreting(), reason="they can serve here")
@pytest.mark.parametrize("op", CALLS)
def test_named_and_cannot_serve(monkeypatch, name, op) -> None:
    monkeypatch.setattr(_native, "load", lambda module: f"{module} is missing for a test")
    says = {
        "cpp": "_C is missing for a test",
        "cuda": "cuda serves NVIDIA GPUs and the tensors are on cpu; torch sees no CUDA device",
        "triton": "triton serves GPUs; on the CPU it needs TRITON_INTERPRET=1 in the environment before Python starts",
    }
    with use_backend(name), pytest.raises(BackendUnavailable) as raised:
        CALLS[op]()
    assert str(raised.value) == f"the backend {name!r} was asked for and cannot serve: {says[name]}"


def test_devices_that_have_no_kernels() -> None:
    assert backends.why_not("cpp", "mps") == "cpp serves the CPU and the tensors are on mps"
    assert backends.why_not("triton", "mps") == "triton serves GPUs, the tensors are on mps"
    assert backends.why_not("reference", "mps") is None
    with use_backend("auto"):
        assert backends.serving("mps") == "reference"
    with pytest.raises(ValueError, match="unknown backend 'sycl'; accepted are"):
        backends.why_not("sycl", "cpu")


class TestEnvironment:
    @pytest.mark.parametrize("value", ["reference", " Reference ", pytest.param("cpp", marks=needs_compiled)])
    def test_named(self, copy, value) -> None:
        assert probe(copy, FASTCL_BACKEND=value)["serving"] == value.strip().lower()

    @needs_compiled
    @pytest.mark.parametrize("value", ["auto", ""])
    def test_auto(self, copy, value) -> None:
        assert probe(copy, FASTCL_BACKEND=value)["serving"] == "cpp"

    def test_unknown(self, copy) -> None:
        error = probe(copy, FASTCL_BACKEND="gpu")["error"]
        assert error == ["ValueError", "FASTCL_BACKEND is 'gpu'; accepted are auto, reference, cpp, cuda, triton"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_cuda_on_a_cpu_machine(self, copy) -> None:
        kind, message = probe(copy, FASTCL_BACKEND="cuda")["error"]
        assert kind == "BackendUnavailable"
        assert message.endswith("cuda serves NVIDIA GPUs and the tensors are on cpu; torch sees no CUDA device")

    def test_triton_without_the_interpreter(self, copy) -> None:
        kind, message = probe(copy, FASTCL_BACKEND="triton")["error"]
        assert kind == "BackendUnavailable"
        assert "TRITON_INTERPRET=1" in message

    def test_triton_interpreted(self, copy) -> None:
        pytest.importorskip("triton")
        spy = """
import fastcl.kernels.soft_mask as kernels
original, kernels.calls = kernels.soft_mask_, 0
def spy(*args):
    kernels.calls += 1
    return original(*args)
kernels.soft_mask_ = spy
import atexit
atexit.register(lambda: print(json.dumps(out | {"calls": kernels.calls})))
"""
        said = probe(copy, before=spy, FASTCL_BACKEND="triton", TRITON_INTERPRET="1")
        assert said["error"] is None
        assert (said["serving"], said["calls"]) == ("triton", 1)

    @pytest.mark.parametrize("hook", ["None in sys.modules", "a finder"])
    def test_triton_not_installed(self, copy, hook) -> None:
        block = "import sys; sys.modules['triton'] = None\n"
        if hook == "a finder":  # hides it from importlib's search, as when it is not there
            block = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else find(name, package)
"""
        kind, message = probe(copy, before=block, FASTCL_BACKEND="triton", TRITON_INTERPRET="1")["error"]
        assert kind == "BackendUnavailable"
        assert message.endswith("the package triton is not installed; pip install 'fastcl[triton]'")


def write_library(folder: Path, content: bytes, name: str = f"_C{SUFFIX}") -> None:
    (folder / "fastcl" / name).write_bytes(content)


OLD_TORCH = "import torch; torch.__version__ = '2.9.1'\n"
NO_API = "import torch; del torch.Tensor.__dlpack_c_exchange_api__\n"
NO_CAPSULE = "import torch; torch.Tensor.__dlpack_c_exchange_api__ = 3\n"
# A table of another major version; PREVIOUS is the address of an older table behind it.
NEWER_API = """
import ctypes, torch
get, new = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
real = get(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
class Table(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p), ("rest", ctypes.c_void_p * 8)]
table = Table(2, 0, PREVIOUS)
torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(table), b"NAME", None)
"""
NAMED = NEWER_API.replace("NAME", "dlpack_exchange_api")
NO_POOL = "import ctypes, torch; load = ctypes.CDLL; ctypes.CDLL = lambda name, *a, **k: load(None)\n"

FAILURES = {
    "torch too old": (OLD_TORCH, "torch 2.9.1 is too old: the compiled modules need torch >= 2.10; upgrade torch"),
    "no exchange API": (
        NO_API,
        f"cannot connect to torch {torch.__version__}: type object 'Tensor' has no attribute '__dlpack_c_exchange_api__'",
    ),
    "no capsule": (NO_CAPSULE, "cannot connect to torch"),
    "newer exchange API": (NAMED.replace("PREVIOUS", "None"), "its DLPack exchange API has version 2, this fastcl knows version 1"),
    "a capsule of something else": (NEWER_API.replace("NAME", "other").replace("PREVIOUS", "None"), "cannot connect to torch"),
    "no thread pool": (NO_POOL, "undefined symbol: torch_parallel_for"),
}


@pytest.fixture(scope="module")
def expected(bare) -> dict:
    return probe(bare, FASTCL_BACKEND="reference")


def falls_back(path: Path, expected: dict, message: str, before: str = "") -> None:
    """auto serves by the reference with its results, the backend named says why not, and so does the report."""
    said = probe(path, before=before)
    assert said["error"] is None
    assert said["serving"] == "reference"
    assert (said["exact"], said["close"]) == (expected["exact"], expected["close"])
    assert said["cpp"][0] == "BackendUnavailable"
    assert "the backend 'cpp' was asked for and cannot serve: " in said["cpp"][1]
    assert message in said["cpp"][1]
    assert message in said["report"]
    assert "soft_mask_         reference" in said["report"]


@needs_compiled
@pytest.mark.parametrize("failure", FAILURES)
def test_torch_that_does_not_fit(copy, expected, failure) -> None:
    before, message = FAILURES[failure]
    falls_back(copy, expected, message, before)


@needs_compiled
def test_a_newer_exchange_api_with_version_1_behind_it(copy) -> None:
    said = probe(copy, before=NAMED.replace("PREVIOUS", "real"))
    assert (said["serving"], said["error"], said["cpp"]) == ("cpp", None, None)


def test_nothing_compiled_and_no_record(bare, expected) -> None:
    falls_back(bare, expected, "fastcl._C is not part of this installation; reinstall fastcl where a compiler is found")


def test_the_reason_of_the_build(tmp_path, expected) -> None:
    package_copy(tmp_path, compiled=False)
    (tmp_path / "fastcl/_build_info.json").write_text(json.dumps({"_C": "not built: a reason from the build"}))
    falls_back(tmp_path, expected, "not built: a reason from the build")


def test_a_library_that_does_not_load(tmp_path, expected) -> None:
    package_copy(tmp_path, compiled=False)
    write_library(tmp_path, b"\x7fELF this is no library")
    falls_back(tmp_path, expected, "fastcl._C failed to load: ")


@needs_compiled
def test_a_truncated_library(tmp_path, expected) -> None:
    package_copy(tmp_path, compiled=False)
    whole = Path(_native.module("_C").__file__).read_bytes()
    write_library(tmp_path, whole[:40])  # shorter than its header; further on the system's loader itself may crash
    falls_back(tmp_path, expected, "file too short; reinstall fastcl for this Python and this system")


def test_a_library_for_another_python(tmp_path, expected) -> None:
    package_copy(tmp_path, compiled=False)
    write_library(tmp_path, b"", "_C.cpython-399-x86_64-linux-gnu.so")
    falls_back(tmp_path, expected, f"built for another Python (_C.cpython-399-x86_64-linux-gnu.so; this one loads _C{SUFFIX})")


@needs_compiled
def test_the_fallback_gives_the_compiled_results(copy, expected) -> None:
    compiled = probe(copy)
    assert compiled["serving"] == "cpp"
    assert compiled["exact"] == expected["exact"]
    for got, wanted in zip(compiled["close"], expected["close"], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-6, atol=1e-7)


def test_module_raises_what_load_says(monkeypatch) -> None:
    monkeypatch.setattr(_native, "load", lambda name: f"{name} is missing for a test")
    with pytest.raises(_native.NativeModuleUnavailable, match="_C_cuda is missing for a test"):
        _native.module("_C_cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cuda_module_is_not_loaded_without_a_gpu() -> None:
    assert _native.load("_C_cuda") == "torch sees no CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_named_backends_on_the_gpu(backend) -> None:
    g, i = torch.ones(70, device="cuda"), torch.full((70,), 0.25, device="cuda")
    with use_backend(backend):
        ops.soft_mask_([g], [i])
    with use_backend("cpp"), pytest.raises(BackendUnavailable, match="cpp serves the CPU and the tensors are on cuda"):
        ops.soft_mask_([g], [i])
    expected = [torch.ones(70)]
    reference.soft_mask_(expected, [torch.full((70,), 0.25)])
    assert torch.equal(g.cpu(), expected[0])
