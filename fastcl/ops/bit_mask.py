"""Masks of one bit per element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.bit_mask import BitMask
from fastcl.ops import _checks, _dispatch, _sharded


def bit_mask_(grads: Sequence[Tensor], masks: Sequence[BitMask | Tensor]) -> None:
    """Keep the gradient elements whose bit is set and set the others to ``+0``, in place: ``g <- g if bit else 0``.

    Child-Tuning-D's mask (Xu et al., "Raise a Child in Large Language Model", EMNLP 2021) and any other fixed choice of parameters. A
    selection and no multiplication: what the mask leaves out is not looked at, so a NaN or Inf there becomes 0, and what it keeps keeps its
    bits. Not differentiable.

    DTensors are masked on each rank's own shard, without communication; their masks are of DTensors with the same mesh and placements.

    Args:
        grads: list of dense tensors, float64, float32, bfloat16 or float16, any strides; written. They may not share memory.
        masks: for each gradient, on its device, a :class:`fastcl.BitMask` of its shape, or the bits themselves: uint8 [ceil(n / 8)],
            contiguous, element e (row by row, whatever the strides) being bit ``e & 7`` of byte ``e >> 3``. Spare bits are not looked at.

    Raises:
        TypeError: not a list of dense tensors, a dtype that is not accepted, a mask of another kind.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, a gradient that requires grad while
            autograd records. Nothing has been written then.
    """
    bits = _bits_of(grads, masks)
    if _dispatch.traced() or _dispatch.gate("bit_mask_", grads, bits) is _dispatch.REFUSED:
        _checks.listed("grads", grads)
        if _sharded.is_sharded(grads):
            _masked_shards(grads, masks, bits)
            return
        torch.ops.fastcl.bit_mask_(grads, bits)


def _bits_of(grads: Sequence[Tensor], masks: Sequence[BitMask | Tensor]) -> list[Tensor]:
    """The masks' bits; that a BitMask has its gradient's shape is known here alone."""
    if not isinstance(masks, (list, tuple)):
        raise TypeError(f"masks must be a list or tuple of BitMask or uint8 tensors, got {type(masks).__name__}")
    _checks.listed("grads", grads)
    _checks.same_length("masks", masks, "grads", grads)
    bits = []
    for i, (g, m) in enumerate(zip(grads, masks, strict=True)):
        if isinstance(m, BitMask):
            if m.shape != g.shape:
                raise ValueError(f"masks[{i}] is for the shape {tuple(m.shape)} and grads[{i}] has shape {tuple(g.shape)}")
            if (m.placements is not None) != (m.placements is not None and _sharded.is_sharded([g])):
                raise TypeError(f"masks[{i}] is of a DTensor with the placements {m.placements} and grads[{i}] a plain tensor")
            bits.append(m.bits)
        elif isinstance(m, Tensor):
            bits.append(m)
        else:
            raise TypeError(f"masks[{i}] must be a BitMask or a uint8 tensor of bits, got {type(m).__name__}")
    return bits


def _masked_shards(grads: Sequence[Tensor], masks: Sequence[BitMask | Tensor], bits: Sequence[Tensor]) -> None:
    _checks.not_recorded("grads", grads)
    _sharded.mesh_of(("grads", grads))
    _sharded.check_apart("grads", grads)
    for i, (g, m) in enumerate(zip(grads, masks, strict=True)):
        if not _sharded.is_sharded([g]):
            continue
        placed = m.placements if isinstance(m, BitMask) else None
        if placed is None or placed != g.placements or m.device_mesh != g.device_mesh:  # type: ignore[attr-defined,union-attr]
            raise ValueError(
                f"grads[{i}] is a DTensor with the placements {g.placements} and masks[{i}] "  # type: ignore[attr-defined]
                + ("is no mask of a DTensor" if placed is None else f"has {placed} on {m.device_mesh}")  # type: ignore[union-attr]
                + "; accepted is BitMask.from_bool of a DTensor with the same mesh and placements"
            )
    bit_mask_(_sharded.shards(grads), bits)
    _sharded.bump_versions(grads)


def _check(grads: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.not_recorded("grads", grads)
    _checks.dense("masks", bits, (torch.uint8,))
    _checks.same_length("masks", bits, "grads", grads)
    _checks.same_device("masks", bits, "grads", grads)
    for i, (g, b) in enumerate(zip(grads, bits, strict=True)):
        wanted = -(-g.numel() // 8)
        if b.shape != (wanted,) or not b.is_contiguous():
            raise ValueError(
                f"masks[{i}] has shape {tuple(b.shape)}; for grads[{i}] of shape {tuple(g.shape)} the bits are a contiguous [{wanted}]"
            )
    _checks.no_overlap("grads", grads, "masks", bits, partners_may_be_equal=False)


def _run(grads: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
    if _dispatch.gate("bit_mask_", grads, bits) is not _dispatch.REFUSED:
        return
    _check(grads, bits)
    for device, (g, b) in _dispatch.by_device(grads, bits):
        _dispatch.run("bit_mask_", device, g, b)


_dispatch.define("bit_mask_", "bit_mask", "(Tensor(a!)[] grads, Tensor[] bits) -> ()", implementation=_run, fake=_check)
