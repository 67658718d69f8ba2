"""Layers of the Kronecker family that one program solves: which of them share a launch, and where a program finds its layer's matrices.

A launch holds layers of one padded size. The last column of ``[W | b]`` stands apart, as a vector: sizes as 32 x 33 and 128 x 129, which a
bias makes of powers of two, would otherwise be padded to twice their columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._lists import ARGUMENTS, NARROW, NARROW_BIAS, WIDE_BIAS, encode

CAPACITIES = (1, 8, 32)  # layers of one launch; 32 with all lists of a step fill the arguments
SMALLEST = 16  # rows and columns of the smallest tile that is multiplied
VECTOR = 4  # elements whose address is known to be aligned where sizes and strides allow it: 16 bytes of float32

Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


class Layers(NamedTuple):
    """What a kernel knows of its layers: pointers, one list after the other; numbers, one kind after the other."""

    pointers: tuple[Any, ...]
    numbers: tuple[int, ...]


class Plan(NamedTuple):
    """What is compiled in: layers of a launch, tile, whether a column stands apart, inner dims (0: in order), factor, bias, lists."""

    T: int
    M: int
    N: int
    TAIL: bool
    D: int
    ALIGN: int
    BIAS: int
    MATRICES: int
    PAIRS: int


class Launch(NamedTuple):
    """The arguments of one launch over ``count`` layers."""

    count: int
    layers: Layers
    plan: Plan
    double: bool

    @property
    def options(self) -> dict[str, Any]:
        """The last arguments of a kernel."""
        tile = self.plan.M * self.plan.N * (8 if self.double else 4)
        warps = min(16, max(4, tile // 8192))
        return {"DTYPE": tl.float64 if self.double else tl.float32, "PLAN": self.plan, "num_warps": warps}


class _Layer(NamedTuple):
    key: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...]


def _inner(weights: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of all dims but the first, in their order, merged where all tensors allow it."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in weights]
    for d in range(1, weights[0].dim()):
        size = weights[0].shape[d]
        if size == 1:
            continue
        if sizes and all(s[-1] == w.stride(d) * size for s, w in zip(strides, weights, strict=True)):
            sizes[-1] *= size
            for s, w in zip(strides, weights, strict=True):
                s[-1] = w.stride(d)
        else:
            sizes.append(size)
            for s, w in zip(strides, weights, strict=True):
                s.append(w.stride(d))
    return sizes, strides


def _last_column(weight: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    last = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return weight.as_strided((weight.shape[0],), (weight.stride(0),), weight.storage_offset() + last)


def _layer(place: int, matrices: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> _Layer:
    rows = weights[0].shape[0]
    sizes, strides = _inner(weights)
    columns = math.prod(sizes)
    tails: Sequence[Tensor] = weights
    has_tail = biases[0].numel() > 0
    if has_tail:
        tails = biases
    elif columns > SMALLEST and columns - 1 == triton.next_power_of_2(columns - 1):
        tails = [_last_column(w, sizes, s) for w, s in zip(weights, strides, strict=True)]
        has_tail, columns = True, columns - 1
    flat = all(s in ([], [1]) for s in strides)
    steps = [x.stride(0) for x in (*matrices, *weights)]
    align = VECTOR if flat and all(v % VECTOR == 0 for v in (columns, *steps)) else 1
    pairs = [(w.stride(0) // align, t.stride(0) if has_tail else 0) for w, t in zip(weights, tails, strict=True)]
    numbers = (rows, columns // align, *(x.stride(0) // align for x in matrices), *(v for pair in pairs for v in pair), place)
    if not flat:
        numbers += (*sizes, *(v for s in strides for v in s))
    tile = tuple(max(SMALLEST, triton.next_power_of_2(v)) for v in (rows, columns))
    # Each stride is met by at most as many steps as a tile has rows or columns.
    wide = max(numbers) * max(tile) * align * len(numbers) >= NARROW
    tensors = (*matrices, *(t for pair in zip(weights, tails, strict=True) for t in pair))
    memory = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    return _Layer((tile, has_tail, 0 if flat else len(sizes), align, wide, memory), tensors, numbers)


def plans(matrices: Sequence[Sequence[Tensor]], pairs: Sequence[Pair]) -> Iterator[Launch]:
    """Launches over all layers that have elements: of matrices of C, A first, and of pairs of weights and biases."""
    groups: dict[Any, list[_Layer]] = {}
    for n, weight in enumerate(pairs[0][0]):
        if weight.numel():
            layer = _layer(n, [x[n] for x in matrices], [w[n] for w, _ in pairs], [b[n] for _, b in pairs])
            groups.setdefault(layer.key, []).append(layer)
    for (tile, tail, dims, align, wide, memory), layers in groups.items():
        bias = WIDE_BIAS if wide else NARROW_BIAS
        size = 8 * len(memory) + (8 if wide else 4) * len(layers[0].numbers)
        limit = 1 if wide else max(c for c in CAPACITIES if c == 1 or c * size <= ARGUMENTS)
        for at in range(0, len(layers), limit):
            part = layers[at : at + limit]
            capacity = next(c for c in CAPACITIES if c >= len(part))
            padded = [*part, *part[-1:] * (capacity - len(part))]
            pointers = tuple(t for column in zip(*(x.tensors for x in padded), strict=True) for t in column)
            numbers = encode([v for column in zip(*(x.numbers for x in padded), strict=True) for v in column], wide)
            plan = Plan(capacity, *tile, tail, dims, align, bias, len(matrices), len(pairs))
            yield Launch(len(part), Layers(pointers, numbers), plan, memory[0][0] == torch.float64)


@triton.jit  # type: ignore[untyped-decorator]
def _of_layer(values: tl.tuple, COLUMN: tl.constexpr, T: tl.constexpr) -> tl.tensor:
    layer = tl.program_id(0)
    value = values[COLUMN * T]
    for t in tl.static_range(1, T):
        value = tl.where(layer >= t, values[COLUMN * T + t], value)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def number(layers: tl.tuple, COLUMN: tl.constexpr, PLAN: tl.constexpr) -> tl.tensor:
    """One of the numbers of this program's layer."""
    return (_of_layer(layers.numbers, COLUMN, PLAN.T) - PLAN.BIAS) >> 1


@triton.jit  # type: ignore[untyped-decorator]
def extent(layers: tl.tuple, PLAN: tl.constexpr) -> tl.tuple:
    """Rows, and columns without the one that stands apart."""
    return number(layers, 0, PLAN).to(tl.int32), (number(layers, 1, PLAN) * PLAN.ALIGN).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def place(layers: tl.tuple, PLAN: tl.constexpr) -> tl.tensor:
    """Where the layer stands in the lists."""
    return number(layers, 2 + PLAN.MATRICES + 2 * PLAN.PAIRS, PLAN).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def matrix(layers: tl.tuple, C: tl.constexpr, PLAN: tl.constexpr) -> tl.tuple:
    """Pointer and row stride of matrix C."""
    return _of_layer(layers.pointers, C, PLAN.T), number(layers, 2 + C, PLAN) * PLAN.ALIGN


@triton.jit  # type: ignore[untyped-decorator]
def entries(layers: tl.tuple, rows: tl.tensor, columns: tl.tensor, P: tl.constexpr, PLAN: tl.constexpr) -> tl.tensor:
    """Addresses of a tile of the weight of pair P."""
    first: tl.constexpr = 2 + PLAN.MATRICES
    step = number(layers, first + 2 * P, PLAN) * PLAN.ALIGN
    if PLAN.D == 0:
        inner = columns
    else:
        sizes: tl.constexpr = first + 2 * PLAN.PAIRS + 1
        index = columns
        inner = index * 0
        for back in tl.static_range(PLAN.D):
            stride = number(layers, sizes + (1 + P) * PLAN.D + PLAN.D - 1 - back, PLAN)
            if back == PLAN.D - 1:
                inner += index * stride
            else:
                size = number(layers, sizes + PLAN.D - 1 - back, PLAN).to(tl.int32)
                inner += index % size * stride
                index = index // size
    return _of_layer(layers.pointers, PLAN.MATRICES + 2 * P, PLAN.T) + (rows[:, None] * step + inner[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def apart(layers: tl.tuple, rows: tl.tensor, P: tl.constexpr, PLAN: tl.constexpr) -> tl.tensor:
    """Addresses of the column of pair P that stands apart."""
    stride = number(layers, 2 + PLAN.MATRICES + 2 * P + 1, PLAN)
    return _of_layer(layers.pointers, PLAN.MATRICES + 2 * P + 1, PLAN.T) + rows * stride
