"""State between an optimizer, a state_dict and torch.optim: checked, copied, in the precision and with the strides that steps need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl.ops import _sharded
from fastcl.optim import _load_checks

if TYPE_CHECKING:
    from fastcl.optim._base import Swept
    from fastcl.optim.ncl import NCL


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


def load(optimizer: Swept | NCL, state_dict: Mapping[str, Any], torch_load: Callable[[dict[str, Any]], None]) -> None:
    """Torch's load_state_dict, with hooks, between checks and copies."""
    given = _load_checks.mapping("state_dict", state_dict)
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    for hook in hooks.values():
        given = _load_checks.mapping("what a load_state_dict pre-hook returns", hook(optimizer, given) or given)
    _load_checks.check(optimizer, given)
    own_groups = optimizer.param_groups
    # State belongs to positions. Names stay with the parameters here: transforms may have been given by them.
    groups = [
        {**{k: v for k, v in own.items() if k != "params"}, **{k: v for k, v in saved.items() if k != "param_names"}}
        for own, saved in zip(own_groups, given["param_groups"], strict=True)
    ]
    held = {
        key: {name: _Held(t) for name, t in value.items()} if isinstance(value, Mapping) else value for key, value in given["state"].items()
    }
    # Torch makes new groups and new state and assigns them, so that the former ones come back by assignment, whatever fails.
    before = dict(optimizer.__dict__)
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
    try:
        torch_load({**given, "state": held, "param_groups": groups})
    except BaseException:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(before)
        raise
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


def held(value: Any) -> Any:
    """A value of a state, whether :func:`load` holds it back or not."""
    return value.value if isinstance(value, _Held) else value


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
