"""The gate between Python and raw memory, and everything that may arrive there.

The suites in tests/gate run in a Python of their own, so that a crash is a red test with a traceback and not the end of all tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcl import _native

FOLDER = Path(__file__).parent / "gate"
UNAVAILABLE = _native.load("_C")
pytestmark = pytest.mark.skipif(isinstance(UNAVAILABLE, str), reason=str(UNAVAILABLE))


@pytest.mark.parametrize("suite", ["kinds", "arguments", "contexts", "soup", "optimizers", "kronecker"])
def test_gate(suite: str) -> None:
    pytest.importorskip("hypothesis")
    environment = {name: value for name, value in os.environ.items() if name != "FASTCL_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(FOLDER.parents[1]), environment.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "pytest",
        "-c",
        str(FOLDER / "pytest.ini"),
        "--noconftest",
        "--rootdir",
        str(FOLDER),
    ]
    done = subprocess.run(
        [*command, str(FOLDER / f"suite_{suite}.py")], env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-12000:]}\n{done.stderr[-6000:]}"
