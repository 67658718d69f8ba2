"""Numbers that precisions are made with."""

from __future__ import annotations

from typing import Any

from fastcl.ops import _checks


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds. Raises TypeError and ValueError, which name it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value}")
    return value


def positive(name: str, value: Any) -> float:
    """A finite number > 0 that is no bool. Raises TypeError and ValueError, which name it."""
    return _checks.positive(name, _number(name, value))


def at_least_zero(name: str, value: Any) -> float:
    """A finite number >= 0 that is no bool. Raises TypeError and ValueError, which name it."""
    return _checks.at_least_zero(name, _number(name, value))


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got bool")
    return value
