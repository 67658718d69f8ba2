"""The diagonal of the Fisher information, accumulated over a pass through a task's data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastcl import _distributed, ops
from fastcl._model import Slot
from fastcl.methods._passes import Loss, _logits, _scalar, check_finite, reader, usable_batches, zeros_to_sum_into
from fastcl.ops import _sharded

Batches = Iterable[tuple[Any, Any]]
Logits = Callable[[Any], Tensor]


def of_batches(
    model: nn.Module, slots: Sequence[Slot], loader: Batches, logits_of: Logits, loss: Loss, max_norm: float | None
) -> list[Tensor]:
    """Child-Tuning's: the mean over the batches of ``clip(g)^2``, g the gradient of a batch's mean loss, each tensor clipped by itself."""
    gathered, gradients = _Sum(model, slots), reader(model, slots)
    batches = 0
    for x, y in usable_batches(loader, gathered.device):
        gathered.add(gradients(_scalar(loss(_logits(logits_of(x)), y))), max_norm=max_norm)
        batches += 1
    return gathered.mean(batches)


def of_drawn_labels(model: nn.Module, slots: Sequence[Slot], loader: Batches, logits_of: Logits, seed: str) -> list[Tensor]:
    """The Fisher information: labels are drawn from the model's softmax; the mean over samples, from one backward pass per batch.

    For ``B`` samples ``E[(sum of g_i)^2] = sum of E[g_i^2]``, since the g_i are then independent and have mean zero.
    """
    parallel = _distributed.data_parallel(model, slots)
    gathered, gradients = _Sum(model, slots), reader(model, slots)
    # Ranks that drew the same numbers would make their samples' gradients dependent.
    drawn = hashlib.sha256(f"{seed} {parallel.rank}".encode()).digest()
    generator = torch.Generator(gathered.device).manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
    samples = diverged = 0
    for x, _ in usable_batches(loader, gathered.device):
        logits = _rows(_logits(logits_of(x)))
        if bool(logits.isfinite().all()):
            with torch.no_grad():
                labels = torch.multinomial(logits.double().softmax(1), 1, generator=generator)[:, 0]
        else:
            diverged += 1
            if parallel.size == 1:
                break
            # The other ranks wait in this batch's collectives, and in those of the batches to come: any label does until all can stop.
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        # The sum over this rank's samples: what arrives is the sum over all ranks' samples over the number of ranks.
        gathered.add(gradients(cross_entropy(logits, labels, reduction="sum")), weight=parallel.size**2)
        samples += len(logits)
    if parallel.total(diverged):
        raise ValueError("the logits have a NaN or an Inf, so no label can be drawn: the training has diverged")
    return gathered.mean(parallel.total(samples))


def of_true_labels(model: nn.Module, slots: Sequence[Slot], loader: Batches, logits_of: Logits, loss: Loss) -> list[Tensor]:
    """The empirical Fisher information: the mean over samples of the squared gradient for the true label, one backward pass per sample."""
    parallel = _distributed.data_parallel(model, slots)
    gathered, gradients = _Sum(model, slots), reader(model, slots)
    samples = 0
    for x, y in usable_batches(loader, gathered.device):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or len(x) != len(y):
            raise TypeError("labels='true' takes batches apart, so x and y must be tensors with one row per sample")
        for i in range(len(x)):
            for turn in range(parallel.size):  # the ranks' gradients are averaged: all but one are made zero
                value = _scalar(loss(_logits(logits_of(x[i : i + 1])), y[i : i + 1]))
                gathered.add(gradients(value * float(turn == parallel.rank)), weight=parallel.size**2)
        samples += len(x)
    return gathered.mean(parallel.total(samples))


class _Sum:
    """Squared gradients summed up, one tensor per slot, in float32 at least."""

    def __init__(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        _sharded.reshard(model)
        self.slots, self.totals = slots, zeros_to_sum_into(slots)
        self.device = slots[0].parameter().device

    def add(self, grads: Sequence[Tensor | None], weight: float = 1.0, max_norm: float | None = None) -> None:
        pairs = [(total, g.detach()) for total, g in zip(self.totals, grads, strict=True) if g is not None]
        with torch.no_grad():
            ops.fisher_add_([total for total, _ in pairs], [g for _, g in pairs], weight, max_norm)

    def mean(self, count: int) -> list[Tensor]:
        if not count:
            raise ValueError("loader gave no batch; pass the task's training data as a DataLoader, a list or an iterator of batches")
        check_finite(self.totals, self.slots)
        with torch.no_grad():
            for total in _sharded.local("fisher", self.totals):
                total.div_(count)
        return self.totals


def _rows(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise ValueError(
            f"labels are drawn for logits of shape [samples, classes]; forward gave {tuple(logits.shape)}: let it flatten what comes first"
        )
    return logits
