"""Interleaved timing, statistics and extra memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
HIGH_WATER_RESET = "5"  # proc(5), /proc/pid/clear_refs: reset the peak resident set size


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the samples, in milliseconds."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of samples in seconds."""
        if not seconds:
            raise ValueError("no samples were taken, so there is no median")
        ms = [s * 1e3 for s in seconds]
        low, median, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
        return cls(median, low, high, len(ms))

    def row(self) -> dict[str, float]:
        """As the results hold it."""
        return {f"{k}_ms" if k != "samples" else k: v for k, v in asdict(self).items()}


def ratios(numerator: list[list[float]], denominator: list[list[float]]) -> list[float]:
    """The per-round ratios: both of a ratio's times were taken within one round, so slow drift cancels."""
    return [statistics.median(n) / statistics.median(d) for n, d in zip(numerator, denominator, strict=False)]


def paired_ratio(numerator: list[list[float]], denominator: list[list[float]]) -> Spread:
    """Spread of :func:`ratios`. No unit."""
    return Spread.of([r / 1e3 for r in ratios(numerator, denominator)])


def cpu_clock(call: Call) -> float:
    """Seconds that a call takes on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock(call: Call) -> float:
    """Seconds between two device events around a call, on an idle stream."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock(device: str) -> Callable[[Call], float]:
    """The clock for a device."""
    return cuda_clock if device == "cuda" else cpu_clock


def interleave(
    calls: Mapping[str, Call],
    reset: Call,
    timed: Callable[[Call], float] = cpu_clock,
    *,
    seconds: float = 6.0,
    rounds: tuple[int, int] = (5, 400),
    burst: int = 1,
    seed: int = 0,
) -> dict[str, list[list[float]]]:
    """Times of every call, by name and round; in each round every call has one turn of ``burst`` samples, in random order.

    ``reset`` restores the inputs before every sample, outside the timed region: masking the same gradients again and again would drive
    them into subnormal numbers, which are slow on CPUs. As many rounds as fit into ``seconds``, within the limits of ``rounds``; a call
    that takes more than an eighth of ``seconds`` leaves after the fewest rounds, so that the others get more.
    """
    order, shuffle = list(calls), random.Random(seed)

    def turn(name: str) -> list[float]:
        samples = []
        for _ in range(burst):
            reset()
            samples.append(timed(calls[name]))
        return samples

    # Warm-up: first touch of memory, lazy initialisation, thread pools.
    slow = {name for name in order if min(turn(name)) > seconds / 8}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    times: dict[str, list[list[float]]] = {name: [] for name in order}
    try:
        start = time.perf_counter()
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
            shuffle.shuffle(order)
            for name in order:
                if done < rounds[0] or name not in slow:
                    times[name].append(turn(name))
    finally:
        if collecting:
            gc.enable()
    return times


def flat(rounds: list[list[float]]) -> list[float]:
    """All samples of all rounds."""
    return [s for r in rounds for s in r]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _trim() -> None:
    """Give freed heap back to the system: an allocation served from retained pages would not show in the resident set."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _cpu_extra(call: Call) -> int:
    gc.collect()
    _trim()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text(HIGH_WATER_RESET)
    kept: Any = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def _cuda_extra(call: Call) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept: Any = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


MEMORY_METHOD = {
    "cpu": "rise of the process's peak resident memory during a call (VmHWM, reset through /proc/self/clear_refs after malloc_trim); "
    "counts every allocator, resolution about 0.5 MB",
    "cuda": "rise of torch.cuda.max_memory_allocated during a call",
}


def extra_bytes(call: Call, reset: Call, device: str = "cpu", repeats: int = 3) -> int | None:
    """Most memory that a warm call holds beyond what was there before it: median of ``repeats``. None where it cannot be measured."""
    measured = []
    for _ in range(repeats):
        reset()
        try:
            measured.append(_cuda_extra(call) if device == "cuda" else _cpu_extra(call))
        except OSError:  # no /proc, or clear_refs is read-only in this container
            return None
    return int(statistics.median(measured))
