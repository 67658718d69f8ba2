"""Kronecker factors as a multiple of the identity plus a low rank, and the sketches that they are collected in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl._distributed import DataParallel


class LowRankFactor(NamedTuple):
    """``scale I + basis^T diag(values) basis``: ``basis`` [k, n] with orthonormal rows, ``values`` float64 [k], from 0, descending.

    ``values`` and the number ``scale`` live on the host: they change once per task and steps need them without a wait.
    """

    scale: float
    values: Tensor
    basis: Tensor

    @property
    def size(self) -> int:
        """``n``."""
        return self.basis.shape[1]

    def dense(self) -> Tensor:
        """The factor as a matrix [n, n] in float64, for looking at and for tests."""
        basis = self.basis.double()
        return (
            torch.eye(self.size, dtype=torch.float64, device=basis.device) * self.scale + (basis.T * self.values.to(basis.device)) @ basis
        )

    def trace(self) -> float:
        """``scale n + sum(values)``."""
        return self.scale * self.size + float(self.values.sum())


def identity(scale: float, size: int, rank: int, like: Tensor, dtype: torch.dtype) -> LowRankFactor:
    """``scale I`` with ``rank`` unused rows."""
    return LowRankFactor(scale, torch.zeros(rank, dtype=torch.float64), torch.zeros((rank, size), dtype=dtype, device=like.device))


def truncated(eigenvalues: Tensor, total: float, size: int, rank: int) -> tuple[float, Tensor]:
    """The ``scale`` and ``values`` that keep the ``rank`` largest of the ``eigenvalues`` (float64, descending, on the host) and the trace.

    What is dropped, up to the trace ``total`` of the whole [size, size] matrix, is spread over the directions that are not kept:
    ``scale = (total - sum of the kept) / (size - kept)``, the maximum-likelihood choice of probabilistic PCA (Tipping, Bishop 1999, eq. 8).
    A direction whose eigenvalue is below that mean of the others is not kept.
    """
    rank = min(rank, len(eigenvalues), size - 1)
    leading, noise = eigenvalues[:rank].clamp_min(0), 1e-14 * total
    kept = torch.cat([leading.new_zeros(1), leading.cumsum(0)])
    rest = total - kept
    rest = torch.where(rest > noise, rest, 0.0) / (size - torch.arange(rank + 1))
    count = int(((leading >= rest[1:]) & (leading > noise)).long().cumprod(0).sum())
    scale = float(rest[count])
    values = leading - scale
    values[count:] = 0
    return scale, values


def fitted(matrix: Tensor, frame: Tensor, outside: float, rank: int, dtype: torch.dtype) -> LowRankFactor:
    """The best factor of rank ``rank`` for ``frame matrix frame^T + outside (I - frame frame^T)``, with its trace.

    Args:
        matrix: float64 [j, j], symmetric, positive semi-definite.
        frame: float64 [n, j] with orthonormal columns.
        outside: the eigenvalue of everything orthogonal to the frame.
        rank: rows of the basis; at most ``n - 1`` are used, with which any matrix is exact.
        dtype: of the basis.
    """
    size, inside = frame.shape
    eigenvalues, vectors = (t.flip(-1) for t in torch.linalg.eigh(matrix))
    known = eigenvalues.cpu().clamp_min(0)
    total = float(known.sum()) + outside * (size - inside)
    scale, values = truncated(known, total, size, rank)
    basis = frame.new_zeros((rank, size), dtype=dtype)
    full = torch.zeros(rank, dtype=torch.float64)
    full[: len(values)] = values
    used = int((values > 0).sum())
    basis[:used] = (frame @ vectors[:, :used]).T
    return LowRankFactor(scale, full, basis)


class Sketch:
    """A running sum ``S`` of outer products ``x x^T`` of rows [n], kept as the leading ``size`` of its eigenvectors, and its whole trace.

    Rows come in blocks. Each block is stacked below the ``size`` rows kept so far, the Gram matrix of the stack (float64, at most
    ``3 size`` wide) is decomposed, and the stack is rotated to its ``size`` largest principal directions; what is dropped stays in the
    trace. No [n, n] matrix exists. With ``size >= n``, or fewer rows than ``size``, nothing is dropped.

    Rows with a NaN or an Inf make ``finite`` False (on the device) and leave ``rows`` finite.
    """

    def __init__(self, n: int, size: int, device: torch.device) -> None:
        self.size, self.width = min(size, n), n
        self.rows = torch.zeros((self.size, n), dtype=torch.float64, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, block: Tensor, weight: float = 1.0) -> None:
        """``S += weight block^T block``; a block [B, n - 1] gets the bias' column of ones."""
        step = max(2 * self.size, 64)
        for start in range(0, block.shape[0], step):
            part = block[start : start + step]
            stack = torch.ones((self.size + part.shape[0], self.width), dtype=torch.float64, device=self.rows.device)
            stack[: self.size] = self.rows
            stack[self.size :, : part.shape[1]] = part
            stack[self.size :].mul_(weight**0.5)
            self._compress(stack)

    def plus(self, other: Sketch) -> Sketch:
        """The sketch of both sums."""
        both = Sketch(self.width, self.size, self.rows.device)
        both.rows, both.trace, both.finite = self.rows, self.trace, self.finite & other.finite
        both._compress(torch.cat([self.rows, other.rows]), extra=other.trace - other.rows.square().sum())
        return both

    def over(self, parallel: DataParallel) -> Sketch:
        """The sketch of the sums of all ranks, the same on each."""
        if parallel.size == 1:
            return self
        flat = torch.cat([self.rows.flatten(), self.trace[None], self.finite.double()[None]])
        every = flat.new_zeros((parallel.size, len(flat)))
        every[parallel.rank] = flat
        result: Sketch | None = None
        for row in parallel.reduce(every):
            one = Sketch(self.width, self.size, self.rows.device)
            one.rows, one.trace, one.finite = row[:-2].view_as(self.rows), row[-2], row[-1] > 0
            result = one if result is None else result.plus(one)
        return result or self

    def is_finite(self) -> Tensor:
        """Whether all rows were, on the device."""
        return self.finite

    def _compress(self, stack: Tensor, extra: Tensor | None = None) -> None:
        gram = stack @ stack.T
        ok = gram.isfinite().all()
        # A decomposition of NaN raises on the host; the flag waits until the end of the task.
        _, vectors = torch.linalg.eigh(torch.where(ok, gram, torch.zeros_like(gram)))
        self.finite = self.finite & ok
        dropped = self.trace - self.rows.square().sum() + gram.diagonal().sum()
        self.trace = torch.where(ok, dropped, self.trace) + (0 if extra is None else extra)
        top = vectors[:, -self.size :].flip(1)
        self.rows = torch.where(ok, top.T @ torch.where(ok, stack, torch.zeros_like(stack)), self.rows)

    def factor(self, count: float, rank: int, dtype: torch.dtype) -> LowRankFactor:
        """``S / count`` with ``rank`` directions. Raises ValueError when a row was not finite. Waits for the device."""
        if not bool(self.finite):
            raise ValueError("a row has a NaN or an Inf")
        squares = self.rows.square().sum(1).cpu()
        order = squares.argsort(descending=True)
        squares = squares[order] / count
        scale, values = truncated(squares, max(float(self.trace) / count, float(squares.sum())), self.width, rank)
        basis = self.rows.new_zeros((rank, self.width), dtype=dtype)
        full = torch.zeros(rank, dtype=torch.float64)
        full[: len(values)] = values
        used = int((values > 0).sum())
        if used:
            kept = self.rows[order[:used].to(self.rows.device)]
            basis[:used] = _orthonormal(kept.T).T
        return LowRankFactor(scale, full, basis)


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the same subspaces in the same order: of nearly orthogonal ones, nearly their directions."""
    q, r = torch.linalg.qr(columns)
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed
