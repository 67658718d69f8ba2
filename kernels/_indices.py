"""Lists whose members are their elements' indices, which a kernel computes with as it does with addresses.

A random mask depends on an element's row-major index in the whole parameter, a bit mask on that in the tensor; memory may be walked
through in another order, and a shard is a part of its parameter. So the indices are one more list: a member has sizes and strides as a
tensor has, and an offset instead of a pointer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastcl.kernels._lists import MOST_DIMS, Launch, launches

# As in fastcl.reference.child_mask: tensor index, offset, strides.
Place: TypeAlias = tuple[int, int, Sequence[int]]

_NOWHERE = torch.empty(0, dtype=torch.int16, device="meta")  # of 2 bytes, so that what is aligned to 16 is a multiple of 8


def index(shape: Sequence[int], offset: int, strides: Sequence[int]) -> Tensor:
    """Element ``j`` has the index ``offset + sum j_d strides_d``."""
    return _NOWHERE.as_strided(tuple(shape), tuple(strides), offset)


def row_major(shape: Sequence[int]) -> Tensor:
    """A contiguous tensor's own indices."""
    return index(shape, 0, [math.prod(shape[d + 1 :]) for d in range(len(shape))])


def counts_itself(leading: Tensor) -> bool:
    """Whether a walk led by this tensor meets its elements in row-major order and in one piece, so that it needs no list."""
    return leading.is_contiguous() and leading.dim() <= MOST_DIMS


def own_indices(leading: Sequence[Tensor]) -> list[Tensor | None]:
    """Per tensor the elements' indices in it; None where a walk counts by itself."""
    return [None if counts_itself(t) else row_major(t.shape) for t in leading]


def whole_indices(leading: Sequence[Tensor], places: Sequence[Place] | None) -> list[Tensor | None]:
    """Per tensor the elements' indices in the whole parameter; None where a walk counts by itself."""
    if places is None:
        return own_indices(leading)
    return [index(t.shape, offset, strides) for t, (_, offset, strides) in zip(leading, places, strict=True)]


def indexed(
    grads: Sequence[Tensor], listed: Sequence[Tensor | None], beside: Sequence[Sequence[Tensor]] = ()
) -> Iterator[tuple[Launch, int]]:
    """Launches over ``grads``, each with the column of their indices: 1, or -1 where the walk counts by itself."""
    for column in (-1, 1):
        rows = [n for n, i in enumerate(listed) if (i is None) == (column < 0)]
        lists = [[grads[n] for n in rows], [i for i in listed if i is not None]][: 1 if column < 0 else 2]
        for launch in launches(*lists, beside=[[tensors[n] for n in rows] for tensors in beside]):
            yield launch._replace(members=tuple(rows[m] for m in launch.members)), column
