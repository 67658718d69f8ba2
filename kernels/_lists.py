"""Groups lists of tensors into launches: which tensors share one, and how each is walked through.

A launch takes its metadata by value, as tuples, so nothing is uploaded and a launch can be captured in a CUDA graph. Triton specialises
the members of a tuple on being 1, on divisibility by 16 and on needing 64 bits (``do_not_specialize`` does not reach into tuples): every
model would compile kernels of its own. :func:`encode` therefore passes ``2 v + bias``, which is never any of these; ``_math`` undoes it.
Pointers are specialised on 16-byte alignment, which vector loads need, so a launch holds one pattern of alignment.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 4096  # elements of a program that walks through memory in order: 8 warps of 16 fp32 elements per thread
STRIDED_BLOCK = 1024  # elements of a program that computes an address per element: fewer, because it holds addresses in registers
CAPACITIES = (1, 8, 64)  # tensors of one launch; shorter lists are padded, so that these are all the sizes that are ever compiled
MOST_DIMS = 6  # dims of one strided walk; what has more is cut along its first dim
RANKS = (2, 3, MOST_DIMS)
NARROW = (1 << 30) - 1  # what is smaller is encoded in 32 bits
NARROW_BIAS = 3
WIDE_BIAS = (1 << 40) + 1  # keeps every encoded value in 64 bits
GROUP = 4  # elements that a strided walk keeps together where it can, as through rows that are padded: 16 bytes of float32
ARGUMENTS = 3968  # bytes for the tuples: every GPU accepts 4 KB of arguments, of which the scalars and Triton's own pointers take some

FLAT, SCALAR, STRIDED = 0, 1, 2


class Lists(NamedTuple):
    """What a kernel knows of its lists: pointers of one list after the other, where each tensor starts, sizes, strides."""

    pointers: tuple[Any, ...]
    starts: tuple[int, ...]
    tails: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Shape(NamedTuple):
    """What is compiled in: the kinds of the lists that are walked through, tensors of a launch, dims, bias, elements of a program, and
    how many elements stand together wherever the walk goes (``GROUP``, which the encoded sizes and strides are divided by).
    """

    KINDS: tuple[int, ...]
    T: int
    D: int
    BIAS: int
    BLOCK: int
    GROUP: int = 1


class Walk(NamedTuple):
    """How the elements of one row of tensors are visited: sizes, and per column its kind and strides; no sizes if all are in order."""

    elements: int
    kinds: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()


class Launch(NamedTuple):
    """The arguments of one launch. ``columns[c]`` holds the tensors of list ``c``; ``members`` are their places in the lists.

    Columns beyond the kinds are not walked through: each row has a tensor of its own there, which the kernel addresses by itself. Columns
    of ``_indices.index`` hold numbers.
    """

    members: tuple[int, ...]
    columns: tuple[tuple[Any, ...], ...]
    starts: tuple[int, ...]
    tails: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    row_blocks: tuple[int, ...]
    shape: Shape
    tag: Any

    @property
    def grid(self) -> tuple[int]:
        """One program per block."""
        return (sum(self.row_blocks),)

    @property
    def double(self) -> bool:
        """Whether a list that is walked through is of float64."""
        walked = self.columns[: len(self.shape.KINDS)]
        return any(isinstance(column[0], Tensor) and column[0].dtype == torch.float64 for column in walked)

    @property
    def lists(self) -> Lists:
        """The first argument of a kernel."""
        return Lists(sum(self.columns, ()), self.starts, self.tails, self.sizes, self.strides)

    @property
    def options(self) -> dict[str, Any]:
        """The last arguments of a kernel. Without contraction, which would give other bits than the definition's."""
        return {"SHAPE": self.shape, "num_warps": 8 if self.shape.BLOCK > STRIDED_BLOCK else 4, "enable_fp_fusion": False}

    def aligned(self, column: int) -> bool:
        """Whether the walk through a column of ``_indices`` goes in order from a multiple of 8; -1: the walk counts by itself."""
        return column < 0 or (self.shape.KINDS[column] == FLAT and (self.columns[column][0] - WIDE_BIAS) % 16 == 0)

    def per_row(self, values: Sequence[int]) -> tuple[int, ...]:
        """One integer per member, encoded and padded for ``_math.pick``."""
        return encode([*values, *[values[-1]] * (self.shape.T - len(values))])


def encode(values: Sequence[int], wide: bool = False) -> tuple[int, ...]:
    bias = WIDE_BIAS if wide else NARROW_BIAS
    return tuple(2 * v + bias for v in values)


def halves(value: float) -> tuple[int, int]:
    """The bits of a float64, high and low, for ``_math.float64``."""
    low, high = struct.unpack("<ii", struct.pack("<d", value))
    return high, low


def words(value: int, count: int) -> tuple[int, ...]:
    """The lowest ``16 count`` bits of a whole number, encoded, lowest first, for ``_math.whole``."""
    return encode([value >> 16 * n & 0xFFFF for n in range(count)])


def number(value: float, double: bool) -> tuple[Any, ...]:
    """A number in the precision of computation, for ``_math.numeral``."""
    return words(struct.unpack("<q", struct.pack("<d", value))[0], 4) if double else (value * 1.0,)


def padded_capacity(count: int) -> int:
    """The compiled size that holds ``count`` tensors."""
    return next(c for c in CAPACITIES if c >= count)


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; this makes it the one of ``t``."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _coalesced(row: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of a row, the first tensor's order of memory deciding the order of dims, merged where all tensors allow it."""
    shape = row[0].shape
    strides = [t.stride() if t.shape == shape else t.expand(shape).stride() for t in row]
    dims = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: tuple(-s[d] for s in strides))
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in row]
    for d in dims:
        if sizes and all(m[-1] == s[d] * shape[d] for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= shape[d]
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[d]
            continue
        sizes.append(shape[d])
        for m, s in zip(merged, strides, strict=True):
            m.append(s[d])
    return sizes, merged


def _in_order(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def walk(row: Sequence[Tensor]) -> Walk:
    """How to visit a row of tensors that broadcast to the first one."""
    first = row[0]
    count = first.numel()
    sizes, strides = _coalesced(row)
    kinds = tuple(FLAT if _in_order(sizes, s) else SCALAR if not any(s) else STRIDED for s in strides)
    if STRIDED not in kinds:
        return Walk(count, kinds)
    pad = min((r for r in RANKS if r >= len(sizes)), default=len(sizes)) - len(sizes)
    return Walk(count, kinds, (*(1,) * pad, *sizes), tuple((*(0,) * pad, *s) for s in strides))


def _wide(w: Walk) -> bool:
    reach = [sum((n - 1) * s for n, s in zip(w.sizes, strides, strict=True)) for strides in w.strides]
    return max(w.elements, *w.sizes, *reach, *(s for strides in w.strides for s in strides)) >= NARROW if w.sizes else False


def _grouped(w: Walk) -> tuple[Walk, int]:
    """The walk from group to group of elements that stand together in every list, at a multiple of as many; if there are none, itself."""
    strided = [s for kind, s in zip(w.kinds, w.strides, strict=True) if kind == STRIDED] if w.sizes else []
    if not strided or w.sizes[-1] % GROUP or any(s[-1] != 1 or any(v % GROUP for v in s[:-1]) for s in strided):
        return w, 1
    strides = tuple((*(v // GROUP for v in s[:-1]), s[-1]) for s in w.strides)
    return w._replace(sizes=(*w.sizes[:-1], w.sizes[-1] // GROUP), strides=strides), GROUP


def _cut(member: int, row: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Tensor], Walk]]:
    w = walk(row)
    if len(w.sizes) <= MOST_DIMS:
        yield member, row, w
        return
    shape = row[0].shape
    for part in zip(*(t.expand(shape).unbind(0) for t in row), strict=True):
        yield from _cut(member, part)


def _memory(row: Sequence[Tensor]) -> Any:
    if len(row) == 2:
        a, b = row
        return a.dtype, a.data_ptr() % 16 == 0, b.dtype, b.data_ptr() % 16 == 0
    return tuple((t.dtype, t.data_ptr() % 16 == 0) for t in row)


def _capacity(columns: int, rank: int, wide: bool, values: int) -> int:
    """How many tensors a launch holds."""
    # 64 strided tensors of 3 dims and 2 columns would take 4.6 KB.
    limit = 1 if wide else 8 if rank else CAPACITIES[-1]
    # Per tensor its pointers, a start, a tail, the caller's values, and per dim the sizes and strides.
    size = 8 * columns + 8 + 4 * values + (8 if wide else 4) * rank * (columns + 1)
    return max(c for c in CAPACITIES if c == 1 or (c <= limit and c * size <= ARGUMENTS))


def launches(
    *lists: Sequence[Tensor],
    tags: Sequence[Any] | None = None,
    block: int = BLOCK,
    beside: Sequence[Sequence[Tensor]] = (),
    values: int = 1,
    strided: int = STRIDED_BLOCK,
) -> Iterator[Launch]:
    """Launches that together visit every element of ``lists[0]``, with the elements of the other lists that broadcast to it.

    Rows with different ``tags`` do not share a launch. ``block`` is the number of elements of a program that walks in order, ``strided`` of
    one that does not. Lists ``beside`` are handed over and not walked through. ``values`` is how many numbers per row the caller adds.
    """
    groups: dict[Any, list[tuple[int, Sequence[Tensor], Walk]]] = {}
    in_order = (FLAT,) * len(lists)
    for n, row in enumerate(zip(*lists, strict=True)):
        elements = row[0].numel()
        if not elements:
            continue
        tag = tags[n] if tags else None
        others = tuple(column[n] for column in beside)
        shape = row[0].shape
        # The common case first and without detours: this loop is what a list of thousands of tensors costs.
        for t in row:
            if t.shape != shape or not t.is_contiguous():
                break
        else:
            row += others
            key = (_memory(row), in_order, 0, False, tag, 1)
            groups.setdefault(key, []).append((n, row, Walk(elements, in_order)))
            continue
        for member, part, w in _cut(n, row):
            tensors = (*part, *others)
            grouped, together = _grouped(w)
            key = (_memory(tensors), w.kinds, len(w.sizes), _wide(w), tag, together)
            groups.setdefault(key, []).append((member, tensors, grouped))
    for (_, kinds, rank, wide, tag, group), rows in groups.items():
        limit = _capacity(len(lists) + len(beside), rank, wide, values)
        for at in range(0, len(rows), limit):
            yield _launch(rows[at : at + limit], kinds, rank, wide, tag, strided if rank else block, group)


def _column(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return encode([t.storage_offset() for t in tensors], True) if tensors[0].is_meta else tensors


def _launch(
    rows: Sequence[tuple[int, Sequence[Tensor], Walk]], kinds: tuple[int, ...], rank: int, wide: bool, tag: Any, block: int, group: int
) -> Launch:
    capacity = padded_capacity(len(rows))
    padded = [*rows, *(rows[-1],) * (capacity - len(rows))]
    row_blocks = tuple(-(-w.elements // block) for _, _, w in rows)
    starts = [0, *itertools.accumulate(row_blocks), *[NARROW - 1] * (capacity - len(rows))]
    return Launch(
        members=tuple(member for member, _, _ in rows),
        columns=tuple(map(_column, zip(*(tensors for _, tensors, _ in padded), strict=True))),
        starts=encode(starts),
        tails=encode([(w.elements - 1) % block + 1 for _, _, w in padded]),
        sizes=encode([n for _, _, w in padded for n in w.sizes], wide) or (0,),
        strides=encode([s for c in range(len(kinds)) for _, _, w in padded for s in w.strides[c]], wide) if rank else (0,),
        row_blocks=row_blocks,
        shape=Shape(kinds, capacity, rank, WIDE_BIAS if wide else NARROW_BIAS, block, group),
        tag=tag,
    )
