"""The form of a case, and what every case needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Args = tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """One op, under the name of what is measured.

    ``make(shapes, dtype, other, device, seed)`` returns its arguments; the first one is the list that it writes.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., Args]
    providers: Mapping[str, Callable[..., Any]]
    # Fewest bytes that one element costs, from the bytes of the gradient's (or new importance's) and of the other list's dtype.
    bytes_per_element: Callable[[int, int], int]
    bitwise: bool  # every implementation equals the reference bit for bit
    # Those of them that are read before the first write. The rest is a sweep that reads two streams and writes one; without any, nothing is
    # written.
    read_first: Callable[[int, int], int] = lambda gradient, other: 0  # noqa: ARG005
    uint8: bool = True  # the other list may be importance stored as uint8
    broadcasts: bool = False  # the other list's tensors may be smaller
    traces: bool = True  # eager code for it can be compiled
    alone: bool = False  # there is no other list
    random: bool = False  # its rivals draw other random numbers

    def provider(self, name: str) -> Callable[..., Any]:
        """An implementation by name: fastcl, reference, official, eager, foreach or compile."""
        if name == "fastcl":
            return self.call
        if name == "reference":
            return self.reference
        if name == "compile":
            return torch.compile(self.providers["eager"], dynamic=False, fullgraph=True)
        return self.providers[name]

    def in_float64(self, args: Args) -> Args:
        """The same arguments with every floating tensor in float64 (copies)."""
        copied: Args = clone(args, torch.float64)
        return copied


def clone(value: Any, floating: torch.dtype | None = None) -> Any:
    """A deep copy of arguments that keeps strides; floating tensors change to the dtype ``floating`` if it is given."""
    if isinstance(value, Tensor):
        out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device) if _dense(value) else value.clone()
        out.copy_(value)
        return out.to(floating) if floating is not None and out.is_floating_point() else out
    if isinstance(value, (list, tuple)):
        return type(value)(clone(v, floating) for v in value)
    return value


def _dense(t: Tensor) -> bool:
    return t.numel() > 0 and 0 not in t.stride()


@functools.cache
def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number; for uint8 importance the step 1/255 (it rounds up)."""
    return 1 / 255 if dtype == torch.uint8 else torch.finfo(dtype).eps / 2


def largest_error(value: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest absolute difference to float64 values; inf where NaN or Inf stand in different places."""
    worst = 0.0
    for v, e in zip(value, exact, strict=True):
        a = v.double() / 255 if v.dtype == torch.uint8 else v.double()
        b = e.double() / 255 if e.dtype == torch.uint8 else e.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=math.inf)
        worst = max(worst, float(difference.max())) if difference.numel() else worst
    return worst
