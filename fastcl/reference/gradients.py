"""The definitions applied to the ``.grad`` of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fastcl.reference.child_mask import child_mask_at_, row_major
from fastcl.reference.soft_mask import soft_mask_


def mask_gradients_(
    params: nn.Module | Iterable[Tensor], importance: Mapping[str, Tensor] | Sequence[Tensor], *, strength: float = 1.0
) -> None:
    """``p.grad <- p.grad * (1 - strength * I)``; see :func:`fastcl.mask_gradients_`."""
    pairs: list[tuple[Tensor, Tensor]]
    if isinstance(importance, Mapping):
        named = dict(params.named_parameters()) if isinstance(params, nn.Module) else {}
        pairs = [(named[name], value) for name, value in importance.items()]
    else:
        listed: Iterable[Tensor] = params.parameters() if isinstance(params, nn.Module) else params
        pairs = list(zip(listed, importance, strict=True))
    for p, value in pairs:
        if p.grad is not None:
            soft_mask_([p.grad], [value], strength)


def child_mask_gradients_(params: nn.Module | Iterable[Tensor], keep: float, *, seed: int, step: int) -> None:
    """``p.grad <- p.grad * Bernoulli(keep) / keep``; see :func:`fastcl.child_mask_gradients_`."""
    listed = params.parameters() if isinstance(params, nn.Module) else params
    for i, p in enumerate(listed):
        if p.grad is not None:
            child_mask_at_([p.grad], keep, seed, step, [(i, 0, row_major(p.grad.shape))])
