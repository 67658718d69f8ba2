"""What README shows has to run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from processes import ROOT, environment

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks(number: int, tmp_path) -> None:
    if "fastcl.data" in BLOCKS[number]:
        pytest.importorskip("sklearn")
    command = [sys.executable, "-W", "error", "-c", BLOCKS[number]]
    done = subprocess.run(command, cwd=tmp_path, env=environment(None), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
