"""What methods with a precision share: a task that has ended becomes part of it, and their state is the precision's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastcl import _distributed
from fastcl.methods._arguments import checked_forward, whole_below
from fastcl.methods._passes import Forward, _logits, training_passes, usable_batches
from fastcl.methods._state import Method
from fastcl.precision._base import RULES, Precision
from fastcl.precision._labels import FISHERS
from fastcl.precision._numbers import positive


class Laplace(Method):
    """A method whose memory of the past is one Gaussian, ``N(mu, Lambda^-1)``: it is built on a precision and takes in tasks."""

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        fisher: str,
        rule: str,
        weight: float,
        forward: Forward | None,
        train_mode: bool,
        seed: int,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(precision, Precision):
            raise TypeError(f"precision must be one of fastcl's, such as KroneckerPrecision; got {type(precision).__name__}")
        if _distributed.unwrapped(precision.model) is not _distributed.unwrapped(model):
            raise ValueError("precision is that of another model; build it from the model that is given here")
        if fisher not in FISHERS:
            raise ValueError(f"fisher must be one of {', '.join(map(repr, FISHERS))}; got {fisher!r}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}")
        if not isinstance(train_mode, bool):
            raise TypeError(f"train_mode must be True or False, got {type(train_mode).__name__}")
        _distributed.prepare(model)
        self._model, self._precision, self._fisher, self._rule = model, precision, fisher, rule
        self._weight = positive("weight", weight)
        self._forward: Forward = checked_forward(forward)
        self._train_mode, self._seed = train_mode, whole_below("seed", seed, 2**63)

    @property
    def precision(self) -> Precision:
        """The precision that this method was built on."""
        return self._precision

    def end_task(self, loader: Iterable[tuple[Any, Any]]) -> None:
        """Take in the task that was just trained: ``Lambda <- Lambda + weight F`` by the rule, then ``mu`` is where the parameters are.

        One pass over the data, a forward and a backward for each batch (with ``fisher="exact"`` one for each class). Parameters, ``.grad``,
        buffers and every module's mode are afterwards as they were. An exception before the merge, the loader's included, leaves this
        object as it was too.

        Args:
            loader: the task's training data: yields ``(x, y)`` batches, is read once. Tensors are moved to the model's device. ``y`` is
                used with ``fisher="empirical"`` alone.

        Raises:
            TypeError: a loader that cannot be iterated or whose batches are no pairs, a forward that returns no tensor.
            ValueError: a loader without a batch; what :meth:`fastcl.KroneckerPrecision.merge_` refuses, such as a NaN.
            RuntimeError: a factor that could not be inverted for the third time.
        """
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches (x, y), got {type(loader).__name__}")
        _distributed.prepare(self._model)
        batches = 0
        with training_passes(self._model, self._train_mode), self._precision.collect(self._fisher, seed=self._task_seed()) as collection:
            for x, y in usable_batches(loader, self._device()):
                logits = _logits(self._forward(self._model, x, self.tasks_seen))
                collection.backward(logits, y if self._fisher == "empirical" else None)
                batches += 1
        if not batches:
            raise ValueError("loader gave no batch; pass the task's training data as a DataLoader, a list or an iterator of batches")
        _distributed.prepare(self._model)
        self._precision.merge_(self._rule, self._weight)
        self._precision.anchor_()
        self._tasks_seen += 1

    def _task_seed(self) -> int:
        """Other labels in every task; the ranks of a process group draw others by the precision's own doing."""
        drawn = hashlib.sha256(f"{self._seed} {self.tasks_seen}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") >> 1

    def _kept(self) -> dict[str, Any]:
        # How often it has changed is a matter of this process: a run that was resumed has the same state as one that was not.
        return {"precision": {**self._precision.state_dict(), "changes": 0}}

    def _take_over(self, state: Mapping[str, Any]) -> None:
        kept = state.get("precision")
        if not isinstance(kept, Mapping):
            raise TypeError(f"state['precision'] must be a mapping made by the precision's state_dict(), got {type(kept).__name__}")
        self._precision.load_state_dict(dict(kept))

    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), super()._device())
