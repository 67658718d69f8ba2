"""Child-Tuning-F's random mask of the gradients. The definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastcl.reference._storage import compute_dtype

# Where a tensor lies in the list and in its whole parameter: (tensor index, offset, strides); element (j0, j1, ...) has there the row-major
# index offset + sum j_d * strides_d.
Place: TypeAlias = tuple[int, int, Sequence[int]]

LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
SECOND_DRAW = 0x80000000


def philox(counter: Sequence[Tensor | int], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Philox 4x32 (Salmon et al., SC 2011): four words of 32 bits, held in int64, for every counter of four words and a key of two."""
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2  # wraps to the product's low 64 bits
        c0, c1, c2, c3 = (p1 >> 32) & LOW ^ c1 ^ k0, p1 & LOW, (p0 >> 32) & LOW ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return [c0, c1, c2, c3]


def child(index: Tensor, tensor: int, keep: float, seed: int, step: int) -> Tensor:
    """Which elements are kept: a Bernoulli(keep) draw for each index (int64, in the whole parameter) of the tensor with index ``tensor``.

    16 bits decide; only where they equal those of ``keep * 2^48``, 32 bits of a second draw do.
    """
    key = (seed & LOW, (seed >> 32) & LOW)
    limit, rest = divmod(round(keep * 2**48), 2**32)
    block = index >> 3
    word = torch.stack(philox([block & LOW, block >> 32, tensor, step], key)).gather(0, ((index >> 1) & 3)[None])[0]
    u = torch.where(index & 1 == 0, word & 0xFFFF, word >> 16)
    block = index >> 2
    r = torch.stack(philox([block & LOW, block >> 32 | SECOND_DRAW, tensor, step], key)).gather(0, (index & 3)[None])[0]
    return (u < limit) | (u == limit) & (r < rest)


def row_major(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def indices(shape: Sequence[int], place: Place, device: torch.device) -> Tensor:
    """Every element's index in the whole parameter, int64, of the shape given."""
    index = torch.full((), place[1], dtype=torch.int64, device=device)
    for size, stride in zip(shape, place[2], strict=True):
        index = index[..., None] + torch.arange(size, device=device) * stride
    return index


def child_mask_at_(grads: Sequence[Tensor], keep: float, seed: int, step: int, places: Sequence[Place] | None) -> None:
    """:func:`child_mask_` for tensors that are parts of parameters; None: each is whole, and its place in the list is its index."""
    if places is None:
        places = [(i, 0, row_major(g.shape)) for i, g in enumerate(grads)]
    for g, place in zip(grads, places, strict=True):
        dtype = compute_dtype(g)
        kept = child(indices(g.shape, place, g.device), place[0], keep, seed, step)
        g.copy_(g.to(dtype) * torch.where(kept, torch.tensor(1 / keep, dtype=dtype, device=g.device), 0))


def child_mask_(grads: Sequence[Tensor], keep: float, seed: int, step: int) -> None:
    """``g <- g * Bernoulli(keep) / keep``; see :func:`fastcl.ops.child_mask_`."""
    child_mask_at_(grads, keep, seed, step, None)
