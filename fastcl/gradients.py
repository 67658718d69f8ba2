"""The ops applied to the ``.grad`` of a model's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastcl import ops

Params = nn.Module | Iterable[Tensor]
Importance = Mapping[str, Tensor] | Sequence[Tensor]


def pair_gradients(params: Params, importance: Importance) -> tuple[list[Tensor], list[Tensor], list[str | int]]:
    """The gradients that exist, the importance that belongs to each, and what the caller calls it (a name or an index).

    Raises:
        TypeError: ``params`` is a tensor or holds something else, or ``importance`` is a mapping while ``params`` has no names.
        ValueError: ``importance`` has another length than ``params``, or a name that is no parameter.
    """
    if isinstance(importance, Mapping):
        if not isinstance(params, nn.Module):
            raise TypeError("importance is a mapping of names, so params must be a Module; got " + type(params).__name__)
        named: dict[str, Tensor] = dict(params.named_parameters())
        for name, value in importance.items():
            if name not in named:
                raise ValueError(f"importance[{name!r}] belongs to no parameter of params; its parameters are {_some(list(named))}")
            if not isinstance(value, Tensor):
                raise TypeError(f"importance[{name!r}] must be a tensor, got {type(value).__name__}")
        rows: list[tuple[str | int, Tensor, Tensor]] = [(name, named[name], i) for name, i in importance.items()]
    else:
        listed: list[Tensor] = list(params.parameters()) if isinstance(params, nn.Module) else _listed("params", params)
        values = _listed("importance", importance)
        if len(values) != len(listed):
            raise ValueError(f"importance has {len(values)} tensors and params has {len(listed)}; pass one for each, in the same order")
        rows = [(index, p, i) for index, (p, i) in enumerate(zip(listed, values, strict=True))]
    kept = [(p.grad, i, label) for label, p, i in rows if p.grad is not None]
    return [g for g, _, _ in kept], [i for _, i, _ in kept], [label for _, _, label in kept]


def _listed(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a Module or an iterable of tensors, got {type(value).__name__}")
    listed = list(value)
    for index, t in enumerate(listed):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {type(t).__name__}")
    return listed


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def mask_gradients_(params: Params, importance: Importance, *, strength: float = 1.0) -> None:
    """Soft-mask the gradients of a model, in place: ``p.grad <- p.grad * (1 - strength * I)``. Call it between backward and step.

    Args:
        params: a Module or an iterable of parameters. Parameters whose ``.grad`` is None are skipped.
        importance: a mapping from parameter names to tensors when ``params`` is a Module (parameters without an entry are left as they
            are), or one tensor per parameter in the same order. Shapes, dtypes and devices as in :func:`fastcl.ops.soft_mask_`.
        strength: number in [0, 1].

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.soft_mask_`, and for names or lengths that do not fit. Nothing has been written then.
    """
    grads, values, labels = pair_gradients(params, importance)
    try:
        ops.soft_mask_(grads, values, strength)
    except (TypeError, ValueError) as error:
        # The op counts the gradients that exist; the caller knows names, or positions among all parameters.
        named = {str(position): label for position, label in enumerate(labels)}
        message = re.sub(r"\b(grads|importance)\[(\d+)\]", lambda m: f"{m[1]}[{named[m[2]]!r}]", str(error))
        raise type(error)(message) from None
