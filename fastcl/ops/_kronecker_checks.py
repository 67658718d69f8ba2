"""Checks of the kronecker family: each raises before anything is written and names the argument and the layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _sharded
from fastcl.ops._kronecker_layers import FACTORS, Layers

Named = tuple[str, Sequence[Tensor]]


def solved(layers: Layers, of: str, factors: str, *, writes: bool) -> None:
    """Weights and biases of the argument ``of`` with their factors."""
    named = _layers(layers, of) + _sides(layers, factors)
    _check_all(layers, of, factors, named, named[:2] if writes else [])


def direction(layers: Layers, lengths_of: str = "grads") -> None:
    """What makes the direction: gradients (standing as weights and biases), M, V, H and inverse factors."""
    named = _layers(layers, lengths_of) + _matrices(layers) + _sides(layers, "inverse_factors")
    written = [(name, value) for name, value in named if name in ("M", "workspace")]
    _check_all(layers, lengths_of, "inverse_factors", named, written)


def stepped(layers: Layers) -> None:
    """Everything that one step of NCL takes."""
    grads: list[Named] = [("the weight of grads", layers.weight_grads), ("the bias of grads", layers.bias_grads)]
    own = _layers(layers, "params")
    for (name, value), (other_name, other) in zip(grads, own, strict=True):
        _checks.dense(name, value, _checks.FLOATING)
        _lengths(name, value, other_name, other)
        _checks.same_shape(name, value, other_name, other)
    named = [*own, *_matrices(layers), *grads, *_sides(layers, "inverse_factors")]
    _check_all(layers, "params", "inverse_factors", named, [*own, *_matrices(layers)])


def applied(layers: Layers) -> None:
    """What the second half of a step takes: no factors."""
    own, matrices = _layers(layers, "params"), _matrices(layers)
    for name, value in own:
        _checks.dense(name, value, _checks.FLOATING)
    for i, (w, b) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        _check_layer("params", i, w, b)
    for name, value in matrices:
        _checks.dense(name, value, FACTORS)
        _lengths(name, value, *own[0])
        for i, (t, w) in enumerate(zip(value, layers.weights, strict=True)):
            columns = (w.numel() // w.shape[0] if w.shape[0] else 0) + (1 if layers.biases[i].numel() else 0)
            _check_matrix(name, i, t, w.shape[0], columns, t.dtype)
    _share(own + matrices, [*own, *(pair for pair in matrices if pair[0] == "H")])


def step_size(layers: Layers, step: Tensor) -> None:
    """The step size that :func:`applied` layers take."""
    if step.dtype != torch.float64 or step.dim() != 0:
        raise ValueError(f"step has dtype {step.dtype} and shape {tuple(step.shape)}; accepted is a 0-d float64 tensor")
    if layers.weights and step.device != layers.weights[0].device:
        raise ValueError(f"step is on {step.device} and params[0] on {layers.weights[0].device}")


def learning_rate(lr: object, like: Sequence[Tensor]) -> None:
    """A number >= 0, or a 0-d tensor on the layers' device."""
    if not isinstance(lr, Tensor):
        _checks.at_least_zero("lr", lr)
        return
    if lr.dim() != 0 or lr.dtype not in FACTORS:
        raise ValueError(f"lr has dtype {lr.dtype} and shape {tuple(lr.shape)}; accepted are a number, or a 0-d float32 or float64 tensor")
    if like and lr.device != like[0].device:
        raise ValueError(f"lr is on {lr.device} and params[0] on {like[0].device}; move it with .to('{like[0].device}')")


def numbers(momentum: object, strength: object, radius: object = None) -> None:
    """The step's numbers."""
    _checks.at_least_zero("momentum", momentum)
    _checks.at_least_zero("strength", strength)
    if radius is not None:
        _checks.positive("radius", radius)


def _layers(layers: Layers, of: str) -> list[Named]:
    return [(f"the weight of {of}", layers.weights), (f"the bias of {of}", layers.biases)]


def _matrices(layers: Layers) -> list[Named]:
    return [("M", layers.M), ("H", layers.H), *([("workspace", layers.V)] if layers.V else [])]


def _sides(layers: Layers, factors: str) -> list[Named]:
    return [(f"A of {factors}", layers.A), (f"G of {factors}", layers.G)]


def _check_all(layers: Layers, of: str, factors: str, named: Sequence[Named], written: Sequence[Named]) -> None:
    if len(layers.A) != len(layers.weights):
        raise ValueError(f"{factors} has {len(layers.A)} pairs and {of} has {len(layers.weights)} layers; pass one for each")
    for name, value in named:
        matrix = name in ("M", "H", "workspace") or value is layers.A or value is layers.G
        _checks.dense(name, value, FACTORS if matrix else _checks.FLOATING)
        _lengths(name, value, of, layers.weights)
    for i, (w, b, a, g) in enumerate(zip(layers.weights, layers.biases, layers.A, layers.G, strict=True)):
        _check_layer(of, i, w, b)
        m, columns = w.shape[0], w.numel() // w.shape[0] if w.shape[0] else w.shape[1]
        n = columns + (1 if b.numel() else 0)
        said = f"{of}[{i}] is [{m}, {columns}]" + (" with a bias" if b.numel() else "")
        _check_factor(f"A of {factors}[{i}]", a, n, said)
        _check_factor(f"G of {factors}[{i}]", g, m, said)
        if a.dtype != g.dtype:
            raise TypeError(f"A of {factors}[{i}] has dtype {a.dtype} and G has {g.dtype}; accepted is one dtype for both")
        for name, value in named:
            if name in ("M", "H", "workspace"):
                _check_matrix(name, i, value[i], m, n, a.dtype)
    _share(named, written)


def _lengths(name: str, value: Sequence[Tensor], other_name: str, other: Sequence[Tensor]) -> None:
    if len(value) != len(other):
        raise ValueError(
            f"{name.rpartition(' ')[2]} has {len(value)} elements and {other_name.rpartition(' ')[2]} has {len(other)}; "
            "pass one for each layer"
        )


def _check_layer(of: str, i: int, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() < 2:
        raise ValueError(f"{of}[{i}] has a weight of shape {tuple(weight.shape)}; accepted are two dimensions or more, outputs first")
    if bias.numel() and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{of}[{i}] has a bias of shape {tuple(bias.shape)} and a weight of shape {tuple(weight.shape)}; accepted is "
            f"a bias of shape {tuple(weight.shape[:1])}"
        )


def _check_factor(name: str, factor: Tensor, size: int, said: str) -> None:
    if factor.shape not in ((size, size), (size,)):
        raise ValueError(f"{name} has shape {tuple(factor.shape)}; {said}, so accepted are {(size, size)}, or {(size,)} for a diagonal one")
    if not _row_major(factor):
        raise ValueError(f"{name} has strides {factor.stride()}; accepted are contiguous rows; pass .contiguous()")


def _check_matrix(name: str, i: int, t: Tensor, m: int, n: int, dtype: torch.dtype) -> None:
    if t.shape != (m, n):
        raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}; accepted is {(m, n)}, the bias being the last column")
    if t.dtype != dtype:
        raise TypeError(f"{name}[{i}] has dtype {t.dtype}; accepted is that of the factors, {dtype}")
    if not _row_major(t):
        raise ValueError(f"{name}[{i}] has strides {t.stride()}; accepted are contiguous rows, with or without a gap between them")


def _row_major(t: Tensor) -> bool:
    return t.numel() == 0 or ((t.shape[-1] == 1 or t.stride(-1) == 1) and (t.dim() == 1 or t.shape[0] == 1 or t.stride(0) >= t.shape[1]))


def _share(named: Sequence[Named], written: Sequence[Named]) -> None:
    _checks.one_device(*((name, value) for name, value in named if value))
    for name, value in written:
        _checks.not_recorded(name, value)
    labels = [[f"{name}[{i}]" for name, value in lists for i in range(len(value))] for lists in (written, named)]
    names = {name for name, _ in written}
    read = [(name, value) for name, value in named if name not in names]
    labels[1] = [f"{name}[{i}]" for name, value in read for i in range(len(value))]
    _checks.no_overlap(
        "",
        [t for _, value in written for t in value],
        "",
        [t for _, value in read for t in value],
        partners_may_be_equal=False,
        labels=(labels[0], labels[1]),
    )


def merged(named: dict[str, Tensor], rule: object, rules: Sequence[str]) -> None:
    """What kron_merge takes, but for the matrices' values."""
    if not isinstance(rule, str):
        raise TypeError(f"rule must be one of {', '.join(rules)}, got {type(rule).__name__}")
    if rule not in rules:
        raise ValueError(f"rule must be one of {', '.join(rules)}, got {rule!r}")
    for name, value in named.items():
        for_merge(name, value)
    for name, other_name in (("C_L", "B_L"), ("C_R", "B_R")):
        if named[name].shape != named[other_name].shape:
            raise ValueError(
                f"{name} has shape {tuple(named[name].shape)} and {other_name} has {tuple(named[other_name].shape)}; "
                "accepted are equal ones"
            )
    for name, value in named.items():
        if value.device != named["B_L"].device:
            raise ValueError(f"{name} is on {value.device} and B_L on {named['B_L'].device}; one call takes the tensors of one device")


def for_merge(name: str, value: object) -> None:
    """One matrix of kron_merge."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if _sharded.is_sharded([value]):
        raise TypeError(f"{name} is a DTensor; factors are whole on every rank: pass {name}.full_tensor()")
    if value.layout != torch.strided or value.dtype not in _checks.FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in _checks.FLOATING)
        raise TypeError(f"{name} is {value.layout} with dtype {value.dtype}; accepted are dense tensors of {names}")
    if value.dim() not in (1, 2) or value.shape[0] != value.shape[-1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted are a square matrix, or a vector for a diagonal one")
