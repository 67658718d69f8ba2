"""Python processes with a fastcl of their own: what happens at import can be tested only there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")


def environment(path: Path | None, **variables: str | None) -> dict[str, str]:
    """This process's environment, with what steers fastcl and Triton taken out and ``variables`` put in (None removes)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTCL_", "TRITON_", "CXX", "NVCC"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT / "tests/no_editable")])
    for name, value in variables.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def python(*arguments: str, path: Path, check: bool = True, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python with ``path`` first on sys.path, away from the checkout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=path,
        env=environment(path, **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def package_copy(folder: Path, compiled: bool = True) -> Path:
    """fastcl as it would be installed, in a new folder; its compiled modules are links to the checkout's."""
    shutil.copytree(ROOT / "fastcl", folder / "fastcl", ignore=LEFT_OUT)
    shutil.copytree(ROOT / "kernels", folder / "fastcl/kernels", ignore=LEFT_OUT)
    if compiled:
        for file in [*(ROOT / "fastcl").glob("_C*.so"), *(ROOT / "fastcl").glob("_build_info.json")]:
            (folder / "fastcl" / file.name).symlink_to(file)
    return folder
