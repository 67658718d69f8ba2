"""EWC: elastic weight consolidation, offline and online."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import _distributed, ops
from fastcl._model import FLOATING, check_unchanged, trainable
from fastcl.methods import _fisher
from fastcl.methods._arguments import checked_forward, tensors_by_name, whole_below
from fastcl.methods._memory import Scaler
from fastcl.methods._passes import Forward, Loss, training_passes, zeros_to_sum_into
from fastcl.methods._state import Method
from fastcl.ops import _sharded
from fastcl.ops._checks import at_least_zero, unit_interval

LABELS = ("model", "true")


class EWC(Method):
    """Elastic weight consolidation: a quadratic pull towards what earlier tasks learned, weighted by the Fisher information.

    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796, eq. 3; online: Schwarz et al.,
    "Progress & Compress", ICML 2018, arXiv 1805.06370, section 4.

    With ``F_k`` the diagonal of the Fisher information after task ``k``, at its parameters ``theta_k``, the penalty that later tasks add to
    their loss is, up to a constant, one parabola per parameter, whatever the number of tasks::

        strength * sum_k F_k (theta - theta_k)^2 = strength * A (theta - c)^2 + constant
        A = sum_k F_k          c = sum_k F_k theta_k / A   (where A = 0, c = theta_k)                       offline, gamma=None
        A <- gamma A + F_k     c = theta_k                                                                  online, gamma in [0, 1]

    so that two tensors per parameter are kept. Between backward and the optimizer's step::

        g <- g + 2 * strength * A (theta - c)

    Papers write the penalty with ``lambda / 2``: their ``lambda`` is ``2 * strength``. The sums are kept in closed form,
    ``c <- c + F (theta - c) / A``. The first task is not touched.

    The Fisher information, a mean over the task's samples, comes from one pass through its data:

    * ``labels="model"``: that of the definition, with labels drawn from the model's softmax, one backward pass per batch. The gradients
      ``g_i`` of the samples' losses are then independent and have mean zero, so that for ``B`` samples whose mean loss has the gradient
      ``g`` the expectation of ``B g^2`` is the mean of the ``E[g_i^2]``: unbiased, without a pass per sample. It needs a classifier,
      logits [samples, classes], whose samples do not meet in the forward pass (no batch normalisation in train mode).
    * ``labels="true"``: the empirical Fisher information, squared gradients of the samples' losses for their true labels. Their mean is
      not zero, so that this takes a forward and a backward pass per sample, as many times those of ``"model"`` as a batch has samples.

    Example::

        ewc = EWC(model, strength=100.0)
        for loader in loaders:
            for epoch in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    ewc.after_backward()
                    optimizer.step()
            ewc.end_task(loader)
            ewc.save("ewc.safetensors")

    With an optimizer of :mod:`fastcl.optim` the pull costs no sweep of its own: no ``after_backward``, and
    ``SGD(model.parameters(), lr, transforms=ewc.transforms())``.

    The state holds what changes (tasks, ``A`` and ``c``), not the settings ``strength``, ``gamma``, ``labels`` and ``seed``:
    ``load_state_dict`` takes the state of other settings, the offline form's for the online form included, and goes on with this object's.

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` (FSDP2) or neither. Every parameter that
            requires grad is pulled. Modules may not be replaced, added or unfrozen afterwards (:meth:`end_task` checks it). With several
            processes every rank calls every method, with as many batches of as many samples on each.
        strength: finite number >= 0. A step of plain SGD overshoots ``c``, and diverges, where ``lr * 2 * strength * A > 2``.
        gamma: None for the offline form, or a number in [0, 1], by which the past fades at the end of each later task: the online form.
        labels: ``"model"`` or ``"true"``, see above.
        forward: ``forward(model, x, task) -> logits``; by default ``model(x)``.
        train_mode: whether the model is in train mode in the Fisher's pass; by default in eval mode, so that it is the Fisher information
            of the model as it is used, without dropout.
        seed: of the drawn labels: whole number in [0, 2^63). Every task and every rank draws its own; no other generator is used.

    Raises:
        TypeError: an argument of a wrong kind, a model under FullyShardedDataParallel, a parameter that is not floating point.
        ValueError: a number outside its range, other ``labels``, no parameter that requires grad.
    """

    _format = "fastcl.ewc"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        gamma: float | None = None,
        labels: str = "model",
        forward: Forward | None = None,
        train_mode: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if labels not in LABELS:
            raise ValueError(f"labels must be 'model' or 'true', got {labels!r}")
        if not isinstance(train_mode, bool):
            raise TypeError(f"train_mode must be True or False, got {type(train_mode).__name__}")
        self._strength = at_least_zero("strength", strength)
        self._gamma = None if gamma is None else unit_interval("gamma", gamma)
        self._seed = whole_below("seed", seed, 2**63)
        _distributed.prepare(model)
        self._slots = trainable(_distributed.unwrapped(model))
        self._model, self._labels, self._train_mode = model, labels, train_mode
        self._forward: Forward = checked_forward(forward)
        self._precision, self._anchor = zeros_to_sum_into(self._slots), zeros_to_sum_into(self._slots)

    @property
    def precision(self) -> Mapping[str, Tensor]:
        """``A`` by parameter name, not copied: in the parameter's dtype, but at least float32."""
        return self._named(self._precision)

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """``c`` by parameter name, not copied: in the parameter's dtype, but at least float32."""
        return self._named(self._anchor)

    def _named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {slot.name: t for slot, t in zip(self._slots, tensors, strict=True)}

    def after_backward(self, *, scaler: Scaler | None = None) -> None:
        """Add the pull to the gradients; call it once between the last ``backward()`` and the optimizer's step.

        One call of :func:`fastcl.ops.ewc_pull_`, without a host sync. Gradients that are None are skipped. Does nothing in the first task.
        Clip gradients before it, if the loss' alone are to be clipped, or after it.

        Args:
            scaler: the ``torch.amp.GradScaler`` that scaled the loss and has not unscaled its gradients yet: the pull is scaled, too (its
                scale is read on the host). None when gradients are not scaled or were unscaled.

        Raises:
            TypeError, ValueError: a gradient that the op does not take (sparse, complex). Nothing has been written then.
        """
        if not self.tasks_seen:
            return
        rows = [
            (p.grad, p, a, c)
            for slot, a, c in zip(self._slots, self._precision, self._anchor, strict=True)
            if (p := slot.parameter()).grad is not None
        ]
        grads, params, precision, anchor = ([row[k] for row in rows] for k in range(4))
        strength = self._strength if scaler is None else self._strength * scaler.get_scale()
        try:
            ops.ewc_pull_(grads, [p.detach() for p in params], precision, anchor, strength)
        except (TypeError, ValueError):
            # The op has written nothing. Looking for a moved or sharded model only now keeps that look out of every step.
            if not self._follow():
                raise
            self.after_backward(scaler=scaler)

    def transforms(self) -> tuple[Any, ...]:
        """The pull as a transform for an optimizer of :mod:`fastcl.optim` over this model's parameters, instead of :meth:`after_backward`.

        It holds this object's own tensors, which are zero in the first task, and sees what later tasks add.
        """
        from fastcl import optim

        self._follow()
        precision, anchor = (
            {slot.parameter(): t for slot, t in zip(self._slots, tensors, strict=True)} for tensors in (self._precision, self._anchor)
        )
        return (optim.Pull(precision, anchor, self._strength),)

    def end_task(self, loader: Iterable[tuple[Any, Any]], loss_fn: Loss | None = None) -> None:
        """Take in the Fisher information of the task that has just been trained.

        Parameters, ``.grad``, buffers and every module's mode are afterwards as they were. An exception, the loader's and the loss's
        included, leaves this object as it was too. One tensor per parameter is needed meanwhile.

        Args:
            loader: the task's training data: yields ``(x, y)`` batches, is read once. Tensors are moved to the model's device.
            loss_fn: ``loss_fn(logits, y)``, the mean loss of a batch, for ``labels="true"``. With ``labels="model"`` the loss is the
                cross-entropy with the drawn labels; neither ``loss_fn`` nor ``y`` is used.

        Raises:
            TypeError: no ``loss_fn`` where one is needed; a loader that cannot be iterated or whose batches are no pairs, or with
                ``labels="true"`` no pairs of tensors; a loss that is no tensor; parameters that are sharded otherwise than by
                ``fully_shard``.
            ValueError: a loader without a batch, logits of another shape, a loss of more than one element or without a gradient, a NaN
                or Inf in the gradients, a model that has changed.
        """
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches (x, y), got {type(loader).__name__}")
        if self._labels == "true" and not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (logits, y) -> mean loss with labels='true', got {type(loss_fn).__name__}")
        _distributed.prepare(self._model)
        check_unchanged(_distributed.unwrapped(self._model), self._slots)
        self._follow()
        task = self.tasks_seen

        def logits_of(x: Any) -> Tensor:
            return self._forward(self._model, x, task)

        with training_passes(self._model, self._train_mode):
            if self._labels == "true" and loss_fn is not None:
                fisher = _fisher.of_true_labels(self._model, self._slots, loader, logits_of, loss_fn)
            else:
                fisher = _fisher.of_drawn_labels(self._model, self._slots, loader, logits_of, f"{self._seed} {task}")
        _distributed.prepare(self._model)
        self._take_in(fisher)
        self._tasks_seen += 1

    @torch.no_grad()
    def _take_in(self, fisher: list[Tensor]) -> None:
        params = [slot.parameter() for slot in self._slots]
        shards = (_sharded.local("fisher", tensors) for tensors in (fisher, params, self._precision, self._anchor))
        for f, theta, a, c in zip(*shards, strict=True):
            if self._gamma is None:
                a.add_(f)
                # The share of the new task; where nobody cares, c is the latest theta.
                c.add_(torch.where(a > 0, f / a, 1.0) * (theta - c))
            else:
                a.mul_(self._gamma).add_(f)
                c.copy_(theta)

    def _follow(self) -> bool:
        """Move what is not where its parameter is, and shard it as its parameter is; whether anything was."""
        params = [slot.parameter() for slot in self._slots]
        if all(_distributed.laid_out(t, p) for tensors in (self._precision, self._anchor) for t, p in zip(tensors, params, strict=True)):
            return False
        self._precision, self._anchor = (
            [_distributed.lay_out(t, p) for t, p in zip(tensors, params, strict=True)] for tensors in (self._precision, self._anchor)
        )
        return True

    def _kept(self) -> dict[str, Any]:
        return {kind: {name: t.clone() for name, t in getattr(self, kind).items()} for kind in ("precision", "anchor")}

    def _take_over(self, state: Mapping[str, Any]) -> None:
        self._follow()
        loaded = []
        for kind, own in (("precision", self._precision), ("anchor", self._anchor)):
            given = tensors_by_name(state, kind, self._slots)
            for slot, t in zip(self._slots, given, strict=True):
                if t.dtype not in FLOATING:
                    raise TypeError(f"{kind}[{slot.name!r}] has dtype {t.dtype}; accepted are {', '.join(map(str, FLOATING))}")
                if t.shape != slot.parameter().shape:
                    shapes = f"{tuple(t.shape)}, the parameter has {tuple(slot.parameter().shape)}"
                    raise ValueError(f"{kind}[{slot.name!r}] has shape {shapes}; they must be equal")
            values = [_distributed.lay_out(t, mine).to(mine.dtype) for t, mine in zip(given, own, strict=True)]
            holds: Callable[[Tensor], Tensor] = torch.isfinite if kind == "anchor" else _finite_from_zero
            failing = _distributed.first_failing(values, holds)
            if failing is not None:
                raise ValueError(
                    f"{kind}[{self._slots[failing].name!r}] has values that are not finite{', or below 0' * (kind == 'precision')}"
                )
            loaded.append((own, values))
        with torch.no_grad():
            for own, values in loaded:  # in place: a transform may hold these tensors
                for mine, value in zip(_sharded.local("state", own), _sharded.local("state", values), strict=True):
                    mine.copy_(value)

    def _device(self) -> torch.device:
        return self._slots[0].parameter().device


def _finite_from_zero(value: Tensor) -> Tensor:
    return value.isfinite() & (value >= 0)
