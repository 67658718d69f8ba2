"""Checks of what a precision is given or loads: tensors by name, and pairs of factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastcl._model import FLOATING, some
from fastcl.precision._layers import Layer

ASYMMETRY = 1e-5  # of the largest element


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies, that are no views of anything."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def names(what: str, given: Any, wanted: Iterable[str]) -> Mapping[str, Any]:
    """A mapping that has all of the names and no other."""
    known = list(wanted)
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping from names, got {type(given).__name__}")
    if missing := [name for name in known if name not in given]:
        raise ValueError(f"{what} lacks {some(missing)}, which the model has")
    if unknown := [str(name) for name in given if name not in known]:
        raise ValueError(f"{what} has {some(unknown)}, which the model does not; it has {some(known)}")
    return given


def tensors(state: Mapping[str, Any], kind: str, own: Mapping[str, Tensor], positive: bool = False) -> list[Tensor]:
    """The tensors of a state that take the places of ``own``, as they are, in the order of ``own``."""
    given = names(f"state[{kind!r}]", state.get(kind), own)
    for name, mine in own.items():
        tensor(f"{kind}[{name!r}]", given[name], tuple(mine.shape))
        if positive and not bool((given[name] > 0).all()):
            raise ValueError(f"{kind}[{name!r}] has values that are not > 0")
    return [given[name] for name in own]


def tensor(what: str, value: Any, shape: tuple[int, ...], means: str = "the parameter's") -> None:
    """A finite floating-point tensor of a shape."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATING:
        given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what} must be a floating-point tensor, got {given}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}; {means} is {shape}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{what} has a NaN or an Inf")


def factors(given: Any, layer: Layer) -> tuple[Tensor, Tensor]:
    """The pair (A, G) of a layer: square, symmetric, of its sizes."""
    what = f"the factors of layer {layer.name!r}"
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{what} must be a pair (A, G), got {type(given).__name__}")
    diagonal = layer.kind == "embedding"
    bias = " and one for the bias" if layer.bias is not None else ""
    sides = (
        ("A", given[0], (layer.columns, layer.columns), f"that of its {layer.inputs} inputs{bias}"),
        (
            "G",
            given[1],
            (layer.rows,) if diagonal else (layer.rows, layer.rows),
            f"that of its {layer.rows} {'tokens' if diagonal else 'outputs'}",
        ),
    )
    for side, value, shape, means in sides:
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] != value.shape[1]:
            raise ValueError(f"{side} of layer {layer.name!r} has shape {tuple(value.shape)}, which is not square; {means} is {shape}")
        tensor(f"{side} of layer {layer.name!r}", value, shape, means)
        if value.dim() == 2 and bool((value - value.T).abs().max() > ASYMMETRY * value.abs().max()):
            raise ValueError(f"{side} of layer {layer.name!r} is not symmetric")
    return given[0], given[1]
