"""EWC's pull: ``pytest bench/bench_pull.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("ewc_pull_"))
def test_pull(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
