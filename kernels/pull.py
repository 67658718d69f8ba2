"""EWC's pull towards an anchor on Triton; the definition is fastcl.reference.pull."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import here, numeral, read_list, write_list
from fastcl.kernels._lists import launches, number, on_device
from fastcl.kernels._math import decode, encode, precision


@triton.jit  # type: ignore[untyped-decorator]
def _pull(lists: tl.tuple, at: tl.tuple, twice: tl.tuple, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    grad = read_list(lists, at, 0, SHAPE, MASKED)
    param = read_list(lists, at, 1, SHAPE, MASKED)
    weight = read_list(lists, at, 2, SHAPE, MASKED)
    anchor = read_list(lists, at, 3, SHAPE, MASKED)
    dtype: tl.constexpr = precision(precision(grad.dtype, param.dtype), precision(weight.dtype, anchor.dtype))
    pull = decode(weight, dtype) * (decode(param, dtype) - decode(anchor, dtype))
    write_list(lists, at, 0, encode(decode(grad, dtype) + numeral(twice, 0, dtype) * pull, grad.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def pull_kernel(lists: tl.tuple, twice: tl.tuple, SHAPE: tl.constexpr) -> None:
    """One block of one gradient: ``g <- g + 2 strength A (theta - c)``."""
    at = here(lists, SHAPE)
    if at[2] == SHAPE.BLOCK:
        _pull(lists, at, twice, SHAPE, False)
    else:
        _pull(lists, at, twice, SHAPE, True)


def ewc_pull_(
    grads: Sequence[Tensor], params: Sequence[Tensor], precision: Sequence[Tensor], anchor: Sequence[Tensor], strength: float
) -> None:
    """``g <- g + 2 * strength * A (theta - c)``; see :func:`fastcl.ops.ewc_pull_`."""
    for launch in launches(grads, params, precision, anchor):
        with on_device(grads[0]):
            pull_kernel[launch.grid](launch.lists, number(2 * strength, launch.double), **launch.options)
