"""What the numbers were taken on: processor, threads and versions; no host names and no paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fastcl
from bench import yardstick
from fastcl import backends
from fastcl.experiment.environment import processor

ROOT = Path(__file__).resolve().parents[1]
VENDORS = {"nvidia", "amd", "geforce", "tesla", "quadro", "radeon", "instinct"}


def slug(gpu: str) -> str:
    """A short name for files: 'NVIDIA H100 80GB HBM3' is 'h100', 'NVIDIA GeForce RTX 4090' is 'rtx-4090'."""
    words = [w for w in re.split(r"[^a-z0-9]+", gpu.lower()) if w and w not in VENDORS]
    numbered = next((n for n, w in enumerate(words) if any(c.isdigit() for c in w)), len(words) - 1)
    return "-".join(words[: numbered + 1]) or "gpu"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return shown.stdout.strip()


def facts(device: str) -> dict[str, object]:
    """The machine and the software, as the results hold them."""
    out: dict[str, object] = {
        "name": slug(torch.cuda.get_device_name()) if device == "cuda" else "cpu",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastcl": fastcl.__version__,
        "backend": backends.serving(device),
        "yardstick": yardstick.source(device),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return out
