"""Exact quantiles over lists of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import backends
from fastcl.ops import _checks, _dispatch, _sharded
from fastcl.reference.quantile import BINS, DIGITS, from_keys, interpolate, ranks

# What counts the digits of one level: (prefixes, level) -> counts, as the stage radix_counts does.
Counting = Callable[[Tensor, int], Tensor]


def quantile(tensors: Sequence[Tensor], q: float) -> Tensor:
    """The value at rank ``q (n - 1)`` of all n elements of all tensors in ascending order, interpolated linearly between neighbours.

    Exact for any number of elements: a radix select over the bits of the numbers, without sorting, copying or joining the tensors. The
    neighbours are found as they are stored; rank and interpolation are float64. So it is ``numpy.quantile`` of all elements in float64 to
    the last bit (NumPy itself rounds to float32 in arrays of float32). Any NaN gives NaN, and so does an infinite neighbour where NumPy's
    formula has inf - inf or 0 * inf (at q = 0 and 1, too). Not differentiable.

    Of DTensors it is the quantile of the whole tensors: the counts are summed over the ranks of the mesh, what is replicated counts once,
    and the result has the same bits on all ranks and for all placements but Partial, which is refused. Every rank calls the op.

    Args:
        tensors: list of dense tensors on one device, float64, float32, bfloat16 or float16, any strides; at least one element in all.
        q: number in [0, 1]; 0 is the least element, 0.5 the median.

    Returns:
        0-d, float64, on the tensors' device; no host sync.

    Raises:
        TypeError: not a list of dense tensors, a dtype that is not accepted, a q that is no number.
        ValueError: no element, two devices, a q outside [0, 1]. Nothing is written in any case.
    """
    result: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate_reading("quantile", tensors, tensors, q)
    if result is _dispatch.REFUSED:
        _checks.listed("tensors", tensors)
        q = _checks.unit_interval("q", q)
        with torch.no_grad():
            result = _of_shards(tensors, q) if _sharded.is_sharded(tensors) else torch.ops.fastcl.quantile(tensors, q)
    value: Tensor = result
    return value


@_sharded.outside_graphs
def _of_shards(tensors: Sequence[Tensor], q: float) -> Tensor:
    mesh = _sharded.mesh_of(("tensors", tensors))
    _checks.one_device(("tensors", tensors))
    own = [_dispatch.plain(t) for t in _sharded.shards(tensors)]
    # Here and on all of them: a rank that raises alone would leave the others waiting.
    _checks.dense("tensors", own, _checks.FLOATING)
    count = _count(tensors)
    members = [t for t, counts in zip(own, _sharded.counted(tensors, mesh), strict=True) if counts and t.numel()]
    wide = _wide(own)

    def counts(prefixes: Tensor, level: int) -> Tensor:
        return _sharded.all_reduce_sum(_counts(own[0].device, members, wide, prefixes, level), mesh)

    with torch.no_grad():
        return select(counts, count, q, wide, own[0].device)


def _counts(device: torch.device, tensors: Sequence[Tensor], wide: bool, prefixes: Tensor, level: int) -> Tensor:
    if not tensors:
        return torch.zeros(2, BINS + 1, dtype=torch.int64, device=device)
    result: Tensor = _dispatch.run_reading("radix_counts", device, tensors, prefixes, level, wide)
    return result


def select(counts: Counting, count: int, q: float, wide: bool, device: torch.device) -> Tensor:
    """The quantile of ``count`` elements, digit by digit: what is left between two sweeps are 2048 numbers, and they stay on the device."""
    below, above, weight = ranks(count, q)
    rank = torch.stack([torch.full((), r, dtype=torch.int64, device=device) for r in (below, above)])[:, None]
    prefixes = torch.zeros(2, dtype=torch.int64, device=device)
    missing = prefixes[0]
    for level, width in enumerate(DIGITS[wide]):
        found = counts(prefixes, level)
        if level == 0:
            missing = found[0, BINS]
        digits = found[:, :BINS]
        upto = digits.cumsum(dim=1)
        # With NaNs, which are not among the digits, a rank can lie beyond all of them.
        digit = torch.searchsorted(upto, rank, right=True).clamp(max=(1 << width) - 1)
        rank = rank - upto.gather(1, digit) + digits.gather(1, digit)
        prefixes = (prefixes << width) | digit[:, 0]
    values = from_keys(prefixes, wide)
    return torch.where(missing > 0, torch.nan, interpolate(values[0], values[1], weight))


def _wide(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype == torch.float64 for t in tensors)


def _count(tensors: Sequence[Tensor]) -> int:
    count = sum(t.numel() for t in tensors)
    if count == 0:
        raise ValueError(f"tensors has no element ({len(tensors)} tensors): there is no quantile of nothing")
    return count


def _check(tensors: Sequence[Tensor], q: float) -> Tensor:
    _checks.dense("tensors", tensors, _checks.FLOATING)
    _checks.one_device(("tensors", tensors))
    _checks.unit_interval("q", q)
    _count(tensors)
    return torch.empty((), dtype=torch.float64, device=tensors[0].device)


def _run(tensors: Sequence[Tensor], q: float) -> Tensor:
    _check(tensors, q)
    device, own = tensors[0].device, [_dispatch.plain(t) for t in tensors]
    if backends.serving(device.type) in ("cpp", "reference"):
        whole: Tensor = _dispatch.run_reading("quantile", device, own, q)
        return whole
    with torch.no_grad():
        return select(functools.partial(_counts, device, own, _wide(own)), _count(own), q, _wide(own), device)


_dispatch.define("quantile", "quantile", "(Tensor[] tensors, float q) -> Tensor", implementation=_run, fake=_check)
