"""Soft masking of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _sharded


def soft_mask_(grads: Sequence[Tensor], importance: Sequence[Tensor], strength: float = 1.0) -> None:
    """Scale every gradient element by what its importance leaves free, in place: ``g <- g * (1 - strength * I)``.

    SPG's rule for the feature extractor and, with 0-d importance, for the heads (Konishi et al., "Parameter-Level Soft-Masking for
    Continual Learning", ICML 2023, eq. 4); with one value per row or column DAS's rule for units (Ke et al., ICLR 2023, eq. 7).

    Computed in float64 if the pair holds a float64 tensor, else in float32, as ``g * (1 - strength * I)`` without contraction, and
    rounded once to ``g``'s dtype; uint8 importance means ``I = u / 255``. NaN and Inf propagate. The values of ``importance`` are
    not checked (that would cost a sweep and a device sync). The op is not differentiable: importance is a constant.

    DTensors (FSDP2, tensor parallelism) are masked on each rank's own shard, without communication. A gradient that is a DTensor takes
    a DTensor of the same mesh and the same placements, a dimension of size 1 that broadcasts being replicated, or a plain tensor of one
    element. ``Partial`` placements and several meshes in one call are refused.

    Args:
        grads: list of dense tensors, float64, float32, bfloat16 or float16, any strides; written. They may not share memory.
        importance: one tensor per gradient, on its device: of its shape, ``[m, 1, ...]`` (per row), ``[1, n]`` (per column), 0-d, or
            any other shape that broadcasts to it; float64, float32, bfloat16, float16 or uint8, any strides.
        strength: number in [0, 1]; 0 leaves the gradients as they are, 1 is full protection.

    Raises:
        TypeError: not a list of dense tensors, a dtype that is not accepted, a strength that is not a number, a plain tensor beside a
            DTensor, a Partial placement.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, a strength outside [0, 1], a gradient
            that requires grad while autograd records. Nothing has been written then.
    """
    if _dispatch.traced() or _dispatch.gate("soft_mask_", grads, importance, strength) is _dispatch.REFUSED:
        _checks.listed("grads", grads)
        _checks.listed("importance", importance)
        if _sharded.is_sharded(grads, importance):
            _sharded.elementwise(lambda g, i: soft_mask_(g, i, strength), "grads", grads, "importance", importance)
            return
        torch.ops.fastcl.soft_mask_(grads, importance, _checks.unit_interval("strength", strength))


def _check(grads: Sequence[Tensor], importance: Sequence[Tensor], strength: float = 1.0) -> None:
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.not_recorded("grads", grads)
    _checks.dense("importance", importance, _checks.STORED)
    _checks.same_length("importance", importance, "grads", grads)
    _checks.same_device("importance", importance, "grads", grads)
    _checks.broadcasts("importance", importance, "grads", grads)
    _checks.unit_interval("strength", strength)
    _checks.no_overlap("grads", grads, "importance", importance)


def _run(grads: Sequence[Tensor], importance: Sequence[Tensor], strength: float = 1.0) -> None:
    if _dispatch.gate("soft_mask_", grads, importance, strength) is not _dispatch.REFUSED:
        return
    _check(grads, importance, strength)
    for device, (g, i) in _dispatch.by_device(grads, importance):
        _dispatch.run("soft_mask_", device, g, i, strength)


_dispatch.define(
    "soft_mask_", "soft_mask", "(Tensor(a!)[] grads, Tensor[] importance, float strength=1.0) -> ()", implementation=_run, fake=_check
)
