"""Gradient directions on Triton: dot products of lists, A-GEM's and GEM's projection; the definition is fastcl.reference.projection.

The first sweep makes dot products (``_products``), one program decides, and a second sweep combines. That one is launched whatever was
decided, since the host does not wait to know; its programs return at once when all coefficients are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._access import beside, elements, here, read_list, write_list
from fastcl.kernels._lists import STRIDED_BLOCK, Launch, halves, launches, on_device
from fastcl.kernels._math import decode, encode, total
from fastcl.kernels._products import CHUNK, fill_tile, partial_sums, sum_kernel
from fastcl.kernels._quadratic import gem_kernel

# Lists on one side of a tile of the Gram matrix. A launch reads two sides, so each of K lists is read ceil(K / 8) times: once up to 8
# lists, 9 times for the most that are accepted, 65. A wider tile would not fit the registers.
TILE = 8
_SMALLEST = 8  # variables of the smallest quadratic programme that is compiled
_SCALAR = tl.constexpr(1)

Lists = Sequence[Sequence[Tensor]]


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def agem_kernel(partials: tl.tensor, out: tl.tensor, blocks: tl.tensor, CHUNK: tl.constexpr) -> None:
    """``[g.r, r.r, coefficient]``."""
    dot = total(partials, blocks, CHUNK)
    square = total(partials + blocks, blocks, CHUNK)
    violated = (dot < 0) & (square > 0)
    number = (square < float("inf")) & (dot == dot)
    tl.store(out, dot)
    tl.store(out + 1, square)
    coefficient = tl.where(violated, -dot / tl.where(violated, square, 1.0), 0.0)
    tl.store(out + 2, tl.where(number, coefficient, float("nan")))


@triton.jit  # type: ignore[untyped-decorator]
def _combine(lists: tl.tuple, at: tl.tuple, coefficients: tl.tensor, SHAPE: tl.constexpr, MASKED: tl.constexpr) -> None:
    g = read_list(lists, at, 0, SHAPE, MASKED)
    new = decode(g, tl.float64)
    for c in tl.static_range(1, len(SHAPE.KINDS)):
        v = tl.load(coefficients + c - 1)
        m_at = elements(beside(lists, at, c, SHAPE), lists, at, c, SHAPE)
        # A memory that counts for nothing is not read. No branch, so that the loads of all memories are under way at once. The condition
        # becomes an integer first: the interpreter cannot spread a comparison's result, and the compiler sees that it is one for all.
        counts = tl.broadcast_to((v != 0).to(tl.int32), (SHAPE.BLOCK,)) != 0
        if SHAPE.KINDS[c] == _SCALAR:
            m = tl.load(m_at)
        elif MASKED:
            m = tl.load(m_at, mask=counts & (tl.arange(0, SHAPE.BLOCK) < at[2]), other=0)
        else:
            m = tl.load(m_at, mask=counts, other=0)
        new = tl.where(v == 0, new, new + v * decode(m, tl.float64))
    write_list(lists, at, 0, encode(new, g.dtype), SHAPE, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(lists: tl.tuple, coefficients: tl.tensor, N: tl.constexpr, SHAPE: tl.constexpr) -> None:
    """One block of one gradient: ``g <- g + sum_k v_k m_k``; the first list holds the gradients. N: a power of two >= the memories."""
    lane = tl.arange(0, N)
    v = tl.load(coefficients + lane, mask=lane < len(SHAPE.KINDS) - 1, other=0)
    if tl.max((v != 0).to(tl.int32), 0) != 0:
        at = here(lists, SHAPE)
        if at[2] == SHAPE.BLOCK:
            _combine(lists, at, coefficients, SHAPE, False)
        else:
            _combine(lists, at, coefficients, SHAPE, True)


def _device(lists: Lists) -> torch.device:
    return lists[0][0].device if lists[0] else torch.device("cpu")


def grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``sum a_i b_i`` in float64; see :func:`fastcl.ops.grad_dot`."""
    plan = list(launches(a, b))
    if not plan:
        return torch.zeros((), dtype=torch.float64, device=_device([a]))
    with on_device(a[0]):
        out = torch.empty((), dtype=torch.float64, device=a[0].device)
        partials, blocks = partial_sums(plan, (0,), (1,), a[0].device)
        sum_kernel[(1,)](partials, out, blocks, 0, 0, 1, 1, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
    return out


def gram(vectors: Lists) -> Tensor:
    """``[K, K]`` of all dot products; see :func:`fastcl.ops.gram`."""
    k = len(vectors)
    if not any(t.numel() for t in vectors[0]):
        return torch.zeros(k, k, dtype=torch.float64, device=_device(vectors))
    out = torch.empty(k, k, dtype=torch.float64, device=_device(vectors))
    # Up to 16 lists are in flight at once, so a program takes fewer elements of each.
    with on_device(vectors[0][0]):
        for row in range(0, k, TILE):
            fill_tile(out, vectors[row : row + TILE], row, 0, row, STRIDED_BLOCK)
            for column in range(row + TILE, k, TILE):
                fill_tile(out, [*vectors[row : row + TILE], *vectors[column : column + TILE]], row, TILE, column, STRIDED_BLOCK)
    return out


def project_(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """``g <- g - (g.r)/(r.r) r`` if ``g.r < 0``; returns ``[g.r, r.r, coefficient]``; see :func:`fastcl.ops.project_`."""
    plan = list(launches(grads, reference))
    if not plan:
        return torch.zeros(3, dtype=torch.float64, device=_device([grads]))
    with on_device(grads[0]):
        values = torch.empty(3, dtype=torch.float64, device=grads[0].device)
        partials, blocks = partial_sums(plan, (0, 1), (1, 1), grads[0].device)
        agem_kernel[(1,)](partials, values, blocks, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
        _combine_planned(plan, values[2:])
    return values


def gem_project_(grads: Sequence[Tensor], memories: Lists, margin: float, ridge: float) -> Tensor:
    """``g <- g + G^T v``; returns what :func:`gem_coefficients` returns; see :func:`fastcl.ops.gem_project_`."""
    products = gram([*memories, grads])
    if not any(g.numel() for g in grads):
        return torch.zeros(2 * len(memories) + 1, dtype=torch.float64, device=_device([grads]))
    values = gem_coefficients(products, margin, ridge)
    combine_(grads, memories, values[1 : 1 + len(memories)])
    return values


def gem_coefficients(products: Tensor, margin: float, ridge: float) -> Tensor:
    """``[violated, v_0 ... v_K-1, G_0 . g ... G_K-1 . g]`` from the Gram matrix, as fastcl.reference.projection has it."""
    k = len(products) - 1
    out = torch.empty(2 * k + 1, dtype=torch.float64, device=products.device)
    size = max(_SMALLEST, triton.next_power_of_2(k))
    with on_device(products):
        # 4 doubles of a tile per thread: it holds Q, the inverse, and a third while a variable enters. 16 warps are what AMD allows.
        warps = min(16, max(1, size * size // 128))
        gem_kernel[(1,)](products.contiguous(), out, k, *halves(margin), *halves(ridge), N=size, num_warps=warps, enable_fp_fusion=False)
    return out


def combine_(grads: Sequence[Tensor], memories: Lists, coefficients: Tensor) -> None:
    """``g <- g + sum_k v_k m_k``, computed in float64 and rounded once; gradients stay as they are when every ``v_k`` is 0."""
    plan = list(launches(grads, *memories))
    if plan:
        with on_device(grads[0]):
            _combine_planned(plan, coefficients.contiguous())


def _combine_planned(plan: Sequence[Launch], coefficients: Tensor) -> None:
    for launch in plan:
        size = triton.next_power_of_2(len(launch.columns) - 1)
        # Without contraction: v * m is rounded before it is added, as in the definition.
        combine_kernel[launch.grid](launch.lists, coefficients, N=size, **launch.options)
