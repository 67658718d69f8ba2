"""Heat maps of accuracy matrices and accuracy along the stream; they need matplotlib, and no display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcl.metrics import AccuracyMatrix, mean_and_std

# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#8c8c8c", "#d95f02", "#1b6ca8", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b59f00")
BOUND = "#2b8a3e"
MARKERS = "so^Dv<>P"
PER_LINE = 4


def _figure(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})


def heat_maps(path: Path, title: str, matrices: Mapping[str, Tensor]) -> None:
    """The accuracy matrices side by side, on one colour scale; what was not measured stays white."""
    lowest = min(float(m[~m.isnan()].min()) for m in matrices.values())
    lowest = min(lowest, 0.99)  # a scale needs two ends
    tasks = len(next(iter(matrices.values())))
    lines = -(-len(matrices) // PER_LINE)
    columns = -(-len(matrices) // lines)
    figure, axes = _figure(lines, columns, (4.1 * columns + 0.9, 4.4 * lines + 0.3))
    shown, spare = list(axes.flat)[: len(matrices)], list(axes.flat)[len(matrices) :]
    for axis in spare:
        axis.remove()
    for axis, (name, m) in zip(shown, matrices.items(), strict=True):
        image = axis.imshow(m.numpy(), cmap="viridis", vmin=lowest, vmax=1)
        for i, row in enumerate(m.tolist()):
            for j, value in enumerate(row):
                if tasks <= 10 and not math.isnan(value):
                    colour = "white" if value < lowest + 0.6 * (1 - lowest) else "black"
                    axis.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=9.5, color=colour)
        axis.set_title(name, parse_math=False)  # a folder's name may hold dollar signs
        axis.set(xlabel="accuracy on task", ylabel="after training task", xticks=range(tasks), yticks=range(tasks))
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=shown, shrink=0.8, pad=0.015, format=lambda v, _: f"{100 * v:.0f} %")
    figure.suptitle(title + "\n", fontsize=11)
    _save(figure, path)


def _at(measure: Callable[[AccuracyMatrix, int], float], k: int) -> Callable[[AccuracyMatrix], float]:
    return lambda r: measure(r, k)


def curves(
    path: Path, title: str, methods: Mapping[str, Sequence[AccuracyMatrix]], bounds: Mapping[str, Sequence[AccuracyMatrix]] | None = None
) -> None:
    """Average accuracy over the tasks so far, and accuracy on the first task, along the stream; bars are one standard deviation.

    Args:
        path: the file, PNG.
        title: of the figure.
        methods: matrices of each method's seeds, all of as many tasks.
        bounds: matrices of which only the last row was measured (joint training): horizontal lines.
    """
    bounds = bounds or {}
    tasks = next(iter([*methods.values(), *bounds.values()]))[0].tasks
    panels: dict[str, Callable[[AccuracyMatrix, int], float]] = {
        "average accuracy on the tasks so far": AccuracyMatrix.acc,
        "accuracy on task 0": lambda r, k: r[k, 0],
    }
    figure, axes = _figure(1, 2, (10, 4.6), sharey=True)
    x = list(range(tasks))
    for axis, (label, measure) in zip(axes[0], panels.items(), strict=True):
        for n, runs in enumerate(methods.values()):
            points = [mean_and_std(runs, _at(measure, k)) for k in x]
            # Bars beside each other: bands of several methods hide one another.
            moved = [k + 0.06 * (n - (len(methods) - 1) / 2) for k in x]
            means, stds = ([0.0 if math.isnan(v) else 100 * v for v in column] for column in zip(*points, strict=True))
            style = {"marker": MARKERS[n % len(MARKERS)], "color": COLOURS[n % len(COLOURS)], "ms": 5.5, "lw": 1.8}
            axis.errorbar(moved, means, stds, elinewidth=1.1, capsize=3, label=str(n), **style)
        for n, runs in enumerate(bounds.values()):
            bound, _ = mean_and_std(runs, _at(measure, tasks - 1))
            axis.axhline(100 * bound, color=BOUND, ls=("--", ":", "-.")[n % 3], lw=1.4, label=str(len(methods) + n))
        axis.set(title=label, xlabel="after training task", xticks=x)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test accuracy in %")
    handles = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(*handles, frameon=False, loc="outside lower center", ncols=min(5, len(methods) + len(bounds)), fontsize=9)
    names = [*methods, *bounds]
    for text in legend.get_texts():  # set afterwards: a label is hidden if it begins with an underscore, and read as TeX between dollars
        text.set_parse_math(False)
        text.set_text(names[int(text.get_text())])
    figure.suptitle(title, fontsize=11)
    _save(figure, path)
