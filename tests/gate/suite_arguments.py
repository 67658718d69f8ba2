"""Lists, strengths and aliases: what is not a list of separate tensors is refused before the first write."""

from __future__ import annotations

import decimal
import fractions
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import _native, ops

C = _native.module("_C")
BACKENDS = ("auto", "reference")


class OwnList(list):  # type: ignore[type-arg]
    """A subclass of list."""


class Lazy:
    """Something that is like a sequence and is none."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(3)


class Number(int):
    """An int whose float is another number."""

    def __float__(self) -> float:
        return 0.25


class Hostile:
    """Overrides every torch function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("hostile")


NOT_LISTS: list[Any] = [
    None, 1, "ab", b"ab", torch.ones(1, 3), np.ones((1, 3)), {"a": torch.ones(3)}, {1}, (t for t in [torch.ones(3)]), iter([torch.ones(3)]),
    deque([torch.ones(3)]), Lazy(), Hostile(), range(1), lambda: 0,
]  # fmt: skip
NOT_TENSORS: list[Any] = [
    None,
    1.0,
    "a",
    np.ones(3, np.float32),
    [torch.ones(3)],
    (torch.ones(3),),
    Hostile(),
    torch.Tensor,
    torch.float32,
    object(),
]


@pytest.mark.parametrize("bad", NOT_LISTS, ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_list_is_refused_by_name(bad: Any, backend: str) -> None:
    good = [torch.ones(3)]
    count = sys.getrefcount(bad)
    with fastcl.use_backend(backend):
        for call, name in (
            (lambda: ops.soft_mask_(bad, good), "grads"),
            (lambda: ops.soft_mask_(good, bad), "importance"),
            (lambda: ops.emax_(bad, good), "importance"),
            (lambda: ops.emax_(good, bad), "new"),
            (lambda: ops.spg_importance_(bad, [good]), "accumulated"),
            (lambda: ops.spg_importance_(good, [bad]), r"grads_by_head\[0\]"),
            (lambda: ops.spg_importance_(good, bad), "grads_by_head"),
        ):
            with pytest.raises(TypeError, match=f"^{name}"):
                call()
    assert C.soft_mask_(bad, good, 1.0, True) == "grads is not a list or tuple"
    assert C.soft_mask_(good, bad, 1.0, True) == "importance is not a list or tuple"
    assert good[0].equal(torch.ones(3))
    assert bad is None or sys.getrefcount(bad) == count


@pytest.mark.parametrize("bad", NOT_TENSORS, ids=lambda b: type(b).__name__)
def test_what_is_no_tensor_is_refused_by_place(bad: Any) -> None:
    good = [torch.ones(3), torch.ones(3)]
    for call, name in (
        (lambda: ops.soft_mask_([good[0], bad], good), "grads"),
        (lambda: ops.soft_mask_(good, [good[0], bad]), "importance"),
        (lambda: ops.emax_(good, (good[0], bad)), "new"),
        (lambda: ops.spg_importance_(good, [good, [good[0], bad]]), r"grads_by_head\[1\]"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\[1\]"):
            call()
    assert good[0].equal(torch.ones(3))
    assert C.soft_mask_(good, [good[0], bad], 1.0, True) == "importance[1] is not an exact torch.Tensor or Parameter"


@pytest.mark.parametrize("kind", [list, tuple, OwnList])
def test_lists_tuples_and_their_subclasses(kind: Callable[[list[Tensor]], Any]) -> None:
    g = torch.ones(3)
    ops.soft_mask_(kind([g]), kind([torch.full((3,), 0.5)]))
    assert g.tolist() == [0.5] * 3
    ops.soft_mask_(kind([]), kind([]))
    ops.emax_(kind([]), kind([]))
    assert ops.spg_importance_(kind([]), kind([])).item() == 0
    with pytest.raises(ValueError, match="importance has 0 tensors and grads has 1"):
        ops.soft_mask_(kind([g]), kind([]))


GOOD_STRENGTHS: list[Any] = [
    0,
    1,
    True,
    False,
    0.5,
    np.float64(0.5),
    np.float32(0.5),
    np.float16(0.5),
    np.int64(1),
    fractions.Fraction(1, 2),
    -0.0,
    5e-324,
    Number(1),
]
WRONG_VALUES: list[Any] = [
    float("nan"),
    float("inf"),
    -float("inf"),
    1.0000001,
    -1e-300,
    2,
    -1,
    10**400,
    -(10**400),
    np.float64("nan"),
    np.float32(1.5),
]
WRONG_TYPES: list[Any] = [
    None,
    "0.5",
    b"1",
    [0.5],
    torch.tensor(0.5),
    1j,
    decimal.Decimal("0.5"),
    np.array([0.5]),
    object(),
    Hostile(),
    torch.nn.Parameter(torch.ones(())),
]


@pytest.mark.parametrize("strength", GOOD_STRENGTHS, ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_in_the_unit_interval(strength: Any, backend: str) -> None:
    g = torch.ones(3)
    with fastcl.use_backend(backend):
        ops.soft_mask_([g], [torch.full((3,), 0.5)], strength)
    assert g.tolist() == [1 - 0.5 * float(strength)] * 3


REFUSED = [*((w, ValueError) for w in WRONG_VALUES), *((w, TypeError) for w in WRONG_TYPES)]


@pytest.mark.parametrize(("strength", "error"), REFUSED, ids=lambda v: repr(v)[:20])
def test_other_strengths_are_refused(strength: Any, error: Any) -> None:
    g = torch.ones(3)
    with pytest.raises(error, match="strength"):
        ops.soft_mask_([g], [g.clone()], strength)
    assert C.soft_mask_([g], [g.clone()], strength, True).startswith("strength ")
    assert g.tolist() == [1] * 3


BUFFER = torch.rand(200)
ALIASES: dict[str, tuple[Callable[[Tensor], list[Tensor]], Callable[[Tensor], list[Tensor]], bool]] = {
    "same tensor twice": (lambda b: [b[:9], b[:9]], lambda b: [torch.ones(9), torch.ones(9)], False),
    "partly overlapping writes": (lambda b: [b[:9], b[8:17]], lambda b: [torch.ones(9), torch.ones(9)], False),
    "neighbours": (lambda b: [b[:9], b[9:18]], lambda b: [torch.ones(9), torch.ones(9)], True),
    "interleaved columns": (lambda b: [b[:100:2], b[1:100:2]], lambda b: [torch.ones(50), torch.ones(50)], False),
    "importance is grads": (lambda b: [b[:9]], lambda b: [b[:9]], True),
    "importance is shifted grads": (lambda b: [b[:9]], lambda b: [b[1:10]], False),
    "importance is another's gradient": (lambda b: [b[:9], b[20:29]], lambda b: [b[20:29], torch.ones(9)], False),
    "importance twice": (lambda b: [torch.ones(9), torch.ones(9)], lambda b: [b[:9], b[:9]], True),
    "importance overlaps itself": (lambda b: [torch.ones(9, 9)], lambda b: [b.as_strided((9, 9), (1, 1))], True),
    "gradient overlaps itself": (lambda b: [b.as_strided((9, 9), (1, 1))], lambda b: [torch.ones(9, 9)], False),
    "same memory, other dtype": (lambda b: [b[:9]], lambda b: [b.view(torch.uint8)[:9]], False),
    "same memory, transposed": (lambda b: [b[:9].view(3, 3)], lambda b: [b[:9].view(3, 3).t()], False),
    "one value of the gradient": (lambda b: [b[:9]], lambda b: [b[4]], False),
    "empty views of one place": (lambda b: [b[5:5], b[5:5], b[:9]], lambda b: [b[5:5], b[5:5], torch.ones(9)], True),
}


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_aliases(name: str, backend: str) -> None:
    make_grads, make_importance, accepted = ALIASES[name]
    buffer = BUFFER.clone()
    grads, importance = make_grads(buffer), make_importance(buffer)
    want = [g.clone() for g in grads]
    fastcl.reference.soft_mask_(want, [i.clone() for i in importance], 1.0)
    with fastcl.use_backend(backend):
        if accepted:
            ops.soft_mask_(grads, importance)
            assert all(g.equal(w) for g, w in zip(grads, want, strict=True))
        else:
            with pytest.raises(ValueError, match=r"(grads|importance)\[\d\].* share memory"):
                ops.soft_mask_(grads, importance)
            assert buffer.equal(BUFFER)
            assert isinstance(C.soft_mask_(grads, importance, 1.0, True), str)
            assert buffer.equal(BUFFER)


def test_heads_of_spg_share_no_memory_with_what_is_written() -> None:
    a, other = torch.rand(30), torch.randn(30)
    expanded = a.clone().set_(a.untyped_storage(), 0, (30,), (0,))
    for heads in ([[a]], [[other], [a]], [[a[:1].expand(30)]], [[other], [expanded]]):
        before = a.clone()
        with pytest.raises(ValueError, match="share memory"):
            ops.spg_importance_([a], heads)
        assert a.equal(before)
    assert isinstance(C.spg_importance_([a], [[a[1:].clone()]], True), str)
    with pytest.raises((TypeError, ValueError)):
        C.spg_importance_([a], None, True)


def test_a_list_that_another_thread_changes_during_the_call() -> None:
    tensors = [torch.ones(40_000) for _ in range(20)]
    importance = [torch.zeros(40_000) for _ in range(20)]
    grads = list(tensors)
    stop = threading.Event()

    def meddle() -> None:
        while not stop.is_set():
            grads.clear()
            grads.extend(tensors)

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(300):
            try:
                ops.soft_mask_(grads, importance)
            except (ValueError, TypeError) as error:
                assert "importance" in str(error) or "grads" in str(error)  # noqa: PT017
            assert C.soft_mask_(grads, importance, 1.0, True) in (None, "importance has another length")
    finally:
        stop.set()
        thread.join()
    assert all(t.equal(torch.ones(40_000)) for t in tensors)


def test_a_small_object_at_the_end_of_readable_memory_in_a_list() -> None:
    # The gate fetches ahead in the list; what stands there may be smaller than a tensor and end where memory ends.
    import ctypes
    import mmap

    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(page))  # stays, since the object in it does
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    head = start + mmap.PAGESIZE - object.__basicsize__
    words = ctypes.cast(head, ctypes.POINTER(ctypes.c_ssize_t))
    words[0], words[1] = 1 << 20, id(object)
    small = ctypes.cast(head, ctypes.py_object).value
    grads = [torch.zeros(2) for _ in range(9)]
    grads[8] = small
    with pytest.raises(TypeError, match=r"grads\[8\] must be a tensor, got object"):
        ops.soft_mask_(grads, [torch.zeros(2) for _ in range(9)])
