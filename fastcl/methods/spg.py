"""SPG: soft-masking of parameter-level gradient flow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcl import _checkpoint, _distributed, ops
from fastcl._model import Slot, check_unchanged, some, split
from fastcl.methods._passes import Forward, Loss, sum_gradients, training_passes, zeros_to_sum_into
from fastcl.ops._checks import STORED, unit_interval

FORMAT = "fastcl.spg"
VERSION = 1


class _State(NamedTuple):
    """All that changes at the end of a task, so that it changes in one assignment."""

    tasks_seen: int
    masks: list[Tensor]  # one per slot: the importance of a feature extractor's parameter, the mean for a head's parameter
    mean: Tensor


class SPG:
    """Soft-masking of parameter-level gradient flow, for task-incremental learning with a head per task.

    Konishi, Kurokawa, Ono, Ke, Kim and Liu, "Parameter-Level Soft-Masking for Continual Learning", ICML 2023, arXiv 2306.14775.

    After task ``t`` every head ``tau <= t`` gives a gradient of the feature extractor, a signed sum over the batches of task ``t``, with
    dropout on::

        h_tau = d/dw mean cross-entropy(logits_t, y)         tau = t
        h_tau = d/dw sum(logits_tau)                         tau < t: cross-head importance, CHI

    and each parameter tensor (weights and biases apart) accumulates, element by element::

        a <- max(a, max over tau of | tanh((h_tau - mean h_tau) / std h_tau) |)       std unbiased (n - 1)

    While a later task is trained, between backward and the optimizer's step::

        g <- g * (1 - strength * a)              feature extractor
        g <- g * (1 - strength * mean(a))        every head that has a gradient; the mean is over all elements of all tensors

    The first task is not masked. CHI is never part of the training loss. A constant gradient tensor, one of a single element included,
    gives importance 0, where the authors' code divides 0 by 0. The authors also clip the joint norm of the heads' gradients to 10000,
    which hardly ever acts; that is left out. The rule protects against the gradient alone: use plain SGD, as the authors do, since
    momentum, weight decay or Adam's scaling move weights whose gradient is masked to 0.

    The paper defines SPG for task-incremental learning. With ``shared=True`` one head serves every task, so that the rule can be compared
    in class- and domain-incremental streams: all the ``tau`` name that head, and the passes of CHI for ``tau < t`` are then one pass.
    Nothing protects the old outputs of a shared head beyond the factor ``1 - strength * mean(a)``.

    Example::

        spg = SPG(model, heads=model.heads)                  # model(x, task) -> logits
        for t, loader in enumerate(loaders):
            for epoch in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    loss_fn(model(x, t), y).backward()
                    spg.after_backward()
                    optimizer.step()
            spg.end_task(loader, loss_fn)
            spg.save("spg.safetensors")

    Distributed training: pass the DistributedDataParallel module itself as ``model`` (heads: ``model.module.heads``), or a model on which
    ``fully_shard`` (FSDP2) was called, and call every method on every rank, with as many batches on each. Importance then comes from the
    gradients that the ranks have averaged, and is sharded as the parameters are.

    Args:
        model: the module that holds feature extractor and heads. Every parameter that requires grad and belongs to no head is part of
            the feature extractor. Modules may not be replaced, added or unfrozen afterwards (:meth:`end_task` checks it).
        heads: one submodule of ``model`` per task, in the order of the tasks; more than there are tasks so far is fine.
        forward: ``forward(model, x, head_index) -> logits``; by default ``model(x, head_index)``.
        strength: number in [0, 1]; 1 is the paper's rule, 0 no protection.
        dtype: of the stored importance: float64, float32, bfloat16, float16, or uint8 (``a = u / 255``, rounded up so that protection
            never weakens). It lives on the device of its parameter and follows it when the model is moved.
        shared: ``heads`` holds the one head of any number of tasks; ``head_index`` is then always 0.

    Raises:
        TypeError: a model, heads, strength, parameter, dtype or ``shared`` of a wrong kind.
        ValueError: no head, several with ``shared``, a head that is not inside ``model`` or given twice, parameters shared between heads
            or with the feature extractor, no trainable parameter in the feature extractor, a strength outside [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[nn.Module] | nn.ModuleList,
        *,
        forward: Forward | None = None,
        strength: float = 1.0,
        dtype: torch.dtype = torch.float32,
        shared: bool = False,
    ) -> None:
        if dtype not in STORED:
            raise TypeError(f"dtype is {dtype}; accepted are {', '.join(map(str, STORED))}")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward must be a function (model, x, head_index) -> logits, got {type(forward).__name__}")
        if not isinstance(shared, bool):
            raise TypeError(f"shared must be True or False, got {type(shared).__name__}")
        self._strength = unit_interval("strength", strength)
        _distributed.prepare(model)
        self._features, self._of_heads = split(model, heads)
        self._slots = (*self._features, *self._of_heads)
        if shared and len(heads) != 1:
            raise ValueError(f"heads must hold one module, the head of all tasks, with shared=True; got {len(heads)}")
        self._model = model
        self._heads: float = math.inf if shared else len(heads)
        self._shared = shared
        self._dtype = dtype
        self._forward: Forward = forward if forward is not None else _call_with_head
        self._state = self._new_state(0, self._zeros())

    @property
    def tasks_seen(self) -> int:
        """Number of tasks that have ended."""
        return self._state.tasks_seen

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """The accumulated importance by parameter name, not copied: in ``dtype``, of the parameter's shape."""
        return {slot.name: mask for slot, mask in zip(self._features, self._state.masks, strict=False)}

    @property
    def mean(self) -> Tensor:
        """Mean importance over all elements of the feature extractor: 0-d, float64, on the device."""
        return self._state.mean

    def after_backward(self) -> None:
        """Mask the gradients; call it once between the last ``backward()`` and the optimizer's step. Does nothing in the first task.

        When gradients of several micro-batches accumulate, call it after the last one: every call masks what is there.

        One call of :func:`fastcl.ops.soft_mask_`, without a host sync. Gradients that are None are skipped.

        Raises:
            TypeError, ValueError: a gradient that the op does not take (sparse, complex). Nothing has been written then.
        """
        if not self._state.tasks_seen:
            return
        grads: list[Tensor] = []
        masks: list[Tensor] = []
        for slot, mask in zip(self._slots, self._state.masks, strict=True):
            grad = slot.parameter().grad
            if grad is not None:
                grads.append(grad)
                masks.append(mask)
        try:
            ops.soft_mask_(grads, masks, self._strength)
        except (TypeError, ValueError):
            # The op has written nothing. Looking for a moved or sharded model only now keeps that look out of every step.
            if not self._follow():
                raise
            self.after_backward()

    def end_task(self, loader: Iterable[tuple[Any, Any]], loss_fn: Loss) -> Tensor:
        """Accumulate the importance of the task that has just been trained; its head is ``heads[tasks_seen]``, or the shared one.

        Runs ``loader`` once per head up to this one (a shared head: twice from the second task on), with the model in train mode;
        autograd is switched on if the caller has it off.
        Gradients are summed in float32 for bfloat16 and float16 parameters, else in the parameter's dtype; missing ones count as 0.
        Parameters, ``.grad``, buffers (BatchNorm's running statistics) and every module's mode are afterwards as they were; only the
        random number generators have advanced. An exception, the loader's and the loss's included, leaves this object as it was too.

        Args:
            loader: the task's training data: yields ``(x, y)`` batches, can be iterated ``tasks_seen + 1`` times. Tensors are moved to
                the model's device.
            loss_fn: ``loss_fn(logits, y)``, the mean loss of a batch.

        Returns:
            The mean importance after this task: 0-d, float64, on the device.

        Raises:
            RuntimeError: every head has had its task.
            TypeError: ``loader`` is an iterator (it can be read only once) or its batches are not pairs; a loss that is no tensor.
            ValueError: an empty or exhausted loader, a loss of more than one element or without a gradient, a NaN or Inf in the
                gradients, a model that has changed.
        """
        task = self._state.tasks_seen
        if task >= self._heads:
            raise RuntimeError(f"end_task: {task} tasks have ended and there are {self._heads} heads; build SPG with a head for every task")
        if isinstance(loader, Iterator):
            raise TypeError(
                f"loader is an iterator ({type(loader).__name__}), which can be read only once; end_task reads the data once per head: "
                "pass a DataLoader or a list of batches"
            )
        _distributed.prepare(self._model)
        check_unchanged(self._model, self._slots)
        self._follow()
        with training_passes(self._model):
            accumulated = [mask.clone() for mask in self._state.masks[: len(self._features)]]
            totals = zeros_to_sum_into(self._features)
            for number, (head, loss) in enumerate(self._passes(task, loss_fn)):
                batches = self._sum_through(head, totals, loader, loss)
                if not batches:
                    again = " when it was read for the second time: it can be read only once" if number else ""
                    raise ValueError(f"loader gave no batch{again}; pass the task's training data as a DataLoader or a list of batches")
                with torch.no_grad():
                    mean = ops.spg_importance_(accumulated, [totals])  # the maximum over heads, one head at a time
        self._state = self._new_state(task + 1, accumulated, mean)
        return mean

    def _passes(self, task: int, loss_fn: Loss) -> list[tuple[int, Loss]]:
        """The heads and objectives of a task's end; tasks that share a head share its CHI."""
        if self._shared:
            return [*[(0, _sum_of_logits)] * min(task, 1), (0, loss_fn)]
        return [*((head, _sum_of_logits) for head in range(task)), (task, loss_fn)]

    def _sum_through(self, head: int, totals: list[Tensor], loader: Iterable[tuple[Any, Any]], loss: Loss) -> int:
        def logits_of(x: Any) -> Tensor:
            return self._forward(self._model, x, head)

        return sum_gradients(self._model, totals, self._features, loader, logits_of, loss)

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(slot.parameter(), dtype=self._dtype, requires_grad=False) for slot in self._features]

    def _new_state(self, tasks_seen: int, importance: list[Tensor], mean: Tensor | None = None) -> _State:
        if mean is None:
            mean = ops.spg_importance_(importance, [])
        by_device = {importance[0].device: mean}
        of_heads = []
        for slot in self._of_heads:
            device = slot.parameter().device
            of_heads.append(by_device.setdefault(device, mean.to(device)))
        return _State(tasks_seen, [*importance, *of_heads], mean)

    def _follow(self) -> bool:
        """Move what is not where its parameter is, and shard it as its parameter is; whether anything was."""
        devices = all(mask.device == slot.parameter().device for slot, mask in zip(self._slots, self._state.masks, strict=True))
        pairs = [(mask, slot.parameter()) for slot, mask in zip(self._features, self._state.masks, strict=False)]
        if devices and all(_distributed.laid_out(mask, p) for mask, p in pairs):
            return False
        importance = [_distributed.lay_out(mask, p) for mask, p in pairs]
        self._state = self._new_state(self._state.tasks_seen, importance, self._state.mean.to(importance[0].device))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state: ``format``, ``version``, ``tasks_seen`` and ``importance`` (name to tensor, on the tensors' devices).

        On a sharded model the importance consists of DTensors, sharded as the parameters are, like FSDP2's own ``state_dict()``.
        """
        importance = {name: mask.clone() for name, mask in self.importance.items()}
        return {"format": FORMAT, "version": VERSION, "tasks_seen": self.tasks_seen, "importance": importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; the tensors are copied, to the devices, layouts and shardings of the parameters.

        Whole tensors (the same on every rank) and DTensors of any sharding are accepted, whatever the model's own is. On a sharded model
        every rank calls it.

        Importance of another dtype is accepted and stored as :func:`fastcl.ops.emax_` stores it: a floating ``dtype`` rounds to nearest,
        uint8 rounds up, so that protection never weakens. Values outside [0, 1] and NaN are refused.

        Raises:
            TypeError: not a mapping, an importance that is no tensor or of a dtype that is not accepted.
            ValueError: another format or version, more tasks than heads, names or shapes that are not the model's, values outside [0, 1].
                The object is then as it was.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping made by state_dict(), got {type(state).__name__}")
        if state.get("format") != FORMAT or state.get("version") != VERSION:
            raise ValueError(
                f"state has the format {state.get('format')!r}, version {state.get('version')!r}; accepted is {FORMAT!r}, {VERSION}"
            )
        tasks_seen, given = state.get("tasks_seen"), state.get("importance")
        if not isinstance(tasks_seen, int) or isinstance(tasks_seen, bool) or not 0 <= tasks_seen <= self._heads:
            raise ValueError(f"tasks_seen is {tasks_seen!r}; accepted is a whole number from 0 to the number of heads, {self._heads}")
        if not isinstance(given, Mapping):
            raise TypeError(f"importance must be a mapping from names to tensors, got {type(given).__name__}")
        names = {slot.name for slot in self._features}
        if missing := sorted(names - given.keys()):
            raise ValueError(f"importance lacks {some(missing)}, which the feature extractor has")
        if unknown := sorted(map(str, given.keys() - names)):
            raise ValueError(f"importance has {some(unknown)}, which the feature extractor does not have")
        for slot in self._features:
            _check_importance(slot, given[slot.name])
        importance = self._zeros()
        values = [_distributed.lay_out(given[slot.name], i) for slot, i in zip(self._features, importance, strict=True)]
        failing = _distributed.first_failing(values, _in_unit_interval)
        if failing is not None:
            raise ValueError(f"importance[{self._features[failing].name!r}] has values outside [0, 1], or NaN")
        ops.emax_(importance, values)
        self._state = self._new_state(tasks_seen, importance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors: importance by parameter name, format, version, tasks and a checksum in the header.

        On a sharded model every rank calls it; the tensors are gathered, and the first rank writes a file that fits the unsharded model
        and any sharding of it. The file appears whole or not at all. Raises OSError if it cannot be written; what was at ``path`` is then
        still there.
        """
        header = {"format": FORMAT, "version": str(VERSION), "tasks_seen": str(self.tasks_seen)}
        _distributed.once(self.importance, lambda whole: _checkpoint.write(path, whole, header), str(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the state of a file that :meth:`save` wrote, under the rules of :meth:`load_state_dict`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged or foreign file, another version, or a state that does not fit this model; the message names the path
                and what is wrong. The object is then as it was.
        """
        tensors, header = _checkpoint.read(path, FORMAT, VERSION)
        tasks_seen = header.get("tasks_seen", "")
        try:
            if not (tasks_seen.isascii() and tasks_seen.isdecimal() and len(tasks_seen) < 10):
                raise ValueError(f"tasks_seen is {tasks_seen!r}, not a whole number")
            self.load_state_dict({"format": FORMAT, "version": VERSION, "tasks_seen": int(tasks_seen), "importance": tensors})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit: {error}") from error


def _call_with_head(model: nn.Module, x: Any, head: int) -> Tensor:
    """The default forward; a named function, so that an SPG can be pickled."""
    logits: Tensor = model(x, head)
    return logits


def _sum_of_logits(logits: Tensor, _: Any) -> Tensor:
    """CHI's objective."""
    return logits.sum()


def _check_importance(slot: Slot, value: Any) -> None:
    shape = slot.parameter().shape
    if not isinstance(value, Tensor):
        raise TypeError(f"importance[{slot.name!r}] must be a tensor, got {type(value).__name__}")
    if value.dtype not in STORED:
        raise TypeError(f"importance[{slot.name!r}] has dtype {value.dtype}; accepted are {', '.join(map(str, STORED))}")
    if value.shape != shape:
        raise ValueError(f"importance[{slot.name!r}] has shape {tuple(value.shape)}, the parameter has {tuple(shape)}; they must be equal")


def _in_unit_interval(value: Tensor) -> Tensor:
    return torch.ones_like(value, dtype=torch.bool) if value.dtype == torch.uint8 else (value >= 0) & (value <= 1)
