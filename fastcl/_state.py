"""State in memory and in a file: what methods and precisions keep from task to task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastcl import _checkpoint, _distributed

VERSION = 1


class Stateful:
    """``state_dict``, ``load_state_dict``, ``save`` and ``load``; a subclass says what it keeps and takes it over."""

    _format: ClassVar[str]

    def _kept(self) -> dict[str, Any]:
        """What the state holds: nested mappings and lists of tensors and plain values, copied."""
        return {}

    def _check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for what a state must not be, before anything is taken over."""

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`_kept` gave, or raise TypeError or ValueError and change nothing."""

    def _device(self) -> torch.device:
        """Where a loaded state goes, as far as it was on a device of that type when it was saved."""
        return torch.device("cpu")

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: ``format``, ``version``, and what this object keeps."""
        return {"format": self._format, "version": VERSION, **self._kept()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; tensors are copied.

        Raises:
            TypeError: not a mapping, or a part of it of a wrong kind.
            ValueError: another format or version, or a state that does not fit. The object is then as it was.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping made by state_dict(), got {type(state).__name__}")
        if state.get("format") != self._format or state.get("version") != VERSION:
            raise ValueError(
                f"state has the format {state.get('format')!r}, version {state.get('version')!r}; accepted is {self._format!r}, {VERSION}"
            )
        self._check(state)
        self._take_over(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors, with format, version and a checksum in the header.

        The file appears whole or not at all. Raises OSError if it cannot be written; what was at ``path`` is then still there. Where the
        state holds DTensors every rank calls it; they are gathered, and the first rank writes.
        """
        tensors: dict[str, Tensor] = {}
        plan = _flatten(self.state_dict(), "state", tensors)
        header = {"format": self._format, "version": str(VERSION), "state": json.dumps(plan)}
        _distributed.once(tensors, lambda whole: _checkpoint.write(path, whole, header), str(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the state of a file that :meth:`save` wrote, under the rules of :meth:`load_state_dict`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged or foreign file, another version, or a state that does not fit; the message names the path and what is
                wrong. The object is then as it was.
        """
        tensors, header = _checkpoint.read(path, self._format, VERSION)
        try:
            self.load_state_dict(_restored(header.get("state"), tensors, self._device()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit: {error}") from error


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> list[Any]:
    """``value`` as JSON can hold it; its tensors go into ``tensors`` under names that tell where they were."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return ["tensor", [name, value.device.type]]
    if isinstance(value, Mapping):
        return ["mapping", [[key, _flatten(v, f"{name}.{key}", tensors)] for key, v in value.items()]]  # pairs: JSON's keys are strings
    if isinstance(value, (list, tuple)):
        return ["list", [_flatten(v, f"{name}.{index}", tensors) for index, v in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    raise TypeError(f"{name} is a {type(value).__name__}; a state is made of tensors, numbers, strings, None, mappings and lists")


def _restored(stated: str | None, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    try:
        return _unflatten(json.loads(stated or ""), tensors, device)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its header describes no state ({error})") from error


def _unflatten(plan: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    kind, value = plan
    if kind == "tensor":
        name, saved_on = value
        return tensors[name].to(device) if saved_on == device.type else tensors[name]
    if kind == "mapping":
        return {key: _unflatten(v, tensors, device) for key, v in value}
    return [_unflatten(v, tensors, device) for v in value] if kind == "list" else value
