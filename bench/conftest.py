"""Lets ``pytest bench/ --benchmark-only`` find bench_*.py; ``make bench`` does not need it."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cells import Cell, Workload


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture
def side_by_side(benchmark: Any) -> Any:
    """A function that measures one provider of one cell, in that cell's group."""

    def run(cell: Cell, provider: str) -> None:
        work = Workload(cell, "cpu")
        work.add(provider)
        if provider in work.not_run:
            pytest.skip(work.not_run[provider])
        benchmark.group = str(cell)
        benchmark.extra_info["bytes"] = cell.amount.total
        benchmark.pedantic(work.calls[provider], setup=work.reset, rounds=20 if cell.burst > 1 else 7, warmup_rounds=1)

    return run
