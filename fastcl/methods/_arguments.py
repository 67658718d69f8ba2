"""Arguments that several methods take, and states that hold a tensor per parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastcl._model import Slot, some


def call(model: nn.Module, x: Any, task: int) -> Tensor:  # noqa: ARG001 (one head serves every task)
    """The default forward; a named function, so that a method can be pickled."""
    logits: Tensor = model(x)
    return logits


def checked_forward(forward: Any) -> Any:
    """The forward that a method calls."""
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function (model, x, task) -> logits, got {type(forward).__name__}")
    return call if forward is None else forward


def whole_below(name: str, value: Any, limit: int) -> int:
    """A whole number from 0 that is below ``limit``, a power of two."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be a whole number from 0 that is below 2**{limit.bit_length() - 1}, got {value}")
    return value


def tensors_by_name(state: Mapping[str, Any], kind: str, slots: Sequence[Slot]) -> list[Tensor]:
    """The tensors that a state holds under the names of the slots, in their order.

    Raises:
        TypeError: no mapping, or something in it that is no tensor.
        ValueError: a name that is missing or that is none of the slots'.
    """
    given = state.get(kind)
    if not isinstance(given, Mapping):
        raise TypeError(f"state[{kind!r}] must be a mapping from names to tensors, got {type(given).__name__}")
    names = {slot.name for slot in slots}
    if missing := sorted(names - given.keys()):
        raise ValueError(f"state[{kind!r}] lacks {some(missing)}, which the model has")
    if unknown := sorted(map(str, given.keys() - names)):
        raise ValueError(f"state[{kind!r}] has {some(unknown)}, which the method does not know")
    for slot in slots:
        if not isinstance(given[slot.name], Tensor):
            raise TypeError(f"state[{kind!r}][{slot.name!r}] must be a tensor, got {type(given[slot.name]).__name__}")
    return [given[slot.name] for slot in slots]
