"""A precision of low rank plus a diagonal over all trainable parameters together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastcl import _distributed
from fastcl.ops import _low_rank_checks
from fastcl.precision import _saved
from fastcl.precision._base import Precision
from fastcl.precision._blocks import Block
from fastcl.precision._columns import COLUMNS, Columns
from fastcl.precision._factors import Damping
from fastcl.precision._forms import Form
from fastcl.precision._gathered import Gathered, sum_of
from fastcl.precision._joint_block import JointBlock
from fastcl.precision._numbers import whole
from fastcl.precision._statistics import Statistic, Sums


class LowRankPrecision(Precision):
    """``Lambda = D + U U^T``, D diagonal and U of rank ``rank``, over all trainable parameters together: it couples layers.

    Kept as ``D``, orthonormal rows ``Q`` [rank, P] and the singular values ``sigma`` of ``D^-1/2 U``; a step is two sweeps over ``Q``
    (:func:`fastcl.ops.low_rank_step_`). Natural steps: Kao, Jensen et al., "Natural continual learning", NeurIPS 2021, arXiv 2106.08085. A
    task adds its Fisher information by :func:`fastcl.ops.low_rank_append_`: the principal directions of the sum stay in U, what is dropped
    goes to D, element by element, so that the diagonal of Lambda is always that of the sum.

    The Fisher information per datum, the mean over samples of ``g_n g_n^T``, comes from one column per backward pass, in which samples'
    gradients are summed before they are squared:

    * ``fisher="sample"``: ``v = sum_n g_n`` for drawn labels. They are independent and the ``g_n`` have mean zero, so that ``E[v v^T]`` is
      the sum of the ``E[g_n g_n^T]``: with N samples in all, ``1/N sum_batches v v^T`` is unbiased.
    * ``fisher="exact"`` (a column per class) and ``"empirical"``: ``v = sum_n e_n w_n g_n`` with random signs ``e_n``, whose products have
      mean zero where gradients have not; ``w_n`` is the root of the class' probability, or 1. Unbiased, too.

    A batch gives one direction however large it is: many small batches tell more of F than few large ones. ``rank`` columns of each task
    at least are a good beginning. ``sequence`` makes no difference, nor the ``rule`` of :meth:`merge_`: forms of this kind just add up.
    A parameter whose gradient is None in a step stays as it is; the others step by the inverse of their own part of Lambda.

    Example::

        precision = fastcl.LowRankPrecision(model, n_data=len(dataset), rank=16)
        optimizer = fastcl.optim.NCL(model, precision, lr=0.05)
        ...
        with precision.collect() as fisher:
            for x, _ in loader:
                fisher.backward(model(x))
        precision.merge_()
        precision.anchor_()

    With parameters sharded by ``fully_shard`` (FSDP2) D, Q and the anchor are sharded as they are; a step sums O(rank) numbers over the
    ranks. Every rank calls every method, with as many batches on each.

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` or neither.
        n_data: the number of data of a task, > 0: ``Lambda_0 = I / n_data``.
        rank: rows of Q, from 0 (then D is all there is) to 255. Memory: ``(8 + 4 rank) P`` bytes in float32, while collecting
            ``4 (1 + rank + gather) P`` more.
        gather: columns that wait for one compression, at least 1; None: as many as ``rank``, up to 8.

    Raises:
        TypeError: a model or a number of a wrong kind.
        ValueError: a number outside its range, no trainable parameter, an embedding with sparse gradients.
    """

    _format = "fastcl.low-rank-precision"

    def __init__(self, model: nn.Module, n_data: float, *, rank: int = 16, gather: int | None = None) -> None:
        super().__init__(model, n_data, ())
        self._rank = whole("rank", rank, 0, _low_rank_checks.MOST_ROWS - 1)
        most = _low_rank_checks.MOST_ROWS - self._rank
        self._gather = min(max(self._rank, 1), 8, most) if gather is None else whole("gather", gather, 1, most)
        self._block = JointBlock(self._slots, self._rank, 1 / self._n_data)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One: it couples all parameters."""
        return (self._block,)

    @property
    def rank(self) -> int:
        """The number of rows of Q."""
        return self._rank

    @property
    def report(self) -> dict[str, str]:
        """What happens to each trainable parameter, by its name."""
        return {slot.name: f"columns of one Q of rank {self._rank}, and a diagonal" for slot in self._slots}

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """D by parameter name, not copied, without damping."""
        return self._by_name(self._block.own.diagonal)

    @property
    def basis(self) -> dict[str, Tensor]:
        """Q by parameter name, each [rank, ...] for a parameter of shape [...], not copied, without damping."""
        return self._by_name(self._block.own.basis)

    @property
    def sigma(self) -> Tensor:
        """The singular values of D^-1/2 U, float64 [rank], descending; 0 where a row is unused."""
        return self._block.own.sigma

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {slot.name: t for slot, t in zip(self._slots, tensors, strict=True)}

    @property
    def _on_shards(self) -> bool:
        return True

    def _damp(self, damping: Damping | None) -> None:
        self._block.damp(0.0 if damping is None else damping[1])

    def _statistics(self, fisher: str, sequence: str) -> list[Statistic]:  # noqa: ARG002
        gathered = Gathered(self._block.own.diagonal, self._rank, self._gather, self._block.names)
        return [Columns(self._slots, gathered, _distributed.data_parallel(self._model, self._slots))]

    def _merge(self, sums: Sums, rule: str, weight: float) -> None:  # noqa: ARG002
        gathered = cast(Gathered, sums.parts[COLUMNS, ""])
        self._block.take(sum_of(self._block.own, gathered, weight / sums.samples))

    def _kept(self) -> dict[str, Any]:
        kinds = {"diagonal": _saved.copied(self.diagonal), "basis": _saved.copied(self.basis)}
        return {**super()._kept(), **kinds, "sigma": self.sigma.clone()}

    @torch.no_grad()
    def _take_over(self, state: Mapping[str, Any]) -> None:
        common = self._common(state)
        diagonal = _saved.tensors(state, "diagonal", self.diagonal, positive=True)
        sigma = state.get("sigma")
        if isinstance(sigma, Tensor) and sigma.dim() == 1 and len(sigma) != self._rank:
            raise ValueError(f"the state has rank {len(sigma)}, this precision {self._rank}; make it with rank={len(sigma)}")
        _saved.tensor("sigma", sigma, (self._rank,), "that of the rank")
        basis = _saved.tensors(state, "basis", self.basis)
        own = self._block.own
        placed = _placed(diagonal, own.diagonal), _placed(basis, own.basis)
        form = Form(*placed, state["sigma"].to(own.sigma.device, torch.float64, copy=True))
        _check_rows(form.sigma, self._block.rows_of(form))
        self._block.alpha = 0.0 if common.damping is None else common.damping[1]
        self._block.take(form)
        self._adopt(common)


def _placed(given: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """Copies of the dtypes, devices and shards of what is kept."""
    return [_distributed.lay_out(t, mine).to(mine.dtype).clone() for t, mine in zip(given, own, strict=True)]


def _check_rows(sigma: Tensor, gram: Tensor) -> None:
    """Each row that is used has length 1 and is orthogonal to the others."""
    if bool((sigma < 0).any()):
        raise ValueError("sigma has values below 0")
    used = (sigma > 0).to(gram.dtype)
    if len(sigma) and not float((gram * torch.outer(used, used) - used.diag()).abs().amax()) <= 1e-4:
        raise ValueError("the rows of basis are not orthonormal over all parameters together")
