"""Runs tests/triton_interpreted*.py in a process of its own: Triton decides at import whether it interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent


def test_the_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTCL_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    # From within tests/: with the checkout's root as working directory, its folder fastcl, which has no kernels, would be imported.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        "triton_interpreted.py",
        "triton_interpreted_projection.py",
        "triton_interpreted_masks.py",
        "triton_interpreted_optimizers.py",
        "triton_interpreted_precision.py",
    ]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 100
    assert "skipped" not in done.stdout, done.stdout
