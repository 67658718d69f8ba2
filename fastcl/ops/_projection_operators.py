"""The projection family in torch's dispatcher: checks, fakes and the way to an implementation, for lists without None."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch


def check_written(grads: Sequence[Tensor], memories: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.not_recorded("grads", grads)
    _check_read(("grads", grads), *memories)
    for name, memory in memories:
        _checks.no_overlap("grads", grads, name, memory, partners_may_be_equal=False)


def _check_read(first: tuple[str, Sequence[Tensor]], *others: tuple[str, Sequence[Tensor]]) -> None:
    for name, value in (first, *others):
        _checks.dense(name, value, _checks.FLOATING)
        _checks.same_length(name, value, *first)
        _checks.same_shape(name, value, *first)
    _checks.one_device(first, *others)


def _split(name: str, tensors: Sequence[Tensor], count: int) -> list[tuple[str, Sequence[Tensor]]]:
    if count < 1 or len(tensors) % count:
        raise ValueError(f"{name} has {len(tensors)} tensors; {count} lists of equal length were announced")
    n = len(tensors) // count
    return [(f"{name}[{k}]", tensors[k * n : (k + 1) * n]) for k in range(count)]


def _empty(like: Sequence[Tensor], *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like[0].device if like else "cpu")


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_dispatch.plain(t) for t in tensors]


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _fake_grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    _check_read(("a", a), ("b", b))
    return _empty(a)


def _run_grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    _check_read(("a", a), ("b", b))
    result: Tensor = _dispatch.run_reading("grad_dot", _device(a), _plain(a), _plain(b))
    return result


def _fake_gram(vectors: Sequence[Tensor], count: int) -> Tensor:
    _check_read(*_split("vectors", vectors, count))
    return _empty(vectors, count, count)


def _run_gram(vectors: Sequence[Tensor], count: int) -> Tensor:
    lists = _split("vectors", vectors, count)
    _check_read(*lists)
    result: Tensor = _dispatch.run_reading("gram", _device(vectors), [_plain(v) for _, v in lists])
    return result


def _fake_project(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    check_written(grads, [("reference", reference)])
    return _empty(grads, 3)


def _run_project(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    check_written(grads, [("reference", reference)])
    values: Tensor = _dispatch.run("project_", _device(grads), _plain(grads), _plain(reference))
    return values


def _fake_gem(grads: Sequence[Tensor], memories: Sequence[Tensor], count: int, margin: float, ridge: float) -> Tensor:
    check_written(grads, _split("memories", memories, count))
    _checks.at_least_zero("margin", margin)
    _checks.at_least_zero("ridge", ridge)
    return _empty(grads, 2 * count + 1)


def _run_gem(grads: Sequence[Tensor], memories: Sequence[Tensor], count: int, margin: float, ridge: float) -> Tensor:
    lists = _split("memories", memories, count)
    check_written(grads, lists)
    margin, ridge = _checks.at_least_zero("margin", margin), _checks.at_least_zero("ridge", ridge)
    values: Tensor = _dispatch.run("gem_project_", _device(grads), _plain(grads), [_plain(m) for _, m in lists], margin, ridge)
    return values


_dispatch.define("grad_dot", "projection", "(Tensor[] a, Tensor[] b) -> Tensor", implementation=_run_grad_dot, fake=_fake_grad_dot)
_dispatch.define("gram", "projection", "(Tensor[] vectors, int count) -> Tensor", implementation=_run_gram, fake=_fake_gram)
_dispatch.define(
    "project_", "projection", "(Tensor(a!)[] grads, Tensor[] reference) -> Tensor", implementation=_run_project, fake=_fake_project
)
_dispatch.define(
    "gem_project_",
    "projection",
    "(Tensor(a!)[] grads, Tensor[] memories, int count, float margin, float ridge) -> Tensor",
    implementation=_run_gem,
    fake=_fake_gem,
)
