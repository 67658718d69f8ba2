"""Precision matrices of low rank plus a diagonal, ``Lambda = D + U U^T``. The definition.

Kept as the diagonal ``D``, the orthonormal rows ``Q`` [r, P] and the singular values ``sigma`` of ``D^-1/2 U``:
``Lambda = D^1/2 (I + Q^T sigma^2 Q) D^1/2``. Elements are computed in D's dtype, sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.reference.projection import grad_dot

Tensors = Sequence[Tensor]


def low_rank_solve_(grads: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> None:
    """``g <- Lambda^-1 g``; see :func:`fastcl.ops.low_rank_solve_`."""
    along = low_rank_products(grads, diagonal, basis, True)[:-1]
    low_rank_update_(grads, diagonal, basis, along * sigma**2 / (1 + sigma**2))


def low_rank_quadratic(deltas: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> Tensor:
    """``x^T Lambda x``; see :func:`fastcl.ops.low_rank_quadratic`."""
    products = low_rank_products(deltas, diagonal, basis, False)
    return products[-1] + (sigma * products[:-1]).square().sum()


def low_rank_step_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    sigma: Tensor,
    lr: float | Tensor,
    momentum: float,
    strength: float,
    radius: float | None,
) -> None:
    """``V <- rho V + lambda (W - mu) + Lambda^-1 g``, ``W <- W - s V``; see :func:`fastcl.ops.low_rank_step_`."""
    directions = [g.to(d.dtype, copy=True) for g, d in zip(grads, diagonal, strict=True)]
    low_rank_solve_(directions, diagonal, basis, sigma)
    for v, u in zip(directions, _kept(params, momenta, anchors, diagonal, momentum, strength), strict=True):
        v.add_(u)
    step = torch.as_tensor(lr, dtype=torch.float64, device=sigma.device)
    if radius is not None:
        step = torch.minimum(step, radius / low_rank_quadratic(directions, diagonal, basis, sigma).sqrt())
    _apply_(params, momenta, directions, step, momentum)


def low_rank_append_(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors], weight: float) -> None:
    """``Lambda <- Lambda + weight * sum_k v_k v_k^T``, of which rank r is kept; see :func:`fastcl.ops.low_rank_append_`.

    By singular value decompositions of the whole matrices in float64.
    """
    rank = len(sigma)
    shapes = [d.shape for d in diagonal]
    d = torch.cat([t.double().flatten() for t in diagonal])
    old = torch.cat([_rows(b) for b in basis], dim=1) * sigma[:, None]
    new = torch.stack([torch.cat([t.double().flatten() for t in v]) for v in vectors]) * weight**0.5 / d.sqrt()
    check_finite(torch.cat([old, new]).square().sum(dim=1), rank)
    left, values, _ = torch.linalg.svd(torch.cat([old, new]).T, full_matrices=False)
    columns = left * values
    wider = d * (1 + columns[:, rank:].square().sum(dim=1))
    kept = columns[:, :rank] * (d / wider).sqrt()[:, None]
    left, values, _ = torch.linalg.svd(kept, full_matrices=False)
    used = values > values.max().clamp(min=1e-300) * 1e-15 if len(values) else values > 0
    rows = torch.zeros(rank, len(d), dtype=torch.float64, device=d.device)
    rows[: len(used)] = torch.where(used, left, 0).T
    sigma.zero_()[: len(used)] = torch.where(used, values, 0)
    for b, t, row, w, shape in zip(basis, diagonal, *_split(rows, wider, shapes), shapes, strict=True):
        b.copy_(row.reshape(rank, *shape))
        t.copy_(w.reshape(shape))


def _split(rows: Tensor, diagonal: Tensor, shapes: Sequence[torch.Size]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    sizes = [shape.numel() for shape in shapes]
    return torch.split(rows, sizes, dim=1), torch.split(diagonal, sizes)


def check_finite(squares: Tensor, rank: int) -> None:
    """Raise ValueError unless the squares of the rows ``sigma_j q_j`` (``rank`` of them) and ``D^-1/2 v_k`` are finite numbers."""
    for row, finite in enumerate(squares.isfinite().tolist()):
        if not finite and row < rank:
            raise ValueError(f"row {row} of basis, or sigma[{row}], holds NaN or Inf; nothing has been changed")
        if not finite:
            raise ValueError(
                f"vectors[{row - rank}] holds NaN or Inf, or its squares over the diagonal overflow, or an element of the diagonal is not "
                "positive; nothing has been changed"
            )


# ---- stages


def low_rank_products(vectors: Tensors, diagonal: Tensors, basis: Tensors, inverse: bool) -> Tensor:
    """``[q_0 . z, ..., q_r-1 . z, z . z]`` of ``z = D^-1/2 x`` if ``inverse``, else of ``z = D^1/2 x``; float64."""
    z = [x.to(d.dtype) / d.sqrt() if inverse else x.to(d.dtype) * d.sqrt() for x, d in zip(vectors, diagonal, strict=True)]
    return torch.stack([*_along(basis, z), grad_dot(z, z)])


def low_rank_update_(grads: Tensors, diagonal: Tensors, basis: Tensors, coefficients: Tensor) -> None:
    """``g <- D^-1/2 (z - sum_j c_j q_j)``, ``z = D^-1/2 g``."""
    for g, solved in zip(grads, _solved(grads, diagonal, basis, coefficients), strict=True):
        g.copy_(solved)


def low_rank_step_products(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    momentum: float,
    strength: float,
) -> Tensor:
    """``[q_j . z (r of them), q_j . y (r), z . z, z . y, y . y]``, float64.

    ``z = D^-1/2 g``, ``y = D^1/2 u``, ``u = rho V + lambda (W - mu)``.
    """
    z = [g.to(d.dtype) / d.sqrt() for g, d in zip(grads, diagonal, strict=True)]
    kept = _kept(params, momenta, anchors, diagonal, momentum, strength)
    y = [u * d.sqrt() for u, d in zip(kept, diagonal, strict=True)]
    return torch.stack([*_along(basis, z), *_along(basis, y), grad_dot(z, z), grad_dot(z, y), grad_dot(y, y)])


def low_rank_step_update_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    coefficients: Tensor,
    step: Tensor,
    momentum: float,
    strength: float,
) -> None:
    """``V <- u + D^-1/2 (z - sum_j c_j q_j)``, ``W <- W - s V``; V is written with a momentum alone."""
    kept = _kept(params, momenta, anchors, diagonal, momentum, strength)
    directions = [u + x for u, x in zip(kept, _solved(grads, diagonal, basis, coefficients), strict=True)]
    _apply_(params, momenta, directions, step, momentum)


def low_rank_gram(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors]) -> Tensor:
    """All products ``[r + K, r + K]`` of the rows ``sigma_j q_j`` and ``D^-1/2 v_k``; float64."""
    return _products_of([_stacked(d, b, sigma, v) for d, b, *v in zip(diagonal, basis, *vectors, strict=True)], len(sigma) + len(vectors))


def low_rank_compress_(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors], mix: Tensor) -> Tensor:
    """``y' = mix^T y`` for the rows of :func:`low_rank_gram`; ``D' = D (1 + sum_j>=r y'_j^2)``, ``q_j <- y'_j sqrt(D / D')``.

    Returns the products [r, r] of the new rows, float64.
    """
    rank = len(sigma)
    for d, b, *v in zip(diagonal, basis, *vectors, strict=True):
        y = _mixed(_stacked(d, b, sigma, v), mix)
        factor = 1 + y[rank:].square().sum(dim=0)
        b.copy_((y[:rank] / factor.sqrt()).view(b.shape))
        d.copy_((d.double().flatten() * factor).view(d.shape))
    return _products_of([_rows(b) for b in basis], rank)


def low_rank_rotate_(basis: Tensors, mix: Tensor) -> Tensor:
    """``q' = mix^T q``; returns the products [r, r] of the new rows, float64."""
    for b in basis:
        b.copy_(_mixed(_rows(b), mix).view(b.shape))
    return _products_of([_rows(b) for b in basis], len(mix))


def _along(basis: Tensors, z: Tensors) -> list[Tensor]:
    rank = len(basis[0]) if basis else 0
    return [grad_dot([b[j] for b in basis], z) for j in range(rank)]


def _kept(params: Tensors, momenta: Tensors, anchors: Tensors, diagonal: Tensors, momentum: float, strength: float) -> list[Tensor]:
    """``u = rho V + lambda (W - mu)``; what a factor of 0 multiplies is not read."""
    kept = [torch.zeros_like(d) for d in diagonal]
    if momentum != 0:
        kept = [u + momentum * v for u, v in zip(kept, momenta, strict=True)]
    if strength != 0:
        kept = [u + strength * (w.to(u.dtype) - mu) for u, w, mu in zip(kept, params, anchors, strict=True)]
    return kept


def _solved(grads: Tensors, diagonal: Tensors, basis: Tensors, coefficients: Tensor) -> list[Tensor]:
    solved = []
    for g, d, b in zip(grads, diagonal, basis, strict=True):
        z = g.to(d.dtype) / d.sqrt()
        for c, q in zip(coefficients, b, strict=True):
            z = z - c.to(d.dtype) * q
        solved.append(z / d.sqrt())
    return solved


def _apply_(params: Tensors, momenta: Tensors, directions: Tensors, step: Tensor, momentum: float) -> None:
    if momentum != 0:
        for v, direction in zip(momenta, directions, strict=True):
            v.copy_(direction)
    for w, v in zip(params, directions, strict=True):
        wide = torch.promote_types(w.dtype, v.dtype)
        w.copy_(w.to(wide) - step.to(v.dtype) * v)


def _stacked(diagonal: Tensor, basis: Tensor, sigma: Tensor, vectors: Tensors) -> Tensor:
    """The rows of one tensor, [r + K, elements]."""
    root = diagonal.double().sqrt().flatten()
    return torch.cat([sigma[:, None] * _rows(basis), *((v.double().flatten() / root)[None] for v in vectors)])


def _rows(basis: Tensor) -> Tensor:
    return basis.double().reshape(len(basis), basis.shape[1:].numel())


def _mixed(rows: Tensor, mix: Tensor) -> Tensor:
    """``mix^T rows``, by sums whose order does not depend on threads."""
    return torch.stack([(column[:, None] * rows).sum(dim=0) for column in mix.T]) if len(mix) else rows


def _products_of(rows: Tensors, count: int) -> Tensor:
    """Products of the rows of all tensors together, exactly symmetric."""
    out = torch.zeros(count, count, dtype=torch.float64, device=rows[0].device if rows else "cpu")
    for i in range(count):
        for j in range(i + 1):
            out[i, j] = out[j, i] = grad_dot([r[i] for r in rows], [r[j] for r in rows])
    return out
