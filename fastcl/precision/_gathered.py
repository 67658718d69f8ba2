"""Gradients gathered as a form of low rank plus a diagonal, until the end of a task merges them into a precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import _distributed, ops
from fastcl._distributed import DataParallel
from fastcl.ops import _low_rank_checks, _sharded
from fastcl.precision._forms import Form, add_rows, with_diagonal


class Gathered:
    """``S = sum_k v_k v_k^T`` of gradients over all parameters: what ``metric + S`` is more than its diagonal ``metric``, in rank r.

    The directions kept are the principal ones in the norm of ``metric``, that of the precision that S will be added to. Vectors wait until
    there are ``batch`` of them, since each compression reads and writes the whole basis.
    """

    def __init__(self, metric: Sequence[Tensor], rank: int, batch: int, names: Sequence[str]) -> None:
        self.names, self.batch, self.metric = names, batch, list(metric)
        self.form = Form.on([d.clone() for d in metric], rank)
        self.waiting: list[list[Tensor]] = []
        self.failing: str | None = None

    def add(self, vector: Sequence[Tensor | None]) -> None:
        """Take in a vector, kept as it is; None counts as zeros."""
        self.waiting.append([torch.zeros_like(d) if t is None else t for t, d in zip(vector, self.metric, strict=True)])
        if len(self.waiting) >= self.batch:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Compress what waits. A NaN or an Inf in it is remembered as :attr:`failing`, the parameter's name, and S stays as it is."""
        vectors, self.waiting = self.waiting, []
        for vector in vectors:
            failing = _distributed.first_failing(vector, torch.isfinite)
            if failing is not None:
                self.failing = self.names[failing]
        if vectors and self.failing is None:
            ops.low_rank_append_(*self.form, vectors)

    def plus(self, other: Gathered) -> Gathered:
        """Both sums, of one metric. What ``other`` holds is used up."""
        self.flush()
        both = Gathered.__new__(Gathered)
        both.__dict__.update(self.__dict__, form=sum_of(self.form, other, 1.0), waiting=[])
        return both

    def over(self, parallel: DataParallel) -> Gathered:  # noqa: ARG002
        """Itself: every rank was given the sums over all ranks' samples."""
        self.flush()
        return self

    def is_finite(self) -> Tensor:
        """Whether all vectors were."""
        return torch.tensor(self.failing is None, device=self.form.sigma.device)


@torch.no_grad()
def sum_of(own: Form, gathered: Gathered, weight: float) -> Form:
    """A new form of ``own + weight S`` with the rank of ``own``. What ``gathered`` holds is used up."""
    gathered.flush()
    more = gathered.form
    diagonal = [d.clone() for d in own.diagonal]
    lists = (_sharded.shards(t) for t in (diagonal, more.diagonal, gathered.metric))
    for d, grown, metric in zip(*lists, strict=True):
        d.add_((grown - metric).clamp_(min=0), alpha=weight)
    result = with_diagonal(own, diagonal)
    rank = len(own.sigma)
    most = max(1, min(rank, _low_rank_checks.MOST_ROWS - rank))
    for start in range(0, rank, most):
        add_rows(result, more, slice(start, start + most), weight, copies=False)
    return result
