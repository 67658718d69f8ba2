"""[W | b] of a layer in one matrix: rows padded to 16 elements, with the weight's and the bias's parts as views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # elements


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, [rows, columns], whose rows start ``columns`` rounded up to 16 elements apart."""
    return torch.zeros(rows, -(-columns // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :columns]


def padded_copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a factor with padded rows; a diagonal one is contiguous."""
    if value.dim() == 1:
        return value.to(dtype, copy=True)
    return padded(value.shape[0], value.shape[1], dtype, value.device).copy_(value)


def parts(matrix: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of [m, n] in the shapes of the weight [m, ...] and, if there is one, of the bias [m]."""
    inputs = shapes[0][1:].numel()
    weight = torch.unflatten(matrix[:, :inputs], 1, shapes[0][1:]) if len(shapes[0]) != 2 else matrix[:, :inputs]
    return [weight, matrix[:, inputs]] if len(shapes) == 2 else [weight]


def whole(views: Sequence[Tensor], shapes: Sequence[torch.Size]) -> Tensor | None:
    """The matrix that ``views`` are the parts of, or None if they lie otherwise (they were loaded or copied one by one)."""
    weight, rows, inputs = views[0], shapes[0][0], shapes[0][1:].numel()
    pitch, columns = weight.stride(0), inputs + len(views) - 1
    if pitch < columns or pitch % ALIGNMENT:
        return None
    matrix = weight.as_strided((rows, columns), (pitch, 1), weight.storage_offset()) if _fits(weight, rows, columns, pitch) else None
    if matrix is None:
        return None
    expected = parts(matrix, shapes)
    same = all(v.data_ptr() == e.data_ptr() and v.stride() == e.stride() for v, e in zip(views, expected, strict=True))
    return matrix if same else None


def _fits(weight: Tensor, rows: int, columns: int, pitch: int) -> bool:
    needed = weight.storage_offset() + (rows - 1) * pitch + columns
    return needed * weight.element_size() <= weight.untyped_storage().nbytes()
