"""Precision matrices of low rank plus a diagonal: solve, square, step and append, in two sweeps over the basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The operators are registered where they are imported.
from fastcl.ops import (
    _checks,
    _dispatch,
    _low_rank_checks,
    _low_rank_compress,
    _low_rank_direct,
    _low_rank_operators,  # noqa: F401
    _low_rank_stages,
    _sharded,
    _sharded_low_rank,
)

Tensors = Sequence[Tensor]


def low_rank_solve_(grads: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> None:
    r"""Natural gradient, in place: ``g <- Lambda^-1 g`` with ``Lambda = D + U U^T`` of all tensors together.

    ``Lambda`` is kept as its diagonal part ``D``, orthonormal rows ``Q`` [r, P] and the singular values ``sigma`` of ``D^-1/2 U``, so that
    ``Lambda = D^1/2 (I + Q^T sigma^2 Q) D^1/2``. By Woodbury's identity, with ``z = D^-1/2 g``::

        Lambda^-1 g = D^-1/2 [z - Q^T (sigma^2 / (1 + sigma^2) * (Q z))]

    (the step of Kao, Jensen et al., "Natural continual learning", NeurIPS 2021, with a Laplace approximation of low rank). The first sweep
    reads ``Q`` for the products ``Q z``, the second for the result; no P-sized temporary exists. Elements are computed in the diagonal's
    dtype, the products summed in float64 in an order that does not depend on threads; ``sigma`` far above 1e3 in float32 leaves of a
    gradient inside the basis little but rounding. A NaN or Inf in a gradient reaches all elements (with r = 0: its own). Not
    differentiable.

    DTensors: all lists placed alike, of the basis behind its rows (``Shard(d)`` becomes ``Shard(d + 1)``), ``sigma`` plain; one all-reduce
    of r + 1 numbers.

    Args:
        grads: list of dense tensors on one device, float64, float32, bfloat16 or float16, any strides; written. They may not share memory.
        diagonal: D, positive (which is not checked: that would cost a sweep): one tensor per gradient, of its shape, contiguous, all
            float32 or all float64.
        basis: Q: one contiguous tensor [r, \*shape] per gradient, of the diagonal's dtype. Row j of all of them together has length 1 and
            is orthogonal to the other rows, or is zero where ``sigma[j]`` is. r = 0 is a diagonal precision.
        sigma: [r], float64, on the same device, r <= 256.

    Raises:
        TypeError: not lists of dense tensors, a dtype that is not accepted, a plain tensor beside a DTensor, a Partial placement.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, a diagonal or basis that is not
            contiguous, a gradient that requires grad while autograd records. Nothing has been written then.
    """
    if _low_rank_direct.run(_low_rank_stages.solve_, grads, basis, sigma, grads, diagonal, basis, sigma):
        return
    _low_rank_direct.listed(sigma, [("grads", grads), ("diagonal", diagonal), ("basis", basis)])
    if _sharded.is_sharded(grads, diagonal, basis):
        _checks.not_recorded("grads", grads)
        _sharded.check_apart("grads", grads, ("diagonal", diagonal), ("basis", basis))
        _sharded_low_rank.solve_(grads, diagonal, basis, sigma)
    else:
        torch.ops.fastcl.low_rank_solve_(grads, diagonal, basis, sigma)


def low_rank_quadratic(deltas: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> Tensor:
    """Square of a list's norm: ``x^T Lambda x = y.y + sum_j (sigma_j q_j.y)^2`` with ``y = D^1/2 x``, in one sweep.

    NaN and Inf propagate. Precision and DTensors as in :func:`low_rank_solve_`.

    Args:
        deltas: list of dense tensors on one device, float64, float32, bfloat16 or float16, any strides.
        diagonal: D, as in :func:`low_rank_solve_`.
        basis: Q, as there.
        sigma: as there.

    Returns:
        0-d, float64, on the tensors' device.

    Raises:
        TypeError, ValueError: as in :func:`low_rank_solve_`. Nothing is ever written.
    """
    found: list[Tensor] = []

    def run(place: _low_rank_stages.Place) -> None:
        found.append(_low_rank_stages.quadratic(place, deltas, diagonal, basis, sigma))

    if _low_rank_direct.run(run, deltas, basis, sigma):
        return found[0]
    _low_rank_direct.listed(sigma, [("deltas", deltas), ("diagonal", diagonal), ("basis", basis)])
    if _sharded.is_sharded(deltas, diagonal, basis):
        return _sharded_low_rank.quadratic(deltas, diagonal, basis, sigma)
    with torch.no_grad():
        value: Tensor = torch.ops.fastcl.low_rank_quadratic(deltas, diagonal, basis, sigma)
    return value


def low_rank_step_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    sigma: Tensor,
    lr: float | Tensor,
    momentum: float = 0.9,
    strength: float = 1.0,
    radius: float | None = None,
) -> None:
    """One step of natural continual learning with a precision of low rank plus a diagonal, in place::

        u = rho V + lambda (W - mu)
        V <- u + Lambda^-1 g                              # Lambda^-1 as in low_rank_solve_
        s = lr, or min(lr, radius / sqrt(V^T Lambda V))   # on the device
        W <- W - s V

    Kao, Jensen et al., "Natural continual learning", NeurIPS 2021; the radius is an extension: no step is longer in the norm of ``Lambda``.
    ``V = Lambda^-1 M`` is the dual momentum ``M <- rho M + g + lambda Lambda (W - mu)`` solved for once, so no second buffer
    has to follow ``Lambda (W - mu)`` and none can drift from it.

    Two sweeps, each reading the basis once, and ``V^T Lambda V = g^T Lambda^-1 g + 2 g.u + u^T Lambda u`` is known after the first. In
    float32 they move ``8 r + 28`` bytes per parameter without momentum and radius, ``8 r + 36`` with momentum; a radius makes the first
    sweep read ``W``, ``mu`` and ``V`` too. Precision, NaN, and DTensors (one all-reduce of at most 2 r + 3 numbers) as in
    :func:`low_rank_solve_`; parameters are rounded once.

    Args:
        params: W: list of dense tensors on one device, float64, float32, bfloat16 or float16, any strides; written.
        grads: g: one per parameter, of its shape; the same dtypes, any strides.
        momenta: V: one per parameter, of its shape, contiguous, of the diagonal's dtype; written. With ``momentum=0`` they are neither
            read nor written, and the list may be empty.
        anchors: mu, as ``momenta``, read; with ``strength=0`` the list may be empty.
        diagonal: as in :func:`low_rank_solve_`.
        basis: as in :func:`low_rank_solve_`.
        sigma: as in :func:`low_rank_solve_`.
        lr: number >= 0, or a 0-d float32 or float64 tensor on the same device.
        momentum: rho, finite number >= 0.
        strength: lambda, finite number >= 0.
        radius: finite number > 0, or None.

    Raises:
        TypeError: as :func:`low_rank_solve_`; a number that is none.
        ValueError: as :func:`low_rank_solve_`; a number outside its range. Nothing has been written then.
    """
    momenta = [] if _low_rank_direct.is_zero(momentum) else momenta
    anchors = [] if _low_rank_direct.is_zero(strength) else anchors
    lists = (params, grads, momenta, anchors, diagonal, basis)
    numbers = (momentum, strength, radius)
    plain = _low_rank_direct.numbers(sigma, lr, momentum, strength, radius or 0) and not _low_rank_direct.is_zero(radius)
    if plain and _low_rank_direct.run(_low_rank_stages.step_, params, basis, sigma, *lists, sigma, lr, *numbers):
        return
    names = ("params", "grads", "momenta", "anchors", "diagonal", "basis")
    _low_rank_direct.listed(sigma, list(zip(names, lists, strict=True)))
    _low_rank_checks.numbers(lr, *numbers)
    if _sharded.is_sharded(*lists):
        for name, written in (("params", params), ("momenta", momenta)):
            _checks.not_recorded(name, written)
        others = (("grads", grads), ("anchors", anchors), ("diagonal", diagonal), ("basis", basis))
        _sharded.check_apart("params", params, ("momenta", momenta), *others)
        _sharded.check_apart("momenta", momenta, *others)
        _sharded_low_rank.step_(*lists, sigma, lr, *numbers)
        return
    rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    torch.ops.fastcl.low_rank_step_(*lists, sigma, *rate, *numbers)


def low_rank_append_(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors], weight: float = 1.0) -> None:
    """Add vectors to a precision and keep its rank, in place: ``Lambda <- Lambda + weight * sum_k v_k v_k^T``.

    The r principal directions of ``D^-1/2 [U, sqrt(weight) v_0, ...]`` are kept; what is dropped goes to the diagonal, element by element,
    ``D_e += sum_dropped U_e^2``, so that every diagonal element of ``Lambda`` is that of the sum. If the rank of the sum is at most r,
    nothing is dropped and the result is exact. Directions shorter than 2e-7 of the vectors they stem from (float32's roundings) count as
    dependent.

    One sweep for the Gram matrix [r + K, r + K] in float64, one for the new rows, and one for each rotation that makes them orthonormal;
    their products differ from the identity by at most 1e-5, which is checked. Meant for the end of a task: it waits for the device. Every
    rank of a DTensor's mesh calls it. Not differentiable.

    Args:
        diagonal: as in :func:`low_rank_solve_`; written.
        basis: as in :func:`low_rank_solve_`; written.
        sigma: as in :func:`low_rank_solve_`; written, in descending order, zeros where rows are unused.
        vectors: K >= 1 lists, each with one tensor per element of ``diagonal``, of its shape; any floating dtype, any strides;
            K + r <= 256.
        weight: finite number >= 0.

    Raises:
        TypeError: as :func:`low_rank_solve_`; a weight that is no number.
        ValueError: as :func:`low_rank_solve_`; too many vectors; vectors that hold NaN or Inf. Nothing has been written then.
        RuntimeError: the rows cannot be made orthonormal.
    """
    named = _low_rank_direct.lists_of("vectors", vectors)

    def run(place: _low_rank_stages.Place) -> None:
        _low_rank_checks.rows(len(sigma), len(named))
        _low_rank_compress.append_(place, diagonal, basis, sigma, vectors, weight)
        _dispatch.bump_versions([sigma])

    if _low_rank_direct.numbers(sigma, weight) and _low_rank_direct.run(run, diagonal, basis, sigma):
        return
    _low_rank_direct.listed(sigma, [("diagonal", diagonal), ("basis", basis), *named])
    weight = _checks.at_least_zero("weight", weight)
    if _sharded.is_sharded(diagonal, basis, *vectors):
        _sharded.check_apart("diagonal", diagonal, ("basis", basis), *named)
        _sharded.check_apart("basis", basis, *named)
        _low_rank_checks.rows(len(sigma), len(named))
        _sharded_low_rank.append_(diagonal, basis, sigma, named, weight)
    else:
        for name, value in named:
            _checks.same_length(name, value, "diagonal", diagonal)
        torch.ops.fastcl.low_rank_append_(diagonal, basis, sigma, [t for v in vectors for t in v], len(vectors), weight)
