"""EWC's pull towards an anchor. The definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastcl.reference._storage import compute_dtype


def ewc_pull_(
    grads: Sequence[Tensor], params: Sequence[Tensor], precision: Sequence[Tensor], anchor: Sequence[Tensor], strength: float
) -> None:
    """``g <- g + 2 * strength * A (theta - c)``; see :func:`fastcl.ops.ewc_pull_`."""
    for g, theta, a, c in zip(grads, params, precision, anchor, strict=True):
        dtype = compute_dtype(g, theta, a, c)
        pull = a.to(dtype) * (theta.to(dtype) - c.to(dtype))
        g.copy_(g.to(dtype) + 2 * strength * pull)
