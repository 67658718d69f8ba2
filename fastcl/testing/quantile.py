"""Exact quantiles: inputs with ties and zeros, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.testing._case import Args, OpCase, Shape

Q = 0.7  # keep = 0.3


def skewed(shapes: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Squares of normal numbers, as a Fisher information has, 30 % zeros and 10 % ties among them: views of one buffer."""
    sizes = [math.prod(s) for s in shapes]
    gen = torch.Generator(device).manual_seed(seed)
    flat = torch.randn(sum(sizes), generator=gen, device=device).square_().mul_(1e-6)
    choice = torch.rand(len(flat), generator=gen, device=device)
    flat = flat.masked_fill_(choice < 0.3, 0).masked_fill_(choice > 0.9, 1e-6).to(dtype)
    return [part.view(s) for part, s in zip(torch.split(flat, sizes), shapes, strict=True)]


def _args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:  # noqa: ARG001
    return skewed(shapes, dtype, device, seed), Q


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The concatenation: without a copy where the tensors lie in one buffer, so that rivals are not timed for it."""
    base = tensors[0]._base
    if base is not None and base.dim() == 1 and sum(t.numel() for t in tensors) == base.numel():
        address = base.data_ptr()
        for t in tensors:
            if t.data_ptr() != address or not t.is_contiguous():
                break
            address += t.numel() * t.element_size()
        else:
            return base
    return torch.cat([t.reshape(-1) for t in tensors])


def _official(tensors: list[Tensor], q: float) -> Tensor:
    import numpy as np

    flat = _joined(tensors)
    flat = flat.float() if flat.dtype == torch.bfloat16 else flat  # which NumPy does not have
    return torch.tensor(float(np.percentile(flat.cpu().numpy(), 100 * q)), dtype=torch.float64)


def _eager(tensors: list[Tensor], q: float) -> Tensor:
    """torch.quantile takes no more than 16 M elements."""
    flat = _joined(tensors)
    rank = q * (flat.numel() - 1)
    below, above = (flat.kthvalue(int(k) + 1).values.double() for k in (math.floor(rank), math.ceil(rank)))
    return torch.lerp(below, above, rank - math.floor(rank))


CASES = (
    OpCase(
        name="quantile",
        call=ops.quantile,
        reference=reference.quantile,
        make=_args,
        providers={"official": _official, "eager": _eager},
        bytes_per_element=lambda element, _: element,
        bitwise=True,
        read_first=lambda element, _: element,
        uint8=False,
        pairs=False,
        traces=False,
    ),
)
