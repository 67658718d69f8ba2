"""Soft masking: the definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastcl.reference._storage import compute_dtype, decode


def soft_mask_(grads: Sequence[Tensor], importance: Sequence[Tensor], strength: float = 1.0) -> None:
    """``g <- g * (1 - strength * I)``; see :func:`fastcl.ops.soft_mask_`."""
    for g, stored in zip(grads, importance, strict=True):
        dtype = compute_dtype(g, stored)
        g.copy_(g.to(dtype) * (1 - strength * decode(stored, dtype)))
