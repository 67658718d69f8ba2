"""The stages of the Kronecker-factored precision through the gate: they run, or say what is wrong and have written nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from suite_kinds import KINDS, raw
from torch import Tensor

from fastcl import _native

C = _native.module("_C")
STAGES: dict[str, tuple[str, ...]] = {
    "kron_small_": ("weights", "biases", "A", "G"),
    "kron_small_quadratic": ("weights", "biases", "A", "G"),
    "ncl_small_step_": ("weights", "biases", "weight_grads", "bias_grads", "M", "H", "A_inv", "G_inv", "lr", "momentum", "strength"),
    "ncl_small_direction_": ("M", "V", "weight_grads", "bias_grads", "H", "A_inv", "G_inv", "momentum", "strength"),
    "ncl_momentum_": ("M", "H", "weight_grads", "bias_grads", "momentum", "strength", "lr"),
    "ncl_apply_": ("weights", "biases", "H", "V", "M", "step"),
}
WRITTEN: dict[str, tuple[str, ...]] = {
    "kron_small_": ("weights", "biases"),
    "kron_small_quadratic": (),
    "ncl_small_step_": ("weights", "biases", "M", "H"),
    "ncl_small_direction_": ("M", "V"),
    "ncl_momentum_": ("M", "H"),
    "ncl_apply_": ("weights", "biases", "H"),
}
NUMBERS = ("lr", "momentum", "strength")
LISTS = [(stage, name) for stage, names in STAGES.items() for name in names if name not in (*NUMBERS, "step")]
MATRICES = ("M", "H", "V", "A", "G", "A_inv", "G_inv")
BAD_NUMBERS: list[Any] = [-1.0, float("nan"), float("inf"), "1", torch.tensor(0.5), 10**400]


def padded(m: int, n: int) -> Tensor:
    return torch.rand(m, 16)[:, :n]


def arguments(stage: str) -> dict[str, Any]:
    """Two layers, [4, 6] with a bias and [5, 2, 3] without."""
    values: dict[str, Any] = {
        "weights": [torch.rand(4, 6), torch.rand(5, 2, 3)],
        "biases": [torch.rand(4), torch.empty(0)],
        "weight_grads": [torch.rand(4, 6), torch.rand(5, 2, 3)],
        "bias_grads": [torch.rand(4), torch.empty(0)],
        **{name: [padded(4, 7), padded(5, 6)] for name in "MHV"},
        **{name: [padded(7, 7), padded(6, 6)] for name in ("A", "A_inv")},
        **{name: [padded(4, 4), padded(5, 5)] for name in ("G", "G_inv")},
        "lr": 0.1, "momentum": 0.9, "strength": 1.0, "step": torch.tensor(0.1, dtype=torch.float64),
    }  # fmt: skip
    return {name: values[name] for name in STAGES[stage]}


def call(stage: str, own: dict[str, Any], grad_mode: bool = False) -> Any:
    return getattr(C, stage)(*own.values(), grad_mode)


def contents(own: dict[str, Any]) -> list[Any]:
    return [raw(t) for value in own.values() if isinstance(value, (list, tuple)) for t in value]


def refused(stage: str, own: dict[str, Any], *starts: str, grad_mode: bool = False) -> None:
    before = contents(own)
    answer = call(stage, own, grad_mode)
    assert isinstance(answer, str), f"{stage} took it"
    assert not starts or answer.startswith(starts), answer
    assert contents(own) == before


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_right_runs_and_writes_what_it_should(stage: str) -> None:
    own = arguments(stage)
    before = {name: [raw(t) for t in value] for name, value in own.items() if isinstance(value, list)}
    answer = call(stage, own)
    assert answer is None or (isinstance(answer, Tensor) and answer.dtype == torch.float64)
    after = {name: [raw(t) for t in value] for name, value in own.items() if isinstance(value, list)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(WRITTEN[stage])


@pytest.mark.parametrize(("stage", "name"), LISTS)
@pytest.mark.parametrize(
    "kind",
    ["uint8", "torch.int64", "torch.complex64", "expanded", "misaligned float32",
     "plain subclass", "wrapper subclass", "FakeTensor", "meta",
     "sparse COO", "nested strided", "zero tensor", "conj().imag", "freed storage", "freed storage behind an offset", "None", "number"],
)  # fmt: skip
def test_odd_tensors_are_refused_by_place(stage: str, name: str, kind: str) -> None:
    own = arguments(stage)
    odd = KINDS[kind][0]()
    own[name] = [odd, own[name][1]]
    if kind in ("expanded", "zero tensor") and name not in WRITTEN[stage] and name in ("weights", "weight_grads"):
        assert kind == "zero tensor" or not isinstance(call(stage, own), str)
        return
    refused(stage, own, f"{name}[0]", "a written tensor", "weight_grads[0]", "weights[0]", "biases[0]", "bias_grads[0]")


@pytest.mark.parametrize(("stage", "name"), LISTS)
def test_lists_that_do_not_fit(stage: str, name: str) -> None:
    for change in (lambda v: v[:1], lambda v: [*v, v[0]], lambda v: v[0], lambda v: None, lambda v: iter(v)):
        own = arguments(stage)
        own[name] = change(own[name])
        assert isinstance(call(stage, own), str)
    own = arguments(stage)
    own[name] = own[name][::-1]
    refused(stage, own)


@pytest.mark.parametrize(("stage", "name"), [pair for pair in LISTS if pair[1] in MATRICES])
def test_matrices_of_the_wrong_kind(stage: str, name: str) -> None:
    def with_first(make: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        own = arguments(stage)
        own[name][0] = make(own[name][0])
        return own

    wrong: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[:, :-1], lambda t: t[1:], lambda t: t[0], lambda t: t[None], lambda t: t.t().contiguous().t(), lambda t: t.half(),
        lambda t: t.bfloat16(), lambda t: t.new_zeros(64).as_strided(t.shape, (t.shape[1] - 1, 1)), lambda t: t[:1].expand(t.shape),
    ]  # fmt: skip
    for make in wrong:
        refused(stage, with_first(make), f"{name}[0]")
    own = arguments(stage)
    own[name][1] = own[name][1].double()
    refused(stage, own)


@pytest.mark.parametrize(("stage", "name"), [pair for pair in LISTS if pair[1] in ("weights", "weight_grads")])
def test_weights_and_biases_that_do_not_fit(stage: str, name: str) -> None:
    other = name.replace("weight_grads", "bias_grads").replace("weights", "biases")
    for which, tensor in (
        (name, torch.rand(4)), (name, torch.rand(())), (name, torch.rand(4, 5)), (name, torch.rand(3, 6)), (other, torch.rand(3)),
        (other, torch.rand(4, 1)), (other, torch.rand(())), (other, torch.empty(0)),
    ):  # fmt: skip
        own = arguments(stage)
        own[which][0] = tensor
        refused(stage, own)


def test_gradients_of_another_shape_than_their_weight() -> None:
    own = arguments("ncl_small_step_")
    own["weight_grads"][1] = torch.rand(5, 6)
    refused("ncl_small_step_", own, "weight_grads")


@pytest.mark.parametrize("stage", [s for s in STAGES if "small" in s])
@pytest.mark.parametrize(("m", "n"), [(129, 3), (3, 130)])
def test_layers_that_are_not_small(stage: str, m: int, n: int) -> None:
    own = arguments(stage)
    for name, value in own.items():
        if isinstance(value, list):
            own[name] = [
                torch.rand({"A": (n, n), "G": (m, m)}.get(name[0], (m, n)) if name in (*MATRICES, "weights", "weight_grads") else 0)
            ]
    refused(stage, own, "G")


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_outside_their_range(stage: str) -> None:
    for name in NUMBERS:
        for bad in BAD_NUMBERS if name in STAGES[stage] else ():
            own = arguments(stage)
            own[name] = bad
            refused(stage, own, name)
    if "step" in STAGES[stage]:
        for bad in (0.1, None, torch.tensor(0.1), torch.zeros(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64, device="meta")):
            own = arguments(stage)
            own["step"] = bad
            refused(stage, own, "step")


@pytest.mark.parametrize("stage", [s for s in STAGES if WRITTEN[s]])
def test_written_memory_is_shared_with_nothing(stage: str) -> None:
    for written in WRITTEN[stage]:
        for name in STAGES[stage]:
            if name in (*NUMBERS, "step") or name == written:
                continue
            own, memory = arguments(stage), torch.rand(512)
            for which in (written, name):
                t = own[which][0]
                own[which][0] = memory.as_strided(t.shape, t.stride(), 7)
            refused(stage, own, "a written tensor")
        own = arguments(stage)
        own[written][1] = own[written][0]
        refused(stage, own)


@pytest.mark.parametrize("stage", [s for s in STAGES if WRITTEN[s]])
def test_written_tensors_that_require_grad(stage: str) -> None:
    for name in WRITTEN[stage]:
        own = arguments(stage)
        own[name][0].requires_grad_()
        refused(stage, own, f"{name}[0] requires grad", grad_mode=True)
        assert not isinstance(call(stage, own), str)


def test_a_momentum_sweep_without_a_learning_rate_only_reads_h() -> None:
    own = arguments("ncl_momentum_") | {"lr": None}
    own["H"][0].requires_grad_()
    before = [raw(h) for h in own["H"]]
    assert call("ncl_momentum_", own, grad_mode=True) is None
    assert [raw(h) for h in own["H"]] == before


@pytest.mark.parametrize("stage", STAGES)
def test_layers_of_two_dtypes(stage: str) -> None:
    own = arguments(stage)
    for name in STAGES[stage]:
        if name in MATRICES:
            own[name][1] = own[name][1].double()
    assert not isinstance(call(stage, own), str)


def test_empty_lists() -> None:
    for stage in STAGES:
        own = {name: [] if isinstance(value, list) else value for name, value in arguments(stage).items()}
        answer = call(stage, own)
        assert answer is None or (isinstance(answer, Tensor) and not answer.any())
