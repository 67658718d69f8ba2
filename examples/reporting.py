"""Tables and plots that the examples share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastcl.metrics import AccuracyMatrix, mean_and_std
from fastcl.testing import CASES, SIZES, clone, elements, largest_error

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WARM_UP = 10
COLOURS = ("#8c8c8c", "#d95f02", "#1b6ca8", "#2b8a3e")


def mean_matrix(runs: Sequence[AccuracyMatrix]) -> Tensor:
    """Mean over runs, entry by entry."""
    return torch.stack([r.values for r in runs]).mean(dim=0)


def plus_minus(pair: tuple[float, float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"


def matrix_table(title: str, runs: Sequence[AccuracyMatrix]) -> Table:
    """The accuracy matrix in percent, mean ± std over runs."""
    values = torch.stack([r.values for r in runs])
    mean, std = 100 * values.mean(dim=0), 100 * values.std(dim=0)
    table = Table(title=title, title_justify="left")
    table.add_column("after task", justify="right")
    for j in range(values.shape[1]):
        table.add_column(f"on {j}", justify="right")
    for i in range(values.shape[1]):
        table.add_row(str(i), *(f"{mean[i, j]:.1f} ± {std[i, j]:.1f}" if j <= i else "" for j in range(values.shape[1])))
    return table


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


def heat_maps(path: Path, title: str, matrices: Mapping[str, Tensor]) -> None:
    """The accuracy matrices side by side, on one colour scale."""
    lowest = min(float(m[~m.isnan()].min()) for m in matrices.values())
    size = len(next(iter(matrices.values())))
    fig, axes = plt.subplots(1, len(matrices), figsize=(4.1 * len(matrices) + 0.9, 4.7), layout="constrained", squeeze=False)
    for ax, (name, m) in zip(axes[0], matrices.items(), strict=True):
        image = ax.imshow(m, cmap="viridis", vmin=lowest, vmax=1)
        for i in range(size):
            for j in range(i + 1):
                value = float(m[i, j])
                dark = value < lowest + 0.6 * (1 - lowest)
                ax.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=9.5, color="white" if dark else "black")
        ax.set(title=name, xlabel="accuracy on task", ylabel="after training task", xticks=range(size), yticks=range(size))
        ax.spines[:].set_visible(False)
    fig.colorbar(image, ax=axes, shrink=0.8, pad=0.015, format=lambda v, _: f"{100 * v:.0f} %")
    fig.suptitle(title + "\n", fontsize=11)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _at(measure: Callable[[AccuracyMatrix, int], float], k: int) -> Callable[[AccuracyMatrix], float]:
    return lambda r: measure(r, k)


def curves(path: Path, title: str, methods: Mapping[str, Sequence[AccuracyMatrix]], joint: Sequence[AccuracyMatrix]) -> None:
    """Average accuracy over the tasks seen, and accuracy on the first task, along the stream; bars are one standard deviation."""
    tasks = joint[0].tasks
    panels: dict[str, Callable[[AccuracyMatrix, int], float]] = {
        "average accuracy on the tasks so far": AccuracyMatrix.acc,
        "accuracy on task 0": lambda r, k: r[k, 0],
    }
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    x = list(range(tasks))
    for ax, (label, measure) in zip(axes, panels.items(), strict=True):
        for n, (name, runs) in enumerate(methods.items()):
            colour, marker = COLOURS[n], "so^"[n]
            points = [mean_and_std(runs, _at(measure, k)) for k in x]
            # Bars beside each other: bands of three methods hide one another.
            moved = [k + 0.06 * (n - 1) for k in x]
            means, stds = ([100 * v for v in column] for column in zip(*points, strict=True))
            ax.errorbar(moved, means, stds, marker=marker, ms=5.5, lw=1.8, elinewidth=1.1, capsize=3, color=colour, label=name)
        bound, _ = mean_and_std(joint, _at(measure, tasks - 1))
        ax.axhline(100 * bound, color=COLOURS[3], ls="--", lw=1.4, label="joint training (upper bound)")
        ax.set(title=label, xlabel="after training task", xticks=x)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy in %")
    axes[0].legend(frameon=False, loc="lower left", fontsize=9)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=150)
    plt.close(fig)
