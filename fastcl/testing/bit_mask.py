"""Masks of one bit per element: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastcl import ops, reference
from fastcl.reference.bit_mask import pack, unpack
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import gradients

KEEP = 0.3


def _args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:  # noqa: ARG001
    gen = torch.Generator(device).manual_seed(seed + 1)
    return gradients(shapes, dtype, device, seed), [pack(torch.rand(s, generator=gen, device=device) < KEEP) for s in shapes]


# The rivals' masks, made in the first call that needs them: nobody is timed for it.
_unpacked: MutableMapping[Tensor, dict[torch.dtype, Tensor]] = WeakIdKeyDictionary()


def _masks(grads: Sequence[Tensor], bits: Sequence[Tensor], floating: bool) -> list[Tensor]:
    out = []
    for g, b in zip(grads, bits, strict=True):
        known = _unpacked.setdefault(b, {})
        dtype = g.dtype if floating else torch.bool
        if dtype not in known:
            known[dtype] = unpack(b, g.numel()).view(g.shape).to(dtype)
        out.append(known[dtype])
    return out


def _official(grads: list[Tensor], bits: list[Tensor]) -> None:
    for g, mask in zip(grads, _masks(grads, bits, floating=False), strict=True):
        g *= mask


def _eager(grads: list[Tensor], bits: list[Tensor]) -> None:
    for g, mask in zip(grads, _masks(grads, bits, floating=True), strict=True):
        g.mul_(mask)


def _foreach(grads: list[Tensor], bits: list[Tensor]) -> None:
    torch._foreach_mul_(grads, _masks(grads, bits, floating=True))


CASES = (
    OpCase(
        name="bit_mask_",
        call=ops.bit_mask_,
        reference=reference.bit_mask_,
        make=_args,
        providers={"official": _official, "eager": _eager, "foreach": _foreach},
        bytes_per_element=lambda gradient, _: 2 * gradient + 1 / 8,
        bitwise=True,
        uint8=False,
        pairs=False,
        traces=False,
    ),
)
