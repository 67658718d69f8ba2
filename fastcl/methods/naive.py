"""Fine-tuning without anything against forgetting: the baseline, with the calls of the other methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastcl.methods._memory import Scaler
from fastcl.methods._state import Method


class Naive(Method):
    """Sequential fine-tuning: no call touches a gradient, so the same loop serves the baseline and the methods.

    Args:
        model: the module that is trained.

    Raises:
        TypeError: a model that is no Module.
    """

    _format = "fastcl.naive"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

    def after_backward(self, *, scaler: Scaler | None = None) -> None:
        """Leave the gradients as they are."""

    def end_task(self, loader: Iterable[tuple[Any, Any]] | None = None) -> None:  # noqa: ARG002 (the methods' call)
        """Count the task; ``loader`` is not read."""
        self._tasks_seen += 1
