"""What runs here: versions, devices, and for every op and device the implementation that serves it and why the others do not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import fastcl
from fastcl import _native, backends


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    native = _native.load("_C")
    compiled = "unknown: the compiled module is not loaded" if isinstance(native, str) else native.cpu_capability()
    return {"capability": compiled, "torch_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)})
    return found


def _serving(device_type: str) -> dict[str, Any]:
    reasons = {name: backends.why_not(name, device_type) for name in backends.NAMES if name != "auto"}
    others = {name: reason for name, reason in reasons.items() if reason is not None}
    if device_type == "cuda" and not torch.cuda.is_available():
        return {"served_by": None, "error": "torch sees no CUDA device", "not_available": others}
    try:
        return {"served_by": backends.serving(device_type), "error": None, "not_available": others}
    except (backends.BackendUnavailable, ValueError) as error:
        return {"served_by": None, "error": str(error), "not_available": others}


def support() -> dict[str, Any]:
    """Everything that ``python -m fastcl --json`` prints, as plain data."""
    try:
        requested = backends.requested()
    except ValueError as error:
        requested = f"invalid: {error}"
    devices = {device: _serving(device) for device in ("cpu", "cuda")}
    return {
        "versions": {
            "fastcl": fastcl.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "build": _native.build_info(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "requested_backend": requested,
        "ops": {op: {"family": family, "devices": devices} for op, family in sorted(backends.FAMILIES.items())},
    }


def _built(build: dict[str, str], compiler: str, module: str) -> str:
    return (
        f"compiled with {build[compiler]}"
        if compiler in build
        else build.get(module, "unknown: this installation has no record of its build")
    )


def render(data: dict[str, Any]) -> str:
    """The same for people."""
    v, cpu = data["versions"], data["cpu"]
    lines = [
        f"fastcl {v['fastcl']}  (Python {v['python']}, torch {v['torch']}, triton {v['triton'] or 'not installed'}, {data['platform']})",
        f"CPU: {cpu['capability']}, {cpu['threads']} threads",
        *(f"GPU {n}: {g['name']}, compute capability {g['capability']}, {g['memory_gib']} GiB" for n, g in enumerate(data["gpus"])),
        f"C++: {_built(data['build'], 'compiler', '_C')}",
        f"CUDA: {_built(data['build'], 'nvcc', '_C_cuda')}",
        f"backend asked for: {data['requested_backend']}",
        "",
        f"{'op':<18} {'on the CPU':<12} on NVIDIA GPUs",
    ]
    for op, row in data["ops"].items():
        cells = [row["devices"][d]["served_by"] or "none" for d in ("cpu", "cuda")]
        lines.append(f"{op:<18} {cells[0]:<12} {cells[1]}")
    reasons: dict[str, None] = {}
    for row in data["ops"].values():
        for device, state in row["devices"].items():
            if state["error"]:
                reasons[f"{device}: {state['error']}"] = None
            for name, reason in state["not_available"].items():
                reasons[f"{name} on {device}: {reason}"] = None
    if reasons:
        lines += ["", "Why not:", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines)
