"""The child mask: ``pytest bench/bench_child_mask.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("child_mask_"))
def test_child_mask(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
