"""The shapes and strides that every op meets."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STORED = [*FLOATING, torch.uint8]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")  # a hundred times slower
CHUNK = 16384  # of the CPU reductions

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "empty list": [],
    "empty tensor": [(0,), (3, 0, 2)],
    "scalar": [(), ()],
    "one": [(1,), (1, 1)],
    "vector widths": [(63,), (64,), (65,), (127,), (129,)],
    "chunk edges": [(CHUNK - 1,), (CHUNK,), (CHUNK + 1,)],
    "mixed": [(0,), (5, 7), (), (3, 4, 5), (2, 3, 4, 5), (1,), (1000,)],
    "tiny tensors": [(n % 7 + 1,) for n in range(70 if INTERPRETED else 400)],
}


def _reversed_dimensions(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order) if t.dim() else t.clone()


# Each returns a tensor with the given one's values and another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0] if t.dim() else t.clone(),
    "shifted by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "reversed dimensions": _reversed_dimensions,
}

# Importance that broadcasts to a shape.
BROADCASTS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "element": lambda s: s,
    "row": lambda s: (s[0], *[1] * (len(s) - 1)) if s else (),
    "column": lambda s: (*[1] * (len(s) - 1), s[-1]) if s else (),
    "fewer dimensions": lambda s: s[1:],
    "0-d": lambda s: (),
    "middle": lambda s: tuple(n if d == len(s) // 2 else 1 for d, n in enumerate(s)),
}


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, where every NaN equals every NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    signs = torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())
    return signs and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())
