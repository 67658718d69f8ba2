"""Masks of one bit per element: the definition.

Element e of a tensor, counted row by row, is bit ``e & 7`` of byte ``e >> 3``; the spare bits of the last byte are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ONES = 0x0101010101010101


def bit_mask_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """``g <- g`` where the bit is set, else ``+0``; see :func:`fastcl.ops.bit_mask_`."""
    for g, b in zip(grads, masks, strict=True):
        g.masked_fill_(~unpack(b, g.numel()).view(g.shape), 0)


def threshold_bits_(bits: Sequence[Tensor], tensors: Sequence[Tensor], threshold: Tensor) -> None:
    """``bit <- value >= threshold`` in float64, for tensors as they lie on this process; a NaN on either side gives 0."""
    for b, t in zip(bits, tensors, strict=True):
        b.copy_(pack(t.double() >= threshold))


def pack(mask: Tensor) -> Tensor:
    """The bits of a bool tensor: uint8, [ceil(n / 8)]."""
    flat = mask.contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    # Eight bytes of 0 or 1 as one word: the product gathers their lowest bits in its topmost byte.
    return (flat.view(torch.int64) * 0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8)


def unpack(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` bits as a bool tensor, [count]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places).bitwise_and_(1).view(torch.bool).view(-1)[:count]


def set_bits(bits: Tensor, block: int) -> Tensor:
    """How many bits are set in each block of ``block`` bytes (a multiple of 8): int64, [ceil(len(bits) / block)]."""
    words = torch.nn.functional.pad(bits, (0, -len(bits) % block)).view(torch.int64)
    words = words - ((words >> 1) & (0x55 * _ONES))
    words = (words & (0x33 * _ONES)) + ((words >> 2) & (0x33 * _ONES))
    words = (words + (words >> 4)) & (0x0F * _ONES)
    return ((words * _ONES) >> 56).view(-1, block // 8).sum(dim=1)
