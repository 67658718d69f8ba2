"""On what a run was computed: versions, processor and device; no host names and no paths."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastcl
from fastcl import backends

if TYPE_CHECKING:
    from fastcl.experiment.config import Config


def processor() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def environment(config: Config) -> dict[str, Any]:
    """What may move the last bits of a run besides its configuration."""
    device = torch.device(config.device)
    return {
        "fastcl": fastcl.__version__,
        "torch": str(torch.__version__),  # a subclass of str, which a checkpoint could not hold
        "python": platform.python_version(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": config.threads,
        "backend": backends.serving(device.type),
    }
