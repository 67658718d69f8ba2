"""What the operators of the low_rank family accept; everything is looked at before the first write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks

Named = tuple[str, Sequence[Tensor]]
MOST_ROWS = 256
KEPT = _checks.FLOATING[:2]  # what the diagonal, the basis and everything of their dtype are stored in


def solved(grads: Sequence[Tensor], diagonal: Sequence[Tensor], basis: Sequence[Tensor], sigma: Tensor) -> None:
    read(("grads", grads), diagonal, basis, sigma)
    _checks.not_recorded("grads", grads)
    apart([("grads", grads)], [("diagonal", diagonal), ("basis", basis)])


def read(vectors: Named, diagonal: Sequence[Tensor], basis: Sequence[Tensor], sigma: Tensor) -> None:
    """A list of any floating dtype and any strides, and the precision of its elements."""
    name, value = vectors
    _checks.dense(name, value, _checks.FLOATING)
    precision(diagonal, basis, sigma)
    _like("diagonal", diagonal, vectors)
    _checks.one_device(vectors, ("diagonal", diagonal), ("basis", basis), ("sigma", [sigma]))


def stepped(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    anchors: Sequence[Tensor],
    diagonal: Sequence[Tensor],
    basis: Sequence[Tensor],
    sigma: Tensor,
    lr: float | Tensor,
    momentum: float,
    strength: float,
    radius: float | None,
) -> None:
    numbers(lr, momentum, strength, radius)
    read(("params", params), diagonal, basis, sigma)
    _checks.dense("grads", grads, _checks.FLOATING)
    _like("grads", grads, ("params", params))
    for name, state, factor, factor_name in (("momenta", momenta, momentum, "momentum"), ("anchors", anchors, strength, "strength")):
        if factor == 0:
            if state:
                raise ValueError(f"{name} has {len(state)} tensors and {factor_name} is 0; pass none")
            continue
        _stored(name, state, diagonal)
        _like(name, state, ("params", params))
    _checks.one_device(("params", params), ("grads", grads), ("momenta", momenta), ("anchors", anchors))
    if isinstance(lr, Tensor):
        _checks.one_device(("sigma", [sigma]), ("lr", [lr]))
    for name, written in (("params", params), ("momenta", momenta)):
        _checks.not_recorded(name, written)
    others = [("grads", grads), ("anchors", anchors), ("diagonal", diagonal), ("basis", basis)]
    apart([("params", params), ("momenta", momenta)], others)


def numbers(lr: float | Tensor, momentum: float, strength: float, radius: float | None) -> None:
    if isinstance(lr, Tensor):
        _checks.dense("lr", [lr], _checks.FLOATING[:2])
        if lr.dim():
            raise ValueError(f"lr has shape {tuple(lr.shape)}; a tensor lr is 0-d")
    else:
        _checks.at_least_zero("lr", lr)
    _checks.at_least_zero("momentum", momentum)
    _checks.at_least_zero("strength", strength)
    if radius is not None:
        _checks.positive("radius", radius)


def appended(diagonal: Sequence[Tensor], basis: Sequence[Tensor], sigma: Tensor, vectors: Sequence[Named], weight: float) -> None:
    precision(diagonal, basis, sigma)
    _checks.at_least_zero("weight", weight)
    rows(len(sigma), len(vectors))
    for name, value in vectors:
        _checks.dense(name, value, _checks.FLOATING)
        _like(name, value, ("diagonal", diagonal))
    _checks.one_device(("diagonal", diagonal), ("basis", basis), ("sigma", [sigma]), *vectors)
    written: list[Named] = [("diagonal", diagonal), ("basis", basis), ("sigma", [sigma])]
    for name, value in written:
        _checks.not_recorded(name, value)
    apart(written, vectors)


def rows(rank: int, count: int) -> None:
    if rank + count > MOST_ROWS:
        raise ValueError(
            f"vectors has {count} lists and sigma {rank} values; their sum is at most {MOST_ROWS}: append the vectors in several calls"
        )


def precision(diagonal: Sequence[Tensor], basis: Sequence[Tensor], sigma: Tensor) -> None:
    """D, Q and sigma among themselves."""
    _checks.dense("sigma", [sigma], (torch.float64,))
    if sigma.dim() != 1 or not sigma.is_contiguous() or len(sigma) > MOST_ROWS:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; it is contiguous [r], r at most {MOST_ROWS}: one value per row of basis")
    _stored("diagonal", diagonal, diagonal)
    _stored("basis", basis, diagonal)
    _checks.same_length("basis", basis, "diagonal", diagonal)
    for i, (b, d) in enumerate(zip(basis, diagonal, strict=True)):
        if tuple(b.shape) != (len(sigma), *d.shape):
            raise ValueError(
                f"basis[{i}] has shape {tuple(b.shape)}; for the {len(sigma)} values of sigma and diagonal[{i}] of shape "
                f"{tuple(d.shape)} it is {(len(sigma), *d.shape)}"
            )


def _stored(name: str, value: Sequence[Tensor], diagonal: Sequence[Tensor]) -> None:
    """Contiguous, all in the dtype of the diagonal."""
    _checks.dense(name, value, KEPT)
    for i, t in enumerate(value):
        if t.dtype != diagonal[0].dtype:
            raise TypeError(f"{name}[{i}] has dtype {t.dtype}, diagonal[0] has {diagonal[0].dtype}; they must be equal")
        if not t.is_contiguous():
            raise ValueError(f"{name}[{i}] is not contiguous (shape {tuple(t.shape)}, strides {t.stride()}); pass a .contiguous() copy")


def _like(name: str, value: Sequence[Tensor], other: Named) -> None:
    _checks.same_length(name, value, *other)
    _checks.same_device(name, value, *other)
    _checks.same_shape(name, value, *other)


def apart(written: Sequence[Named], others: Sequence[Named]) -> None:
    """No written tensor shares memory with another tensor of the call."""
    (front, back) = ([(f"{name}[{i}]", t) for name, value in named for i, t in enumerate(value)] for named in (written, others))
    labels = [label for label, _ in front], [label for label, _ in back]
    _checks.no_overlap("", [t for _, t in front], "", [t for _, t in back], partners_may_be_equal=False, labels=labels)
