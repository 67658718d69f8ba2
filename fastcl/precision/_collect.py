"""Hooks that feed the statistics from forward and backward passes, without a loop over samples."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import _distributed
from fastcl._model import Slot, some
from fastcl.ops import _sharded
from fastcl.ops._checks import integer
from fastcl.precision._labels import losses
from fastcl.precision._layers import BATCH_NORMS, Layout
from fastcl.precision._statistics import Batch, Call, Statistic, Sums


class Collection:
    """What a block of :meth:`Precision.collect` yields."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        slots: Sequence[Slot],
        statistics: Sequence[Statistic],
        fisher: str,
        reduction: str,
        seed: int | None,
    ) -> None:
        self._model, self._layout, self._slots, self._statistics = model, layout, slots, statistics
        self._fisher, self._reduction = fisher, reduction
        self._parallel = _distributed.data_parallel(model, slots)
        # fully_shard puts others in their places while a forward pass waits for its backward pass.
        self._everything, self._params = list(model.parameters()), [slot.parameter() for slot in slots]
        self._sharded = _sharded.is_sharded(self._params)
        device = slots[0].parameter().device
        start = int(torch.randint(2**62, ())) if seed is None else integer("seed", seed, 2**63)
        # Ranks that drew the same numbers would make their samples' gradients dependent.
        drawn = hashlib.sha256(f"{start} {self._parallel.rank}".encode()).digest()
        self._generator = torch.Generator(device).manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
        self._samples = 0
        self._batch: Batch | None = None  # of the forward pass that is running or was the last
        self._stated: int | None = None  # samples of the running pass, where backward() knows them
        self._called: list[Call] = []  # in the backward pass that is running
        self._direct: set[str] = set()  # layers whose weight has a gradient though no call of the module was seen
        self._queued = False

    def backward(self, logits: Tensor, targets: Tensor | None = None) -> None:
        """Take in a batch: one backward pass of the samples' summed cross-entropy ("exact": one per class). Writes no ``.grad``.

        Args:
            logits: what the model gave for the batch, [samples, classes]; with labels at several positions [samples, ..., classes], whose
                losses are summed. The graph behind it is freed.
            targets: the labels, for "empirical" alone: [samples, ...], or probabilities of the logits' shape.

        Raises:
            TypeError: logits or targets that are no tensors.
            ValueError: logits of another shape or without a graph, targets that are missing or not wanted.
        """
        values = list(losses(self._fisher, logits, targets, self._generator))
        for i, loss in enumerate(values):
            self._pass(loss, len(logits), last=i == len(values) - 1)

    def _pass(self, loss: Tensor, samples: int, last: bool) -> None:
        self._stated = samples
        try:
            if not self._sharded:
                wanted = [p for p in self._params if p.requires_grad]
                torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=not last)
                return
            if not last:
                raise ValueError("fisher='exact' needs several backward passes through one graph, which fully_shard does not keep")
            found = _distributed.gradients(loss, self._everything, self._params)
            self._take_sharded(dict(zip([slot.name for slot in self._slots], found, strict=True)))
        finally:
            self._stated = None

    def _take_sharded(self, grads: Mapping[str, Tensor | None]) -> None:
        """Averages over the ranks come as DTensors; no hook has seen them. Every rank takes its share of the whole batch's squares."""
        for statistic in self._statistics:
            for index, slot in enumerate(statistic.slots):
                grad = grads[slot.name]
                if grad is not None:
                    statistic.take(index, _distributed.whole(grad) * self._parallel.size**0.5)
            if statistic.slots:
                statistic.close(0, 1.0)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are there within the block."""
        by_module: dict[int, tuple[nn.Module, list[Statistic]]] = {}
        for statistic in self._statistics:
            for module in statistic.modules:
                by_module.setdefault(id(module), (module, []))[1].append(statistic)
        root = _distributed.unwrapped(self._model)
        with contextlib.ExitStack() as stack:

            def keep(handle: Any) -> None:
                stack.callback(handle.remove)

            keep(root.register_forward_pre_hook(self._began, with_kwargs=True))
            for name, module in root.named_modules():
                if isinstance(module, BATCH_NORMS):
                    keep(module.register_forward_pre_hook(functools.partial(_check_batch_norm, name)))
            for module, statistics in by_module.values():
                keep(module.register_forward_hook(functools.partial(self._called_module, statistics), with_kwargs=True))
            watched = [
                (slot, functools.partial(self._parameter_arrived, statistic, i))
                for statistic in self._statistics
                for i, slot in enumerate(statistic.slots)
            ]
            watched += [(layer.weight, functools.partial(self._weight_arrived, layer.name, layer.modules)) for layer in self._layout.layers]
            for slot, function in watched:
                if slot.parameter().requires_grad:  # it may have been frozen since
                    keep(_hook(slot.parameter(), function))
            yield

    def _began(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        self._batch = None if first is None else Batch(len(first))

    def _called_module(self, statistics: Sequence[Statistic], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if self._batch is None:
            self._batch = Batch(len(x))
        _hook(output, functools.partial(self._output_arrived, statistics, Call(module, x, self._batch)))

    def _output_arrived(self, statistics: Sequence[Statistic], call: Call, grad: Tensor) -> None:
        self._enter()
        self._called.append(call)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            g = grad * call.batch.samples if self._stated is None and self._reduction == "mean" else grad
            for statistic in statistics:
                statistic.see(call, g)

    def _parameter_arrived(self, statistic: Statistic, index: int, grad: Tensor) -> None:
        self._enter()
        with torch.no_grad():
            statistic.take(index, grad)

    def _weight_arrived(self, name: str, modules: Sequence[nn.Module], grad: Tensor) -> None:  # noqa: ARG002
        """The gradient of a weight comes after those of the outputs of its modules' calls."""
        if not any(call.module is module for call in self._called for module in modules):
            self._direct.add(name)

    def _enter(self) -> None:
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._close)

    @torch.no_grad()
    def _close(self) -> None:
        """A backward pass is over."""
        self._queued = False
        called, self._called, batch, self._batch = self._called, [], self._batch, None
        batches = list({id(call.batch): call.batch for call in called}.values()) or ([batch] if batch is not None else [])
        fresh = sum(b.samples for b in batches if not b.counted)
        samples = self._stated if self._stated is not None else sum(b.samples for b in batches)
        if fresh or not batches:
            self._samples += samples if self._stated is not None else fresh
        scale = float(samples) if self._stated is None and self._reduction == "mean" else 1.0
        if self._sharded and self._stated is None and (names := [slot.name for statistic in self._statistics for slot in statistic.slots]):
            raise ValueError(
                f"the gradients of {some(names)} are sharded, and no hook sees them; use the collection's own backward(logits)"
            )
        for statistic in self._statistics:
            statistic.close(samples, scale)
        for call in called:
            call.counted = True
        for b in batches:
            b.counted = True

    def sums(self) -> Sums:
        """What was collected, over all ranks, if it is finite; one host read.

        Raises:
            ValueError: a NaN or an Inf, or a weight that was used without a call of its module; the layers are named.
        """
        tensors = {key: self._parallel.reduce(t) for statistic in self._statistics for key, t in statistic.sums().items()}
        if self._direct:
            raise ValueError(
                f"the weights of {some(sorted(self._direct))} had gradients though no call of these modules was seen, which Kronecker "
                "factors need: leave them out of layers=[...], so that they have a diagonal"
            )
        flags = torch.stack([torch.isfinite(t).all() for t in tensors.values()]).double() if tensors else torch.empty(0)
        counts = [t.reshape(1).to(flags.device) for (kind, _), t in tensors.items() if kind == "rows"]
        read = torch.cat([flags, *counts]).tolist()
        failing = list(dict.fromkeys(name for (_, name), ok in zip(tensors, read, strict=False) if not ok))
        if failing:
            raise ValueError(
                f"a NaN or an Inf in the activations or gradients of {some(failing)}: the training has diverged, or a batch holds one; "
                "nothing of this block was kept"
            )
        rows = dict(zip((name for kind, name in tensors if kind == "rows"), read[len(tensors) :], strict=True))
        kept = {key: t for key, t in tensors.items() if key[0] != "rows"}
        return Sums(self._parallel.total(self._samples), rows, kept)


def _hook(t: Tensor, function: Callable[[Tensor], None]) -> Any:
    return t.register_hook(function)  # type: ignore[no-untyped-call]


def _check_batch_norm(name: str, module: nn.Module, args: Any) -> None:
    if module.training and args and isinstance(args[0], Tensor) and len(args[0]) == 1:
        raise ValueError(
            f"the layer {name!r} ({type(module).__name__}, in train mode) got a batch of one, whose statistics are those of the "
            "sample itself; call model.eval(), or collect with larger batches"
        )
