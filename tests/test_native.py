"""csrc/core and csrc/cpu without torch: as shipped, and under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The suites in tests/native run in a Python of their own, because a sanitizer's runtime must be loaded before everything else.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "native"
SUITES = ("scalars", "layout", "ops", "projection", "quantile", "child_mask", "fisher", "low_rank", "optimizers")
pytest.importorskip("pybind11")
pytest.importorskip("hypothesis")


def _builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _builder()


def _run(variant: str, suites: tuple[str, ...], *options: str) -> None:
    try:
        module, runtime = builder.build(variant), builder.runtime(variant)
    except builder.CannotBuild as reason:
        pytest.skip(str(reason))
    environment = {**os.environ, "PYTHONPATH": f"{module}{os.pathsep}{FOLDER}", "OMP_NUM_THREADS": "1"}
    prefix: list[str] = []
    if runtime is not None:
        # Python itself keeps memory until it exits; reports go where the assertion below shows them.
        environment |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    if variant == "tsan" and shutil.which("setarch"):
        prefix = ["setarch", "-R"]  # its shadow memory does not fit every randomised address space
    probe = subprocess.run(
        [*prefix, sys.executable, "-c", "import _fastcl_numpy"], env=environment, capture_output=True, text=True, check=False
    )
    if probe.returncode and variant != "plain":
        pytest.skip(f"{runtime} does not start here: {(probe.stderr or probe.stdout)[-300:]}")
    files = [str(FOLDER / f"suite_{name}.py") for name in suites]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-c", str(FOLDER / "pytest.ini"), "--noconftest", *options, *files]
    done = subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True, check=False, timeout=540, cwd=FOLDER)
    assert done.returncode == 0, f"{variant}: exit status {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"


def test_as_shipped() -> None:
    _run("plain", SUITES, "-m", "not slow")


def test_address_and_undefined_behaviour_sanitizers() -> None:
    _run("asan", SUITES, "-m", "not slow")


def test_thread_sanitizer() -> None:
    _run("tsan", ("threads",))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    _run("plain", ("ops", "quantile"), "-m", "slow")
