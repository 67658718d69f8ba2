"""The low_rank family in torch's dispatcher: checks, fakes and the way to an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import backends
from fastcl.ops import _dispatch, _low_rank_checks, _low_rank_compress, _low_rank_stages

Tensors = Sequence[Tensor]


def whole(device: torch.device) -> _low_rank_stages.Place:
    return _low_rank_stages.Place(_low_rank_stages.Checked(), device)


def _plain(tensors: Tensors) -> list[Tensor]:
    return [_dispatch.plain(t) for t in tensors]


def _defined(device: torch.device) -> bool:
    """Whether the definition itself serves, and not its stages."""
    return backends.serving(device.type) == "reference"


def split(vectors: Tensors, count: int) -> list[tuple[str, Tensors]]:
    if count < 1 or len(vectors) % count:
        raise ValueError(f"vectors has {len(vectors)} tensors; {count} lists of equal length were announced")
    n = len(vectors) // count
    return [(f"vectors[{k}]", vectors[k * n : (k + 1) * n]) for k in range(count)]


def _run_solve(grads: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> None:
    _low_rank_checks.solved(grads, diagonal, basis, sigma)
    if not grads:
        return
    g, d, b, (s,) = _plain(grads), _plain(diagonal), _plain(basis), _plain([sigma])
    if _defined(g[0].device):
        _dispatch.run("low_rank_solve_", g[0].device, g, d, b, s)
    else:
        _low_rank_stages.solve_(whole(g[0].device), g, d, b, s)


def _fake_quadratic(deltas: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> Tensor:
    _low_rank_checks.read(("deltas", deltas), diagonal, basis, sigma)
    return torch.empty((), dtype=torch.float64, device=sigma.device)


def _run_quadratic(deltas: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> Tensor:
    _low_rank_checks.read(("deltas", deltas), diagonal, basis, sigma)
    if not deltas:
        return torch.zeros((), dtype=torch.float64, device=sigma.device)
    x, d, b, (s,) = _plain(deltas), _plain(diagonal), _plain(basis), _plain([sigma])
    if _defined(s.device):
        value: Tensor = _dispatch.run_reading("low_rank_quadratic", s.device, x, d, b, s)
        return value
    with torch.no_grad():
        return _low_rank_stages.quadratic(whole(s.device), x, d, b, s)


def _check_step(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    sigma: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    momentum: float,
    strength: float,
    radius: float | None,
) -> None:
    rate = lr if lr_tensor is None else lr_tensor
    _low_rank_checks.stepped(params, grads, momenta, anchors, diagonal, basis, sigma, rate, momentum, strength, radius)


def _run_step(params: Tensors, grads: Tensors, momenta: Tensors, anchors: Tensors, *rest: Any) -> None:
    _check_step(params, grads, momenta, anchors, *rest)
    if not params:
        return
    diagonal, basis, sigma, lr_tensor, lr, *numbers = rest
    lists = [_plain(tensors) for tensors in (params, grads, momenta, anchors, diagonal, basis)]
    rate = lr if lr_tensor is None else _dispatch.plain(lr_tensor)
    device = params[0].device
    args: list[Any] = [*lists, _dispatch.plain(sigma), rate, *numbers]
    if _defined(device):
        _dispatch.run("low_rank_step_", device, *args)
        _dispatch.bump_versions(lists[2])
        return
    with torch.no_grad():
        _low_rank_stages.step_(whole(device), *args)


def _check_append(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Tensors, count: int, weight: float) -> None:
    _low_rank_checks.appended(diagonal, basis, sigma, split(vectors, count), weight)


def _run_append(diagonal: Tensors, basis: Tensors, sigma: Tensor, vectors: Tensors, count: int, weight: float) -> None:
    _check_append(diagonal, basis, sigma, vectors, count, weight)
    if not diagonal:
        return
    d, b, s = _plain(diagonal), _plain(basis), _dispatch.plain(sigma)
    lists = [_plain(v) for _, v in split(vectors, count)]
    if _defined(s.device):
        _dispatch.run("low_rank_append_", s.device, d, b, s, lists, weight)
        _dispatch.bump_versions([*b, s])
        return
    with torch.no_grad():
        _low_rank_compress.append_(whole(s.device), d, b, s, lists, weight)
    _dispatch.bump_versions([s])


PRECISION = "Tensor[] diagonal, Tensor[] basis, Tensor sigma"
_dispatch.define(
    "low_rank_solve_",
    "low_rank",
    f"(Tensor(a!)[] grads, {PRECISION}) -> ()",
    implementation=_run_solve,
    fake=_low_rank_checks.solved,
)
_dispatch.define(
    "low_rank_quadratic",
    "low_rank",
    f"(Tensor[] deltas, {PRECISION}) -> Tensor",
    implementation=_run_quadratic,
    fake=_fake_quadratic,
)
_dispatch.define(
    "low_rank_step_",
    "low_rank",
    f"(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] anchors, {PRECISION}, Tensor? lr_tensor, float lr, "
    "float momentum, float strength, float? radius) -> ()",
    implementation=_run_step,
    fake=_check_step,
)
_dispatch.define(
    "low_rank_append_",
    "low_rank",
    "(Tensor(a!)[] diagonal, Tensor(b!)[] basis, Tensor(c!) sigma, Tensor[] vectors, int count, float weight) -> ()",
    implementation=_run_append,
    fake=_check_append,
)
