"""A-GEM and GEM: ``pytest bench/bench_projection.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, rows


@pytest.mark.parametrize(("cell", "provider"), rows("project_", "project_, not violated", "gem_project_"))
def test_projection(side_by_side: Any, cell: Cell, provider: str) -> None:
    side_by_side(cell, provider)
