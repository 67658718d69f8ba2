"""What a gradient goes through on its way into an optimizer. The definition of each transform, and of their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastcl.reference._storage import decode
from fastcl.reference.bit_mask import unpack
from fastcl.reference.child_mask import Place, child, indices, row_major

# ("soft_mask", importance, strength), ("child_mask", keep, seed), ("fixed_mask", bits), ("project", reference, coefficient) and
# ("pull", precision, anchor, strength); an operand without elements, where the parameter has some, leaves its tensor out.
Transform: TypeAlias = tuple[Any, ...]


def transformed(
    i: int,
    p: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    step: Tensor | None,
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    scale: Tensor | None,
) -> Tensor:
    """The ``i``-th gradient in ``dtype``, scaled, and after all transforms in their order; never rounded to its own dtype in between."""
    x = grad.to(dtype)
    if scale is not None:
        x = x * scale.to(dtype)
    for kind, *operands in transforms:
        if kind == "soft_mask":
            importance, strength = operands
            if _present(importance[i], p):
                x = x * (1 - strength * decode(importance[i], dtype))
        elif kind == "child_mask":
            keep, seed = operands
            place = places[i] if places is not None else (i, 0, row_major(p.shape))
            kept = child(indices(p.shape, place, p.device), place[0], keep, seed, step)  # type: ignore[arg-type]  # a step on the device
            x = x * torch.where(kept, torch.tensor(1 / keep, dtype=dtype, device=p.device), 0)
        elif kind == "fixed_mask":
            (bits,) = operands
            if _present(bits[i], p):
                x = torch.where(unpack(bits[i], p.numel()).view(p.shape), x, 0)
        elif kind == "project":
            reference, coefficient = operands
            if _present(reference[i], p):
                v = coefficient.reshape(())
                x = torch.where(v == 0, x, (x.double() + v * reference[i].double()).to(dtype))
        elif kind == "pull":
            precision, anchor, strength = operands
            if _present(precision[i], p):
                x = x + 2 * strength * (precision[i].to(dtype) * (p.to(dtype) - anchor[i].to(dtype)))
        else:
            raise ValueError(f"unknown transform {kind!r}")
    return x


def _present(operand: Tensor, p: Tensor) -> bool:
    return operand.numel() > 0 or p.numel() == 0
