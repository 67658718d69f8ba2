"""Which parameters of a model get Kronecker factors, which a diagonal, and where their statistics come from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcl._model import Slot, some, trainable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORMS)
FACTORED = ("linear", "convolution", "embedding")


class Use(NamedTuple):
    """A parameter's place in a module."""

    name: str
    module: nn.Module
    kind: str
    key: str
    slot: Slot


class Layer(NamedTuple):
    """A weight with Kronecker factors: ``[W | b]`` is [rows, columns], the bias its last column."""

    name: str
    kind: str
    modules: tuple[nn.Module, ...]
    weight: Slot
    bias: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The weight's place and, where there is one, the bias's."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def rows(self) -> int:
        """The weight's first dimension."""
        return self.weight.parameter().shape[0]

    @property
    def inputs(self) -> int:
        """The number of columns that belong to the weight."""
        return self.weight.parameter().shape[1:].numel()

    @property
    def columns(self) -> int:
        """The number of columns: the weight's, and one for the bias."""
        return self.inputs + (self.bias is not None)


class Diagonal(NamedTuple):
    """A parameter with a diagonal block, and the modules whose passes tell its gradients of single samples; "other": none does."""

    slot: Slot
    kind: str
    role: str
    modules: tuple[nn.Module, ...]
    layer: str


class Layout(NamedTuple):
    """The blocks of a precision."""

    layers: tuple[Layer, ...]
    diagonal: tuple[Diagonal, ...]
    report: dict[str, str]


def discover(model: nn.Module, layers: Iterable[str] | None) -> Layout:
    """Every trainable parameter once: in a Kronecker-factored layer, or with a diagonal block.

    ``layers`` are the names of the modules that get Kronecker factors; None: all that can have them. One UserWarning names the
    parameters that have a diagonal block because their module is of a kind without a rule.

    Raises:
        TypeError, ValueError: as :func:`fastcl._model.trainable`; ``layers`` that is no collection of names, an unknown name, the name of
            a module that cannot have Kronecker factors, an embedding with sparse gradients.
    """
    slots = trainable(model)
    uses = _uses(model)
    wanted = None if layers is None else _known(layers, uses)
    found: list[Layer] = []
    claimed: set[int] = set()
    for slot in slots:
        own = uses[id(slot.parameter())]
        kinds = {use.kind for use in own}
        if len(kinds) != 1 or own[0].kind not in FACTORED or own[0].key != "weight":
            continue
        if wanted is not None and not any(use.name in wanted for use in own):
            continue
        bias = _common_bias(own, uses)
        found.append(Layer(own[0].name, own[0].kind, tuple(use.module for use in own), slot, bias))
        claimed.update(id(s.parameter()) for s in found[-1].slots)
    rest = tuple(_diagonal(slot, uses[id(slot.parameter())]) for slot in slots if id(slot.parameter()) not in claimed)
    report = {s.name: f"Kronecker factors of {layer.kind} {layer.name!r}{_tied(layer.modules)}" for layer in found for s in layer.slots}
    report |= {d.slot.name: f"diagonal: {_reason(d, uses[id(d.slot.parameter())])}" for d in rest}
    without_rule = [d.slot.name for d in rest if d.kind in ("other", "grouped")]
    if without_rule and wanted is None:
        warnings.warn(
            f"{some(without_rule)}: no Kronecker factors for {'its kind' if len(without_rule) == 1 else 'their kinds'} of module (those "
            "with a rule are Linear, Conv1d/2d/3d with groups=1 and Embedding); a diagonal block is kept instead",
            UserWarning,
            stacklevel=4,
        )
    return Layout(tuple(found), rest, {slot.name: report[slot.name] for slot in slots})


def _uses(model: nn.Module) -> dict[int, list[Use]]:
    found: dict[int, list[Use]] = {}
    # Attention calls functions with these modules' weights and never the modules: no hook would see their inputs.
    bypassed = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    for prefix, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                kind = "other" if id(module) in bypassed else _kind(module, prefix, p)
                slot = Slot(module._parameters, key, f"{prefix}.{key}" if prefix else key)
                found.setdefault(id(p), []).append(Use(prefix, module, kind, key, slot))
    return found


def _kind(module: nn.Module, name: str, p: Tensor) -> str:
    """What is known of a module; a subclass with a forward of its own is not known."""
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "linear"
    for convolution in CONVOLUTIONS:
        if isinstance(module, convolution) and forward is convolution.forward:
            return "convolution" if module.groups == 1 else "grouped"
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        if module.sparse and p.requires_grad:
            raise ValueError(f"the embedding {name!r} has sparse=True; a precision needs dense gradients, sparse=False")
        return "embedding"
    return "norm" if isinstance(module, NORMS) and type(module).forward in [cls.forward for cls in _bases(module)] else "other"


def _bases(module: nn.Module) -> list[type[nn.Module]]:
    return [cls for cls in (*NORMS, nn.modules.batchnorm._BatchNorm) if isinstance(module, cls)]


def check_names(argument: str, names: Iterable[str], model: nn.Module) -> None:
    """Raise as :func:`discover` does for names that are given as another argument than ``layers``."""
    trainable(model)
    _known(names, _uses(model), argument)


def _known(layers: Iterable[str], uses: dict[int, list[Use]], argument: str = "layers") -> set[str]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"{argument} must be a list of module names, got {type(layers).__name__}")
    names = list(layers)
    trained = [use for own in uses.values() for use in own if use.slot.parameter().requires_grad]
    possible = [use.name for use in trained if use.key == "weight" and use.kind in FACTORED]
    for name in names:
        if name not in possible:
            raise ValueError(f"{argument} has {name!r}, which names no module that can have Kronecker factors; those are {some(possible)}")
    return set(names)


def _common_bias(own: Sequence[Use], uses: dict[int, list[Use]]) -> Slot | None:
    """The bias of all modules that share a weight, if it is one, is trained and belongs to nobody else."""
    biases = [use.module._parameters.get("bias") for use in own]
    first = biases[0]
    if first is None or not first.requires_grad or any(b is not first for b in biases):
        return None
    strangers = [use for use in uses[id(first)] if all(use.module is not mine.module for mine in own)]
    return None if strangers else uses[id(first)][0].slot


def _diagonal(slot: Slot, own: Sequence[Use]) -> Diagonal:
    kinds = {(use.kind, use.key) for use in own}
    kind, key = next(iter(kinds))
    known = len(kinds) == 1 and key in ("weight", "bias") and kind != "other"
    names = ", ".join(dict.fromkeys(use.name for use in own))
    return Diagonal(slot, kind if known else "other", key if known else "", tuple(use.module for use in own) if known else (), names)


def _tied(modules: Sequence[nn.Module]) -> str:
    return f", tied over {len(modules)} modules: positions of all of them count" if len(modules) > 1 else ""


def _reason(d: Diagonal, own: Sequence[Use]) -> str:
    if d.kind == "norm":
        return f"affine {d.role} of {type(d.modules[0]).__name__} {d.layer!r}"
    if d.kind == "grouped":
        return f"{d.role} of the grouped convolution {d.layer!r}"
    if d.kind in FACTORED:
        return f"{d.role} of {d.kind} {d.layer!r}"
    if len({use.kind for use in own}) > 1:
        return f"tied over modules of different kinds ({d.layer})"
    return f"a parameter of {type(own[0].module).__name__} {d.layer!r}"


def compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's factors: float64 for float64, else float32."""
    return torch.promote_types(p.dtype, torch.float32)
