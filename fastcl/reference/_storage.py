"""How an importance in [0, 1] is stored, and in which precision an element is computed.

Every implementation (C++, CUDA, Triton) follows these rules, so they are the only place where they are written out in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, else float32 (bf16, fp16 and uint8 are widened first)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The importance that ``stored`` stands for: ``u / 255`` for uint8, the value itself otherwise."""
    value = stored.to(dtype)
    return value / 255 if stored.dtype == torch.uint8 else value


def encode_(stored: Tensor, value: Tensor) -> None:
    """Write ``value`` into ``stored``.

    Floating storage rounds to nearest. uint8 takes the smallest ``u`` with ``u / 255 >= value`` in ``value``'s precision, so that
    protection never weakens and a decoded value is written back unchanged; values below 0 store 0, values above 1 and NaN store 255.
    """
    if stored.dtype != torch.uint8:
        stored.copy_(value)
        return
    code = torch.ceil(value.clamp(0, 1) * 255)
    code = torch.where((code - 1) / 255 >= value, code - 1, code)
    code = torch.where(code / 255 < value, code + 1, code)
    stored.copy_(code.nan_to_num(nan=255).clamp(0, 255))
