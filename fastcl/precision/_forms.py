"""``Lambda = D + U U^T`` as tensors beside the parameters, whole or sharded, and sums of such forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import _distributed, ops
from fastcl.ops import _sharded
from fastcl.ops._sharded_low_rank import _behind_rows

COPIED = 4  # rows of a basis that are scaled in copies at a time


class Form(NamedTuple):
    """``Lambda = D + U U^T``: the diagonal, the rows of ``Q`` and the singular values of ``D^-1/2 U``; see :mod:`fastcl.ops.low_rank`."""

    diagonal: list[Tensor]
    basis: list[Tensor]
    sigma: Tensor

    @classmethod
    def on(cls, diagonal: list[Tensor], rank: int) -> Form:
        """The given diagonal and nothing else."""
        device = diagonal[0].device
        return cls(diagonal, [empty_rows(d, rank) for d in diagonal], torch.zeros(rank, dtype=torch.float64, device=device))


def with_diagonal(own: Form, diagonal: list[Tensor]) -> Form:
    """The form of ``diagonal + U U^T`` with the U of another: its rows are made orthonormal for the new diagonal, nothing is dropped."""
    result = Form.on(diagonal, len(own.sigma))
    for start in range(0, len(own.sigma), COPIED):
        add_rows(result, own, slice(start, start + COPIED))
    return result


@torch.no_grad()
def damped(own: Form, alpha: float) -> Form:
    """``own + alpha I``: a second basis."""
    diagonal = [d.clone() for d in own.diagonal]
    for d in _sharded.shards(diagonal):
        d.add_(alpha)
    return with_diagonal(own, diagonal)


@torch.no_grad()
def moved(own: Form, diagonal: list[Tensor]) -> Form:
    """The same form beside its diagonal on another device or in other shards."""
    basis = [_distributed.lay_out(b, empty_rows(d, 0)) for b, d in zip(own.basis, diagonal, strict=True)]
    return Form(diagonal, basis, own.sigma.to(diagonal[0].device))


def add_rows(result: Form, source: Form, rows: slice, weight: float = 1.0, copies: bool = True) -> None:
    """``result += weight U U^T`` of some rows of another form, ``U = D^1/2 q sigma``. Without copies its basis is used up."""
    sigma = source.sigma[rows]
    if not bool((sigma > 0).any()):
        return
    vectors = rows_of(source.basis, source.diagonal, rows)
    if copies:
        vectors = [[t.clone() for t in vector] for vector in vectors]
    roots = [d.sqrt() for d in _sharded.shards(source.diagonal)]
    for vector, s in zip(vectors, sigma, strict=True):
        for t, root in zip(_sharded.shards(vector), roots, strict=True):
            t.mul_(root).mul_(s.to(t.dtype))
    ops.low_rank_append_(*result, vectors, weight)


def empty_rows(like: Tensor, rank: int) -> Tensor:
    """Zeros [rank, *shape], contiguous, on the device of ``like``; of a DTensor every rank holds its shards of all rows."""
    if not _sharded.is_sharded([like]):
        return torch.zeros((rank, *like.shape), dtype=like.dtype, device=like.device)
    local = _sharded.shards([like])[0]
    return _as_rows(torch.zeros((rank, *local.shape), dtype=local.dtype, device=local.device), like)


def rows_of(basis: Sequence[Tensor], like: Sequence[Tensor], rows: slice) -> list[list[Tensor]]:
    """Some rows of a basis as one list of tensors each, placed as ``like``: views, on this rank's memory."""
    local = _sharded.shards(basis)
    count = len(range(*rows.indices(local[0].shape[0] if local else 0)))
    return [[_as_one(b[rows][k], t) for b, t in zip(local, like, strict=True)] for k in range(count)]


def _as_rows(local: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    d = like
    if not isinstance(d, DTensor):
        return local
    shape = torch.Size((local.shape[0], *d.shape))
    placements = [_behind_rows(p) for p in d.placements]
    return DTensor.from_local(local, d.device_mesh, placements, run_check=False, shape=shape, stride=_contiguous(shape))


def _as_one(local: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=_contiguous(like.shape))


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()
