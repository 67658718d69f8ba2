"""Loads the compiled modules, or remembers why they cannot be used."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import re
from pathlib import Path
from types import ModuleType

import torch

OLDEST_TORCH = (2, 10)


class NativeModuleUnavailable(RuntimeError):
    """A compiled module was asked for and cannot be used; the message says why and what helps."""


def build_info() -> dict[str, str]:
    """What setup.py wrote down when it built this installation (compilers, or why there is no compiled module)."""
    path = Path(__file__).with_name("_build_info.json")
    if not path.is_file():
        return {}
    info: dict[str, str] = json.loads(path.read_text())
    return info


def _torch_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(match[1]), int(match[2])) if match else OLDEST_TORCH


@functools.cache
def load(name: str) -> ModuleType | str:
    """The compiled module ``_C`` or ``_C_cuda``, ready for use, or the reason why it cannot be used."""
    if _torch_version() < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old: the compiled modules need torch >= 2.10; upgrade torch"
    if name == "_C_cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        module = importlib.import_module(f"fastcl.{name}")
    except ModuleNotFoundError:
        return _absent(name)
    except ImportError as error:
        return f"fastcl.{name} failed to load: {error}; reinstall fastcl for this Python and this system"
    try:
        module.connect(torch.Tensor, torch.nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__, *_thread_pool())
    except (RuntimeError, AttributeError, OSError, TypeError, ValueError) as error:
        return f"fastcl.{name} cannot connect to torch {torch.__version__}: {error}"
    return module


def _absent(name: str) -> str:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    others = [path.name for path in Path(__file__).parent.glob(f"{name}.*.so")]
    if others:
        return f"fastcl.{name} was built for another Python ({', '.join(others)}; this one loads {name}{suffix}); reinstall fastcl"
    checkout = Path(__file__).parents[1]
    if not build_info() and (checkout / "setup.py").is_file():
        return f"this is fastcl's source folder ({checkout.name}), which hides an installed fastcl; start Python elsewhere, or build here"
    return build_info().get(name, f"fastcl.{name} is not part of this installation; reinstall fastcl where a compiler is found")


def _thread_pool() -> tuple[int, int]:
    """Addresses of torch's C functions ``torch_parallel_for`` and ``torch_get_num_threads`` in the library torch has loaded."""
    import ctypes
    import os

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    handle = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)
    return tuple(  # type: ignore[return-value]
        ctypes.cast(getattr(handle, symbol), ctypes.c_void_p).value for symbol in ("torch_parallel_for", "torch_get_num_threads")
    )


def module(name: str) -> ModuleType:
    """The compiled module, or :class:`NativeModuleUnavailable`."""
    loaded = load(name)
    if isinstance(loaded, str):
        raise NativeModuleUnavailable(loaded)
    return loaded
