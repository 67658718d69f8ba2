"""State between an optimizer, a state_dict and torch.optim: checked, copied, in the precision and with the strides that steps need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl.ops import _sharded

if TYPE_CHECKING:
    from fastcl.optim._base import Swept


class _Held:
    """A value on its way through torch's loading, which would round it to its parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


def zeros(like: Tensor) -> Tensor:
    """State for a parameter: zeros in the type that it is computed in, with its strides, sharded as it is."""
    own = _sharded.shards([like])[0] if _sharded.is_sharded([like]) else like
    dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
    made = torch.empty_strided(own.shape, own.stride(), dtype=dtype, device=own.device).zero_()
    return _placed(made, like)


def _placed(own: Tensor, like: Tensor) -> Tensor:
    if not _sharded.is_sharded([like]):
        return own
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def load(optimizer: Swept, state_dict: Mapping[str, Any], torch_load: Callable[[dict[str, Any]], None]) -> None:
    """Torch's load_state_dict, with hooks, between checks and copies."""
    given = dict(state_dict)
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    for hook in hooks.values():
        given = hook(optimizer, given) or given
    _check(optimizer, given)
    own_groups = optimizer.param_groups
    groups = [
        {**{k: v for k, v in own.items() if k not in ("params", "param_names")}, **saved}
        for own, saved in zip(own_groups, given["param_groups"], strict=True)
    ]
    held = {
        key: {name: _Held(t) for name, t in value.items()} if isinstance(value, Mapping) else value for key, value in given["state"].items()
    }
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
    try:
        torch_load({**given, "state": held, "param_groups": groups})
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


def unwrap(optimizer: Swept) -> None:
    """Turn what :func:`load` has held back into state."""
    for p, state in optimizer.state.items():
        for name, value in list(state.items()) if isinstance(state, dict) else ():
            if isinstance(value, _Held):
                state[name] = _restored(p, name, value.value)


def _restored(p: Tensor, name: str, value: Any) -> Any:
    if name == "step":
        if not isinstance(value, Tensor):  # as old versions of torch.optim have it
            return torch.full((), value, dtype=torch.float32, device=p.device)
        own = _sharded.shards([value])[0] if _sharded.is_sharded([value]) else value
        return own.detach().reshape(()).to(p.device, torch.float32, copy=True)
    if value is None:
        return None
    made = zeros(p)
    with torch.no_grad():
        target, source = _sharded.shards([made, value]) if _sharded.is_sharded([made, value]) else (made, value)
        target.copy_(source)
    return made


def _check(optimizer: Swept, given: Mapping[str, Any]) -> None:
    name = type(optimizer).__name__
    for key in ("state", "param_groups"):
        if key not in given:
            raise ValueError(f"state_dict has no {key!r}; accepted is what {name}.state_dict() returns, or torch.optim's of that name")
    groups, own = given["param_groups"], optimizer.param_groups
    if len(groups) != len(own):
        raise ValueError(f"state_dict has {len(groups)} parameter groups and the optimizer {len(own)}")
    by_key: dict[Any, Tensor] = {}
    for n, (saved, group) in enumerate(zip(groups, own, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"param_groups[{n}] of the state_dict has {len(saved['params'])} parameters and the optimizer's {len(group['params'])}"
            )
        for key in optimizer._group_keys:
            if key not in saved:
                raise ValueError(
                    f"param_groups[{n}] of the state_dict has no {key!r}: it is of another optimizer than {name}, or another version"
                )
        if saved.get("amsgrad"):
            raise ValueError(f"param_groups[{n}] of the state_dict has amsgrad=True, whose state max_exp_avg_sq {name} has no use for")
        if saved.get("decoupled_weight_decay") is False and name == "AdamW":
            raise ValueError(f"param_groups[{n}] of the state_dict has decoupled_weight_decay=False: it is Adam's, whose decay is another")
        optimizer._check_group(saved)
        by_key.update(zip(saved["params"], group["params"], strict=True))
    for key, state in given["state"].items():
        if key in by_key:
            _check_state(optimizer, key, state, by_key[key])


def _check_state(optimizer: Swept, key: Any, state: Mapping[str, Any], p: Tensor) -> None:
    name = type(optimizer).__name__
    for entry, value in state.items():
        if entry not in optimizer._state_names:
            raise ValueError(
                f"state[{key}] of the state_dict has {entry!r}, which {name} has no use for; accepted are {sorted(optimizer._state_names)}"
            )
        if entry == "step" or value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"state[{key}][{entry!r}] of the state_dict must be a floating-point tensor")
        if value.shape != p.shape:
            raise ValueError(f"state[{key}][{entry!r}] of the state_dict has shape {tuple(value.shape)} and its parameter {tuple(p.shape)}")
        if _sharded.is_sharded([p, value]):
            _sharded.check_matching(f"state[{key}][{entry!r}] of the state_dict", [value], "params", [p], one_element=False)
    missing = [entry for entry in optimizer._needed_state if state and entry not in state]
    if missing:
        raise ValueError(
            f"state[{key}] of the state_dict has no {missing[0]!r}: it is of another optimizer than {name}, or another version"
        )
