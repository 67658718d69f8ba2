"""Appending vectors to a precision of low rank: a Gram matrix, its principal directions, and rotations until the rows are orthonormal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcl.ops._low_rank_stages import Place, Tensors, pick
from fastcl.reference.low_rank import check_finite

ORTHONORMAL = 1e-5  # what is promised
SETTLED = {torch.float64: 1e-13, torch.float32: 1e-6}  # what rounding leaves
ROTATIONS = 4


def append_(place: Place, diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors], weight: float) -> None:
    """Nothing is written if the vectors hold NaN or Inf."""
    rank, rows = len(sigma), len(sigma) + len(vectors)
    lists = [diagonal, basis, *vectors]
    own = [pick(tensors, place.counted) for tensors in lists]
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=place.device)
    if own[0]:
        gram = place.call.read("low_rank_gram", own[0], own[0], own[1], sigma, own[2:])
    gram = place.reduce(gram).cpu()
    check_finite(gram.diagonal(), rank)
    scale = torch.ones(rows, dtype=torch.float64)
    scale[rank:] = weight**0.5
    directions, lengths, combinations = principal(scale[:, None] * gram * scale)
    kept = min(rank, len(lengths))
    mix = torch.zeros(rows, rows, dtype=torch.float64)
    mix[:, :kept] = directions[:, :kept]
    mix[:, rank : len(lengths)] = combinations[:, rank:]
    mix = (scale[:, None] * mix).to(place.device)
    values = torch.zeros(rank, dtype=torch.float64)
    values[:kept] = lengths[:kept]

    def compress(at: Sequence[int] | None) -> Tensor:
        d, b, *v = (pick(tensors, at) for tensors in lists)
        found: Tensor = place.call.write("low_rank_compress_", [d, b], b, sigma, v, mix)
        return found

    _orthonormalise_(place, basis, values, _written(place, basis, compress, rank))
    sigma.copy_(values)


def _orthonormalise_(place: Place, basis: Tensors, values: Tensor, gram: Tensor) -> None:
    """Rotate ``basis`` until its rows are the principal directions of the rows ``values_j q_j``; ``values`` become their lengths."""
    for _ in range(ROTATIONS):
        if _distance(gram, values) <= SETTLED[basis[0].dtype]:
            return
        directions, lengths, _ = principal(values[:, None] * gram * values)
        turn = torch.zeros_like(gram)
        turn[:, : len(lengths)] = values[:, None] * directions
        turn = turn.to(place.device)
        values.zero_()[: len(lengths)] = lengths

        def rotate(at: Sequence[int] | None, turn: Tensor = turn) -> Tensor:
            found: Tensor = place.call.write("low_rank_rotate_", [pick(basis, at)], turn)
            return found

        gram = _written(place, basis, rotate, len(values))
    if not _distance(gram, values) <= ORTHONORMAL:
        raise RuntimeError(f"rows of basis are not orthonormal after {ROTATIONS} rotations: {_distance(gram, values):.1e} is left")


def _distance(gram: Tensor, values: Tensor) -> float:
    """How far the rows that are used are from orthonormal, and the others from zero."""
    return float((gram - torch.diag((values > 0).double())).abs().max()) if len(values) else 0.0


def _written(place: Place, basis: Tensors, stage: Callable[[Sequence[int] | None], Tensor], rank: int) -> Tensor:
    """Run a stage on every tensor; the products, of the tensors that are counted, on the host."""
    gram = torch.zeros(rank, rank, dtype=torch.float64, device=place.device)
    if place.members is None or place.counted is None:
        return place.reduce(stage(None) if basis else gram).cpu()
    others = [i for i in place.members if i not in set(place.counted)]
    if place.counted:
        gram = stage(place.counted)
    if others:
        stage(others)
    return place.reduce(gram).cpu()


def principal(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows ``y`` [n, P] with the products ``gram`` [n, n]: their principal directions and lengths, largest first.

    ``directions^T y`` [p, P] has orthonormal rows and ``combinations^T y`` these rows times their ``lengths`` [p]; p is the rank of ``y``.

    The rows are brought to length 1 first, so that what counts as dependent is measured against each row's own length, and a singular
    value decomposition of a square root follows: eigenvalues of the products themselves lose directions below 1e-8 of the longest row.
    """
    n = len(gram)
    size = gram.diagonal().clamp(min=0).sqrt()
    shrink = torch.where(size > 0, 1 / size, 0)
    values, vectors = torch.linalg.eigh(shrink[:, None] * gram * shrink)
    independent = values > 4e-15 * max(n, 8)  # a vector and its copy that float32 has rounded are one
    root, vectors = values[independent].sqrt(), vectors[:, independent]
    left, lengths, right = torch.linalg.svd((root * vectors).T * size, full_matrices=False)
    return shrink[:, None] * ((vectors / root) @ left), lengths, right.T
