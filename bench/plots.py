"""The plots: time relative to the yardstick where memory bounds an op, microseconds per tensor where its calls do, optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart by colour-blind readers; fastcl is the one strong colour.
COLOURS = {"official": "#CCCCCC", "eager": "#999999", "foreach": "#E69F00", "compile": "#56B4E9", "fastcl": "#D55E00", "triton": "#009E73"}
INK, QUIET = "#222222", "#666666"
BOUND = (("soft_mask_", "fp32"), ("soft_mask_", "bf16"), ("emax_", "fp32"), ("spg_importance_", "fp32"))
TINY = (("soft_mask_", "400x64"), ("soft_mask_", "10000x64"), ("emax_", "400x64"), ("emax_", "10000x64"))

Record = Mapping[str, Any]


def _find(result: Record, op: str, size: str, dtype: str) -> Record | None:
    return next((c for c in result["cells"] if (c["op"], c["size"], c["dtype"]) == (op, size, dtype)), None)


def _bound(result: Record) -> list[Record]:
    found = [_find(result, op, "gpt2-small", dtype) for op, dtype in BOUND]
    return [c for c in found if c is not None]


def _tiny(result: Record) -> list[Record]:
    found = [_find(result, op, size, "fp32") for op, size in TINY]
    return [c for c in found if c is not None]


def captions(result: Record) -> list[tuple[str, str]]:
    """File name and caption of every plot that the result has the cells for."""
    name, out = result["machine"]["name"], []
    if _bound(result):
        out.append((f"{name}-memory.png", "Time over GPT-2 small's tensors relative to the yardstick, by implementation"))
    if _tiny(result):
        out.append((f"{name}-calls.png", "Microseconds per tensor for lists of small tensors, by implementation"))
    if result["optimizers"]:
        out.append((f"{name}-optimizers.png", "Time of an optimizer's step relative to torch's fused AdamW without a transform"))
    return out


def _where(result: Record) -> str:
    m = result["machine"]
    place = m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads"
    software = f"torch {m['torch']}, fastcl {m['fastcl']} ({m['backend']})"
    return f"{place}, {software}, {m['date']}. Medians, bars: quartiles; interleaved in one run."


def _value(provider: Record, scale: float) -> tuple[float, float, float]:
    return provider["median_ms"] * scale, provider["low_ms"] * scale, provider["high_ms"] * scale


def _panel(axis: Any, title: str, rows: Sequence[tuple[str, tuple[float, float, float]]], unit: str) -> None:
    longest = max(v[0] for _, v in rows)
    for y, (name, (value, low, high)) in enumerate(rows):
        error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.barh(y, value, color=COLOURS[name], height=0.72, xerr=error, error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2})
        shown = f"{value:.2f}" if value < 10 else f"{value:.1f}"
        weight = "bold" if name == "fastcl" else "normal"
        axis.text(max(value, high) + longest * 0.02, y, f"{shown}{unit}", va="center", fontsize=9, color=INK, fontweight=weight)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9, color=INK)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "fastcl" else "normal")
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.22)
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.tick_params(length=0, labelsize=8.5)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _figure(panels: int, title: str, note: str, axis_label: str) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if panels > 1 else 1
    lines = -(-panels // columns)
    figure = Figure(figsize=(4.9 * columns, 2.15 * lines + 1.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.012, ha="left", color=INK, fontweight="bold")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[max(0, panels - columns) : panels]:
        axis.set_xlabel(axis_label, fontsize=9, color=QUIET)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    figure.supxlabel(note, fontsize=7.5, color=QUIET, x=0.012, ha="left")
    return figure, axes[:panels]


def _names(record: Record) -> list[str]:
    return [n for n in COLOURS if n in record["providers"]]


def _draw_bound(result: Record, path: Path) -> None:
    records = _bound(result)
    title = "GPT-2 small, 124 M elements in 148 tensors: time relative to the yardstick"
    note = f"1 (dashed) is a sweep that moves the fewest bytes the op can and does nothing else.\n{_where(result)}"
    figure, axes = _figure(len(records), title, note, "time / yardstick's time (lower is better)")
    for axis, c in zip(axes, records, strict=True):
        yardstick = c["providers"]["yardstick"]["median_ms"]
        rows = [(n, _value(c["providers"][n], 1 / yardstick)) for n in _names(c)]
        _panel(axis, f"{c['op']}, {c['dtype']}  (yardstick {yardstick:.1f} ms)", rows, " x")
        axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    figure.savefig(path, metadata={"Software": None})


def _draw_tiny(result: Record, path: Path) -> None:
    records = _tiny(result)
    title = "Lists of small tensors (64 fp32 elements each): time per tensor"
    figure, axes = _figure(len(records), title, _where(result), "microseconds per tensor (lower is better)")
    for axis, c in zip(axes, records, strict=True):
        rows = [(n, _value(c["providers"][n], 1e3 / c["tensors"])) for n in _names(c)]
        _panel(axis, f"{c['op']}, {c['tensors']:,} tensors", rows, " µs")
    figure.savefig(path, metadata={"Software": None})


def _draw_optimizers(result: Record, path: Path) -> None:
    records = [c for c in result["optimizers"] if c["size"] == "gpt2-small"] or result["optimizers"]
    title = "GPT-2 small, optimizer step: time relative to torch's fused AdamW without a transform"
    note = f"1 (dashed) is torch.optim.AdamW(fused=True) alone; the other rivals transform the gradient first.\n{_where(result)}"
    figure, axes = _figure(len(records), title, note, "time / torch fused (lower is better)")
    for axis, c in zip(axes, records, strict=True):
        bare = c["providers"]["torch fused"]["median_ms"]
        rows = [(n, _value(c["providers"][n], 1 / bare)) for n in _names(c)]
        _panel(axis, f"{c['op']}  (torch fused {bare:.1f} ms)", rows, " x")
        axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    figure.savefig(path, metadata={"Software": None})


DRAWN = {"memory": _draw_bound, "calls": _draw_tiny, "optimizers": _draw_optimizers}


def draw(result: Record, folder: Path) -> list[Path]:
    """Draw every plot of a result into ``folder``."""
    out = []
    for file, _ in captions(result):
        path = folder / file
        DRAWN[path.stem.rpartition("-")[2]](result, path)
        out.append(path)
    return out
