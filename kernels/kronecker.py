"""Natural continual learning with Kronecker factors on Triton; the definition is fastcl.reference.kronecker.

Small layers: one launch for all of one padded size, one program per layer. Of any size: sweeps over matrices whose rows may be padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastcl.kernels._kronecker import (
    DIRECTION,
    PRODUCT,
    QUADRATIC,
    STEP,
    apply_kernel,
    direction_kernel,
    momentum_kernel,
    product_kernel,
    step_kernel,
)
from fastcl.kernels._layers import plans
from fastcl.kernels._lists import Launch, launches, number, on_device
from fastcl.kernels._products import CHUNK, sum_kernel

Tensors = Sequence[Tensor]


def kron_small_(weights: Tensors, biases: Tensors, A: Tensors, G: Tensors) -> None:
    """``X <- G X A`` of every layer; see :func:`fastcl.reference.kronecker.kron_small_`."""
    if weights:
        with on_device(weights[0]):
            nothing = torch.empty(0, dtype=torch.float64, device=weights[0].device)
            for launch in plans([A, G], [(weights, biases)]):
                product_kernel[(launch.count,)](launch.layers, nothing, MODE=PRODUCT, **launch.options)


def kron_small_quadratic(weights: Tensors, biases: Tensors, A: Tensors, G: Tensors) -> Tensor:
    """``sum <X, G X A>``, float64 [1]."""
    if not weights:
        return torch.zeros(1, dtype=torch.float64)
    with on_device(weights[0]):
        parts = torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device)
        out = torch.empty(1, dtype=torch.float64, device=parts.device)
        for launch in plans([A, G], [(weights, biases)]):
            product_kernel[(launch.count,)](launch.layers, parts, MODE=QUADRATIC, **launch.options)
        sum_kernel[(1,)](parts, out, len(weights), 0, 0, 1, 1, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
    return out


def ncl_small_step_(
    weights: Tensors,
    biases: Tensors,
    weight_grads: Tensors,
    bias_grads: Tensors,
    M: Tensors,
    H: Tensors,
    A: Tensors,
    G: Tensors,
    lr: float,
    momentum: float,
    strength: float,
) -> None:
    """The whole step of every layer, with the step size ``lr``; A and G are inverses."""
    if weights:
        with on_device(weights[0]):
            for launch in plans([A, G, M, H], [(weight_grads, bias_grads), (weights, biases)]):
                numbers = _numbers(launch.double, momentum, strength, lr)
                step_kernel[(launch.count,)](launch.layers, numbers, MODE=STEP, **launch.options)


def ncl_small_direction_(
    M: Tensors,
    V: Tensors,
    weight_grads: Tensors,
    bias_grads: Tensors,
    H: Tensors,
    A: Tensors,
    G: Tensors,
    momentum: float,
    strength: float,
) -> Tensor:
    """``M <- momentum M + g + strength H;  V <- G M A``; returns each layer's ``<M, V>``, float64 [layers]."""
    if not M:
        return torch.zeros(0, dtype=torch.float64)
    with on_device(M[0]):
        out = torch.zeros(len(M), dtype=torch.float64, device=M[0].device)
        for launch in plans([A, G, M, H, V], [(weight_grads, bias_grads)]):
            numbers = _numbers(launch.double, momentum, strength)
            direction_kernel[(launch.count,)](launch.layers, numbers, out, MODE=DIRECTION, **launch.options)
    return out


def ncl_momentum_(
    M: Tensors, H: Tensors, weight_grads: Tensors, bias_grads: Tensors, momentum: float, strength: float, lr: float | None
) -> None:
    """``M <- momentum M + g + strength H``; then, with a number as ``lr``, ``H <- H - lr M``."""
    if M:
        with on_device(M[0]):
            for launch in launches(*_columns(weight_grads, bias_grads, M, H)):
                double = launch.columns[1][0].dtype == torch.float64
                numbers = _numbers(double, momentum, strength, 0.0 if lr is None else lr)
                momentum_kernel[launch.grid](launch.lists, numbers, MOVE=lr is not None, **_contracted(launch, double))


def ncl_apply_(weights: Tensors, biases: Tensors, H: Tensors, V: Tensors, M: Tensors, step: Tensor) -> None:
    """``W <- W - step V;  H <- H - step M``."""
    if weights:
        with on_device(weights[0]):
            for launch in launches(*_columns(weights, biases, H, V, M)):
                double = launch.columns[1][0].dtype == torch.float64
                apply_kernel[launch.grid](launch.lists, step, **_contracted(launch, double))


def _shaped(matrix: Tensor, weight: Tensor) -> Tensor:
    """The columns that belong to a weight, in its shape."""
    strides = [math.prod(weight.shape[d + 1 :]) for d in range(1, weight.dim())]
    return matrix.as_strided(weight.shape, (matrix.stride(0), *strides))


def _columns(weights: Tensors, biases: Tensors, *matrices: Tensors) -> list[list[Tensor]]:
    """Lists of equal shapes: weights, then biases, and of each matrix the columns that belong to them."""
    rows: list[tuple[Tensor, ...]] = []
    for n, (w, b) in enumerate(zip(weights, biases, strict=True)):
        inputs = matrices[0][n].shape[1] - (1 if b.numel() else 0)
        if w.numel():
            rows.append((w, *(_shaped(x[n], w) for x in matrices)))
        if b.numel():
            rows.append((b, *(x[n][:, inputs] for x in matrices)))
    return [[row[c] for row in rows] for c in range(1 + len(matrices))]


def _numbers(double: bool, *values: float) -> tuple[Any, ...]:
    return sum((number(v, double) for v in values), ())


def _contracted(launch: Launch, double: bool) -> dict[str, Any]:
    options: dict[str, Any] = launch.options
    return options | {"DTYPE": tl.float64 if double else tl.float32, "enable_fp_fusion": True}
