"""Whether a state_dict is one that an optimizer can load; everything is looked at before anything changes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl.ops import _sharded

if TYPE_CHECKING:
    from fastcl.optim._base import Swept
    from fastcl.optim.ncl import NCL


def mapping(name: str, value: object) -> dict[Any, Any]:
    """A mapping as a dict. Raises TypeError."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
    return dict(value)


def check(optimizer: Swept | NCL, given: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError naming the key that does not fit."""
    name = type(optimizer).__name__
    for key in ("state", "param_groups"):
        if key not in given:
            raise ValueError(f"state_dict has no {key!r}; accepted is what {name}.state_dict() returns, or torch.optim's of that name")
    mapping("state of the state_dict", given["state"])
    if not isinstance(given["param_groups"], (list, tuple)):
        raise TypeError(f"param_groups of the state_dict must be a list, got {type(given['param_groups']).__name__}")
    groups, own = given["param_groups"], optimizer.param_groups
    if len(groups) != len(own):
        raise ValueError(f"state_dict has {len(groups)} parameter groups and the optimizer {len(own)}")
    by_key: dict[Any, Tensor] = {}
    for n, (saved, group) in enumerate(zip(groups, own, strict=True)):
        _check_group(optimizer, n, saved, len(group["params"]))
        for key, p in zip(saved["params"], group["params"], strict=True):
            if key in by_key:
                raise ValueError(f"param_groups[{n}]['params'] of the state_dict has {key} a second time")
            by_key[key] = p
    for key, state in given["state"].items():
        if key not in by_key:
            raise ValueError(f"state[{key!r}] of the state_dict belongs to none of its param_groups' params")
        _check_state(optimizer, key, mapping(f"state[{key}] of the state_dict", state), by_key[key])
    optimizer._check_loaded({key: (by_key[key], state) for key, state in given["state"].items()})


def _check_group(optimizer: Swept | NCL, n: int, saved: Any, count: int) -> None:
    name, label = type(optimizer).__name__, f"param_groups[{n}] of the state_dict"
    mapping(label, saved)
    if "params" not in saved:
        raise ValueError(f"{label} has no 'params'")
    params = saved["params"]
    if not isinstance(params, (list, tuple)) or any(not isinstance(key, (int, str)) for key in params):
        raise TypeError(f"param_groups[{n}]['params'] of the state_dict must be a list of numbers, got {params!r}")
    if len(params) != count:
        raise ValueError(f"{label} has {len(params)} parameters and the optimizer's {count}")
    for key in optimizer._group_keys:
        if key not in saved:
            raise ValueError(f"{label} has no {key!r}: it is of another optimizer than {name}, or another version")
    if saved.get("amsgrad"):
        raise ValueError(f"{label} has amsgrad=True, whose state max_exp_avg_sq {name} has no use for")
    if saved.get("decoupled_weight_decay") is False and name == "AdamW":
        raise ValueError(f"{label} has decoupled_weight_decay=False: it is Adam's, whose decay is another")
    try:
        optimizer._check_group(saved)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from None


def _check_state(optimizer: Swept | NCL, key: Any, state: Mapping[str, Any], p: Tensor) -> None:
    name = type(optimizer).__name__
    for entry, value in state.items():
        label = f"state[{key}][{entry!r}] of the state_dict"
        if entry not in optimizer._state_names:
            raise ValueError(
                f"state[{key}] of the state_dict has {entry!r}, which {name} has no use for; accepted are {sorted(optimizer._state_names)}"
            )
        if entry == "step":
            _check_step(label, value, p)
        elif value is not None or entry in optimizer._needed_state:
            _check_tensor(label, value, p)
    missing = [entry for entry in optimizer._needed_state if state and entry not in state]
    if missing:
        raise ValueError(
            f"state[{key}] of the state_dict has no {missing[0]!r}: it is of another optimizer than {name}, or another version"
        )


def _check_tensor(label: str, value: Any, p: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not _readable(value, p):
        given = f"{value.layout} of {value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{label} must be a floating-point tensor, dense and with memory, got {given}")
    if value.shape != p.shape:
        raise ValueError(f"{label} has shape {tuple(value.shape)} and its parameter {tuple(p.shape)}")
    if _sharded.is_sharded([p, value]):
        _sharded.check_matching(label, [value], "params", [p], one_element=False)


def _readable(value: Tensor, p: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested and not value.is_quantized and (p.is_meta or not value.is_meta)


def _check_step(label: str, value: Any, p: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.is_complex() or not _readable(value, p) or value.numel() != 1:
            raise ValueError(
                f"{label} must be a tensor of one real number, got {value.layout} of {value.dtype} and shape {tuple(value.shape)} on "
                f"{value.device}"
            )
        if value.is_meta:
            return
        value = (_sharded.shards([value])[0] if _sharded.is_sharded([value]) else value).item()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{label} must be a number or a tensor of one, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{label} must be a finite number >= 0, got {value}")
