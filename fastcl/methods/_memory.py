"""What methods with a memory share: the buffer, and the backward pass of the loss on samples of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcl.data import Buffer
from fastcl.methods._passes import Forward, Loss, _logits, _scalar
from fastcl.methods._state import Method


class Scaler(Protocol):
    """What a method asks of a gradient scaler; ``torch.amp.GradScaler`` has it."""

    def scale(self, outputs: Tensor) -> Tensor:
        """The loss times the scale."""

    def get_scale(self) -> float:
        """The scale, on the host."""


class MemoryMethod(Method):
    """A method that keeps samples of past tasks in a buffer and runs them through the model between backward and step."""

    def __init__(self, model: nn.Module, buffer: Buffer, loss_fn: Loss, forward: Forward | None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(buffer, Buffer):
            raise TypeError(f"buffer must be a buffer as in fastcl.data, such as ReservoirBuffer; got {type(buffer).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (logits, y) -> mean loss, got {type(loss_fn).__name__}")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward must be a function (model, x, task) -> logits, got {type(forward).__name__}")
        self._model, self._buffer, self._loss_fn, self._forward = model, buffer, loss_fn, forward

    @property
    def buffer(self) -> Buffer:
        """The memory."""
        return self._buffer

    def end_task(self, loader: Iterable[tuple[Any, Any]] | None = None) -> None:
        """Put samples of the task that has just been trained into the buffer: ``buffer.add_task(loader, tasks_seen)``.

        Args:
            loader: the task's training data: yields ``(x, y)`` batches, is read once, so that an iterator will do. None when the training
                loop fills the buffer itself with ``buffer.add(x, y, task)``.

        Raises:
            TypeError: a loader that cannot be iterated or does not yield pairs of tensors.
            ValueError: a loader without a batch, samples that the buffer does not take, no loader while the buffer is empty. An exception,
                the loader's included, leaves this object and the buffer as they were.
        """
        if loader is not None:
            before = self._buffer.state_dict()
            try:
                self._buffer.add_task(_some_of(loader), self.tasks_seen)
            except BaseException:
                self._buffer.load_state_dict(before)
                raise
        elif not len(self._buffer):
            raise ValueError("loader is None and the buffer is empty; pass the task's training data, or fill the buffer while training")
        self._tasks_seen += 1

    def _kept(self) -> dict[str, Any]:
        return {"buffer": self._buffer.state_dict()}

    def _take_over(self, state: Mapping[str, Any]) -> None:
        kept = state.get("buffer")
        if not isinstance(kept, Mapping):
            raise TypeError(f"state['buffer'] must be a mapping made by the buffer's state_dict(), got {type(kept).__name__}")
        self._buffer.load_state_dict(kept)

    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), super()._device())

    def _trained(self) -> list[Tensor]:
        """The parameters that require grad, as they are now: freezing, unfreezing and moving need no word to the method."""
        return [p for p in self._model.parameters() if p.requires_grad]

    def _draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """A memory batch of ``n``, or the whole memory once while it is smaller."""
        held = len(self._buffer)
        if not held:
            raise self._empty()
        return self._buffer.sample(min(n, held))

    def _empty(self) -> RuntimeError:
        return RuntimeError(f"after_backward: {self.tasks_seen} tasks have ended and the buffer is empty; load its state too, or fill it")

    def _past(self) -> list[int]:
        """The past tasks that the buffer has samples of."""
        tasks = self._buffer.tasks
        if not tasks:
            raise self._empty()
        return [task for task in tasks if task < self.tasks_seen]

    def _of_task(self, task: int, n: int | None) -> tuple[Tensor, Tensor]:
        """All samples of a task, or a draw of ``n``."""
        x, y = self._buffer.of_task(task)
        if n is None or n >= len(x):
            return x, y
        rows = torch.randperm(len(x), generator=self._buffer.generator)[:n].to(x.device)
        return x[rows], y[rows]

    def _backward(self, x: Tensor, y: Tensor, tasks: Tensor | int, scaler: Scaler | None, weight: float = 1.0) -> None:
        """Add the gradient of ``weight`` times the mean loss of a memory batch to ``.grad``.

        One pass, or with ``forward`` one per task that occurs, backward included: under DDP every forward then meets its own backward.
        Each counts by its share of the batch, so that the sum is the gradient of the batch's mean.
        """
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        device = self._device()
        for task, rows in self._groups(tasks):
            # Without waiting for the copy: nothing writes to a drawn batch.
            part_x, part_y = ((part if rows is None else part[rows]).to(device, non_blocking=True) for part in (x, y))
            share = 1.0 if rows is None else len(part_x) / len(x)
            with torch.enable_grad():
                logits = self._model(part_x) if self._forward is None else self._forward(self._model, part_x, task)
                loss = _scalar(self._loss_fn(_logits(logits), part_y))
                if not loss.requires_grad:
                    raise ValueError("the loss on the memory carries no gradient; forward must not run under no_grad or detach its result")
                # As with any backward pass, autocast is for the forward only; the caller may hold it around after_backward.
                with torch.autocast(device.type, enabled=False):
                    loss = loss * (weight * share)
                    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def _groups(self, tasks: Tensor | int) -> Iterator[tuple[int, Tensor | None]]:
        """The tasks of a batch and the rows of each; None stands for all rows."""
        if isinstance(tasks, int) or self._forward is None:
            yield (tasks if isinstance(tasks, int) else 0), None
            return
        present = sorted(set(tasks.tolist()))  # on the host already: a buffer draws there
        for task in present:
            yield task, None if len(present) == 1 else (tasks == task).nonzero()[:, 0]


def _some_of(loader: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    try:
        batches = iter(loader)
    except TypeError:
        raise TypeError(f"loader must be an iterable of batches (x, y), got {type(loader).__name__}") from None
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError("loader gave no batch; pass the task's training data as a DataLoader, a list or an iterator of batches")


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose ranks hold parts of the gradients without saying so: their dot products would be those of the parts."""
    if any(base.__name__ == "FullyShardedDataParallel" for module in model.modules() for base in type(module).__mro__):
        raise TypeError(
            "model is sharded by FullyShardedDataParallel, whose gradients are parts that do not tell what they are parts of, so a "
            "projection would be another on every rank; accepted are a plain model, DistributedDataParallel and fully_shard"
        )


def count(name: str, value: Any) -> int:
    """Check an argument that counts samples."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
