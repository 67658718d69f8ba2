"""Kronecker factors of a layer collected as sketches: no [n, n] matrix of its inputs or outputs exists."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcl.precision._layers import Layer
from fastcl.precision._low_rank_factor import Sketch
from fastcl.precision._statistics import FactorSums


class SketchSums(FactorSums):
    """As :class:`FactorSums`, with ``sum a a^T`` and ``sum g g^T`` as sketches of ``2 rank + 8`` rows; an embedding's counts are exact."""

    def __init__(self, layer: Layer, sequence: str, rank: int) -> None:
        self._size = 2 * rank + 8
        super().__init__(layer, sequence)

    def _zeros(self, size: int, matrix: bool = True) -> Any:
        return Sketch(size, self._size, self.device) if matrix else super()._zeros(size, matrix)

    def _add(self, total: Any, rows: Tensor, bias: bool = False) -> None:  # noqa: ARG002 (a sketch knows by its width)
        total.add(rows)
