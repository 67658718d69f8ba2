"""Masks of one bit per element: ``pytest bench/bench_bit_mask.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("bit_mask_"))
def test_bit_mask(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
