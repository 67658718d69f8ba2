"""Soft masking: ``pytest bench/bench_soft_mask.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("soft_mask_"))
def test_soft_mask(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
