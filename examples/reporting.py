"""The ops timed beside each other, for the demo."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastcl.testing import CASES, SIZES, clone, elements, largest_error

WARM_UP = 10


def op_table(console: Console, names: Sequence[str], rounds: int = 15, size: str = "resnet18") -> list[dict[str, Any]]:
    """Time the official-style and the fused op on the same inputs, in turns; print medians, their ratio and errors; return the rows.

    In-place torch ops stand beside them. All warm up first: the first temporaries cost page faults that later ones do not.
    """
    table = Table(
        title=f"ops on the {len(SIZES[size])} tensors of a ResNet-18 ({elements(SIZES[size]) / 1e6:.1f} M elements, float32), "
        f"medians of {rounds} rounds after a warm-up, threads: {torch.get_num_threads()}; errors against the float64 definition",
        title_justify="left",
    )
    for column in (
        "op",
        "official-style",
        "in-place torch",
        "fused",
        "ratio to official",
        "largest error official-style",
        "largest error fused",
    ):
        table.add_column(column, justify="left" if column == "op" else "right")
    rows = []
    for name in names:
        case = CASES[name]
        args = case.make(SIZES[size], torch.float32, torch.float32)
        exact = case.in_float64(args)
        case.reference(*exact)
        errors, seconds = {}, {}
        copies = {provider: clone(args) for provider in ("official", "eager", "fastcl")}
        for provider, own in copies.items():
            case.provider(provider)(*own)
            errors[provider], seconds[provider] = largest_error(own[0], exact[0]), []
        for _ in range(rounds + WARM_UP):
            for provider, own in copies.items():
                start = time.perf_counter()
                case.provider(provider)(*own)
                seconds[provider].append(time.perf_counter() - start)
        official, eager, fused = (statistics.median(seconds[p][WARM_UP:]) * 1e3 for p in ("official", "eager", "fastcl"))
        rows.append(
            {"op": name, "official_ms": official, "eager_ms": eager, "fused_ms": fused, "ratio": official / fused}
            | {"official_error": errors["official"], "fused_error": errors["fastcl"]}
        )
        ratio, error = f"{official / fused:.1f}x", f"{errors['fastcl']:.1e}"
        table.add_row(name, f"{official:.1f} ms", f"{eager:.1f} ms", f"{fused:.1f} ms", ratio, f"{errors['official']:.1e}", error)
    console.print(table)
    return rows
