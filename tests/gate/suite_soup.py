"""Random argument soup through the direct and the public door: right, or refused with every byte as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcl
from fastcl import _native, ops

C = _native.module("_C")
ARENA = 4096  # bytes that all tensors of a call share, so that they overlap by chance
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.bool, torch.complex64)


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    dtype = draw(st.sampled_from(DTYPES[:5]) | st.sampled_from(DTYPES))
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    elif draw(st.booleans()):
        shape = tuple(1 if draw(st.booleans()) else s for s in shape[draw(st.integers(0, len(shape))) :])
    dense, step = [], 1
    for s in reversed(shape):
        dense.insert(0, step)
        step *= max(s, 1)
    strides = tuple(dense) if draw(st.booleans()) else tuple(draw(st.integers(0, 8)) for _ in shape)
    return dtype, shape, strides, draw(st.integers(0, 24))


def build(arena: Tensor, spec: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int], own: bool, wrap: str) -> Any:
    dtype, shape, strides, slot = spec
    t = torch.empty(0, dtype=dtype)
    memory = (arena if not own else arena.clone()).untyped_storage()
    t.set_(memory, slot * 8, shape, strides)  # the offset counts elements of at most 16 bytes: inside the arena
    if wrap == "parameter" and t.is_floating_point():
        return nn.Parameter(t)
    return t


JUNK = st.sampled_from([None, 3, "x", [torch.ones(2)], np.ones(2), torch.ones(2).to_sparse(), torch.ones(2, device="meta")])
OPS = ["soft_mask_", "emax_", "project_", "child_mask_", "fisher_add_", "ewc_pull_"]
STRENGTH = st.floats(0, 1) | st.floats() | st.integers(-1, 2) | st.booleans() | st.none() | st.just("1")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    arena = torch.randint(0, 256, (ARENA * 4,), dtype=torch.uint8, generator=generator)
    lists: list[list[Any]] = [[], []]
    for _ in range(draw(st.integers(0, 4))):
        spec = draw(views())
        other = draw(views(spec[1]))
        for target, s in zip(lists, (spec, other), strict=True):
            target.append(build(arena, s, draw(st.integers(0, 3)) > 0, draw(st.sampled_from(["", "", "", "parameter"]))))
    if draw(st.integers(0, 6)) == 0:
        target = lists[draw(st.integers(0, 1))]
        target.insert(draw(st.integers(0, len(target))), draw(JUNK))
    if draw(st.integers(0, 6)) == 0 and lists[0] and lists[1]:
        lists[1][draw(st.integers(0, len(lists[1]) - 1))] = lists[0][0]
    return arena, lists[0], lists[1]


def contents(*lists: list[Any]) -> list[bytes]:
    """All bytes of all storages, also those between the elements."""
    return [
        bytes(torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage(), 0, (t.untyped_storage().nbytes(),), (1,)).numpy())
        for items in lists
        for t in items
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta
    ]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().nan_to_num(0.5), b.detach().nan_to_num(0.5)) and torch.equal(a.isnan(), b.isnan())


def detached(items: list[Any]) -> list[Tensor]:
    return [t.detach().clone() for t in items]


@settings(max_examples=1500, deadline=None)
@given(calls(), STRENGTH, st.booleans(), st.sampled_from(OPS), st.sampled_from(["gate", "auto", "reference"]))
def test_soup(call: tuple[Tensor, list[Any], list[Any]], strength: Any, grad_mode: bool, op: str, door: str) -> None:
    arena, written, read = call
    before = contents([arena], written, read)
    read_before = [t.clone() for t in read if isinstance(t, Tensor)]
    read_lists = {"child_mask_": (), "ewc_pull_": (read, read, read)}.get(op, (read,))
    numbers = {"soft_mask_": (strength,), "child_mask_": (strength, 3, 4), "fisher_add_": (strength, None), "ewc_pull_": (strength,)}
    extra = (*read_lists, *numbers.get(op, ()))
    try:
        want = detached(written)
        with torch.no_grad():
            getattr(fastcl.reference, op)(want, *[detached(x) for x in read_lists], *numbers.get(op, ()))
    except Exception:  # the soup holds everything; the reference then has no answer, and the op must have refused
        want = []
    with torch.set_grad_enabled(grad_mode):
        if door == "gate":
            answer = getattr(C, op)(written, *extra, grad_mode)
            assert answer is None or isinstance(answer, (str, Tensor))
            refused = answer if isinstance(answer, str) else None
        else:
            refused = None
            with fastcl.use_backend(door):
                try:
                    getattr(ops, op)(written, *extra)
                except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                    refused = f"{type(error).__name__}: {error}"
    if refused is not None:
        assert "compiled implementation refused" not in refused, "the checks in Python let through what the gate refuses"
        assert contents([arena], written, read) == before, refused
    elif op == "project_":  # over the soup's infinities and numbers near them, the order of a sum decides what it is
        assert all(same(r, b) for r, b in zip(read, read_before, strict=True))
    else:
        assert len(want) == len(written)
        assert all(same(a, b) for a, b in zip(written, want, strict=True))
