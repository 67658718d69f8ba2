"""Files of a run that a killed process leaves either as they were or whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MAGIC = b"fastcl.checkpoint 1 "


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path``: a reader sees the old file or the whole new one, also after a crash of the machine. One writer at a time."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # the new name has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write plain data; floats keep their exact values."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def load_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError, or ValueError if it is damaged; the message names the path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: nested too deeply") from error
    except ValueError as error:  # not UTF-8, not JSON, a number of too many digits
        raise ValueError(f"{path} is damaged: {error}") from error


def read_json(path: Path, format: str, version: int) -> dict[str, Any]:
    """An object that says ``format`` and ``version``.

    Raises:
        ValueError: damaged, of another format or version; the message names the path.
    """
    found = load_json(path)
    stated = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
    if stated != (format, version):
        raise ValueError(f"{path} has the format {stated[0]!r}, version {stated[1]!r}; accepted is {format!r}, {version}")
    return dict(found)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, with a checksum."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    write_bytes(path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """What :func:`save_state` wrote; no code in the file is run.

    Raises:
        ValueError: damaged or foreign; the message names the path.
    """
    stated, _, content = path.read_bytes().partition(b"\n")
    if not stated.startswith(MAGIC):
        raise ValueError(f"{path} is no checkpoint of fastcl, or it is damaged")
    if stated.removeprefix(MAGIC) != hashlib.sha256(content).hexdigest().encode():
        raise ValueError(f"{path} is damaged: its content does not have the checksum that its first line states")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    return state
