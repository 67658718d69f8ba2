"""Files of tensors that a method saves: safetensors with a format, a version and a checksum in the header, written atomically."""

from __future__ import annotations

import ctypes
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# safetensors is imported where it is used: not by everyone who imports fastcl.


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """CRC-32 of the header without the checksum, and of the tensors' names, dtypes, shapes and bytes in the order of their names."""
    stated = sorted((key, value) for key, value in header.items() if key != "checksum")
    crc = zlib.crc32(repr(stated).encode())
    for name in sorted(tensors):
        t = tensors[name]
        crc = zlib.crc32(repr((name, str(t.dtype), tuple(t.shape))).encode(), crc)
        size = t.numel() * t.element_size()
        if size:
            crc = zlib.crc32((ctypes.c_char * size).from_address(t.data_ptr()), crc)
    return f"{crc:08x}"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``header`` to ``path``: a reader sees the old file or the whole new one, whatever happens in between.

    Raises OSError when the file cannot be written; ``path`` is then as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.open("xb").close()
    try:
        mode = partial.stat().st_mode  # what the user's umask gives a new file; safetensors makes its own private
        try:
            save_file(stored, partial, metadata={**header, "checksum": _checksum(stored, header)})
        except SafetensorError as error:
            raise OSError(f"{target} cannot be written: {error}") from error
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], format: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the header of a file that :func:`write` made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, damaged, of another format or of another version; the message names the path.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            found = header.get("format")
            if found != format:
                raise ValueError(f"{path} is a safetensors file of the format {found!r}; accepted is {format!r}")
            if header.get("version") != str(version):
                raise ValueError(f"{path} has the format {format!r} in version {header.get('version')!r}; accepted is version {version}")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it is damaged: {error}") from error
    if header.get("checksum") != _checksum(tensors, header):
        raise ValueError(f"{path} is damaged: its content does not have the checksum {header.get('checksum')!r} that its header states")
    return tensors, header
