"""Everything that needs an NVIDIA GPU, in one call: build, tests on the device, compute-sanitizer, benchmarks. No network, no venv.

    python gpu/check.py [--budget SECONDS] [--only STAGE ...] [--logs FOLDER]

Goes on after a failing stage, prints a table last and exits with 1 if any stage failed (2: no NVIDIA GPU here).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=5"]
# The optimizers' own tests compare with torch's kernels bit for bit, which fuse otherwise on a GPU: tests/gpu compares with the CPU.
OPS = [
    f"tests/test_{family}.py"
    for family in ("soft_mask", "importance", "projection", "child_mask", "pull", "quantile", "bit_mask", "low_rank")
]


@dataclass
class Stage:
    """A command with its time limit."""

    name: str
    command: list[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a tool without which the stage is skipped, and the skip is a failure


def sanitizer(tool: str) -> Stage:
    """One of compute-sanitizer's tools over a script that touches every kernel."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    # The caching allocator would hide reads past the end of a tensor inside its big blocks.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(f"sanitizer {tool}", [*command, sys.executable, "tests/gpu/sanitize.py"], 150, environment, "compute-sanitizer")


def stages() -> list[Stage]:
    """All of them, in the order in which they matter should the time run out."""
    python = sys.executable
    return [
        Stage("device", ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], 30),
        # Installed in place, the package finds kernels/ as fastcl.kernels, as users have it.
        Stage(
            "build",
            [
                python,
                "-m",
                "pip",
                "install",
                "--no-build-isolation",
                "--no-deps",
                "--no-index",
                "--disable-pip-version-check",
                "-q",
                "-e",
                ".",
            ],
            240,
            {"FASTCL_CUDA": "1"},
            "nvcc",
        ),
        Stage("what serves", [python, "-m", "fastcl"], 60),
        Stage("build facts", [*PYTEST, "tests/test_cuda_build.py"], 120),
        Stage("gpu tests", [*PYTEST, "tests/gpu"], 240),
        Stage(
            "ops on cuda",
            [*PYTEST, "-m", "not slow", *OPS],
            240,
            {"FASTCL_BACKEND": "cuda"},
        ),
        Stage(
            "ops on triton",
            [*PYTEST, "-m", "not slow", *OPS],
            240,
            {"FASTCL_BACKEND": "triton"},
        ),
        sanitizer("memcheck"),
        Stage("bench", [python, "bench/compare.py", "--device", "cuda", "--seconds", "1"], 240),
        sanitizer("racecheck"),
        sanitizer("initcheck"),
    ]


def run(stage: Stage, logs: Path, left: float) -> tuple[str, float, Path]:
    """The result in words, the seconds it took, and its log."""
    log = logs / f"{stage.name.replace(' ', '_')}.log"
    if stage.needs and shutil.which(stage.needs, path=search_path()) is None:
        log.write_text(f"{stage.needs} was not found\n")
        return f"FAILED: {stage.needs} was not found", 0.0, log
    if left < 5:
        log.write_text("the time budget was spent\n")
        return "FAILED: no time left", 0.0, log
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": search_path(),
    }
    start, limit = time.monotonic(), min(stage.limit, left)
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**environment, **stage.environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            out.write(f"{error}\n")
            return f"FAILED: {error.filename} was not found", 0.0, log
        try:
            code = process.wait(limit)
            result = "ok" if code == 0 else f"FAILED: exit {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"FAILED: over {limit:.0f} s"
    return result, time.monotonic() - start, log


def search_path() -> str:
    """PATH, and where CUDA's tools usually are."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])


def why_no_gpu() -> str | None:
    """Why nothing can run here; None when it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def main() -> int:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=530, help="seconds for all stages together (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], help="only stages whose name contains this (may be repeated)")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu-logs")
    args = parser.parse_args()
    reason = why_no_gpu()
    if reason is not None:
        print(f"make gpu: no NVIDIA GPU here ({reason}); nothing was run", file=sys.stderr)
        return 2
    args.logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    rows = []
    for stage in stages():
        if args.only and not any(part in stage.name for part in args.only):
            continue
        print(f"== {stage.name}", flush=True)
        result, seconds, log = run(stage, args.logs, end - time.monotonic())
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-(8 if result == "ok" else 60) :]), flush=True)
        rows.append((stage.name, seconds, result))
    width = max((len(name) for name, _, _ in rows), default=5)
    print(f"\n{'stage':{width}}  seconds  result")
    for name, seconds, result in rows:
        print(f"{name:{width}}  {seconds:7.1f}  {result}")
    return 1 if not rows or any(result != "ok" for _, _, result in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
