from __future__ import annotations

import os

import pytest
import torch

from fastcl import backends, use_backend
from fastcl.reference import optimizers
from layouts import INTERPRETED

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Without a named backend every one that can serve here is tested; with one (the interpreter run, the GPU run), that one.
NAMED = os.environ.get("FASTCL_BACKEND", "auto")
SERVING = [(d, b) for d in DEVICES for b in backends.NAMES if b != "auto" and backends.why_not(b, d) is None and NAMED in ("auto", b)]


# Files of a few minutes: begun first, so that two processes end together.
LONG = {
    f"test_{name}.py" for name in ("triton_interpreter", "sharded", "native", "package", "gate", "precision_parallel", "methods_parallel")
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if INTERPRETED:
        for item in items:
            if "thread" in item.name:
                item.add_marker(pytest.mark.skip(reason="Triton's interpreter is one thread's Python"))


@pytest.fixture(params=SERVING, ids=lambda p: f"{p[1]}-{p[0]}")
def device(request: pytest.FixtureRequest):
    """A device, with the ops running on one of the backends that serve it."""
    name, backend = request.param
    with use_backend(backend):
        yield name


@pytest.fixture(params=[b for d, b in SERVING if d == "cpu"])
def cpu_backend(request: pytest.FixtureRequest):
    """Each backend that serves the CPU, for tests whose models stay there."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def exact_root(monkeypatch):
    """torch.optim's loop with the square root that it has where its vector library's is exact."""
    monkeypatch.setattr(torch.Tensor, "sqrt", optimizers._root)
