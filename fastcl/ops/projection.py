"""Gradient directions: dot products over lists of tensors, A-GEM's and GEM's projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _sharded, _sharded_projection
from fastcl.ops._projection_operators import check_written

MOST_MEMORIES = 64
Gradients = Sequence[Tensor | None]


class ProjectionInfo(NamedTuple):
    """What A-GEM's projection decided; 0-d tensors on the gradients' device."""

    dot: Tensor  # g . r before the projection, float64
    reference_sq: Tensor  # r . r, float64
    violated: Tensor  # bool: the gradients were changed


class GemInfo(NamedTuple):
    """What GEM's projection decided; tensors on the gradients' device."""

    coefficients: Tensor  # v, [K], float64; zeros when nothing was violated
    dots: Tensor  # G_k . g before the projection, [K], float64
    violated: Tensor  # 0-d bool: the gradients were changed


def grad_dot(a: Gradients, b: Gradients) -> Tensor:
    """Dot product of two gradients that are lists of tensors: ``sum_i sum(a_i * b_i)``.

    Products and sums are float64, summed in a fixed two-stage order: the same bits for any number of threads and from run to run.
    A pair in which one is None counts as zero. Not differentiable.

    Of DTensors the product is that of the whole tensors: one sum over the ranks of the mesh, whose result has the same bits on all of them;
    what is replicated counts once. Both lists have the same meshes and placements, none of them Partial. Every rank calls the op. So it is
    in :func:`gram`, and in :func:`project_` and :func:`gem_project_`, which then update each rank's own shard.

    Args:
        a: list of dense tensors on one device, float64, float32, bfloat16 or float16, any strides; None for a missing gradient.
        b: one tensor per element of ``a``, of its shape; the same dtypes.

    Returns:
        0-d, float64, on the tensors' device (on the CPU if there are none).

    Raises:
        TypeError: not a list of dense tensors, or a dtype that is not accepted.
        ValueError: lengths, shapes or devices that do not fit. Nothing is written in any case.
    """
    result: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate_reading("grad_dot", a, a, b)
    if result is _dispatch.REFUSED:
        x, y = _paired(("a", a), ("b", b))
        if _sharded.is_sharded(x, y):
            return _sharded_projection.gram(("a", x), ("b", y))[0, 1]
        result = torch.ops.fastcl.grad_dot(x, y)
    total: Tensor = result
    return total


def project_(grads: Gradients, reference: Gradients) -> ProjectionInfo:
    """A-GEM's projection, in place: ``g <- g - (g.r)/(r.r) r`` if ``g.r < 0``, else ``g`` stays bit for bit as it is.

    Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019, eq. 11. One sweep over ``g`` and
    ``r`` for both dot products, over all tensors jointly, in float64 and in a fixed order (:func:`grad_dot`); the decision is made on
    the device, and a second sweep reads and writes only if the constraint is violated. It computes in float64 and rounds once to
    ``g``'s dtype. ``r = 0`` leaves ``g`` as it is. When ``g.r`` is NaN or ``r.r`` not finite (in float64), every element of ``g`` becomes
    NaN, so that torch.amp.GradScaler skips the step. Not differentiable.

    Args:
        grads: list of dense tensors on one device, float64, float32, bfloat16 or float16, any strides; written. They may not share
            memory, neither with each other nor with ``reference``. None where ``reference`` is None too; a missing gradient is zero, and
            its projection would have to be written: pass zeros, or use :func:`fastcl.project_gradients_`.
        reference: the gradient of the loss on a memory batch: one tensor per element of ``grads``, of its shape, or None for zero.

    Returns:
        ``dot`` (``g.r``), ``reference_sq`` (``r.r``) and ``violated``: 0-d tensors on the device; no host sync.

    Raises:
        TypeError: not a list of dense tensors, or a dtype that is not accepted.
        ValueError: lengths, shapes or devices that do not fit, shared memory, a gradient that requires grad while autograd records, a
            missing gradient whose reference is not missing. Nothing has been written then.
    """
    values: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate("project_", grads, reference)
    if values is _dispatch.REFUSED:
        g, r = _paired(("grads", grads), ("reference", reference), written=True)
        sharded = _sharded.is_sharded(g, r)
        values = _sharded_projection.project_(g, r, check_written) if sharded else torch.ops.fastcl.project_(g, r)
    dot, square, coefficient = values.unbind()
    return ProjectionInfo(dot, square, coefficient != 0)


def gram(vectors: Sequence[Gradients]) -> Tensor:
    """Gram matrix of K gradients that are lists of tensors: ``[k, l] = sum_i sum(v_k,i * v_l,i)``.

    One sweep reads every element once. Precision and order of summation as in :func:`grad_dot`; the matrix is exactly symmetric.

    Args:
        vectors: K lists, 1 <= K <= 65, of tensors as in :func:`grad_dot`, all of equal lengths and shapes.

    Returns:
        [K, K], float64, on the tensors' device (on the CPU if there are none).

    Raises:
        TypeError: not a list of lists of dense tensors, or a dtype that is not accepted.
        ValueError: no list or too many; lengths, shapes or devices that do not fit. Nothing is written in any case.
    """
    _check_count("vectors", vectors, MOST_MEMORIES + 1)
    result: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate_reading("gram", vectors[0], vectors)
    if result is _dispatch.REFUSED:
        present = _paired(*((f"vectors[{k}]", v) for k, v in enumerate(vectors)))
        if _sharded.is_sharded(*present):
            return _sharded_projection.gram(*((f"vectors[{k}]", v) for k, v in enumerate(present)))
        result = torch.ops.fastcl.gram([t for v in present for t in v], len(present))
    products: Tensor = result
    return products


def gem_project_(grads: Gradients, memories: Sequence[Gradients], margin: float = 0.5, ridge: float = 1e-3) -> GemInfo:
    """GEM's projection, in place: ``g <- g + G^T v`` if some ``G_k . g < 0``, else ``g`` stays bit for bit as it is.

    ``v`` minimises ``1/2 v^T (G G^T + ridge I) v + (G g)^T v`` subject to ``v >= margin``, where the rows of ``G`` are the memory
    gradients. Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, eq. 11 and 12 (their
    ``memory_strength`` is the margin). The Gram matrix is made in one sweep (:func:`gram`), the quadratic programme is solved in float64
    by an active-set method on the device, and a second sweep reads and writes only if something is violated. With K = 1, margin 0 and
    ridge 0 this is :func:`project_`. A NaN or Inf in a memory, and a NaN in ``g``, make every element of ``g`` NaN; an Inf in ``g`` does
    so or stays. Not differentiable.

    Args:
        grads: as in :func:`project_`; written.
        memories: K lists, 1 <= K <= 64, one per past task, each as ``reference`` in :func:`project_`.
        margin: number >= 0, the least coefficient of every memory.
        ridge: number >= 0 added to the Gram matrix's diagonal.

    Returns:
        ``coefficients`` ``v`` [K], ``dots`` ``G_k . g`` [K] and ``violated`` (0-d), on the device; no host sync.

    Raises:
        TypeError: not lists of dense tensors, a dtype that is not accepted, a margin or ridge that is no number.
        ValueError: no memory or more than 64, a negative or infinite margin or ridge, and as :func:`project_`. Nothing has been written
            then.
    """
    _check_count("memories", memories, MOST_MEMORIES)
    values: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate("gem_project_", grads, memories, margin, ridge)
    if values is _dispatch.REFUSED:
        named = [(f"memories[{k}]", m) for k, m in enumerate(memories)]
        g, *present = _paired(("grads", grads), *named, written=True)
        margin, ridge = _checks.at_least_zero("margin", margin), _checks.at_least_zero("ridge", ridge)
        if _sharded.is_sharded(g, *present):
            lists = [(f"memories[{k}]", m) for k, m in enumerate(present)]
            values = _sharded_projection.gem_project_(g, lists, margin, ridge, check_written)
        else:
            values = torch.ops.fastcl.gem_project_(g, [t for m in present for t in m], len(present), margin, ridge)
    violated, coefficients, dots = values.split([1, len(memories), len(memories)])
    return GemInfo(coefficients, dots, violated[0] != 0)


def _check_count(name: str, lists: object, most: int) -> None:
    if not isinstance(lists, (list, tuple)):
        raise TypeError(f"{name} must be a list of lists of tensors, got {type(lists).__name__}")
    if not 1 <= len(lists) <= most:
        raise ValueError(f"{name} has {len(lists)} lists; accepted are 1 to {most}")
    for k, inner in enumerate(lists):
        if not isinstance(inner, (list, tuple)):
            raise TypeError(f"{name}[{k}] must be a list or tuple of tensors, got {type(inner).__name__}")


def _paired(first: tuple[str, Gradients], *others: tuple[str, Gradients], written: bool = False) -> list[list[Tensor]]:
    """The lists without None: places where all lists have None are dropped, elsewhere a None becomes zeros (which take no memory)."""
    named = (first, *others)
    for name, value in named:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(value).__name__}")
        _checks.same_length(name, value, *first)
        _checks.listed(name, value, missing=True)
    rows: list[list[Tensor]] = []
    for i, row in enumerate(zip(*(value for _, value in named), strict=True)):
        present = next((n for n, t in enumerate(row) if t is not None), None)
        if present is None:
            continue
        if written and row[0] is None:
            raise ValueError(
                f"{first[0]}[{i}] is None and {named[present][0]}[{i}] is not: a missing gradient counts as zero, and its projection needs "
                "memory to be written to; pass zeros there, or use the function that takes params"
            )
        like: Any = row[present]
        rows.append([_sharded.zeros_like(like) if t is None else t for t in row])
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in named]
