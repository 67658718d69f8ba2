"""The optimizers' door: malformed transforms, places and state, and memory shared between any two lists, are refused before a write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import _native

C = _native.module("_C")
N = 40


class Call:
    """The arguments of one call that is accepted; tests change one of them."""

    def __init__(self) -> None:
        self.a: dict[str, Any] = {name: [torch.rand(N), torch.rand(4, 10)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        self.a["steps"] = [torch.zeros(()), torch.zeros(())]
        self.a |= {"transforms": [], "places": None, "compact": None, "scale": None, "found_inf": None, "lr": 0.1}
        self.a |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "hf": False, "maximize": False}

    def run(self) -> Any:
        return C.adamw_(*self.a.values(), True)

    def written(self) -> list[Tensor]:
        return [t.detach().clone() for name in ("params", "exp_avgs", "exp_avg_sqs", "steps") for t in self.a[name]]


def lists(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(s, dtype=dtype) for s in shapes or ((N,), (4, 10))]


def bits() -> list[Tensor]:
    return lists((5,), (5,), dtype=torch.uint8)


ONE = torch.ones((), dtype=torch.float64)
GOOD_TRANSFORMS: dict[str, Any] = {
    "none": [],
    "a tuple of them": (("soft_mask", lists(), 1.0),),
    "every kind": [
        ("soft_mask", lists((1,), (10,)), 0.5),
        ("child_mask", 0.3, 2**64 - 1),
        ("fixed_mask", bits()),
        ("project", lists(), ONE),
        ("pull", lists(), lists(), 2.0),
    ],
    "left out": [
        ("soft_mask", lists((0,), (0,)), 0.5),
        ("fixed_mask", lists((0,), (0,), dtype=torch.uint8)),
        ("pull", lists((0,), (0,)), lists((0,), (3,)), 1.0),
    ],
}
BAD_TRANSFORMS: dict[str, Any] = {
    "no list": None,
    "a generator": (t for t in ()),
    "a list for a tuple": [["soft_mask", lists(), 1.0]],
    "an unknown kind": [("mask", lists(), 1.0)],
    "a kind that is no text": [(b"soft_mask", lists(), 1.0)],
    "an empty tuple": [()],
    "too few operands": [("soft_mask", lists())],
    "too many operands": [("child_mask", 0.5, 1, 2)],
    "a strength of NaN": [("soft_mask", lists(), math.nan)],
    "a strength above 1": [("soft_mask", lists(), 1.5)],
    "another length": [("soft_mask", lists((N,)), 1.0)],
    "another shape": [("soft_mask", lists((N,), (4, 9)), 1.0)],
    "an integer importance": [("soft_mask", lists(dtype=torch.int64), 1.0)],
    "keep 0": [("child_mask", 0, 1)],
    "keep above 1": [("child_mask", 1.1, 1)],
    "a negative seed": [("child_mask", 0.5, -1)],
    "a seed that is too large": [("child_mask", 0.5, 2**64)],
    "a seed that is no integer": [("child_mask", 0.5, 1.0)],
    "bools for bits": [("fixed_mask", lists((5,), (5,), dtype=torch.bool))],
    "too few bits": [("fixed_mask", lists((4,), (5,), dtype=torch.uint8))],
    "bits in two dimensions": [("fixed_mask", lists((5,), (5, 1), dtype=torch.uint8))],
    "bits with gaps": [("fixed_mask", [torch.ones(10, dtype=torch.uint8)[::2], bits()[1]])],
    "a coefficient of float32": [("project", lists(), torch.ones(()))],
    "two coefficients": [("project", lists(), torch.ones(2, dtype=torch.float64))],
    "a coefficient that is a number": [("project", lists(), 1.0)],
    "a reference that broadcasts": [("project", lists((1,), (10,)), ONE)],
    "an anchor of another shape": [("pull", lists(), lists((N,), (1,)), 1.0)],
    "an anchor that is missing": [("pull", lists(), lists((N,)), 1.0)],
    "an infinite pull": [("pull", lists(), lists(), math.inf)],
}


@pytest.mark.parametrize("name", GOOD_TRANSFORMS)
def test_transforms_that_are_accepted(name: str) -> None:
    call = Call()
    call.a["transforms"] = GOOD_TRANSFORMS[name]
    assert call.run() is None
    assert [s.item() for s in call.a["steps"]] == [1, 1]


@pytest.mark.parametrize("name", BAD_TRANSFORMS)
def test_transforms_that_are_refused(name: str) -> None:
    call = Call()
    call.a["transforms"] = BAD_TRANSFORMS[name]
    before = call.written()
    assert isinstance(call.run(), str)
    assert all(a.equal(b) for a, b in zip(call.written(), before, strict=True))


def change(name: str, index: int | None, value: Any) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        if index is None:
            call.a[name] = value
        else:
            call.a[name][index] = value

    return apply


COMPACT = (bits(), lists((1,), (1,), dtype=torch.int64))
REFUSED: dict[str, tuple[Callable[[Call], None], str]] = {
    "a NaN for lr": (change("lr", None, math.nan), "lr"),
    "a negative lr": (change("lr", None, -1.0), "lr"),
    "a vector for lr": (change("lr", None, torch.ones(1)), "lr"),
    "a half lr": (change("lr", None, torch.ones((), dtype=torch.float16)), "lr"),
    "beta 1": (change("beta1", None, 1.0), "beta1"),
    "a negative eps": (change("eps", None, -1e-8), "eps"),
    "an infinite decay": (change("weight_decay", None, math.inf), "weight_decay"),
    "a half state": (change("exp_avgs", 0, torch.ones(N, dtype=torch.float16)), r"exp_avgs[0]"),
    "a double state": (change("exp_avg_sqs", 1, torch.ones(4, 10, dtype=torch.float64)), r"exp_avg_sqs[1]"),
    "another order": (change("exp_avgs", 1, torch.ones(10, 4).t()), r"exp_avgs[1] is non-contiguous state"),
    "gaps": (change("exp_avgs", 0, torch.ones(2 * N)[::2]), r"exp_avgs[0] is non-contiguous state"),
    "a gradient of another shape": (change("grads", 0, torch.ones(N, 1)), r"grads[0]"),
    "an integer gradient": (change("grads", 0, torch.ones(N, dtype=torch.int64)), r"grads[0]"),
    "a missing step": (change("steps", None, [torch.zeros(())]), "steps"),
    "a double step": (change("steps", 1, torch.zeros((), dtype=torch.float64)), r"steps[1]"),
    "steps with a dimension": (change("steps", 0, torch.zeros(1)), r"steps[0]"),
    "two scales": (change("scale", None, torch.ones(2)), "scale"),
    "a number for a scale": (change("scale", None, 1.0), "scale"),
    "a double found_inf": (change("found_inf", None, torch.zeros(1, dtype=torch.float64)), "found_inf"),
    "a parameter that requires grad": (change("params", 0, torch.nn.Parameter(torch.ones(N))), r"params[0] requires grad"),
    "places of another length": (change("places", None, [(0, 0, (1,))]), "places"),
    "places without strides": (change("places", None, [(0, 0, ()), (0, 0, (10, 1))]), "places"),
    "a negative place": (change("places", None, [(0, -1, (1,)), (0, 0, (10, 1))]), "places"),
    "a place that reaches too far": (change("places", None, [(0, 2**62, (1,)), (0, 0, (10, 1))]), "places"),
    "compact without ranks": (change("compact", None, (bits(),)), "compact"),
    "compact with dense state": (change("compact", None, COMPACT), "exp_avgs"),
    "ranks of int32": (change("compact", None, (bits(), lists((1,), (1,), dtype=torch.int32))), "ranks"),
    "ranks of another length": (change("compact", None, (bits(), lists((2,), (1,), dtype=torch.int64))), "ranks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_are_refused(name: str) -> None:
    apply, reason = REFUSED[name]
    call = Call()
    apply(call)
    before = call.written()
    answer = call.run()
    assert isinstance(answer, str)
    assert answer.startswith(reason)
    assert all(a.equal(b) for a, b in zip(call.written(), before, strict=True))


WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "steps")
OPERANDS = {
    "importance": lambda t: ("soft_mask", [t, torch.ones(4, 10)], 1.0),
    "reference": lambda t: ("project", [t, torch.ones(4, 10)], ONE),
    "precision": lambda t: ("pull", [t, torch.ones(4, 10)], lists(), 1.0),
    "anchor": lambda t: ("pull", lists(), [t, torch.ones(4, 10)], 1.0),
}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("written", "other"), [(w, o) for w in WRITTEN[:3] for o in (*WRITTEN[:3], "grads", *OPERANDS) if w != o])
def test_memory_that_two_lists_share(written: str, other: str, shift: int) -> None:
    call, memory = Call(), torch.rand(N + 1)
    call.a[written][0] = memory[:N]
    if other in OPERANDS:
        call.a["transforms"] = [OPERANDS[other](memory[shift : N + shift])]
    else:
        call.a[other][0] = memory[shift : N + shift]
    before = call.written()
    assert call.run() == "a written tensor shares memory"
    assert all(a.equal(b) for a, b in zip(call.written(), before, strict=True))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_list_that_names_a_tensor_twice(name: str) -> None:
    call = Call()
    if name != "steps":
        for each in (*WRITTEN[:3], "grads"):
            call.a[each] = lists((N,), (N,))
    call.a[name][1] = call.a[name][0]
    assert call.run() == "a written tensor shares memory"


@pytest.mark.parametrize("name", ["scale", "found_inf", "lr", "coefficient"])
def test_numbers_that_lie_in_what_is_written(name: str) -> None:
    call = Call()
    memory = torch.zeros(N, dtype=torch.float64 if name == "coefficient" else torch.float32)
    call.a["params"][0] = memory
    if name == "coefficient":
        call.a["exp_avgs"][0], call.a["exp_avg_sqs"][0] = torch.zeros_like(memory), torch.zeros_like(memory)
        call.a["transforms"] = [("project", lists(), memory[3])]
    else:
        call.a[name] = memory[3]
    assert call.run() == "a written tensor shares memory"
    call.a["lr" if name == "lr" else name if name != "coefficient" else "transforms"] = (
        0.1 if name == "lr" else [] if name == "coefficient" else None
    )
    assert call.run() is None


def test_ranks_of_other_bits_are_refused_and_nothing_is_written() -> None:
    call = Call()
    mask = torch.tensor([255] * 5, dtype=torch.uint8)
    empty = [torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)]
    for rank, count in ((1, N), (0, N - 1)):
        call.a["compact"] = ([mask, empty[0]], [torch.tensor([rank]), empty[1]])
        call.a["exp_avgs"][0], call.a["exp_avg_sqs"][0] = torch.rand(count), torch.rand(count)
        before = call.written()
        assert "ranks[0]" in call.run()
        assert all(a.equal(b) for a, b in zip(call.written(), before, strict=True))


def test_sgd_and_dots_behind_the_same_door() -> None:
    call = Call()
    p, g, m, steps = (call.a[k] for k in ("params", "grads", "exp_avgs", "steps"))
    rest = (None, None, None, 0.1)
    assert C.sgd_(p, g, m, [], [], *rest, 0.0, 0.0, 0.0, False, False, False, True).startswith("momentum_buffers ")
    assert C.sgd_(p, g, [], [], [], *rest, 0.9, 0.0, 0.0, False, False, False, True).startswith("momentum_buffers ")
    child = [("child_mask", 0.5, 1)]
    assert C.sgd_(p, g, m, [], child, *rest, 0.9, 0.0, 0.0, False, False, False, True).startswith("steps ")
    assert C.sgd_(p, g, m, steps, child, *rest, 0.9, 0.0, 0.0, False, False, False, True) is None
    assert [s.item() for s in steps] == [1, 1]
    assert C.transformed_dot(p, g, [], child, None, None, g, True).startswith("steps ")
    assert C.transformed_dot(p, g, steps, child, None, None, g[:1], True).startswith("reference ")
    assert C.transformed_dot(p, g, steps, child, None, None, g, True).shape == (2,)
    assert [s.item() for s in steps] == [1, 1]
