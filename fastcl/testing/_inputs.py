"""The sizes of real models, and inputs of these sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.testing._case import Shape


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


def decode(stored: Tensor) -> Tensor:
    return stored.float() / 255 if stored.dtype == torch.uint8 else stored


def encode(value: Tensor, stored: torch.dtype) -> Tensor:
    return (value * 255).ceil().to(stored) if stored == torch.uint8 else value.to(stored)
