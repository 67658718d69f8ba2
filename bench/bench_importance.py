"""EMax, SPG importance and the Fisher information: ``pytest bench/bench_importance.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("emax_", "spg_importance_", "fisher_add_"))
def test_importance(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
