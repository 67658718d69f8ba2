"""Moments of a child alone: those of a mask's set elements, in row-major order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.bit_mask import BitMask
from fastcl.ops import _sharded
from fastcl.optim import _saved
from fastcl.optim._binding import Bound
from fastcl.optim.transforms import FixedMask, Project, Pull, Transform
from fastcl.reference.bit_mask import set_bits, unpack

MOMENTS = ("exp_avg", "exp_avg_sq")


class Child:
    """The set elements of one parameter's mask (of this rank's shard), and how many they are."""

    def __init__(self, mask: BitMask, count: int) -> None:
        self.mask, self.count = mask, count
        self.version = mask._version()

    def zeros(self, like: Tensor) -> Tensor:
        """Moments at the start."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.zeros(self.count, dtype=dtype, device=like.device)

    def selected(self) -> Tensor:
        """The mask as a bool tensor."""
        return unpack(self.mask.bits, self.mask.local_shape.numel()).view(self.mask.local_shape)


def children(transforms: Sequence[Transform], bound: Sequence[Bound], params: Sequence[Tensor]) -> list[Child | None]:
    """For every parameter its child, None where moments are whole.

    Raises ValueError where transforms and compact state do not go together. Waits for the device once, to learn the counts.
    """
    fixed = [n for n, t in enumerate(transforms) if isinstance(t, FixedMask)]
    if len(fixed) != 1:
        raise ValueError(f"compact_state needs exactly one FixedMask among the transforms, got {len(fixed)}")
    behind = [type(t).__name__ for t in transforms[fixed[0] :] if isinstance(t, (Project, Pull))]
    if behind:
        raise ValueError(
            f"compact_state keeps no moments outside of the masks, and {behind[0]} behind FixedMask gives gradients there; put it before"
        )
    masks = bound[fixed[0]].masks
    local = _sharded.shards(params) if _sharded.is_sharded(params) else list(params)
    small = [m if m is not None and p.is_contiguous() and p.numel() else None for m, p in zip(masks, local, strict=True)]
    counts = [set_bits(m.bits, 8).sum() for m in small if m is not None]
    numbers = iter(torch.stack([c.to(counts[0].device) for c in counts]).tolist() if counts else [])
    return [None if m is None else Child(m, next(numbers)) for m in small]


def check_not_written(known: Sequence[Child | None]) -> None:
    """Raises ValueError if a mask's bits have been written to. No host sync: versions tell."""
    for i, child in enumerate(known):
        if child is not None and child.version != child.mask._version():
            raise ValueError(
                f"masks[{i}] has been written to, and with compact_state moments are kept for what it was alone; make a new optimizer"
            )


def check_unchanged(known: Sequence[Child | None], made: Sequence[Child | None]) -> None:
    """Raises ValueError if a mask is another than it was: moments that were left out cannot be found again."""
    for i, (a, b) in enumerate(zip(known, made, strict=False)):
        if (a is None) != (b is None) or (a is not None and b is not None and a.mask.bits is not b.mask.bits and a.mask != b.mask):
            raise ValueError(
                f"masks[{i}] has changed, and with compact_state moments are kept for the former mask alone; make a new optimizer"
            )


def lists(own: Sequence[Child | None], local: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Bits and ranks as the operator takes them."""
    empty: dict[Any, tuple[Tensor, Tensor]] = {}
    for p in local:
        if p.device not in empty:
            empty[p.device] = torch.empty(0, dtype=torch.uint8, device=p.device), torch.empty(0, dtype=torch.int64, device=p.device)
    bits = [empty[p.device][0] if c is None else c.mask.bits for c, p in zip(own, local, strict=True)]
    ranks = [empty[p.device][1] if c is None else c.mask.ranks for c, p in zip(own, local, strict=True)]
    return bits, ranks


def spread(state: dict[str, Any], child: Child | None, p: Tensor) -> dict[str, Any]:
    """A state with whole moments, zero outside of the child."""
    if child is None or not state:
        return state
    whole = dict(state)
    for name in MOMENTS:
        made = _saved.zeros(p)
        target = _sharded.shards([made])[0] if _sharded.is_sharded([made]) else made
        target.masked_scatter_(child.selected(), state[name])
        whole[name] = made
    return whole


def check_inside(label: str, value: Tensor, child: Child | None) -> None:
    """Raises ValueError if whole moments have something outside of the child. Waits for the device."""
    if child is None:
        return
    own = _sharded.shards([value])[0] if _sharded.is_sharded([value]) else value
    if int(own.count_nonzero()) != int(own[child.selected().to(own.device)].count_nonzero()):
        raise ValueError(f"{label} is not zero outside of the masks, where compact_state keeps nothing; load it without")


def gather(state: dict[str, Any], child: Child) -> None:
    """The same the other way, in place; compact state stays. Waits for the device.

    Raises ValueError if there are moments outside of the child.
    """
    selected = child.selected()
    for name in MOMENTS:
        value = state.get(name)
        if value is None or (value.dim() == 1 and not _sharded.is_sharded([value]) and value.shape != selected.shape):
            continue
        check_inside(name, value, child)
        state[name] = (_sharded.shards([value])[0] if _sharded.is_sharded([value]) else value)[selected]
