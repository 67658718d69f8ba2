"""The definitions applied to the ``.grad`` of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fastcl.reference.soft_mask import soft_mask_


def mask_gradients_(
    params: nn.Module | Iterable[Tensor], importance: Mapping[str, Tensor] | Sequence[Tensor], *, strength: float = 1.0
) -> None:
    """``p.grad <- p.grad * (1 - strength * I)``; see :func:`fastcl.mask_gradients_`."""
    if isinstance(importance, Mapping) and isinstance(params, nn.Module):
        pairs = [(params.get_parameter(name), value) for name, value in importance.items()]
    else:
        pairs = list(zip(params.parameters() if isinstance(params, nn.Module) else params, importance, strict=True))
    for p, value in pairs:
        if p.grad is not None:
            soft_mask_([p.grad], [value], strength)
