"""Exact quantiles: the definition, by sorting, and the counting sweep of the radix select."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DIGITS = {False: (11, 11, 10), True: (11, 11, 11, 11, 11, 9)}  # bits of a key's digits, most significant first: 32-bit keys, 64-bit keys
BINS = 2048


def quantile(tensors: Sequence[Tensor], q: float) -> Tensor:
    """The value at rank ``q (n - 1)`` of all elements in ascending order; see :func:`fastcl.ops.quantile`."""
    ordered = torch.cat([t.double().flatten() for t in tensors]).sort().values  # NaNs last
    below, above, weight = ranks(ordered.numel(), q)
    return torch.where(ordered[-1].isnan(), torch.nan, interpolate(ordered[below], ordered[above], weight))


def ranks(count: int, q: float) -> tuple[int, int, float]:
    """The two neighbouring ranks that the quantile lies between, and how far it is from the lower one."""
    rank = (count - 1) * q
    if rank >= count - 1:
        return count - 1, count - 1, 1.0
    below = math.floor(rank)
    return below, below + 1, rank - below


def interpolate(below: Tensor, above: Tensor, weight: float) -> Tensor:
    """Between two float64 numbers, from the nearer one; two equal infinities give NaN, as they do in NumPy."""
    step = above - below
    return above - step * (1 - weight) if weight >= 0.5 else below + step * weight


def radix_counts(tensors: Sequence[Tensor], prefixes: Tensor, level: int, wide: bool) -> Tensor:
    """How many elements have each digit, among those whose more significant digits are a given prefix.

    A key is an element's bits as an unsigned number in the elements' order: negative numbers inverted, all others with the sign bit set;
    -0 counts as +0. 32-bit keys are of float (narrower types widened), with ``wide`` 64-bit keys of double; ``DIGITS`` cuts them.

    Args:
        tensors: of any floating dtype.
        prefixes: int64 [2], two values of the digits above ``level`` taken as one number; not read at level 0.
        level: the digit to count, 0 for the most significant one.
        wide: 64-bit keys.

    Returns:
        int64 [2, 2049]: a row for each prefix, a column for each digit; the last column has the NaNs at level 0, which are in no other
        column and not counted at other levels.
    """
    widths = DIGITS[wide]
    counts = torch.zeros(2, BINS + 1, dtype=torch.int64, device=prefixes.device)
    for t in tensors:
        keys, missing = _keys(t, wide)
        for row in range(2):
            chosen = ~missing
            if level:
                chosen &= (keys >> sum(widths[level:])) & ((1 << sum(widths[:level])) - 1) == prefixes[row]
            digits = (keys >> sum(widths[level + 1 :])) & ((1 << widths[level]) - 1)
            # Elements that do not count go to a column of their own, so that no size depends on values.
            counts[row] += torch.zeros(BINS + 1, dtype=torch.int64, device=t.device).scatter_add_(
                0, torch.where(chosen, digits, BINS).flatten(), torch.ones_like(keys).flatten()
            )
            counts[row, BINS] -= (~chosen).sum()
        if level == 0:
            counts[:, BINS] += missing.sum()
    return counts


def _keys(t: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Keys as int64 (the bits of an unsigned 64-bit number with ``wide``), and where the NaNs are."""
    floating, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    value = t.to(floating)
    bits = value.contiguous().view(integer).long()
    lowest = torch.iinfo(integer).min
    bits = torch.where(bits == lowest, 0, bits)
    return torch.where(bits < 0, ~bits, bits ^ lowest if wide else bits - lowest), value.isnan()


def from_keys(keys: Tensor, wide: bool) -> Tensor:
    """The elements with these keys, in float64."""
    if wide:
        lowest = torch.iinfo(torch.int64).min
        return torch.where(keys < 0, keys ^ lowest, ~keys).view(torch.float64)
    bits = torch.where(keys >= 1 << 31, keys - (1 << 31), ~keys)
    return bits.to(torch.int32).view(torch.float32).double()
