"""What every method with a plain state shares: the tasks it has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcl._state import Stateful


class Method(Stateful):
    """Tasks seen, ``state_dict`` and ``save``; a subclass adds what it does with a gradient and what else it keeps."""

    def __init__(self) -> None:
        self._tasks_seen = 0

    @property
    def tasks_seen(self) -> int:
        """Number of tasks that have ended."""
        return self._tasks_seen

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: ``format``, ``version``, ``tasks_seen`` and, where there is one, ``buffer`` with its generator's state."""
        state = super().state_dict()
        return {"format": state.pop("format"), "version": state.pop("version"), "tasks_seen": self.tasks_seen, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; tensors are copied.

        Raises:
            TypeError: not a mapping, or a part of it of a wrong kind.
            ValueError: another format or version, a ``tasks_seen`` that is no number of tasks, a buffer's state that does not fit the
                buffer. The object is then as it was.
        """
        super().load_state_dict(state)
        self._tasks_seen = state["tasks_seen"]

    def _check(self, state: Mapping[str, Any]) -> None:
        tasks_seen = state.get("tasks_seen")
        if not isinstance(tasks_seen, int) or isinstance(tasks_seen, bool) or tasks_seen < 0:
            raise ValueError(f"tasks_seen is {tasks_seen!r}; accepted is a whole number from 0")
