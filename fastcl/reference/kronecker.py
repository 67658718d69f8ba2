"""Kronecker-factored precision: products, quadratic forms and NCL's step. The definition, of whole ops and of the stages they are made of.

A layer is a weight [m, ...] alone or a pair (weight, bias), read as the matrix X = [W.flatten(1) | b] of shape [m, n]; its factors are
the pair (A [n, n], G [m, m]) and stand for the precision ``Lambda vec(X) = vec(G X A)``. A factor with one dimension is diagonal. Stages
take one tensor per layer in each list, without elements where there is no bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.reference.kronecker_merge import kron_merge as kron_merge
from fastcl.reference.projection import grad_dot

Layer = Tensor | tuple[Tensor, Tensor | None]
Factors = tuple[Tensor, Tensor]
Tensors = Sequence[Tensor]


def kron_solve_(grads: Sequence[Layer], inverse_factors: Sequence[Factors]) -> None:
    """``X <- G X A``; see :func:`fastcl.ops.kron_solve_`."""
    kron_small_(*parts(grads), *sides(inverse_factors))


def kron_quadratic(deltas: Sequence[Layer], factors: Sequence[Factors]) -> Tensor:
    """``sum <X, G X A>`` in float64; see :func:`fastcl.ops.kron_quadratic`."""
    return kron_small_quadratic(*parts(deltas), *sides(factors))[0]


def ncl_step_(
    params: Sequence[Layer],
    grads: Sequence[Layer],
    M: Tensors,
    H: Tensors,
    inverse_factors: Sequence[Factors],
    lr: float | Tensor,
    momentum: float = 0.9,
    strength: float = 1.0,
    radius: float | None = None,
) -> None:
    """The four lines of natural continual learning; see :func:`fastcl.ops.ncl_step_`."""
    V = [torch.empty_like(m) for m in M]
    q = ncl_direction_(grads, M, V, H, inverse_factors, momentum, strength)
    ncl_apply_(*parts(params), H, V, M, step_size(q, lr, radius))


def ncl_direction_(
    grads: Sequence[Layer], M: Tensors, V: Tensors, H: Tensors, inverse_factors: Sequence[Factors], momentum: float, strength: float
) -> Tensor:
    """``M <- momentum M + g + strength H;  V <- G M A``; returns ``sum <M, V>``, float64."""
    ncl_small_direction_(M, V, *parts(grads), H, *sides(inverse_factors), momentum, strength)
    return grad_dot(M, V).to(M[0].device if M else "cpu")


def step_size(q: Tensor, lr: float | Tensor, radius: float | None) -> Tensor:
    """``min(lr, radius / sqrt(q))``, float64 on the device of ``q``; ``lr`` without a radius or where ``q`` is 0."""
    rate = lr.to(q) if isinstance(lr, Tensor) else torch.full_like(q, lr)
    # A sum that cancels to less than nothing is no reason to spoil every weight; a NaN is.
    return rate if radius is None else torch.minimum(rate, radius / q.clamp(min=0).sqrt())


def kron_small_(weights: Tensors, biases: Tensors, A: Tensors, G: Tensors) -> None:
    """``X <- G X A`` of every layer."""
    for w, b, a, g in zip(weights, biases, A, G, strict=True):
        split_(w, b, product(joined(w, b, a.dtype), a, g))


def kron_small_quadratic(weights: Tensors, biases: Tensors, A: Tensors, G: Tensors) -> Tensor:
    """``sum <X, G X A>``, float64 [1]."""
    X = [joined(w, b, a.dtype) for w, b, a in zip(weights, biases, A, strict=True)]
    return grad_dot(X, [product(x, a, g) for x, a, g in zip(X, A, G, strict=True)])[None]


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
    """All four lines with the step size ``lr``; A and G are inverses."""
    V = [torch.empty_like(m) for m in M]
    q = ncl_small_direction_(M, V, weight_grads, bias_grads, H, A, G, momentum, strength)
    ncl_apply_(weights, biases, H, V, M, step_size(q.sum(), lr, None))


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
    ncl_momentum_(M, H, weight_grads, bias_grads, momentum, strength, None)
    for m, v, a, g in zip(M, V, A, G, strict=True):
        v.copy_(product(m, a, g))
    dots = [grad_dot([m], [v]) for m, v in zip(M, V, strict=True)]
    return torch.stack(dots) if dots else torch.zeros(0, dtype=torch.float64)


def ncl_momentum_(
    M: Tensors, H: Tensors, weight_grads: Tensors, bias_grads: Tensors, momentum: float, strength: float, lr: float | None
) -> None:
    """``M <- momentum M + g + strength H``; then, with a number as ``lr``, ``H <- H - lr M``."""
    for m, h, w, b in zip(M, H, weight_grads, bias_grads, strict=True):
        m.copy_(momentum * m + joined(w, b, m.dtype) + strength * h)
        if lr is not None:
            h.sub_(lr * m)


def ncl_apply_(weights: Tensors, biases: Tensors, H: Tensors, V: Tensors, M: Tensors, step: Tensor) -> None:
    """``W <- W - step V;  H <- H - step M``."""
    for w, b, h, v, m in zip(weights, biases, H, V, M, strict=True):
        s = step.to(v.dtype)
        split_(w, b, joined(w, b, v.dtype) - s * v)
        h.sub_(s * m)


def product(X: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """``G X A``."""
    left = G[:, None] * X if G.dim() == 1 else G @ X
    return left * A if A.dim() == 1 else left @ A


def joined(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``[W.flatten(1) | b]`` in ``dtype``; a bias without elements is none."""
    columns = [weight.flatten(1).to(dtype), *([bias.to(dtype)[:, None]] if bias.numel() else [])]
    return torch.cat(columns, dim=1)


def split_(weight: Tensor, bias: Tensor, X: Tensor) -> None:
    """Write ``X = [W.flatten(1) | b]`` back, rounded once."""
    columns = X.shape[1] - (1 if bias.numel() else 0)
    weight.copy_(X[:, :columns].reshape(weight.shape))
    if bias.numel():
        bias.copy_(X[:, columns])


def parts(layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases, which have no elements where there are none."""
    pairs = [layer if isinstance(layer, (tuple, list)) else (layer, None) for layer in layers]
    return [w for w, _ in pairs], [w.new_empty(0) if b is None else b for w, b in pairs]


def sides(factors: Sequence[Factors]) -> tuple[list[Tensor], list[Tensor]]:
    """The input sides A and the output sides G."""
    return [a for a, _ in factors], [g for _, g in factors]
