"""Precision of low rank plus a diagonal: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import elements, gradients

RANK = 8
MOMENTUM, STRENGTH, RATE = 0.9, 0.7, 0.03


def low_rank_precision(
    shapes: Sequence[Shape], dtype: torch.dtype, rank: int, device: str = "cpu", seed: int = 0
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A diagonal in [0.5, 2), a basis of ``rank`` orthonormal rows over all tensors together, and singular values from 10 to 0.1.

    Rows beyond the number of elements are zero, as their singular values are.
    """
    gen = torch.Generator(device).manual_seed(seed + 17)
    count = elements(shapes)
    diagonal = [(0.5 * 4 ** torch.rand(s, generator=gen, device=device)).to(dtype) for s in shapes]
    wide = torch.float64 if dtype == torch.float64 or count < 1 << 20 else torch.float32
    rows = torch.randn(rank, count, generator=gen, device=device).to(wide)
    used = min(rank, count)
    if used:
        # By the Cholesky factor of the products, twice: cheap, and as orthonormal as the dtype allows.
        for _ in range(2):
            factor = torch.linalg.cholesky((rows[:used] @ rows[:used].T).double())
            rows[:used] = (
                torch.linalg.solve_triangular(factor, torch.eye(used, dtype=torch.float64, device=device), upper=False).to(wide)
                @ rows[:used]
            )
    rows[used:] = 0
    sigma = torch.logspace(1, -1, max(rank, 1), dtype=torch.float64, device=device)[:rank]
    sigma[used:] = 0
    parts = torch.split(rows, [elements([s]) for s in shapes], dim=1)
    return diagonal, [p.reshape(rank, *s).to(dtype).contiguous() for p, s in zip(parts, shapes, strict=True)], sigma


def _kept(dtype: torch.dtype, stored: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (dtype, stored) else torch.float32


def _solve_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return gradients(shapes, dtype, device, seed), *low_rank_precision(shapes, _kept(dtype, stored), RANK, device, seed)


def _step_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    kept = _kept(dtype, stored)
    params, grads = (gradients(shapes, dtype, device, seed + n) for n in range(2))
    momenta, anchors = (gradients(shapes, kept, device, seed + n) for n in range(2, 4))
    return params, grads, momenta, anchors, *low_rank_precision(shapes, kept, RANK, device, seed), RATE, MOMENTUM, STRENGTH, None


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.reshape(-1).to(dtype) for t in tensors])


def _rows(basis: Tensor) -> Tensor:
    return basis.reshape(len(basis), basis.shape[1:].numel())


def _copy_back(tensors: Sequence[Tensor], flat: Tensor) -> None:
    at = 0
    for t in tensors:
        t.copy_(flat[at : at + t.numel()].view_as(t))
        at += t.numel()


def _solve_official(grads: list[Tensor], diagonal: list[Tensor], basis: list[Tensor], sigma: Tensor) -> None:
    """Woodbury's identity on vectors of all parameters, as the textbook has it: D^-1 g - D^-1 U (I + U^T D^-1 U)^-1 U^T D^-1 g."""
    d = _flat(diagonal, diagonal[0].dtype)
    factor = torch.cat([_rows(b) for b in basis], dim=1).T * sigma.to(d.dtype) * d.sqrt()[:, None]
    scaled = factor / d[:, None]
    inner = torch.eye(len(sigma), dtype=d.dtype, device=d.device) + factor.T @ scaled
    g = _flat(grads, d.dtype)
    _copy_back(grads, g / d - scaled @ torch.linalg.solve(inner, scaled.T @ g))


def _solve_eager(grads: list[Tensor], diagonal: list[Tensor], basis: list[Tensor], sigma: Tensor) -> None:
    roots = [d.sqrt() for d in diagonal]
    z = [g / s for g, s in zip(grads, roots, strict=True)]
    along = torch.stack([_rows(b) @ x.flatten() for b, x in zip(basis, z, strict=True)]).sum(0)
    square = (sigma * sigma).to(along.dtype)
    along = along * (square / (1 + square))
    for g, s, x, b in zip(grads, roots, z, basis, strict=True):
        g.copy_((x - torch.tensordot(along, b, 1)) / s)


def _step_eager(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    anchors: list[Tensor],
    diagonal: list[Tensor],
    basis: list[Tensor],
    sigma: Tensor,
    lr: float,
    momentum: float,
    strength: float,
    radius: float | None,  # noqa: ARG001
) -> None:
    x = [g.to(d.dtype, copy=True) for g, d in zip(grads, diagonal, strict=True)]
    _solve_eager(x, diagonal, basis, sigma)
    for p, v, mu, direction in zip(params, momenta, anchors, x, strict=True):
        v.mul_(momentum).add_(p - mu, alpha=strength).add_(direction)
        p.sub_(lr * v)


def _step_official(*args: object) -> None:
    params, grads, momenta, anchors, diagonal, basis, sigma, lr, momentum, strength, _ = args
    x = [g.to(d.dtype, copy=True) for g, d in zip(grads, diagonal, strict=True)]  # type: ignore[call-overload]
    _solve_official(x, diagonal, basis, sigma)  # type: ignore[arg-type]
    for p, v, mu, direction in zip(params, momenta, anchors, x, strict=True):  # type: ignore[call-overload]
        v.copy_(momentum * v + strength * (p - mu) + direction)
        p.copy_(p - lr * v)


CASES = (
    OpCase(
        name="low_rank_solve_",
        call=ops.low_rank_solve_,
        reference=reference.low_rank_solve_,
        make=_solve_args,
        providers={"official": _solve_official, "eager": _solve_eager},
        bytes_per_element=lambda gradient, stored: 3 * gradient + (2 + 2 * RANK) * max(stored, 4),
        bitwise=False,
        read_first=lambda gradient, stored: gradient + (1 + 2 * RANK - 1) * max(stored, 4),
        uint8=False,
        pairs=False,
    ),
    OpCase(
        name="low_rank_step_",
        call=ops.low_rank_step_,
        reference=reference.low_rank_step_,
        make=_step_args,
        providers={"official": _step_official, "eager": _step_eager},
        bytes_per_element=lambda gradient, stored: 4 * gradient + (5 + 2 * RANK) * max(stored, 4),
        bitwise=False,
        read_first=lambda gradient, stored: gradient + (4 + 2 * RANK - 1) * max(stored, 4),
        uint8=False,
        pairs=False,
    ),
)
