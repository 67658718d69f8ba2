"""Numbers that precisions are made with."""

from __future__ import annotations

from typing import Any


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds. Raises TypeError and ValueError, which name it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value}")
    return value
