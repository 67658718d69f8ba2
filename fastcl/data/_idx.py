"""MNIST's IDX files, plain or gzipped: a magic number, the dimensions as big-endian 32-bit integers, then bytes in row-major order."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
AT_ONCE = 2**24


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The tensor in an IDX file of unsigned bytes: uint8.

    Args:
        path: the file; gzipped if its name ends in .gz.
        dimensions: how many the tensor has: 3 for images, 1 for labels.

    Raises:
        ValueError: another magic number, fewer or more bytes than the header says, a damaged gzip file; the message names the path.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
            if header[:4] != expected:
                raise ValueError(f"{path} must start with the IDX magic number 0x{expected.hex()}, got 0x{header[:4].hex()}")
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path} is truncated: its header has {len(header)} of {4 + 4 * dimensions} bytes")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if 0 in shape and math.prod(n or 1 for n in shape) >= 2**62:  # no bytes are missing, and no tensor has it
                raise ValueError(f"{path} is truncated or damaged: no file holds the shape {shape} that its header says")
            if 0 in shape[1:]:
                raise ValueError(f"{path} must hold images of at least one pixel; the shape in its header is {shape}")
            size, data = math.prod(shape), bytearray()
            # A piece at a time: a damaged header may announce more than there is memory.
            while piece := file.read(min(AT_ONCE, size + 1 - len(data))):
                data += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no gzip file, or it is damaged: {error}") from error
    if len(data) != size:
        got = f"only {len(data)}" if len(data) < size else "more"
        raise ValueError(f"{path} must hold {size} bytes after its header, as the shape {shape} there says; it has {got}")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape) if size else torch.empty(shape, dtype=torch.uint8)
