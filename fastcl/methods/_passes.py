"""Passes over a task's data that compute gradients and leave no trace in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import _distributed
from fastcl._model import Slot

Forward = Callable[[nn.Module, Any, int], Tensor]
Loss = Callable[[Tensor, Any], Tensor]


@contextlib.contextmanager
def training_passes(model: nn.Module, train: bool = True) -> Iterator[None]:
    """Train (or eval) mode and autograd within the block; afterwards all modules' modes and buffers are as they were, whatever happened."""
    modules = list(model.modules())
    modes = [m.training for m in modules]
    buffers = [(m._buffers, key, b, None if b is None else b.clone()) for m in modules for key, b in m._buffers.items()]
    try:
        # Inference mode outlasts enable_grad, and a caller may well hold either while it evaluates.
        with torch.inference_mode(False), torch.enable_grad():
            model.train(train)
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
    for total in totals:
        total.zero_()
    gradients = reader(model, slots)
    batches = 0
    for x, y in usable_batches(loader, slots[0].parameter().device):
        grads = gradients(_scalar(loss(_logits(logits_of(x)), y)))
        with torch.no_grad():
            for total, grad in zip(totals, grads, strict=True):
                if grad is not None:
                    total.add_(grad)
        batches += 1
    check_finite(totals, slots)
    return batches


def reader(model: nn.Module, slots: Sequence[Slot]) -> Callable[[Tensor], list[Tensor | None]]:
    """A function from a loss to the gradients of the slots' parameters; None where one is missing or not wanted. ``.grad`` stays as it is.

    Make it before the forward pass.
    """
    parameters, everything = [slot.parameter() for slot in slots], list(model.parameters())
    wanted = [p for p in parameters if p.requires_grad]
    joined = _distributed.joins_in_backward(model)
    if joined:
        _distributed.check_hooks(slots)

    def gradients(loss: Tensor) -> list[Tensor | None]:
        if not wanted:
            return [None] * len(parameters)
        if not loss.requires_grad:
            raise ValueError("the loss carries no gradient; forward must not run under no_grad or detach its result")
        # Not backward() where it can be helped: hooks that step an optimizer as soon as a gradient arrives must not run here.
        found = _distributed.gradients(loss, everything, wanted) if joined else torch.autograd.grad(loss, wanted, allow_unused=True)
        by_parameter = {id(p): g for p, g in zip(wanted, found, strict=True)}
        return [by_parameter.get(id(p)) for p in parameters]

    return gradients


def usable_batches(loader: Iterable[tuple[Any, Any]], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The loader's pairs, their tensors on the device. Raises TypeError if they are not pairs."""
    for batch in loader:
        x, y = _pair(batch)
        yield _usable(x, device), _usable(y, device)


def check_finite(totals: Sequence[Tensor], slots: Sequence[Slot]) -> None:
    """Raise ValueError if something that was accumulated over a loader is not finite, on any rank."""
    failing = _distributed.first_failing(totals, torch.isfinite)
    if failing is not None:
        raise ValueError(
            f"the gradient of {slots[failing].name!r}, summed over the loader, has a NaN or an Inf; importance needs finite ones"
        )


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
