"""Sums over samples that a pass through the data accumulates: the two factors of a layer, or the squares of a parameter's gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcl._distributed import DataParallel
from fastcl._model import Slot
from fastcl.precision import _rows
from fastcl.precision._layers import Layer, compute_dtype

Key = tuple[str, str]


class Batch:
    """One forward pass of the model: the samples it has, as far as its input tells, and whether they were counted."""

    def __init__(self, samples: int) -> None:
        self.samples, self.counted = samples, False


class Call:
    """One call of a module within a forward pass."""

    def __init__(self, module: nn.Module, x: Tensor, batch: Batch) -> None:
        self.module, self.x, self.batch, self.counted = module, x.detach(), batch, False


class Part(Protocol):
    """A sum that is kept as something else than a tensor of its size."""

    def plus(self, other: Any) -> Any:
        """Both together."""

    def over(self, parallel: DataParallel) -> Any:
        """The sum over all ranks."""

    def is_finite(self) -> Tensor:
        """Whether all that was added was finite: a 0-d tensor."""


@dataclass
class Sums:
    """What was collected: additive over blocks of collect() and over ranks.

    ``rows``: over how many rows a layer's gradients were summed. ``tensors`` are sums, ``parts`` those that are approximated.
    """

    samples: int
    rows: dict[str, float]
    tensors: dict[Key, Tensor]
    parts: dict[Key, Part] = field(default_factory=dict)

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        rows = {name: count + other.rows[name] for name, count in self.rows.items()}
        tensors = {key: t + other.tensors[key] for key, t in self.tensors.items()}
        return Sums(self.samples + other.samples, rows, tensors, {key: part.plus(other.parts[key]) for key, part in self.parts.items()})

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """A and G per datum, float64; None where no pass has used the layer."""
        if not self.rows[layer.name]:
            return None
        inputs = self.tensors["inputs", layer.name].double() / self.samples
        gradients = self.tensors["gradients", layer.name].double() / self.rows[layer.name]
        return (gradients, inputs) if layer.kind == "embedding" else (inputs, gradients)

    def squares(self, name: str) -> Tensor:
        """The mean over samples of a parameter's squared gradients, float64."""
        return self.tensors["squares", name].double() / self.samples


class Statistic(Protocol):
    """Something that is accumulated over backward passes."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Whose calls :meth:`see` is told about."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Whose gradients, as a backward pass leaves them, :meth:`take` is told about."""

    def see(self, call: Call, grad: Tensor) -> None:
        """The gradient of the samples' summed loss at the output of a call."""

    def take(self, index: int, grad: Tensor) -> None:
        """The gradient of ``slots[index]``."""

    def close(self, samples: int | None, scale: float) -> None:
        """A backward pass of this many samples (None: not known) is over; what was taken is to be multiplied by ``scale``."""

    def drop(self) -> None:
        """The running backward pass has failed: nothing of it is kept."""

    def sums(self) -> Mapping[Key, Tensor | Part]:
        """What has been accumulated; it may be changed."""


class _OfModules:
    slots: tuple[Slot, ...] = ()

    def take(self, index: int, grad: Tensor) -> None:
        """It has no slots."""


class FactorSums(_OfModules):
    """``sum a a^T`` and ``sum g g^T`` over samples and positions ("expand"), or over samples of the mean a and the sum g ("reduce")."""

    def __init__(self, layer: Layer, sequence: str) -> None:
        weight = layer.weight.parameter()
        self.layer, self.modules, self.reduce = layer, layer.modules, sequence == "reduce"
        self.dtype, self.device = compute_dtype(weight), weight.device
        m, n = layer.rows, layer.columns
        self.inputs, self.gradients = (
            (self._zeros(m, False), self._zeros(n)) if layer.kind == "embedding" else (self._zeros(n), self._zeros(m))
        )
        self.rows = torch.zeros((), dtype=torch.float64, device=weight.device)
        self._seen: list[tuple[Call, Tensor]] = []

    def _zeros(self, size: int, matrix: bool = True) -> Any:
        return torch.zeros((size, size) if matrix else (size,), dtype=self.dtype, device=self.device)

    def _add(self, total: Any, rows: Tensor, bias: bool = False) -> None:
        """``total += [rows, 1]^T [rows, 1]``, or without the column of ones."""
        _add_squares(total, rows, bias)

    def see(self, call: Call, grad: Tensor) -> None:
        """See :class:`Statistic`, as for all that follows."""
        g = _rows.gradients(self.layer.kind, call.module, grad).to(self.dtype)
        if self.layer.kind == "embedding" and (padding := _padding(call)) is not None:
            g = g.masked_fill(padding.view(g.shape[:2]).unsqueeze(2), 0)
        self._seen.append((call, g.sum(1) if self.reduce else g))

    def _expand(self, call: Call, g: Tensor) -> None:
        """All positions count."""
        self._add(self.gradients, g.flatten(0, 1))
        if call.counted:
            return
        if self.layer.kind == "embedding":
            counts = _counts(call, self.inputs)
            self.inputs.add_(counts)
            self.rows.add_(counts.sum())
            return
        self.rows.add_(g.shape[0] * g.shape[1])
        # A few samples' windows of a convolution at a time: each input element is in many of them.
        for x in (
            torch.split(call.x, max(1, _rows.CHUNK // (g.shape[1] * self.layer.inputs))) if self.layer.kind == "convolution" else (call.x,)
        ):
            a = _rows.inputs(self.layer.kind, call.module, x).to(self.dtype)
            self._add(self.inputs, a.flatten(0, 1), self.layer.bias is not None)

    def close(self, samples: int | None, scale: float) -> None:  # noqa: ARG002
        """Not before here is anything added: a pass that fails leaves no trace. In "reduce" the parts of a sample come together."""
        seen, self._seen = self._seen, []
        if self.reduce:
            if seen:
                self._reduce(seen, samples)
            return
        seen.reverse()
        while seen:  # each gradient is freed once it was added
            self._expand(*seen.pop())

    def drop(self) -> None:
        """See :class:`Statistic`."""
        self._seen = []

    def _reduce(self, seen: list[tuple[Call, Tensor]], samples: int | None) -> None:
        for call, g in seen:
            if len(g) != samples:
                raise ValueError(
                    f"the layer {self.layer.name!r} saw {len(g)} rows of inputs in a batch of {samples} samples; sequence='reduce' needs "
                    f"samples in dimension 0 of its input, which has shape {tuple(call.x.shape)}; use sequence='expand'"
                )
        self._add(self.gradients, torch.stack([g for _, g in seen]).sum(0))
        fresh = [call for call, _ in seen if not call.counted]
        if not fresh:
            return
        self.rows.add_(len(seen[0][1]))
        if self.layer.kind == "embedding":
            self._add_mean_tokens(fresh, len(seen[0][1]))
            return
        rows = [_rows.inputs(self.layer.kind, call.module, call.x).to(self.dtype) for call in fresh]
        mean = torch.stack([a.sum(1) for a in rows]).sum(0) / sum(a.shape[1] for a in rows)
        self._add(self.inputs, mean, self.layer.bias is not None)

    def _add_mean_tokens(self, calls: list[Call], samples: int) -> None:
        tokens = torch.cat([call.x.reshape(samples, -1) for call in calls], 1)
        kept = torch.cat([_kept(call).reshape(samples, -1) for call in calls], 1)
        share = kept.sum(1, keepdim=True).clamp_min(1).to(self.inputs.dtype).reciprocal().expand_as(tokens)
        sample = torch.arange(samples, device=tokens.device).unsqueeze(1).expand_as(tokens)
        pairs, place = torch.unique(torch.stack([sample, tokens])[:, kept], dim=1, return_inverse=True)
        mean = self.inputs.new_zeros(pairs.shape[1]).index_add_(0, place, share[kept])
        self.inputs.index_add_(0, pairs[1], mean.square())

    def sums(self) -> Mapping[Key, Any]:
        """Both sides, and over how many rows the gradients were summed."""
        name = self.layer.name
        return {("inputs", name): self.inputs, ("gradients", name): self.gradients, ("rows", name): self.rows}


def _add_squares(total: Tensor, rows: Tensor, bias: bool = False) -> None:
    """``total += [rows, 1]^T [rows, 1]`` without the column of ones."""
    n = rows.shape[1]
    total[:n, :n].addmm_(rows.T, rows)
    if bias:
        sums = rows.sum(0)
        total[:n, n].add_(sums)
        total[n, :n].add_(sums)
        total[n, n].add_(len(rows))


def _padding(call: Call) -> Tensor | None:
    index = getattr(call.module, "padding_idx", None)
    return None if index is None else call.x == index


def _kept(call: Call) -> Tensor:
    padding = _padding(call)
    return torch.ones_like(call.x, dtype=torch.bool) if padding is None else ~padding


def _counts(call: Call, like: Tensor) -> Tensor:
    """How often each token occurs, padding left out."""
    return torch.zeros_like(like).index_add_(0, call.x.flatten(), _kept(call).flatten().to(like.dtype))
