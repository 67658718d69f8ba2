"""Squares of the gradients of single samples, summed: the diagonal of the Fisher information."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcl._model import Slot
from fastcl.precision import _rows
from fastcl.precision._layers import Diagonal, compute_dtype
from fastcl.precision._statistics import Call, Key, Statistic, _kept, _OfModules


class Squares(_OfModules):
    """``independent``: labels were drawn, so that squares of a batch's summed gradients are right where samples cannot be told apart.

    Their gradients are then independent with mean 0, and ``E[(sum_n g_n)^2] = sum_n E[g_n^2]``.
    """

    def __init__(self, diagonal: Diagonal, independent: bool) -> None:
        p = diagonal.slot.parameter()
        self.diagonal, self.modules, self.independent = diagonal, diagonal.modules, independent
        self.total = torch.zeros(p.shape, dtype=compute_dtype(p), device=p.device)
        self._whole: list[Tensor] = []
        self._seen: list[Any] = []

    def take(self, index: int, grad: Tensor) -> None:  # noqa: ARG002
        """The gradient of a batch in whose pass no module was called."""
        self._whole.append(_rows.wide(grad).to(self.total.dtype))

    def close(self, samples: int | None, scale: float) -> None:
        """See :class:`Statistic`, as for all that follows."""
        whole, self._whole = self._whole, []
        if whole:
            self.total.add_((torch.stack(whole).sum(0) * scale).square_())
        self._add(samples)

    def _add(self, samples: int | None) -> None:
        """What calls have shown."""

    def drop(self) -> None:
        """Nothing of the running pass is kept."""
        self._whole, self._seen = [], []

    def sums(self) -> dict[Key, Tensor]:
        """The squares."""
        return {("squares", self.diagonal.slot.name): self.total}

    def _apart(self, rows: int, samples: int | None) -> bool:
        """Whether rows are samples; where they are not the whole batch is taken as one, if labels allow it."""
        if rows == samples:
            return True
        if not self.independent:
            raise ValueError(
                f"the layer {self.diagonal.layer!r} saw {rows} rows of inputs in a batch of {samples} samples; with fisher='exact' or "
                "'empirical' it needs samples in dimension 0 of its input; use fisher='sample'"
            )
        return False


class VectorSquares(Squares):
    """Of a bias, or of a normalisation's weight."""

    def see(self, call: Call, grad: Tensor) -> None:
        """Sums over positions."""
        self._seen.append(_rows.sample_gradient(self.diagonal.kind, self.diagonal.role, call.module, call.x, grad))

    def _add(self, samples: int | None) -> None:
        """Sums over calls, then squares."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        if all(self._apart(len(g), samples) for g in seen):
            squares = torch.stack(seen).sum(0).square().sum(0)
        else:
            squares = torch.stack([g.sum(0) for g in seen]).sum(0).square()
        self.total.add_(squares.view(self.total.shape))


class MatrixSquares(Squares):
    """Of the weight of a linear layer or a convolution, grouped or not."""

    def see(self, call: Call, grad: Tensor) -> None:
        """Rows on both sides."""
        kind = self.diagonal.kind
        self._seen.append((_rows.inputs(kind, call.module, call.x), _rows.gradients(kind, call.module, grad)))

    def _add(self, samples: int | None) -> None:
        """Products of each sample's rows, squared."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        groups = getattr(self.modules[0], "groups", 1)
        apart = all(self._apart(len(a) // groups, samples) for a, _ in seen)
        sides = [torch.cat([_joined(part, groups, apart) for part in side], 1) for side in zip(*seen, strict=True)]
        self.total.add_(_rows.square_sums(sides[0], sides[1], groups).view(self.total.shape))


class EmbeddingSquares(Squares):
    """Of an embedding's weight: a sample's gradients of a token come together before the square."""

    def see(self, call: Call, grad: Tensor) -> None:
        """Rows of gradients."""
        self._seen.append((call, _rows.gradients("embedding", call.module, grad)))

    def _add(self, samples: int | None) -> None:
        """One row for each pair of sample and token."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        apart = all(self._apart(len(g), samples) for _, g in seen)
        keys, rows = [], []
        for call, g in seen:
            kept = _kept(call).reshape(g.shape[:2])
            sample = (
                torch.arange(len(g), device=g.device).unsqueeze(1).expand(g.shape[:2])
                if apart
                else torch.zeros_like(kept, dtype=torch.long)
            )
            keys.append(torch.stack([sample[kept], call.x.reshape(g.shape[:2])[kept]]))
            rows.append(g[kept])
        pairs, place = torch.unique(torch.cat(keys, 1), dim=1, return_inverse=True)
        together = self.total.new_zeros(pairs.shape[1], self.total.shape[1]).index_add_(0, place, torch.cat(rows).to(self.total.dtype))
        self.total.index_add_(0, pairs[1], together.square_())


class BatchSquares:
    """Of any other parameter, from the gradient of the batch's summed loss; labels must have been drawn."""

    modules: tuple[nn.Module, ...] = ()

    def __init__(self, slot: Slot) -> None:
        p = slot.parameter()
        self.slots = (slot,)
        self.total = torch.zeros(p.shape, dtype=compute_dtype(p), device=p.device)
        self._seen: list[Tensor] = []

    def see(self, call: Call, grad: Tensor) -> None:
        """It has no modules."""

    def take(self, index: int, grad: Tensor) -> None:  # noqa: ARG002
        """The gradient of a pass."""
        self._seen.append(_rows.wide(grad).to(self.total.dtype))

    def close(self, samples: int | None, scale: float) -> None:  # noqa: ARG002
        """Its square. It may have come in parts, from checkpoints that are run again within the pass."""
        seen, self._seen = self._seen, []
        if seen:
            self.total.add_((torch.stack(seen).sum(0) * scale).square_())

    def drop(self) -> None:
        """Nothing of the running pass is kept."""
        self._seen = []

    def sums(self) -> dict[Key, Tensor]:
        """The squares."""
        return {("squares", self.slots[0].name): self.total}


def of(diagonal: Diagonal, independent: bool) -> Statistic:
    """The statistic of a parameter with a diagonal block."""
    if diagonal.kind == "other":
        return BatchSquares(diagonal.slot)
    if diagonal.role == "bias" or diagonal.kind == "norm":
        return VectorSquares(diagonal, independent)
    return EmbeddingSquares(diagonal, independent) if diagonal.kind == "embedding" else MatrixSquares(diagonal, independent)


def _joined(rows: Tensor, groups: int, apart: bool) -> Tensor:
    """[N * groups, T, n]; with all samples as one [groups, N * T, n]."""
    return rows if apart else torch.unflatten(rows, 0, (-1, groups)).transpose(0, 1).flatten(1, 2)
