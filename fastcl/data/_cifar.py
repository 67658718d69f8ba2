"""CIFAR's Python pickles, read without running what a pickle may ask for.

A pickle is a program: it can name any function of any module and call it. These files need dicts, lists, numbers, byte strings and
NumPy arrays of bytes. So (1) instructions that have no business in them are refused before the first is carried out, and (2) the few
names that NumPy's arrays need stand for objects of this module, which take the arguments that such an array has and nothing else. No
function of NumPy is called and no other module is imported.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastcl.data._pickle_walk import Refused, check_pickle


class _Stand:
    """An object that a pickle may name: it can be called, or handed on as an argument, and that is all."""

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: Callable[..., Any] | None = None) -> None:
        self._name, self._call = name, call

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            raise Refused(f"a call of {self._name}")
        return self._call(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise Refused(f"attributes for {self._name}")


class _Dtype:
    """numpy.dtype("u1")."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags): only a plain one-byte type has these.
        if not isinstance(state, tuple) or len(state) != 8 or any(part is not None for part in state[2:5]) or state[7] != 0:
            raise Refused("a dtype other than unsigned bytes")


class _Array:
    """A numpy.ndarray of unsigned bytes."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor = tensor

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("an array with an unknown state")
        _, shape, dtype, fortran, data = state
        self.tensor = _bytes_as_tensor(shape, dtype, fortran, data)


def _bytes_as_tensor(shape: object, dtype: object, fortran: object, data: object) -> Tensor:
    if not isinstance(dtype, _Dtype) or fortran not in (False, 0, 1) or not isinstance(data, (bytes, bytearray)):
        raise Refused("an array of something else than unsigned bytes")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise Refused("an array without a shape")
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    if len(shape) > 8 or any(n >= 2**32 for n in shape):  # before they are multiplied: the numbers may have any length
        raise Refused("an array with a shape that its bytes do not have")
    size = math.prod(shape)
    if size != len(flat):
        raise Refused(f"an array of shape {shape} with {len(flat)} bytes")
    return flat.reshape(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)) if fortran else flat.reshape(shape)


NDARRAY = _Stand("numpy.ndarray")


def _reconstruct(kind: object, _shape: object, _typecode: object) -> _Array:
    if kind is not NDARRAY:
        raise Refused("a reconstruction of something else than an array")
    return _Array()


def _dtype(code: object, _align: object, _copy: object) -> _Dtype:
    if code not in ("u1", b"u1"):
        raise Refused("a dtype other than unsigned bytes")
    return _Dtype()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    return _Array(_bytes_as_tensor(shape, dtype, order == "F", data))


def _encode(text: object, encoding: object) -> bytes:
    """How Python 3 writes bytes in protocols below 3."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise Refused("a call of _codecs.encode for something else than bytes")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 writes empty bytes in protocols below 3."""
    return b""


GLOBALS = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): _Stand("numpy.dtype", _dtype),
    ("_codecs", "encode"): _Stand("_codecs.encode", _encode),
    ("__builtin__", "bytes"): _Stand("bytes", _no_bytes),
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    GLOBALS[_core + ".multiarray", "_reconstruct"] = _Stand("_reconstruct", _reconstruct)
    GLOBALS[_core + ".numeric", "_frombuffer"] = _Stand("_frombuffer", _frombuffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Stand:
        try:
            return GLOBALS[module, name]
        except KeyError:
            raise Refused(f"{module}.{name}") from None


def read_pickle(path: Path) -> dict[bytes, Any]:
    """The dict in a CIFAR file, with byte strings as keys and values as Python 2 wrote them; arrays are uint8 tensors.

    Raises:
        ValueError: damaged, or it asks for something that such a file has no need of, which is then not done; the message names the path.
    """
    data = path.read_bytes()
    try:
        check_pickle(data)
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Refused as error:
        raise ValueError(f"{path} is refused: a CIFAR pickle has no need of {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its instructions happen to raise
        raise ValueError(f"{path} is no pickle, or it is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dict, got {type(found).__name__}")
    if not all(isinstance(key, (bytes, str)) for key in found):
        raise ValueError(f"{path} must hold a dict with strings as keys")
    return {k.encode() if isinstance(k, str) else k: v.tensor if isinstance(v, _Array) else v for k, v in found.items()}
