"""Gradients of whole batches over all parameters, one vector per backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcl._distributed import DataParallel
from fastcl._model import Slot
from fastcl.ops import _sharded
from fastcl.precision._gathered import Gathered
from fastcl.precision._statistics import Call, Key

COLUMNS = "columns"


class Columns:
    """Feeds the gradient of each pass to a :class:`Gathered`: the sum over the samples of all ranks, on all of them alike."""

    modules: tuple[nn.Module, ...] = ()

    def __init__(self, slots: Sequence[Slot], gathered: Gathered, parallel: DataParallel) -> None:
        self.slots, self.gathered, self._parallel = tuple(slots), gathered, parallel
        self._seen: dict[int, Tensor] = {}

    def see(self, call: Call, grad: Tensor) -> None:
        """It has no modules."""

    def take(self, index: int, grad: Tensor) -> None:
        """The gradient of a parameter on this rank."""
        # A copy: autograd adds to the tensor itself where it becomes a .grad, and may hand out one tensor for two parameters.
        own = grad.detach().clone()
        # It comes in parts from checkpoints that are run again within the pass.
        self._seen[index] = self._seen[index] + own if index in self._seen else own

    def drop(self) -> None:
        """Nothing of the running pass is kept."""
        self._seen = {}

    def close(self, samples: int | None, scale: float) -> None:
        """A column; the ranks' are added up."""
        seen, self._seen = self._seen, {}
        if not seen:
            return
        if samples == 0:  # a mean over no samples would be NaN
            if self._parallel.size == 1:
                return
            seen = {}
        if samples is None:
            raise ValueError(
                "how many samples a backward pass had is not known: it followed no forward pass of the whole model, or is a second one; "
                "call the collection's backward(logits)"
            )
        vector: list[Tensor | None] = [seen.get(i) for i in range(len(self.slots))]
        if self._parallel.size > 1:  # with zeros where there is nothing: all ranks take part in every sum
            metric = self.gathered.metric
            vector = [
                self._parallel.reduce(torch.zeros_like(d) if t is None else t.to(d.dtype)) for t, d in zip(vector, metric, strict=True)
            ]
        if scale != 1:
            vector = [None if t is None else t * scale for t in vector]
        self.gathered.add(vector)

    def take_all(self, grads: Sequence[Tensor | None]) -> None:
        """A column of sharded gradients, which are means over the ranks."""
        if any(g is not None for g in grads):
            size = self._parallel.size
            vector = [None if g is None else g.detach() * size for g in grads]
            self.gathered.add([t.contiguous() if t is not None and not _sharded.is_sharded([t]) else t for t in vector])

    def sums(self) -> dict[Key, Gathered]:
        """All columns, under the name of a parameter that had a NaN or an Inf."""
        self.gathered.flush()
        return {(COLUMNS, self.gathered.failing or ""): self.gathered}
