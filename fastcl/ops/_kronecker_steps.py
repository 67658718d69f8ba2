"""Whole ops as stages: small layers together in one call, large ones one by one between two sweeps over all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcl.ops import _dispatch, _kronecker_large
from fastcl.ops._kronecker_large import Scratch
from fastcl.ops._kronecker_layers import Layers
from fastcl.reference.kronecker import step_size

Stage = Callable[[str], Callable[..., Any]]


def exact_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autograd does not record, and autocast narrows nothing."""
    if not torch.is_autocast_enabled(device.type):
        return torch.no_grad()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack


def solve_(layers: Layers, stage: Stage) -> None:
    """``X <- G X A`` of all layers."""
    small = layers.small()
    if small:
        bucket = layers.select(small)
        stage("kron_small_")(bucket.weights, bucket.biases, bucket.A, bucket.G)
    for rest in _large(layers, small):
        scratch = Scratch(rest)
        for w, b, a, g in zip(rest.weights, rest.biases, rest.A, rest.G, strict=True):
            _kronecker_large.solve_(w, b, a, g, scratch)
    _dispatch.bump_versions([*layers.weights, *layers.biases])


def quadratic(layers: Layers, stage: Stage) -> Tensor:
    """``sum <X, G X A>`` of all layers, of which there is at least one."""
    small = layers.small()
    total = torch.zeros((), dtype=torch.float64, device=layers.A[0].device)
    if small:
        bucket = layers.select(small)
        total = stage("kron_small_quadratic")(bucket.weights, bucket.biases, bucket.A, bucket.G)[0]
    for rest in _large(layers, small):
        scratch = Scratch(rest, blocks=2)
        for w, b, a, g in zip(rest.weights, rest.biases, rest.A, rest.G, strict=True):
            total = total + _kronecker_large.quadratic(w, b, a, g, stage("grad_dot"), scratch)
    return total


def step_(layers: Layers, lr: float | Tensor, momentum: float, strength: float, radius: float | None, stage: Stage) -> None:
    """NCL's four lines."""
    if radius is None:
        small = layers.small()
        if small:
            _small_step_(layers.select(small), lr, momentum, strength, stage)
        for part in _large(layers, small):
            _large_step_(part, lr, momentum, strength, stage)
        _dispatch.bump_versions([*layers.weights, *layers.biases, *layers.M, *layers.H])
        return
    q = direction_(layers, momentum, strength, stage)
    apply_(layers, step_size(q, lr, radius), stage)


def direction_(layers: Layers, momentum: float, strength: float, stage: Stage) -> Tensor:
    """M and V of all layers, V made here where there is none; returns ``sum <M, V>``."""
    layers.V = layers.V or [_kronecker_large.buffer(m.size(0), m.size(1), m) for m in layers.M]
    small = layers.small()
    total = torch.zeros((), dtype=torch.float64, device=layers.M[0].device)
    if small:
        part = layers.select(small)
        grads = part.weight_grads, part.bias_grads
        total = stage("ncl_small_direction_")(part.M, part.V, *grads, part.H, part.A, part.G, momentum, strength).sum()
    for part in _large(layers, small):
        stage("ncl_momentum_")(part.M, part.H, part.weight_grads, part.bias_grads, momentum, strength, None)
        scratch = Scratch(part)
        for v, m, a, g in zip(part.V, part.M, part.A, part.G, strict=True):
            _kronecker_large.direction_(v, m, a, g, scratch)
        total = total + stage("grad_dot")(part.M, part.V)
    _dispatch.bump_versions([*layers.M, *layers.V])
    return total


def apply_(layers: Layers, step: Tensor, stage: Stage) -> None:
    """W and H of all layers."""
    stage("ncl_apply_")(layers.weights, layers.biases, layers.H, layers.V, layers.M, step)
    _dispatch.bump_versions([*layers.weights, *layers.biases, *layers.H])


def _small_step_(part: Layers, lr: float | Tensor, momentum: float, strength: float, stage: Stage) -> None:
    if isinstance(lr, Tensor):
        apply_(part, step_size(direction_(part, momentum, strength, stage), lr, None), stage)
        return
    grads = part.weight_grads, part.bias_grads
    stage("ncl_small_step_")(part.weights, part.biases, *grads, part.M, part.H, part.A, part.G, lr, momentum, strength)


def _large_step_(part: Layers, lr: float | Tensor, momentum: float, strength: float, stage: Stage) -> None:
    matrices = [_kronecker_large.matrix_of(w, a.dtype) for w, a in zip(part.weights, part.A, strict=True)]
    direct = [
        i for i, (w, b) in enumerate(zip(matrices, part.biases, strict=True)) if w is not None and (b.dtype == w.dtype or not b.numel())
    ]
    direct = [] if isinstance(lr, Tensor) else direct
    indirect = _others(part, direct)
    for members, rate in ((direct, lr), (indirect, None)):
        if members:
            own = part.select(members)
            stage("ncl_momentum_")(own.M, own.H, own.weight_grads, own.bias_grads, momentum, strength, rate)
    scratch = Scratch(part, blocks=2 if indirect else 1)
    for i in direct:
        weight: Any = matrices[i]
        number: Any = lr
        _kronecker_large.step_(weight, part.biases[i], part.M[i], part.A[i], part.G[i], number, scratch)
    if indirect:
        step = step_size(torch.zeros((), dtype=torch.float64, device=part.A[0].device), lr, None)
        for i in indirect:
            _kronecker_large.apply_by_blocks_(part, i, step, stage("ncl_apply_"), scratch)


def _large(layers: Layers, small: list[int]) -> list[Layers]:
    """The other layers, those of one dtype together: they share scratch memory."""
    rest = _others(layers, small)
    dtypes = dict.fromkeys(layers.A[i].dtype for i in rest)
    return [layers.select([i for i in rest if layers.A[i].dtype == dtype]) for dtype in dtypes]


def _others(layers: Layers, members: list[int]) -> list[int]:
    if not members:
        return list(range(len(layers.A)))
    chosen = set(members)
    return [i for i in range(len(layers.A)) if i not in chosen]
