"""Compiles Triton kernels as their launches would, for GPUs that need not be here, and reads what the compiler made."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")


class Recorder:
    """Stands in for a kernel: keeps its launches instead of running them."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def recorded(modules: list[Any], patch: Callable[[Any, str, Any], None]) -> list[Any]:
    """A list that fills with the launches of these modules' kernels, which do not run."""
    launches: list[Any] = []
    for module in modules:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            patch(module, name, Recorder(getattr(module, name), launches))
    return launches


def specialised(launch: Any, target: Any) -> Any:
    """What Triton's own launcher would hand to the compiler for these arguments."""
    kernel, args, options = launch
    backend = make_backend(target)
    bound, specialization, extra = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **options)
    packed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, extra)
    return ASTSource(kernel, signature, constants, attributes), packed.__dict__


def compiled(launch: Any, target: str) -> dict[str, str]:
    source, options = specialised(launch, TARGETS[target])
    assembly = triton.compile(source, target=TARGETS[target], options=options).asm
    return {name: text for name, text in assembly.items() if isinstance(text, str)}


def resources(launch: Any, target: str, path: Path) -> dict[str, int]:
    """What the assembler gave to the kernel: registers (REG) and bytes of spills (STACK)."""
    source, options = specialised(launch, TARGETS[target])
    path.write_bytes(triton.compile(source, target=TARGETS[target], options=options).asm["cubin"])
    said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", said)}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def vectors(ptx: str, instruction: str) -> bool:
    """Whether whole blocks move 16 bytes per thread and instruction."""
    return re.search(rf"\b{instruction}\.global\.v(4\.b32|2\.b64)\b", ptx) is not None


def contracted(ptx: str) -> list[str]:
    return re.findall(r"\bfma\.\S+", ptx)


def approximate(ptx: str) -> list[str]:
    return re.findall(r"\b(?:div\.(?:full|approx)|rcp\.approx|ex2\.approx)\S*", ptx)


def keys(launches: list[Any]) -> set[str]:
    """What is compiled: launches with one key share a kernel."""
    return {specialised(launch, TARGETS["sm_90"])[0].hash() for launch in launches}


def argument_bytes(launch: Any) -> int:
    """What a launch's arguments take, without the pointers that Triton appends."""

    def leaves(value: Any) -> list[Any]:
        return [leaf for v in value for leaf in leaves(v)] if isinstance(value, tuple) else [value]

    return sum(8 if isinstance(v, Tensor) or (isinstance(v, int) and abs(v) >= 1 << 31) else 4 for v in leaves(launch[1]))
