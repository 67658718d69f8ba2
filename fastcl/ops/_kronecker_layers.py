"""Layers as flat lists of tensors, and the quick look at them that takes about a microsecond per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastcl.ops import _checks, _sharded
from fastcl.reference.kronecker import Factors, Layer

MOST_ROWS, MOST_COLUMNS = 128, 129  # of a layer that one block or one thread takes whole
FACTORS = (torch.float64, torch.float32)
PLAIN = (Tensor, torch.nn.Parameter)
_empty: dict[tuple[torch.dtype, torch.device], Tensor] = {}


@dataclass
class Layers:
    """One tensor per layer in every list that the op has; biases have no elements where there is none."""

    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    weight_grads: list[Tensor] = field(default_factory=list)
    bias_grads: list[Tensor] = field(default_factory=list)
    M: list[Tensor] = field(default_factory=list)
    H: list[Tensor] = field(default_factory=list)
    V: list[Tensor] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)
    G: list[Tensor] = field(default_factory=list)

    def select(self, members: Sequence[int]) -> Layers:
        """Some of the layers."""
        if len(members) == len(self.A):
            return self
        return replace(self, **{name: [t[i] for i in members] for name, t in vars(self).items() if t})

    def small(self) -> list[int]:
        """The layers whose two products one block or thread makes."""
        return [i for i, (a, g) in enumerate(zip(self.A, self.G, strict=True)) if is_small(a, g)]


def is_small(A: Tensor, G: Tensor) -> bool:
    """Whether the layer goes with the bucket of small ones."""
    return A.dim() == 2 and G.dim() == 2 and A.size(0) <= MOST_COLUMNS and G.size(0) <= MOST_ROWS


def flatten(name: str, value: object, *, traced: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of a list whose elements are a weight or a pair (weight, bias)."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list with a tensor or a pair (weight, bias) for each layer, got {type(value).__name__}")
    weights, biases = [], []
    for i, layer in enumerate(value):
        if isinstance(layer, Tensor):
            weight, bias = layer, None
        elif isinstance(layer, (tuple, list)) and len(layer) == 2:
            weight, bias = layer
        else:
            raise TypeError(f"{name}[{i}] must be a tensor or a pair (weight, bias), got {_kind(layer)}")
        if not isinstance(weight, Tensor):
            raise TypeError(f"the weight of {name}[{i}] must be a tensor, got {_kind(weight)}")
        if bias is None:
            bias = weight.new_empty(0) if traced else _no_bias(weight)
        elif not isinstance(bias, Tensor):
            raise TypeError(f"the bias of {name}[{i}] must be a tensor or None, got {_kind(bias)}")
        weights.append(weight)
        biases.append(bias)
    return weights, biases


def flatten_factors(name: str, value: object) -> tuple[list[Tensor], list[Tensor]]:
    """Input sides and output sides of a list of pairs (A, G)."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list with a pair (A, G) for each layer, got {type(value).__name__}")
    for i, pair in enumerate(value):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor)):
            raise TypeError(f"{name}[{i}] must be a pair of tensors (A [n, n], G [m, m]), got {_kind(pair)}")
    return [pair[0] for pair in value], [pair[1] for pair in value]


def nested(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Layer]:
    """The reverse of :func:`flatten`."""
    return [(w, b) if b.numel() else w for w, b in zip(weights, biases, strict=True)]


def paired(A: Sequence[Tensor], G: Sequence[Tensor]) -> list[Factors]:
    """The reverse of :func:`flatten_factors`."""
    return list(zip(A, G, strict=True))


def for_dispatcher(**lists: Sequence[Tensor]) -> None:
    """What the dispatcher would not name, or could not be handed."""
    for name, tensors in lists.items():
        _checks.listed(name, tensors)
        if _sharded.is_sharded(tensors):
            raise TypeError(
                f"{name} has DTensors: fastcl.optim.NCL takes them and solves whole layers; here pass whole tensors (.full_tensor())"
            )


def accepted(layers: Layers, written: Sequence[Sequence[Tensor]], grad_mode: bool) -> bool:
    """Whether all tensors are of the plainest kind and fit. False says nothing yet: then the checks that name things decide."""
    A = layers.A
    if not A or any(len(t) != len(A) for t in vars(layers).values() if t):
        return False
    device, on_cpu, dtype = A[0].get_device(), A[0].is_cpu, A[0].dtype
    if dtype not in FACTORS or not (on_cpu or A[0].is_cuda):
        return False
    spans = []
    for name, tensors in vars(layers).items():
        writes = any(tensors is t for t in written)
        free = name in ("weights", "biases", "weight_grads", "bias_grads")
        for t in tensors:
            if type(t) not in PLAIN or t.get_device() != device or t.is_cpu != on_cpu or t.is_neg() or t.layout != torch.strided:
                return False
            if (t.dtype not in _checks.FLOATING or not _dense(t)) if free else (t.dtype != dtype or not _rows(t)):
                return False
            if writes and ((grad_mode and t.requires_grad) or t.is_inference()):
                return False
            count = t.numel() if free or t.dim() == 1 else t.stride(0) * (t.size(0) - 1) + t.size(1)
            if count:
                begin = t.data_ptr()
                spans.append((begin, begin + count * t.element_size(), writes))
    return _fit(layers) and _apart(spans)


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _rows(t: Tensor) -> bool:
    """A matrix whose rows are contiguous, with or without a gap between them; or a vector."""
    if t.dim() != 2:
        return t.dim() == 1 and t.is_contiguous()
    return t.size(1) > 1 and t.stride(1) == 1 and t.size(0) > 0 and t.stride(0) >= t.size(1)


def _fit(layers: Layers) -> bool:
    for i, (a, g) in enumerate(zip(layers.A, layers.G, strict=True)):
        m, n = g.size(0), a.size(0)
        bias = layers.biases[i].numel()
        columns = n - 1 if bias else n
        shape = layers.weights[i].shape
        if (
            len(shape) < 2
            or shape[0] != m
            or layers.weights[i].numel() != m * columns
            or (a.dim() == 2 and a.size(1) != n)
            or (g.dim() == 2 and g.size(1) != m)
            or (bias and layers.biases[i].shape != (m,))
            or (layers.weight_grads and (layers.weight_grads[i].shape != shape or layers.bias_grads[i].shape != layers.biases[i].shape))
            or any(t[i].dim() != 2 or t[i].size(0) != m or t[i].size(1) != n for t in (layers.M, layers.H, layers.V) if t)
        ):
            return False
    return True


def _apart(spans: list[tuple[int, int, bool]]) -> bool:
    """No written range meets another one."""
    spans.sort()
    read_end = written_end = 0
    for begin, end, writes in spans:
        if begin < written_end or (writes and begin < read_end):
            return False
        if writes:
            written_end = max(written_end, end)
        else:
            read_end = max(read_end, end)
    return True


def _no_bias(weight: Tensor) -> Tensor:
    key = weight.dtype, weight.device
    known = _empty.get(key)
    if known is None:
        with torch.inference_mode(False):
            known = _empty[key] = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return known


def _kind(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return type(value).__name__ + size
