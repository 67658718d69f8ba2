"""The table of cases: for each op its inputs, reference, rival implementations and bytes.

One table drives the correctness tests, opcheck, torch.compile, the Triton interpreter, the GPU suite and the benchmarks. A new op is a new
row. The rivals are written the way code outside fastcl does it: ``official`` as the methods' public code, ``eager`` with in-place torch
ops, ``foreach`` with torch._foreach_*. ``compile`` (torch.compile of ``eager``) is made from the row by :meth:`OpCase.provider`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcl import ops, reference

Shape = tuple[int, ...]
Args = tuple[Any, ...]


def _gpt2_small() -> list[Shape]:
    block: list[Shape] = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *(block * 12), (768,), (768,)]


def _resnet18() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out in (64, 128, 256, 512):
        for first in (True, False):
            shapes += [(out, width if first else out, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if first and out != width:
                shapes += [(out, width, 1, 1), (out,), (out,)]
        width = out
    return [*shapes, (1000, 512), (1000,)]


SIZES: dict[str, list[Shape]] = {
    "gpt2-small": _gpt2_small(),  # 148 tensors, 124 M elements
    "resnet18": _resnet18(),  # 62 tensors, 11.7 M elements
    "10000x64": [(64,)] * 10_000,
    "400x64": [(64,)] * 400,
    "1x2^20": [(1 << 20,)],
}


def elements(shapes: Sequence[Shape]) -> int:
    """Number of elements of a list of shapes."""
    return sum(math.prod(s) for s in shapes)


@dataclass(frozen=True)
class OpCase:
    """One op. ``make(shapes, dtype, stored, device, seed)`` returns its arguments; the first one is the list that it writes."""

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., Args]
    providers: Mapping[str, Callable[..., Any]]
    # Fewest bytes that one element costs, from the bytes of the gradient's (or new importance's) and the stored importance's dtype.
    bytes_per_element: Callable[[int, int], int]
    bitwise: bool  # every implementation equals the reference bit for bit

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


def _generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def gradients(shapes: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Normal gradients, each tensor with a scale and an offset of its own, as layers have."""
    gen = _generator(device, seed)
    return [(torch.randn(s, generator=gen, device=device) * 10.0 ** -(n % 4) + 0.1 * (n % 3)).to(dtype) for n, s in enumerate(shapes)]


def importances(shapes: Sequence[Shape], stored: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Importance in [0, 1] with exact zeros and ones among it."""
    gen = _generator(device, seed)
    out = []
    for s in shapes:
        value = (torch.rand(s, generator=gen, device=device) * 1.2 - 0.1).clamp_(0, 1)
        out.append((value * 255).round().to(stored) if stored == torch.uint8 else value.to(stored))
    return out


def _decode(stored: Tensor) -> Tensor:
    return stored.float() / 255 if stored.dtype == torch.uint8 else stored


def _encode(value: Tensor, stored: torch.dtype) -> Tensor:
    return (value * 255).ceil().to(stored) if stored == torch.uint8 else value.to(stored)


def _soft_mask_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return gradients(shapes, dtype, device, seed), importances(shapes, stored, device, seed + 1), 0.75


def _soft_mask_official(grads: list[Tensor], importance: list[Tensor], strength: float = 1.0) -> None:
    for n, g in enumerate(grads):
        mask = 1 - strength * _decode(importance[n])
        grads[n].copy_(g * mask)


def _soft_mask_eager(grads: list[Tensor], importance: list[Tensor], strength: float = 1.0) -> None:
    for g, i in zip(grads, importance, strict=True):
        g.mul_(1 - strength * _decode(i))


def _soft_mask_foreach(grads: list[Tensor], importance: list[Tensor], strength: float = 1.0) -> None:
    if any(i.dtype != g.dtype for g, i in zip(grads, importance, strict=True)):
        importance = [_decode(i).to(g.dtype) for g, i in zip(grads, importance, strict=True)]
    torch._foreach_addcmul_(grads, grads, importance, value=-strength)


def _emax_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return importances(shapes, stored, device, seed), importances(shapes, dtype, device, seed + 1)


def _emax_official(importance: list[Tensor], new: list[Tensor]) -> None:
    for n, i in enumerate(importance):
        importance[n].copy_(_encode(torch.max(_decode(i), _decode(new[n]).to(_decode(i).dtype)), i.dtype))


def _emax_eager(importance: list[Tensor], new: list[Tensor]) -> None:
    for i, n in zip(importance, new, strict=True):
        if i.dtype == n.dtype:
            torch.maximum(i, n, out=i)
        else:
            i.copy_(_encode(torch.maximum(_decode(i), _decode(n)), i.dtype))


def _emax_foreach(importance: list[Tensor], new: list[Tensor]) -> None:
    if all(i.dtype == n.dtype for i, n in zip(importance, new, strict=True)):
        torch._foreach_maximum_(importance, new)
    else:
        decoded = [_decode(i).float() for i in importance]
        torch._foreach_maximum_(decoded, [_decode(n).float() for n in new])
        torch._foreach_copy_(importance, [_encode(d, i.dtype) for d, i in zip(decoded, importance, strict=True)])


def _spg_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0, heads: int = 1) -> Args:
    accumulated = [i // 4 if stored == torch.uint8 else i / 4 for i in importances(shapes, stored, device, seed)]
    return accumulated, [gradients(shapes, dtype, device, seed + 1 + h) for h in range(heads)]


def _spg_official(accumulated: list[Tensor], grads_by_head: list[list[Tensor]]) -> Tensor:
    for n, a in enumerate(accumulated):
        by_head = []
        for head in grads_by_head:
            g = head[n]
            by_head.append(torch.abs(torch.tanh((g - g.mean()) / g.std())) if bool((g != 0).any()) else torch.zeros_like(g))
        new = torch.stack(by_head).max(dim=0).values
        accumulated[n].copy_(_encode(torch.max(_decode(a), new), a.dtype))
    return torch.cat([_decode(a).flatten() for a in accumulated]).mean()


def _spg_eager(accumulated: list[Tensor], grads_by_head: list[list[Tensor]]) -> Tensor:
    total = accumulated[0].new_zeros((), dtype=torch.float32)
    for n, a in enumerate(accumulated):
        value = _decode(a)
        for head in grads_by_head:
            std, mean = torch.std_mean(head[n])
            value = torch.maximum(value, head[n].sub(mean).div_(std).tanh_().abs_())
        a.copy_(_encode(value, a.dtype))
        total += value.sum()
    return total / sum(a.numel() for a in accumulated)


CASES: dict[str, OpCase] = {
    case.name: case
    for case in (
        OpCase(
            name="soft_mask_",
            call=ops.soft_mask_,
            reference=reference.soft_mask_,
            make=_soft_mask_args,
            providers={"official": _soft_mask_official, "eager": _soft_mask_eager, "foreach": _soft_mask_foreach},
            bytes_per_element=lambda gradient, stored: 2 * gradient + stored,
            bitwise=True,
        ),
        OpCase(
            name="emax_",
            call=ops.emax_,
            reference=reference.emax_,
            make=_emax_args,
            providers={"official": _emax_official, "eager": _emax_eager, "foreach": _emax_foreach},
            bytes_per_element=lambda new, stored: new + 2 * stored,
            bitwise=True,
        ),
        OpCase(
            name="spg_importance_",
            call=ops.spg_importance_,
            reference=reference.spg_importance_,
            make=_spg_args,
            providers={"official": _spg_official, "eager": _spg_eager},
            bytes_per_element=lambda gradient, stored: 2 * gradient + 2 * stored,  # with one head
            bitwise=False,
        ),
    )
}


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
