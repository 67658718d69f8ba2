"""Lambda as a diagonal: what elastic weight consolidation keeps, behind the interface of the other forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.precision import _saved
from fastcl.precision._base import Precision
from fastcl.precision._blocks import Block
from fastcl.precision._factors import Damping
from fastcl.precision._low_rank_block import LowRankBlock
from fastcl.precision._statistics import Sums


class DiagonalPrecision(Precision):
    """Diagonal Laplace posterior of past tasks: ``Lambda = D``, per datum, the prior ``1 / n_data`` and each task's mean squared gradients.

    Squares are of the gradients of single samples, from one backward pass per batch: Linear, Conv1d/2d/3d (grouped too), Embedding, biases,
    and weights of LayerNorm, RMSNorm, GroupNorm and BatchNorm. Other parameters get theirs from the whole batch's gradient, which is
    right, in the mean, for drawn labels alone. Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; see :meth:`collect` for the conventions;
    ``sequence`` makes no difference.

    Args:
        model: the module, also in DistributedDataParallel or under ``fully_shard``. Modules may not be replaced or added afterwards.
        n_data: number of data of a task, > 0.

    Raises:
        TypeError: an argument of a wrong kind, a parameter that is not floating point.
        ValueError: ``n_data`` that is not > 0, an embedding with ``sparse=True``, no trainable parameter.
    """

    _format = "fastcl.diagonal-precision"

    def __init__(self, model: nn.Module, n_data: float) -> None:
        super().__init__(model, n_data, ())
        self._block = LowRankBlock(self._slots, 1 / self._n_data)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One."""
        return (self._block,)

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """D by parameter name, undamped, not copied."""
        return dict(zip(self._block.names, self._block.diagonal, strict=True))

    @torch.no_grad()
    def _merge(self, sums: Sums, rule: str, weight: float) -> None:  # noqa: ARG002 (a sum of diagonals is one)
        self._block.add_([sums.squares(name) * weight for name in self._block.names])

    def _damp(self, damping: Damping | None) -> None:
        self._block.damp(0.0 if damping is None else damping[1])

    def _kept(self) -> dict[str, Any]:
        return {**super()._kept(), "diagonal": _saved.copied(self.diagonal)}

    @torch.no_grad()
    def _take_over(self, state: Mapping[str, Any]) -> None:
        common = self._common(state)
        diagonal = _saved.tensors(state, "diagonal", self.diagonal, positive=True)
        self._block.damp(0.0 if common.damping is None else common.damping[1])
        self._block.replace(diagonal)
        self._adopt(common)
