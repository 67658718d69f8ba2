"""Precision of low rank plus a diagonal on Triton; the definition is fastcl.reference.low_rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels._lists import STRIDED_BLOCK, Launch, launches, number, on_device
from fastcl.kernels._low_rank import MULTIPLIED, SOLVED, STEP, products_kernel, update_kernel
from fastcl.kernels._low_rank_rows import gram_kernel, mix_kernel
from fastcl.kernels._products import CHUNK, sum_kernel

TILE = 64  # rows whose products are made at once; the rows of more are read ceil(rows / 64) times
PROGRAMS = 1024  # about so many share the products of all rows at most, each of which leaves a matrix
_VECTOR = 4  # elements that are read at once where the number of elements allows it
_SMALLEST = 16
_UPDATED = 2048  # elements of a program of the second sweep: with more its rows under way would fill the registers

Tensors = Sequence[Tensor]


def low_rank_products(vectors: Tensors, diagonal: Tensors, basis: Tensors, inverse: bool) -> Tensor:
    """``[q_0 . z, ..., q_r-1 . z, z . z]`` of ``z = D^-1/2 x`` if ``inverse``, else of ``z = D^1/2 x``; float64."""
    return _products(diagonal, basis, [vectors], SOLVED if inverse else MULTIPLIED)


def low_rank_update_(grads: Tensors, diagonal: Tensors, basis: Tensors, coefficients: Tensor) -> None:
    """``g <- D^-1/2 (z - sum_j c_j q_j)``, ``z = D^-1/2 g``."""
    _update_(diagonal, basis, [grads], coefficients, coefficients, SOLVED)


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
    """``[q_j . z (r of them), q_j . y (r), z . z, z . y, y . y]``; see :func:`fastcl.reference.low_rank.low_rank_step_products`."""
    return _products(diagonal, basis, _operands(params, grads, momenta, anchors, momentum, strength), STEP, momentum, strength)


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
    operands = _operands(params, grads, momenta, anchors, momentum, strength)
    _update_(diagonal, basis, operands, coefficients, step, STEP, momentum, strength)


def low_rank_gram(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors]) -> Tensor:
    """All products ``[r + K, r + K]`` of the rows ``sigma_j q_j`` and ``D^-1/2 v_k``; float64."""
    return _gram(diagonal, basis, vectors, sigma, len(sigma) + len(vectors))


def low_rank_compress_(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Sequence[Tensors], mix: Tensor) -> Tensor:
    """``y' = mix^T y``; ``D' = D (1 + sum_j>=r y'_j^2)``, ``q_j <- y'_j sqrt(D / D')``; returns the new rows' products [r, r], float64."""
    _mix_(diagonal, basis, vectors, sigma, mix)
    return _gram(diagonal, basis, (), None, len(sigma))


def low_rank_rotate_(basis: Tensors, mix: Tensor) -> Tensor:
    """``q' = mix^T q``; returns the products [r, r] of the new rows, float64."""
    _mix_(basis, basis, (), None, mix)
    return _gram(basis, basis, (), None, len(mix))


def _operands(params: Tensors, grads: Tensors, momenta: Tensors, anchors: Tensors, momentum: float, strength: float) -> list[Tensors]:
    return [params, grads, *([momenta] if momentum != 0 else []), *([anchors] if strength != 0 else [])]


def _sweeps(
    diagonal: Tensors, basis: Tensors, lists: Sequence[Tensors], block: int, strided: int = STRIDED_BLOCK
) -> Iterator[tuple[Launch, tuple[int, ...], dict[str, Any]]]:
    """Launches over the diagonal, row 0 of the basis and ``lists``; how far the rows are apart; the last arguments."""
    rank = len(basis[0]) if basis else 0
    # Without rows the diagonal stands in for them, and is not read as such. So does a row for the diagonal where there is none.
    first = [b[0] for b in basis] if rank else diagonal
    lead = first if diagonal is basis else diagonal
    align = [_VECTOR if t.numel() % _VECTOR == 0 else 1 for t in lead]
    for launch in launches(lead, first, *lists, tags=align, block=block, strided=strided):
        lengths = launch.per_row([lead[n].numel() // launch.tag for n in launch.members])
        yield launch, lengths, launch.options | {"ALIGN": launch.tag, "enable_fp_fusion": True}


def _device(tensors: Tensors) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _factors(launch: Launch, form: int, momentum: float, strength: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    double = launch.columns[0][0].dtype == torch.float64
    numbers = number(momentum, double) + number(strength, double)
    dtype = tl.float64 if double else tl.float32
    return numbers, {"FORM": form, "MOMENTUM": momentum != 0, "STRENGTH": strength != 0, "DTYPE": dtype}


def _products(
    diagonal: Tensors, basis: Tensors, lists: Sequence[Tensors], form: int, momentum: float = 0.0, strength: float = 0.0
) -> Tensor:
    rank = len(basis[0]) if basis else 0
    count = 2 * rank + 3 if form == STEP else rank + 1
    device = _device(diagonal)
    plan = list(_sweeps(diagonal, basis, lists, STRIDED_BLOCK))
    if not plan:
        return torch.zeros(count, dtype=torch.float64, device=device)
    with on_device(diagonal[0]):
        out = torch.empty(count, dtype=torch.float64, device=device)
        blocks = sum(launch.grid[0] for launch, *_ in plan)
        partials = torch.empty(count * blocks, dtype=torch.float64, device=device)
        first = 0
        for launch, lengths, options in plan:
            numbers, compiled = _factors(launch, form, momentum, strength)
            products_kernel[launch.grid](launch.lists, lengths, numbers, rank, partials, first, blocks, **compiled, **options)
            first += launch.grid[0]
        sum_kernel[(count,)](partials, out, blocks, 0, 0, count, 1, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
    return out


def _update_(
    diagonal: Tensors,
    basis: Tensors,
    lists: Sequence[Tensors],
    coefficients: Tensor,
    step: Tensor,
    form: int,
    momentum: float = 0.0,
    strength: float = 0.0,
) -> None:
    if not diagonal:
        return
    with on_device(diagonal[0]):
        for launch, lengths, options in _sweeps(diagonal, basis, lists, _UPDATED):
            numbers, compiled = _factors(launch, form, momentum, strength)
            rank = len(basis[0])
            update_kernel[launch.grid](launch.lists, lengths, numbers, rank, coefficients.contiguous(), step, **compiled, **options)


def _stretch(tensors: Tensors) -> int:
    """Elements of a program: of large models more, so that the programs' matrices do not fill the memory."""
    each = sum(t.numel() for t in tensors) // PROGRAMS
    return max(STRIDED_BLOCK, min(1 << 20, 1 << each.bit_length()))


def _parts(launch: Launch, elements: int, options: dict[str, Any]) -> dict[str, Any]:
    return options | {"PART": launch.shape._replace(BLOCK=elements), "num_warps": 8}


def _gram(diagonal: Tensors, basis: Tensors, vectors: Sequence[Tensors], sigma: Tensor | None, count: int) -> Tensor:
    """Without ``sigma`` the rows are the basis's own."""
    device = _device(diagonal)
    stretch = _stretch(diagonal)
    plan = list(_sweeps(diagonal, basis, vectors, stretch, stretch))
    if not plan or not count:
        return torch.zeros(count, count, dtype=torch.float64, device=device)
    size = min(TILE, max(_SMALLEST, triton.next_power_of_2(count)))
    blocks = sum(launch.grid[0] for launch, *_ in plan)
    with on_device(diagonal[0]):
        out = torch.empty(count, count, dtype=torch.float64, device=device)
        partials = torch.empty(blocks, size, size, dtype=torch.float64, device=device)
        for left in range(0, count, size):
            for right in range(left, count, size):
                first = 0
                for launch, lengths, options in plan:
                    gram_kernel[launch.grid](
                        launch.lists,
                        lengths,
                        out if sigma is None else sigma,
                        partials,
                        first,
                        LEFT=left,
                        RIGHT=right,
                        N=size,
                        RANK=len(basis[0]),
                        SCALED=sigma is not None,
                        **_parts(launch, 2048 // size, options),
                    )
                    first += launch.grid[0]
                part = partials.sum(0)[: count - left, : count - right]
                # A product and its mirror image are one number.
                part = part.triu() + part.triu(1).T if left == right else part
                out[left : left + size, right : right + size] = part
                out[right : right + size, left : left + size] = part.T
    return out


def _mix_(diagonal: Tensors, basis: Tensors, vectors: Sequence[Tensors], sigma: Tensor | None, mix: Tensor) -> None:
    """With ``sigma`` the rows are compressed."""
    if not diagonal:
        return
    size = max(_SMALLEST, triton.next_power_of_2(len(mix)))
    mix = mix.contiguous()
    with on_device(diagonal[0]):
        for launch, lengths, options in _sweeps(diagonal, basis, vectors, STRIDED_BLOCK):
            mix_kernel[launch.grid](
                launch.lists,
                lengths,
                mix if sigma is None else sigma,
                mix,
                N=size,
                RANK=len(basis[0]),
                COUNT=len(mix),
                COMPRESS=sigma is not None,
                **_parts(launch, max(32, 4096 // size), options),
            )
