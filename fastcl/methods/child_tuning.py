"""Child-Tuning: only a child network of the model is fine-tuned, drawn anew in every step (F) or chosen once for a task (D)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastcl import BitMask, _distributed, apply_gradient_mask_, child_mask_gradients_, ops, top_fraction_mask
from fastcl._model import Slot, check_unchanged, some, trainable
from fastcl.methods import _fisher
from fastcl.methods._arguments import checked_forward, tensors_by_name, whole_below
from fastcl.methods._memory import Scaler
from fastcl.methods._passes import Forward, Loss, training_passes
from fastcl.methods._state import Method
from fastcl.ops import _sharded
from fastcl.ops._checks import at_least_zero, positive

Names: TypeAlias = str | Callable[[str], bool]
AUTHORS_NAMES = "layer"


class ChildTuning(Method):
    """Fine-tuning of a child network, so that what a model learned before is disturbed less.

    Xu et al., "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning", EMNLP 2021, arXiv 2109.05687.

    Between backward (and the clipping of the global norm) and the optimizer's step the gradients are masked:

    * ``"F"``, task-free: ``g <- g * m / keep`` with ``m ~ Bernoulli(keep)`` for every element of every parameter, drawn anew in every step
      from ``seed``, the step, the parameter's position in ``model.parameters()`` and the element: nothing is stored, and the draws do not
      depend on device, threads or sharding. See :func:`fastcl.child_mask_gradients_`.
    * ``"D"``, task-driven: ``g <- m g`` with a mask that :meth:`start_task` chooses by the Fisher information of the data to come, without
      ``1 / keep``. In train mode, in one pass, each tensor's gradient clipped to ``max_norm`` by its own norm::

          F = mean over batches of clip(g)^2                         g of a batch's mean loss
          m = F >= percentile(F, 100 (1 - keep))                     one threshold over all tensors that compete

      Only parameters whose name competes are masked; all others (the authors': embeddings, pooler, classifier) are always trained.

    Weight decay acts outside the child as well, as with the authors. A threshold of 0 keeps everything, and :meth:`start_task` warns: it
    occurs when more than ``1 - keep`` of the elements that compete have no gradient, as unused layers do; let these not compete. Two
    differences to the authors' code remain with torch's AdamW, whose decay comes before the step; ``fastcl.optim.AdamW(decay="hf")`` has
    their order.

    Example::

        child = ChildTuning(model, "D", keep=0.3)
        child.start_task(loader, loss_fn)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            child.after_backward()
            optimizer.step()
        child.end_task()

    With an optimizer of :mod:`fastcl.optim` the mask costs no sweep of its own: no ``after_backward``, and after ``start_task``
    ``AdamW(model.parameters(), transforms=child.transforms())``.

    The state holds what changes (tasks, F's step, D's masks) and the variant, not the settings ``keep``, ``seed`` and ``max_norm``:
    ``load_state_dict`` takes the state of other settings and goes on with this object's.

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` (FSDP2) or neither. Modules may not be
            replaced, added or unfrozen afterwards, nor competing parameters frozen (:meth:`start_task` checks it). With several processes
            every rank calls every method.
        variant: ``"F"`` or ``"D"``.
        keep: the fraction that is kept, the authors' ``reserve_p``: number in (0, 1].
        seed: of F's draws: whole number in [0, 2^64).
        competing: which parameters compete in D, by name: a substring, or a function from a name to a bool. None is the authors' rule,
            names that contain ``"layer"``. F masks every parameter and takes None only.
        max_norm: to which D clips each tensor's gradient, the authors' ``max_grad_norm``: number > 0, or None for no clipping.
        mask_first_task: False when ``model`` has learned nothing yet: its first task is then trained plainly, and the later ones are the
            fine-tuning.
        forward: ``forward(model, x, task) -> logits`` in D's pass; by default ``model(x)``.

    Raises:
        TypeError: an argument of a wrong kind, a model under FullyShardedDataParallel, a parameter that is not floating point.
        ValueError: another variant, a number outside its range, no parameter that competes in D, ``competing`` for F.
    """

    _format = "fastcl.child-tuning"

    def __init__(
        self,
        model: nn.Module,
        variant: str,
        *,
        keep: float = 0.3,
        seed: int = 0,
        competing: Names | None = None,
        max_norm: float | None = 1.0,
        mask_first_task: bool = True,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("F", "D"):
            raise ValueError(f"variant must be 'F' or 'D', got {variant!r}")
        if not isinstance(mask_first_task, bool):
            raise TypeError(f"mask_first_task must be True or False, got {type(mask_first_task).__name__}")
        self._keep, self._seed = positive("keep", keep, 1), whole_below("seed", seed, 2**64)
        self._max_norm = None if max_norm is None else at_least_zero("max_norm", max_norm)
        if self._max_norm == 0:
            raise ValueError("max_norm must be above 0, or None for no clipping; got 0")
        _distributed.prepare(model)
        self._slots = trainable(_distributed.unwrapped(model))
        self._competing = _chosen(self._slots, AUTHORS_NAMES if competing is None else competing) if variant == "D" else []
        if variant == "F" and competing is not None:
            raise ValueError("competing is for the variant 'D': F masks every parameter")
        self._model, self._variant, self._mask_first_task = model, variant, mask_first_task
        self._forward: Forward = checked_forward(forward)
        self._step = 0
        self._masks: list[BitMask] | None = None

    @property
    def step(self) -> int:
        """Number of masks that F has drawn: the number of the next one."""
        return self._step

    @property
    def masks(self) -> Mapping[str, BitMask]:
        """D's masks by parameter name, not copied; empty outside a task, and for F."""
        return {slot.name: mask for slot, mask in zip(self._competing, self._masks or [], strict=False)}

    @property
    def _active(self) -> bool:
        return self._mask_first_task or self.tasks_seen > 0

    def start_task(self, loader: Iterable[tuple[Any, Any]] | None = None, loss_fn: Loss | None = None) -> None:
        """Choose D's masks for the task that is trained next; call it before its first step. F, and a plain first task, read nothing.

        Parameters, ``.grad``, buffers and every module's mode are afterwards as they were; only random number generators (dropout's, the
        loader's) have advanced. An exception, the loader's and the loss's included, leaves this object as it was too. One tensor per
        competing parameter is needed meanwhile.

        Args:
            loader: the task's training data: yields ``(x, y)`` batches, is read once. Tensors are moved to the model's device.
            loss_fn: ``loss_fn(logits, y)``, the mean loss of a batch.

        Raises:
            TypeError: no ``loss_fn``, a loader that cannot be iterated or whose batches are no pairs; a loss that is no tensor.
            ValueError: a loader without a batch, a loss of more than one element or without a gradient, a NaN or Inf in the gradients, a
                model that has changed, a competing parameter that has been frozen.

        Warns (UserWarning) if the threshold is 0 with ``keep`` below 1, so that every element is kept.
        """
        if self._variant == "F" or not self._active:
            return
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (logits, y) -> mean loss, got {type(loss_fn).__name__}")
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches (x, y), got {type(loader).__name__}")
        _distributed.prepare(self._model)
        check_unchanged(_distributed.unwrapped(self._model), self._slots)
        self._check_none_frozen()
        task = self.tasks_seen

        def logits_of(x: Any) -> Tensor:
            return self._forward(self._model, x, task)

        with training_passes(self._model):
            fisher = _fisher.of_batches(self._model, self._competing, loader, logits_of, loss_fn, self._max_norm)
        _distributed.prepare(self._model)
        masks = top_fraction_mask(fisher, self._keep)
        if self._keep < 1 and not bool(ops.quantile(fisher, (100 * (1 - self._keep)) / 100)):  # top_fraction_mask's own threshold
            warnings.warn(
                f"the child network is the whole model: the threshold is 0, which keeps every element, since more than 1 - keep = "
                f"{1 - self._keep:g} of the elements that compete have no gradient in this loader; let unused layers not compete",
                stacklevel=2,
            )
        self._masks = masks

    def _check_none_frozen(self) -> None:
        frozen = [slot.name for slot in self._competing if not slot.parameter().requires_grad]
        if frozen:
            # Their Fisher information would be 0, which moves the threshold of all others.
            raise ValueError(
                f"the model has changed since the method was built ({some(frozen)}): a competing parameter was frozen; build it anew"
            )

    def after_backward(self, *, scaler: Scaler | None = None) -> None:  # noqa: ARG002 (a mask is the same at any scale)
        """Mask the gradients; call it once between the last ``backward()`` and the optimizer's step, after any clipping of their norm.

        When gradients of several micro-batches accumulate, call it after the last one. Without a host sync. Gradients that are None are
        skipped. With a ``torch.amp.GradScaler`` it may come before or after ``scaler.unscale_``; ``scaler`` is not looked at.

        Raises:
            RuntimeError: D, and :meth:`start_task` has not been called for this task.
            TypeError, ValueError: a gradient that the op does not take (sparse, complex). Nothing has been written then.
        """
        if not self._active:
            return
        if self._variant == "F":
            child_mask_gradients_(self._model, self._keep, seed=self._seed, step=self._step)
            self._step += 1
            return
        masks = self._chosen_masks()
        try:
            apply_gradient_mask_([slot.parameter() for slot in self._competing], masks)
        except (TypeError, ValueError):
            # Nothing has been written. Looking for a moved or sharded model only now keeps that look out of every step.
            if not self._follow():
                raise
            self.after_backward()

    def _chosen_masks(self) -> list[BitMask]:
        if self._masks is None:
            raise RuntimeError("there is no mask for this task yet: call start_task(loader, loss_fn) before its first step")
        return self._masks

    def transforms(self) -> tuple[Any, ...]:
        """The mask as a transform for an optimizer of :mod:`fastcl.optim` over this model's parameters, instead of :meth:`after_backward`.

        D's belongs to the present task. F's draws are numbered by each parameter's own steps in the optimizer and by its position there;
        :meth:`after_backward` counts its calls. They are the same for a new optimizer that was given ``model.parameters()``, as long as
        every parameter has a gradient in every step and no step is skipped (as a ``torch.amp.GradScaler`` skips those with an Inf).
        Empty where nothing is masked.

        Raises:
            RuntimeError: D, and :meth:`start_task` has not been called for this task.
        """
        if not self._active:
            return ()
        from fastcl import optim

        if self._variant == "F":
            return (optim.ChildMask(self._keep, self._seed),)
        self._chosen_masks()
        self._follow()
        masks = self._chosen_masks()
        return (optim.FixedMask({slot.parameter(): mask for slot, mask in zip(self._competing, masks, strict=True)}),)

    def end_task(self, loader: Iterable[tuple[Any, Any]] | None = None) -> None:  # noqa: ARG002 (the methods' call)
        """Count the task, and drop D's masks; ``loader`` is not read."""
        self._tasks_seen += 1
        self._masks = None

    def _follow(self) -> bool:
        """Move the masks that are not where their parameter is, and shard them as it is; whether there was one."""
        pairs = list(zip(self._masks or [], (slot.parameter() for slot in self._competing), strict=False))
        if all(_placed(mask, p) for mask, p in pairs):
            return False
        self._masks = [mask if _placed(mask, p) else _packed(mask.to_bool(), p) for mask, p in pairs]
        return True

    def _kept(self) -> dict[str, Any]:
        """The bits are those of whole parameters, on every rank."""
        return {
            "variant": self._variant,
            "step": self._step,
            "masks": None if self._masks is None else {n: _bits(m) for n, m in self.masks.items()},
        }

    def _take_over(self, state: Mapping[str, Any]) -> None:
        if state.get("variant") != self._variant:
            raise ValueError(f"state is one of the variant {state.get('variant')!r}; this is {self._variant!r}")
        step = whole_below("state['step']", state.get("step"), 2**32)
        masks: list[BitMask] | None = None
        if state.get("masks") is not None:
            masks = []
            for slot, bits in zip(self._competing, tensors_by_name(state, "masks", self._competing), strict=True):
                p = slot.parameter()
                try:
                    whole = BitMask(bits.detach().clone(), p.shape)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"state['masks'][{slot.name!r}]: {error}") from None
                masks.append(_packed(whole.to_bool(), p))
        self._step, self._masks = step, masks

    def _device(self) -> torch.device:
        return self._slots[0].parameter().device


def _chosen(slots: list[Slot], competing: Names) -> list[Slot]:
    if not isinstance(competing, str) and not callable(competing):
        raise TypeError(f"competing must be a part of names, or a function from a name to True or False; got {type(competing).__name__}")
    found = [slot for slot in slots if (competing in slot.name if isinstance(competing, str) else competing(slot.name))]
    if not found:
        rule = f"no name contains {competing!r}" if isinstance(competing, str) else "the function accepts no name"
        raise ValueError(
            f"no parameter competes: {rule}. Pass competing, a part of the names or a function from a name to True or False; the names are "
            f"{some(slot.name for slot in slots)}"
        )
    return found


def _placed(mask: BitMask, p: Tensor) -> bool:
    """Whether the mask is on the device of ``p`` and sharded as it is."""
    at = (p.device_mesh, p.placements) if _sharded.is_sharded([p]) else (None, None)  # type: ignore[attr-defined]
    return mask.device == p.device and (mask.device_mesh, mask.placements) == at


def _packed(mask: Tensor, p: Tensor) -> BitMask:
    return BitMask.from_bool(_distributed.lay_out(mask, p))


def _bits(mask: BitMask) -> Tensor:
    """The bits of the whole parameter, copied."""
    if mask.device_mesh is None:
        return mask.bits.clone()
    whole: Tensor = mask.to_bool().full_tensor()  # type: ignore[attr-defined]
    return BitMask.from_bool(whole).bits
