"""Numbers that a step needs before its sweep: the scale of the gradients and the coefficients of projections. They stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl import ops
from fastcl.ops import _places, _sharded
from fastcl.ops._transforms import select
from fastcl.ops.optimizers import transformed_dot
from fastcl.reference.projection import project_coefficient

if TYPE_CHECKING:
    from fastcl.optim._base import Rows


def places(params: Sequence[Tensor]) -> list[Any]:
    """Where each rank's memory lies in the whole parameters."""
    return _places.of_shards("params", params) if _sharded.is_sharded(params) else _places.whole(params)


def plain(t: Tensor) -> Tensor:
    """A replicated DTensor's value on this rank; a plain tensor itself."""
    return _sharded.shards([t])[0] if _sharded.is_sharded([t]) else t


def scale(grads: Sequence[Sequence[Tensor]], grad_scale: Tensor | None, clip_norm: float | None) -> Tensor | None:
    """What every gradient is multiplied by: the scaler's inverse, and the coefficient of torch's clip_grad_norm_."""
    unscale = None
    if isinstance(grad_scale, Tensor):
        unscale = plain(grad_scale).double().reciprocal().float()  # as GradScaler.unscale_
    if clip_norm is None:
        return unscale
    flat = [g for group in grads for g in group]
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in flat:
        by_device.setdefault(g.device, []).append(g)
    device = flat[0].device
    square = sum(
        (ops.grad_dot(own, own).to(device, non_blocking=True) for own in by_device.values()),
        start=torch.zeros((), dtype=torch.float64, device=device),
    )
    norm = square.sqrt()
    if unscale is None:
        return (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    unscale = unscale.to(device, non_blocking=True).double()
    return unscale * (clip_norm / (norm * unscale + 1e-6)).clamp(max=1.0)


def coefficient(
    rows: Sequence[Rows],
    steps: Sequence[Sequence[Tensor]],
    before: Sequence[Sequence[Any]],
    all_places: Sequence[Any] | None,
    factor: Tensor | None,
    references: Sequence[Sequence[Tensor]],
) -> Tensor:
    """The coefficient of the projection of all groups' gradients, after the transforms ``before`` it: float64, 0-d."""
    params = [p for r in rows for p in r.params]
    mesh = _sharded.mesh_of(("params", params)) if _sharded.is_sharded(params) else None
    total: Any = None
    for r, own_steps, entries, reference in zip(rows, steps, before, references, strict=True):
        counted = _sharded.counted(r.params, mesh) if mesh is not None else [True] * len(r.params)
        own_places = r.pick(all_places) if all_places is not None else None
        by_device: dict[torch.device, list[int]] = {}
        for i, p in enumerate(r.local):
            if counted[i] and reference[i].numel():
                by_device.setdefault(p.device, []).append(i)
        for members in by_device.values():
            products = _products(r, members, own_steps, entries, own_places, factor, reference)
            total = products if total is None else total + products.to(total.device, non_blocking=True)
    if total is None:
        total = torch.zeros(2, dtype=torch.float64, device=rows[0].local[0].device)
    if mesh is not None:
        total = _sharded.all_reduce_sum(total, mesh)
    return project_coefficient(total[0], total[1])


def _products(
    r: Rows,
    members: Sequence[int],
    steps: Sequence[Tensor],
    entries: Sequence[Any],
    own_places: Sequence[Any] | None,
    factor: Tensor | None,
    reference: Sequence[Tensor],
) -> Tensor:
    def pick(column: Sequence[Any]) -> list[Any]:
        return [column[i] for i in members] if column else []

    device = r.local[members[0]].device
    if factor is not None:
        factor = factor.to(device, non_blocking=True)
    placed = pick(own_places) if own_places is not None else None
    return transformed_dot(pick(r.local), pick(r.local_grads), pick(steps), select(entries, members), placed, factor, pick(reference))
