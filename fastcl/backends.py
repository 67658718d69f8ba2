"""Which implementation serves an op on a device, and why another does not.

Backends: ``cpp`` (compiled, CPU), ``cuda`` (compiled, NVIDIA GPUs), ``triton`` (GPUs, or the CPU under TRITON_INTERPRET=1) and
``reference`` (plain PyTorch, every device). ``auto`` takes the first that can serve: cpp, then reference on the CPU; cuda, then triton,
then reference on a GPU; reference elsewhere. ``FASTCL_BACKEND`` or :func:`use_backend` name one; a named backend that cannot serve raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from fastcl import _native

NAMES = ("auto", "reference", "cpp", "cuda", "triton")
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
NATIVE = {"cpp": "_C", "cuda": "_C_cuda"}
# One row per op: the family (file stem) that holds it. fastcl.ops registers the rows.
FAMILIES: dict[str, str] = {}
# Parts of ops: those that lists sharded over processes need one by one, and those that ops which call the vendor's libraries are made of.
STAGES = {
    "spg_moments": "importance",
    "spg_update_": "importance",
    "gem_coefficients": "projection",
    "combine_": "projection",
    "radix_counts": "quantile",
    "threshold_bits_": "bit_mask",
    "transformed_dot": "optimizers",
    "fisher_squares": "importance",
    "fisher_update_": "importance",
    "child_mask_at_": "child_mask",
    "kron_small_": "kronecker",
    "kron_small_quadratic": "kronecker",
    "ncl_small_step_": "kronecker",
    "ncl_small_direction_": "kronecker",
    "ncl_momentum_": "kronecker",
    "ncl_direction_": "kronecker",
    "ncl_apply_": "kronecker",
    "low_rank_products": "low_rank",
    "low_rank_update_": "low_rank",
    "low_rank_step_products": "low_rank",
    "low_rank_step_update_": "low_rank",
    "low_rank_gram": "low_rank",
    "low_rank_compress_": "low_rank",
    "low_rank_rotate_": "low_rank",
}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot serve; the message says what is missing."""


_override: ContextVar[str | None] = ContextVar("fastcl_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; accepted are {', '.join(NAMES)}")
    return name


def requested() -> str:
    """The backend that is asked for: by :func:`use_backend`, else by ``FASTCL_BACKEND``, else ``auto``."""
    override = _override.get()
    return override if override is not None else _from_environment(os.environ.get("FASTCL_BACKEND", "auto"))


@functools.cache
def _from_environment(value: str) -> str:
    return _checked(value.strip().lower() or "auto", "FASTCL_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, in this thread (or task), ops run on the backend ``name``.

    Raises ValueError for an unknown name; the ops inside raise :class:`BackendUnavailable` if the backend cannot serve them.
    """
    token = _override.set(_checked(name, "use_backend(name)"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'fastcl[triton]'"
    return None


def why_not(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot serve tensors of ``device_type``; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"cpp serves the CPU and the tensors are on {device_type}"
        loaded = _native.load("_C")
        return loaded if isinstance(loaded, str) else None
    if backend == "cuda":
        if device_type != "cuda":
            return f"cuda serves NVIDIA GPUs and the tensors are on {device_type}" + (
                "" if torch.cuda.is_available() else "; torch sees no CUDA device"
            )
        loaded = _native.load("_C_cuda")
        return loaded if isinstance(loaded, str) else None
    if backend == "triton":
        if device_type == "cpu" and not _interpreting():
            return "triton serves GPUs; on the CPU it needs TRITON_INTERPRET=1 in the environment before Python starts"
        if device_type not in ("cpu", "cuda"):
            return f"triton serves GPUs, the tensors are on {device_type}"
        return _triton_missing()
    raise ValueError(f"unknown backend {backend!r}; accepted are {', '.join(NAMES)}")


@functools.cache
def _function(op: str, backend: str) -> Callable[..., Any]:
    if backend in NATIVE:
        return functools.partial(_call_native, op, getattr(_native.module(NATIVE[backend]), op))
    package = "fastcl.reference" if backend == "reference" else "fastcl.kernels"
    function: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{FAMILIES.get(op) or STAGES[op]}"), op)
    return function


def _call_native(op: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a compiled function on arguments that fastcl.ops has checked; what it still refuses is an error, never a silent detour."""
    result = function(*args, torch.is_grad_enabled())
    if isinstance(result, str):
        raise RuntimeError(f"{op}: the compiled implementation refused the call: {result}")
    return result


@functools.cache
def _auto(device_type: str) -> str:
    return next(b for b in ORDER.get(device_type, ("reference",)) if why_not(b, device_type) is None)


def serving(device_type: str) -> str:
    """The backend that serves ``device_type`` now; :class:`BackendUnavailable` if the one asked for by name cannot."""
    name = requested()
    if name == "auto":
        return _auto(device_type)
    reason = why_not(name, device_type)
    if reason is not None:
        raise BackendUnavailable(f"the backend {name!r} was asked for and cannot serve: {reason}")
    return name


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs ``op`` on ``device`` now."""
    return _function(op, serving(device.type))
