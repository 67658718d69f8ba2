"""Hooks that feed the statistics from forward and backward passes, without a loop over samples."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import _distributed
from fastcl._model import Slot, some
from fastcl.ops import _sharded
from fastcl.ops._checks import integer
from fastcl.precision._columns import Columns
from fastcl.precision._labels import losses
from fastcl.precision._layers import BATCH_NORMS, Layout
from fastcl.precision._squares import Squares
from fastcl.precision._statistics import Batch, Call, Statistic, Sums
from fastcl.precision._watches import Watch


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
        self._batch: Batch | None = None  # of the forward pass that is running or was the last, until its backward pass
        self._last: Batch | None = None  # of the last forward pass
        self._stated: int | None = None  # samples of the running pass, where backward() knows them
        self._called: list[Call] = []  # in the backward pass that is running
        self._watches = [] if self._sees_all else _watches(layout, statistics)
        self._running: weakref.ref[_End] | None = None  # the backward pass; dead if it has failed
        self._closed = self._partly = self._over = False
        self._fresh = 0  # samples of the running pass that were not in an earlier one

    def backward(self, logits: Tensor, targets: Tensor | None = None) -> None:
        """Take in a batch: one backward pass of the samples' summed cross-entropy ("exact": one per class). Writes no ``.grad``.

        Args:
            logits: what the model gave for the batch, [samples, classes]; with labels at several positions [samples, ..., classes], whose
                losses are summed. The graph behind it is freed.
            targets: the labels, for "empirical" alone: [samples, ...], or probabilities of the logits' shape.

        Raises:
            TypeError: logits or targets that are no tensors.
            ValueError: logits of another shape or without a graph, targets that are missing or not wanted.
            RuntimeError: after the end of the block.
        """
        if self._over:
            raise RuntimeError("the block of collect() that gave this collection has ended; call backward() within it")
        values = list(losses(self._fisher, logits, targets, self._generator, self._signed))
        for i, loss in enumerate(values):
            self._pass(loss, len(logits), first=i == 0, last=i == len(values) - 1)

    @property
    def _sees_all(self) -> bool:
        """Whether gradients are taken where they arrive at the parameters, all of them."""
        return any(isinstance(statistic, Columns) for statistic in self._statistics)

    @property
    def _signed(self) -> bool:
        """Whether random signs have to make up for gradients of single samples whose mean is not zero."""
        return self._fisher != "sample" and self._sees_all

    def _pass(self, loss: Tensor, samples: int, first: bool, last: bool) -> None:
        self._stated, self._fresh, self._closed = samples, samples if first else 0, False
        try:
            if not self._sharded:
                wanted = [p for p in self._params if p.requires_grad]
                torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=not last)
                return
            if not last:
                raise ValueError("fisher='exact' needs several backward passes through one graph, which fully_shard does not keep")
            wanted = [p for p in self._params if p.requires_grad]
            found = {id(p): g for p, g in zip(wanted, _distributed.gradients(loss, self._everything, wanted), strict=True)}
            self._take_sharded({slot.name: found.get(id(p)) for slot, p in zip(self._slots, self._params, strict=True)})
        except BaseException:
            self._partly = self._partly or not first or self._closed
            self._drop()
            raise
        finally:
            self._stated = None

    def _take_sharded(self, grads: Mapping[str, Tensor | None]) -> None:
        """Averages over the ranks come as DTensors; no hook has seen them. Every rank takes its share of the whole batch's squares."""
        if not self._closed:
            self._close()
        for statistic in self._statistics:
            if isinstance(statistic, Columns):
                statistic.take_all([grads.get(slot.name) for slot in statistic.slots])
                continue
            for index, slot in enumerate(statistic.slots):
                grad = grads[slot.name]
                if grad is not None:
                    statistic.take(index, _distributed.whole(grad) * self._parallel.size**0.5)
            if statistic.slots:
                statistic.close(None, 1.0)
        for watch in self._watches:
            grad = grads[watch.slot.name]
            if grad is not None and not watch.called:
                watch.bypassed(_distributed.whole(grad) * self._parallel.size**0.5)
                if watch.squares is not None:
                    watch.squares.close(None, 1.0)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are there within the block."""
        by_module: dict[int, tuple[nn.Module, list[Statistic | Watch]]] = {}
        for each in self._seeing():
            for module in each.modules:
                by_module.setdefault(id(module), (module, []))[1].append(each)
        root = _distributed.unwrapped(self._model)
        with contextlib.ExitStack() as stack:

            def keep(handle: Any) -> None:
                stack.callback(handle.remove)

            keep(root.register_forward_pre_hook(_Hook(self._began), with_kwargs=True))
            for name, module in root.named_modules():
                if isinstance(module, BATCH_NORMS):
                    keep(module.register_forward_pre_hook(_Hook(functools.partial(_check_batch_norm, name))))
            for module, seeing in by_module.values():
                # First of all: another hook may change the output.
                hook = _Hook(functools.partial(self._called_module, seeing))
                keep(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            watched: list[tuple[Slot, Callable[[Tensor], None]]] = [
                (slot, functools.partial(statistic.take, i)) for statistic in self._statistics for i, slot in enumerate(statistic.slots)
            ]
            for watch in self._watches:
                watch.trust(getattr(watch.slot.parameter(), "_backward_hooks", None) or {}, _Hook)
                watched.append((watch.slot, watch.arrived))
            for slot, function in watched:
                if slot.parameter().requires_grad:  # it may have been frozen since
                    keep(_hook(slot.parameter(), functools.partial(self._parameter_arrived, function)))
            try:
                yield
            finally:
                self._over = True

    def _began(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if self._running is not None and self._running() is None:
            self._drop()
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        self._batch = self._last = None if first is None else Batch(len(first))

    def _called_module(self, seeing: Sequence[Statistic | Watch], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if self._batch is None:  # a checkpoint that is run again belongs to the batch
            again = torch._C._current_graph_task_id() >= 0
            self._batch = self._last if again and self._last is not None else Batch(len(x))
        self._last = self._batch
        shape, call = output.shape, Call(module, x, self._batch)
        _hook(_written(output), lambda grad: self._output_arrived(seeing, call, grad.reshape(shape)))

    def _output_arrived(self, seeing: Sequence[Statistic | Watch], call: Call, grad: Tensor) -> None:
        if self._over:
            return
        self._enter()
        self._called.append(call)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            g = grad * call.batch.samples if self._stated is None and self._reduction == "mean" else grad
            for each in seeing:
                if isinstance(each, Watch):
                    each.see(call, grad)
                elif g.numel():  # an empty batch has nothing to show
                    each.see(call, g)

    def _parameter_arrived(self, function: Callable[[Tensor], None], grad: Tensor) -> None:
        self._enter()
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            function(grad)

    def _enter(self) -> None:
        if self._running is not None:
            if self._running() is not None:  # this pass, or one of a checkpoint within it
                return
            self._drop()
        end = _End(self._close)
        self._running = weakref.ref(end)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _seeing(self) -> list[Statistic | Watch]:
        return [*self._statistics, *self._watches]

    def _drop(self) -> None:
        """A backward pass has failed: nothing of it is kept."""
        self._running, self._called = None, []
        for each in self._seeing():
            each.drop()

    def _close(self) -> None:
        """A backward pass is over."""
        try:
            self._add()
        except BaseException:
            self._drop()
            raise

    @torch.no_grad()
    def _add(self) -> None:
        self._running, self._closed = None, True
        if self._stated is None and self._signed:
            raise ValueError(
                f"fisher={self._fisher!r} needs a sign for each sample's loss: call the collection's backward(logits, targets)"
            )
        called, self._called, batch, self._batch = self._called, [], self._batch, None
        batches = list({id(call.batch): call.batch for call in called}.values()) or ([batch] if batch is not None else [])
        fresh = sum(b.samples for b in batches if not b.counted)
        samples = self._stated if self._stated is not None else sum(b.samples for b in batches) if batches else None
        if self._sharded and self._stated is None and (names := [slot.name for statistic in self._statistics for slot in statistic.slots]):
            raise ValueError(
                f"the gradients of {some(names)} are sharded, and no hook sees them; use the collection's own backward(logits)"
            )
        scale = float(samples or 0) if self._stated is None and self._reduction == "mean" else 1.0
        before, self._partly = self._partly, True
        for watch in self._watches:
            watch.close()
        for statistic in self._statistics:
            statistic.close(samples, scale)
        self._partly = before
        self._samples += fresh if self._stated is None else self._fresh
        for call in called:
            call.counted = True
        for b in batches:
            b.counted = True

    def sums(self) -> Sums:
        """What was collected, over all ranks, if it is finite.

        Raises:
            RuntimeError: a batch was taken in by half before its backward pass failed.
            ValueError: a NaN or an Inf, or a parameter that was used without a call of its module; they are named.
        """
        if self._partly:
            raise RuntimeError("a backward pass has failed after a part of its batch had been added; nothing of this block was kept")
        found = {key: t for statistic in self._statistics for key, t in statistic.sums().items()}
        tensors = {key: self._parallel.reduce(t) for key, t in found.items() if isinstance(t, Tensor)}
        parts = {key: part.over(self._parallel) for key, part in found.items() if not isinstance(part, Tensor)}
        outside = self._outside()
        checked = {**tensors, **parts}
        flags = torch.stack([t.is_finite() if key in parts else torch.isfinite(t).all() for key, t in checked.items()]).double()
        counts = [t.reshape(1).to(flags.device) for (kind, _), t in tensors.items() if kind == "rows"]
        read = torch.cat([flags, *counts]).tolist()
        failing = list(dict.fromkeys(name for (_, name), ok in zip(checked, read, strict=False) if not ok))
        if failing:
            raise ValueError(
                f"a NaN or an Inf in the activations or gradients of {some(failing)}: the training has diverged, or a batch holds one; "
                "nothing of this block was kept"
            )
        if outside is not None:
            raise ValueError(outside)
        rows = dict(zip((name for kind, name in tensors if kind == "rows"), read[len(checked) :], strict=True))
        kept = {key: t for key, t in tensors.items() if key[0] != "rows"}
        return Sums(self._parallel.total(self._samples), rows, kept, parts)

    def _outside(self) -> str | None:
        """What is to be said of gradients that no call of a module gave, the same on all ranks."""
        if not self._watches:
            return None
        flags = torch.stack([torch.stack([w.partly, w.partly.new_tensor(w.direct)]) for w in self._watches]).double()
        read = self._parallel.reduce(flags).tolist()
        direct = [watch for watch, (_, count) in zip(self._watches, read, strict=True) if count]
        partly = [watch.slot.name for watch, (count, _) in zip(self._watches, read, strict=True) if count]
        if factored := [watch.slot.name for watch in direct if watch.squares is None]:
            return (
                f"{some(factored)} had gradients though no call of their modules was seen, which Kronecker factors need: leave the modules "
                "out of layers=[...], so that they have diagonals, and collect with fisher='sample'"
            )
        if direct:
            return (
                f"{some(watch.slot.name for watch in direct)} had gradients though no call of their modules was seen, without which those "
                f"of single samples cannot be told apart, as fisher={self._fisher!r} needs; use fisher='sample', or freeze them"
            )
        if partly:
            return (
                f"{some(partly)} had other gradients than calls of their modules gave: something else uses them too, which no hook sees, "
                "such as functional.linear(x, module.weight). Let a module do that which shares the parameter (an nn.Linear whose weight "
                "it is), or freeze it"
            )
        return None


class _End:
    """What autograd calls when a backward pass is over, and keeps alive until then: it dies with a pass that fails."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __call__(self) -> None:
        self._function()


class _Hook:
    """A hook that does nothing in a copy of the model: the block that would take it away is not the copy's."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function: Callable[..., None] | None = function

    def __call__(self, *args: Any) -> None:
        if self._function is not None:
            self._function(*args)

    def __getstate__(self) -> dict[str, None]:
        return {"_function": None}


def _hook(t: Tensor, function: Callable[[Tensor], None]) -> Any:
    return t.register_hook(_Hook(function))  # type: ignore[no-untyped-call]


def _written(output: Tensor) -> Tensor:
    """The tensor that a module has made, whose gradient is to be seen.

    An output that is a view of all of it has a place in the graph that an operation in place takes away (a Linear layer's on inputs with
    more than two dimensions).
    """
    base = output._base if output._is_view() else None
    if base is None or base.numel() != output.numel() or not base.requires_grad:
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _watches(layout: Layout, statistics: Sequence[Statistic]) -> list[Watch]:
    """One for each parameter that is fed by calls of modules."""
    found = [
        Watch(slot, layer.kind, role, layer.modules, None)
        for layer in layout.layers
        for slot, role in zip(layer.slots, ("weight", "bias"), strict=False)
    ]
    for statistic in statistics:
        if isinstance(statistic, Squares):
            d = statistic.diagonal
            found.append(Watch(d.slot, d.kind, d.role, d.modules, statistic))
    return found


def _check_batch_norm(name: str, module: nn.Module, args: Any) -> None:
    if module.training and args and isinstance(args[0], Tensor) and len(args[0]) == 1:
        raise ValueError(
            f"the layer {name!r} ({type(module).__name__}, in train mode) got a batch of one, whose statistics are those of the "
            "sample itself; call model.eval(), or collect with larger batches"
        )
