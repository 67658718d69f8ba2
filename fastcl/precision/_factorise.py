"""Factors made invertible and inverted, in float64, once per task, with one host read for all layers as long as nothing fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

JITTER = 1e-8  # of the mean eigenvalue; three more attempts, each ten times it
JITTERS = tuple(JITTER * 10**i for i in range(4))
NEGATIVE = 1e-4  # of the largest eigenvalue: a smallest one below that is no rounding


class Factored(NamedTuple):
    """A symmetric positive definite factor and its inverse, or its eigenvalues and eigenvectors, in float64."""

    factor: Tensor
    inverse: Tensor | None = None
    values: Tensor | None = None
    vectors: Tensor | None = None  # None for a diagonal factor


def symmetric(factor: Tensor) -> Tensor:
    """In float64, the mean with the transpose; a diagonal factor as it is."""
    wide = factor.double()
    return wide if wide.dim() == 1 else (wide + wide.T) / 2


def factorise(factors: Sequence[Tensor]) -> list[Factored | None]:
    """For each factor [n, n] or [n] (a diagonal) its inverse; None where it is beyond repair: not finite, or not positive definite.

    The ladder: Cholesky; with ``JITTER * 10^i * trace / n`` added to the diagonal, i = 0..3; the eigenvalues, those below JITTER of the
    largest raised to it, unless one is below -NEGATIVE of the largest. ``factor`` is the one that was inverted, with what was added to it.
    """
    found: list[Factored | None] = [None] * len(factors)
    pending = {i: symmetric(f) for i, f in enumerate(factors)}
    finite = dict.fromkeys(pending, True)
    for jitter in (0.0, *JITTERS):
        attempts = {i: _inverse(_jittered(f, jitter)) for i, f in pending.items()}
        if not attempts:
            return found
        flags = torch.stack([torch.stack([pending[i].isfinite().all(), ok]) for i, (_, ok) in attempts.items()]).tolist()
        for (i, (factored, _)), (is_finite, ok) in zip(attempts.items(), flags, strict=True):
            finite[i] = is_finite
            if ok and is_finite:
                found[i] = factored
        pending = {i: f for i, f in pending.items() if found[i] is None and finite[i]}
    for i, f in pending.items():
        found[i] = _floored(f)
    return found


def decompose(factors: Sequence[Tensor]) -> list[Factored | None]:
    """As :func:`factorise`, with eigenvalues and eigenvectors instead of the inverse. Eigenvalues that rounded below 0 are 0."""
    found = [_eigen(symmetric(f)) for f in factors]
    sound = torch.stack([e[2].to(f.device) for e, f in zip(found, factors, strict=True)]).tolist() if found else []
    result: list[Factored | None] = []
    for (values, vectors, _), ok in zip(found, sound, strict=True):
        raised = values.clamp_min(0)
        result.append(Factored(_assembled(raised, vectors), None, raised, vectors) if ok else None)
    return result


def _jittered(f: Tensor, jitter: float) -> Tensor:
    if not jitter:
        return f
    if f.dim() == 1:
        return f + jitter * f.mean()
    moved = f.clone()
    moved.diagonal().add_(jitter * f.diagonal().mean())
    return moved


def _inverse(f: Tensor) -> tuple[Factored, Tensor]:
    if f.dim() == 1:
        inverse = f.reciprocal()
        return Factored(f, inverse), (f > 0).all() & inverse.isfinite().all()
    # Where the matrix is not finite LAPACK's answer means nothing; the caller asks for that, too.
    root, info = torch.linalg.cholesky_ex(f)
    # cholesky_inverse would raise for a root that is none, and the others' are wanted.
    inverse = torch.cholesky_inverse(torch.where(info == 0, root, torch.eye(len(f), dtype=f.dtype, device=f.device)))
    return Factored(f, inverse), (info == 0) & inverse.isfinite().all()


def _floored(f: Tensor) -> Factored | None:
    values, vectors, sound = _eigen(f)
    if not bool(sound):
        return None
    raised = values.clamp_min(JITTER * values.max())
    return Factored(_assembled(raised, vectors), _assembled(raised.reciprocal(), vectors))


def _eigen(f: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Eigenvalues, eigenvectors, and whether they are those of a finite, positive definite matrix, up to rounding."""
    values, vectors = f, None
    if f.dim() == 2:
        try:
            values, vectors = torch.linalg.eigh(f)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            values = torch.full_like(f[0], torch.nan)
    return values, vectors, values.isfinite().all() & (values.max() > 0) & (values.min() >= -NEGATIVE * values.max())


def _assembled(values: Tensor, vectors: Tensor | None) -> Tensor:
    return values if vectors is None else (vectors * values) @ vectors.T
