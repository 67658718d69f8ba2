"""Markdown tables and numbers in them."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence


def number(value: float) -> str:
    """Three significant digits, at most five decimals, never in scientific notation."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(5, max(0, digits))}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: Container[int]) -> str:
    """A Markdown table; the columns in ``text`` are aligned left, the others right."""
    rule = ["---" if n in text else "---:" for n in range(len(head))]
    return "\n".join("| " + " | ".join(r) + " |" for r in (list(head), rule, *map(list, rows)))
