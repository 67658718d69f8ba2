"""Exact quantiles: ``pytest bench/bench_quantile.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("quantile"))
def test_quantile(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
