"""What methods with a head per task need from a model: its parts, the feature extractor and the heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Slot(NamedTuple):
    """The place of a parameter. It stays right when the module gets another Parameter object there, as some kinds of moving do."""

    owner: dict[str, Tensor | None]
    key: str
    name: str

    def parameter(self) -> Tensor:
        """The parameter that is there now."""
        p = self.owner.get(self.key)
        if p is None:
            raise ValueError(f"the model had a parameter {self.name!r} when the method was built and has none now")
        return p


def some(names: Iterable[str]) -> str:
    """A few names for a message."""
    listed = [repr(n) for n in names]
    return ", ".join(listed[:6]) + (f", ... ({len(listed)} in all)" if len(listed) > 6 else "")


def _slots(model: nn.Module) -> list[tuple[Slot, Tensor]]:
    """Every place of every parameter; a shared parameter has several."""
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, p in module._parameters.items():
            if p is not None:
                found.append((Slot(module._parameters, key, f"{prefix}.{key}" if prefix else key), p))
    return found


def split(model: nn.Module, heads: Sequence[nn.Module] | nn.ModuleList) -> tuple[list[Slot], list[Slot]]:
    """The trainable parameters of the feature extractor and those of the heads, each parameter once.

    Raises:
        TypeError: no Module, no sequence of Modules, a parameter that is not floating point.
        ValueError: no head, a head that is the model, is not inside it or is given twice, a parameter that two heads or a head and the
            feature extractor share, no trainable parameter outside the heads, a parameter without a shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList):
        raise TypeError(f"heads must be a sequence of modules, one per task, got one {type(heads).__name__}; pass [head]")
    if not isinstance(heads, (Sequence, nn.ModuleList)) or not all(isinstance(h, nn.Module) for h in heads):
        raise TypeError(f"heads must be a sequence of torch.nn.Modules, one per task, got {type(heads).__name__}")
    if not len(heads):
        raise ValueError("heads is empty; pass one module per task")
    inside = {id(m) for m in model.modules()}
    head_of: dict[int, int] = {}
    index_of: dict[int, int] = {}
    for h, head in enumerate(heads):
        if head is model:
            raise ValueError(f"heads[{h}] is the model itself; a head is a submodule, and the rest of the model is the feature extractor")
        if id(head) not in inside:
            raise ValueError(
                f"heads[{h}] ({type(head).__name__}) is not a submodule of model; register it, for example in an nn.ModuleList"
            )
        if id(head) in index_of:
            raise ValueError(f"heads[{h}] is the same module as heads[{index_of[id(head)]}]; every task needs a head of its own")
        index_of[id(head)] = h
        for name, parameter in head.named_parameters():
            if head_of.setdefault(id(parameter), h) != h:
                raise ValueError(f"heads[{h}] shares its parameter {name!r} with heads[{head_of[id(parameter)]}]; every head needs its own")
    owned = {id(m._parameters) for head in heads for m in head.modules()}
    features: dict[int, Slot] = {}
    of_heads: dict[int, Slot] = {}
    for slot, p in _slots(model):
        in_head = id(slot.owner) in owned
        if not in_head and id(p) in head_of:
            raise ValueError(f"the parameter {slot.name!r} of the feature extractor is shared with heads[{head_of[id(p)]}]; untie them")
        if not p.requires_grad:
            continue
        _check_parameter(slot, p)
        (of_heads if in_head else features).setdefault(id(p), slot)
    if not features:
        raise ValueError("model has no trainable parameter outside its heads, so there is no feature extractor to protect")
    return list(features.values()), list(of_heads.values())


def trainable(model: nn.Module) -> list[Slot]:
    """The parameters that require grad, each once, in the order of ``model.parameters()``.

    Raises:
        TypeError: no Module, a parameter that is not floating point.
        ValueError: no parameter that requires grad, a parameter without a shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[int, Slot] = {}
    for slot, p in _slots(model):
        if p.requires_grad:
            _check_parameter(slot, p)
            found.setdefault(id(p), slot)
    if not found:
        raise ValueError("model has no parameter that requires grad")
    return list(found.values())


def _check_parameter(slot: Slot, p: Tensor) -> None:
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ValueError(f"the parameter {slot.name!r} has no shape yet; run one batch through the model first")
    if p.dtype not in FLOATING:
        raise TypeError(f"the parameter {slot.name!r} has dtype {p.dtype}; accepted are float64, float32, bfloat16 and float16")


def check_unchanged(model: nn.Module, known: Sequence[Slot]) -> None:
    """Raise ValueError if a module was replaced or added, or a parameter unfrozen or shared, since ``known`` was taken."""
    places = {(id(slot.owner), slot.key) for slot in known}
    parameters = {id(slot.parameter()) for slot in known}
    now = _slots(model)
    strangers = [slot.name for slot, p in now if p.requires_grad and id(p) not in parameters]
    gone = places - {(id(slot.owner), slot.key) for slot, _ in now}
    if strangers or gone:
        names = strangers or [slot.name for slot in known if (id(slot.owner), slot.key) in gone]
        raise ValueError(
            f"the model has changed since the method was built ({some(names)}): a module was replaced or added, or a parameter unfrozen; "
            "build the method anew and carry its state over with state_dict()"
        )
