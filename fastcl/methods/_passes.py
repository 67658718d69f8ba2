"""Passes over a task's data that compute gradients and leave no trace in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.methods import _distributed
from fastcl.methods._model import Slot

Forward = Callable[[nn.Module, Any, int], Tensor]
Loss = Callable[[Tensor, Any], Tensor]


@contextlib.contextmanager
def training_passes(model: nn.Module) -> Iterator[None]:
    """Train mode and autograd within the block; afterwards every module's mode and every buffer is as it was, whatever happened."""
    modules = list(model.modules())
    modes = [m.training for m in modules]
    buffers = [(m._buffers, key, b, None if b is None else b.clone()) for m in modules for key, b in m._buffers.items()]
    try:
        # Inference mode outlasts enable_grad, and a caller may well hold either while it evaluates.
        with torch.inference_mode(False), torch.enable_grad():
            model.train()
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for owner, key, buffer, value in buffers:
                owner[key] = buffer
                # Compared by value: batch normalisation does not bump versions, and an expanded buffer cannot be written to.
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


def zeros_to_sum_into(slots: Sequence[Slot]) -> list[Tensor]:
    """One zero tensor per parameter: of its dtype, but at least float32, since a long sum of bfloat16 stops growing."""
    parameters = [slot.parameter() for slot in slots]
    return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False) for p in parameters]


def sum_gradients(
    model: nn.Module,
    totals: Sequence[Tensor],
    slots: Sequence[Slot],
    loader: Iterable[tuple[Any, Any]],
    logits_of: Callable[[Any], Tensor],
    loss: Loss,
) -> int:
    """Overwrite ``totals`` with the signed sum over the batches of the gradient of ``loss(logits_of(x), y)``; missing ones count as 0.

    Returns the number of batches. Raises as :meth:`fastcl.methods.SPG.end_task` says.
    """
    trained = [(total.zero_(), p) for total, slot in zip(totals, slots, strict=True) if (p := slot.parameter()).requires_grad]
    wanted, everything = [p for _, p in trained], list(model.parameters())
    device = slots[0].parameter().device
    joined = _distributed.joins_in_backward(model)
    if joined:
        _distributed.check_hooks(slots)
    batches = 0
    for batch in loader:
        x, y = (_usable(part, device) for part in _pair(batch))
        output = _scalar(loss(_logits(logits_of(x)), y))
        if trained and not output.requires_grad:
            raise ValueError("the loss carries no gradient; forward must not run under no_grad or detach its result")
        grads: Sequence[Tensor | None] = ()
        if trained and joined:
            grads = _distributed.gradients(output, everything, wanted)
        elif trained:
            # Not backward(): hooks that step an optimizer as soon as a gradient arrives must not run here.
            grads = torch.autograd.grad(output, wanted, allow_unused=True)
        with torch.no_grad():
            for (total, _), grad in zip(trained, grads, strict=True):
                if grad is not None:
                    total.add_(grad)
        batches += 1
    failing = _distributed.first_failing(totals, torch.isfinite)
    if failing is not None:
        raise ValueError(
            f"the gradient of {slots[failing].name!r}, summed over the loader, has a NaN or an Inf; importance needs finite ones"
        )
    return batches


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"loader must yield pairs (x, y), got {type(batch).__name__}")
    if len(batch) != 2:
        raise TypeError(f"loader must yield pairs (x, y), got {len(batch)} parts")
    return batch[0], batch[1]


def _usable(part: Any, device: torch.device) -> Any:
    """A tensor on the device that autograd can save, since the caller may have made it in inference mode; other things as they are."""
    if not isinstance(part, Tensor):
        return part
    moved = part.to(device)
    return moved.clone() if moved.is_inference() else moved


def _logits(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"forward must return the logits, a tensor; got {type(value).__name__}")
    return value


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss_fn must return the mean loss of a batch, one element; got shape {tuple(value.shape)}")
    return value
