"""The optimizers on NumPy arrays, bit for bit: every transform, compact state, any layout and any number of threads."""

from __future__ import annotations

import copy
import ctypes
import ctypes.util
import math
from dataclasses import dataclass, field
from typing import Any

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import STORAGE, decode, encode, layouts, operand, random_values, same_bits, strided
from hypothesis import given
from hypothesis import strategies as st
from suite_ops import BOUNDARIES, POOLS

SOFT, CHILD, FIXED, PROJECT, PULL = range(5)
_libm = ctypes.CDLL(ctypes.util.find_library("m"))
for _name, _type in (("fma", ctypes.c_double), ("fmaf", ctypes.c_float)):
    getattr(_libm, _name).argtypes = [_type] * 3
    getattr(_libm, _name).restype = _type
RULE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.01, "hf": False, "maximize": False}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def fused(a: Any, b: Any, c: np.ndarray) -> np.ndarray:
    one = _libm.fmaf if c.dtype == np.float32 else _libm.fma
    return np.asarray(np.frompyfunc(one, 3, 1)(a, b, c), c.dtype).reshape(c.shape)


@dataclass
class Tensor:
    """A parameter with all that belongs to it; arrays of bits for bf16."""

    dtype: str
    param: np.ndarray
    grad: np.ndarray
    grad_dtype: str
    first: np.ndarray
    second: np.ndarray
    step: np.ndarray
    operands: list[tuple[int, float, list[tuple[np.ndarray, str]]]] = field(default_factory=list)
    bits: np.ndarray | None = None  # with compact state
    place: tuple[int, int, list[int]] | None = None

    @property
    def compute(self) -> type:
        return np.float64 if self.dtype == "f64" else np.float32


def ranks(mask: np.ndarray) -> np.ndarray:
    counts = [mask.ravel()[b : b + 2048].sum() for b in range(0, mask.size, 2048)]
    return np.cumsum([0, *counts])[:-1].astype(np.int64)


def arguments(tensors: list[Tensor], seeds: tuple[int, ...] = (), coefficient: float = 0.5) -> Any:
    def own(pairs: list[tuple[np.ndarray, str]]) -> list[Any]:
        return [operand(a, d) for a, d in pairs]

    a = native.OptimizerArguments()
    state = ["f64" if t.dtype == "f64" else "f32" for t in tensors]
    a.params = own([(t.param, t.dtype) for t in tensors])
    a.grads = own([(t.grad, t.grad_dtype) for t in tensors])
    a.first = own([(t.first, s) for t, s in zip(tensors, state, strict=True)])
    a.second = own([(t.second, s) for t, s in zip(tensors, state, strict=True)])
    a.steps = own([(t.step, "f32") for t in tensors])
    transforms = []
    for k, (kind, number, _) in enumerate(tensors[0].operands if tensors else []):
        lists = list(zip(*(t.operands[k][2] for t in tensors), strict=True))
        lists += [()] * (2 - len(lists))
        scalar = own([(np.array([coefficient]), "f64")]) if kind == PROJECT else []
        transforms.append((kind, number, seeds[k] if seeds else 0, own(list(lists[0])), own(list(lists[1])), scalar))
    a.transforms = transforms
    if any(t.bits is not None for t in tensors):
        none = np.zeros(0, np.uint8)
        a.bits = own([(none if t.bits is None else np.packbits(t.bits.ravel(), bitorder="little"), "u8") for t in tensors])
        a.ranks = own([(np.zeros(0, np.int64) if t.bits is None else ranks(t.bits), "i64") for t in tensors])
    if any(t.place is not None for t in tensors):
        a.places = [t.place for t in tensors]
    return a


def transformed(i: int, t: Tensor, seeds: tuple[int, ...], coefficient: float, scale: float | None = None) -> np.ndarray:
    c = t.compute
    x = decode(t.grad, t.grad_dtype, c)
    x = x if scale is None else x * c(scale)
    for k, (kind, number, own) in enumerate(t.operands):
        if kind != CHILD and own[0][0].size == 0 and t.param.size > 0:
            continue
        if kind == SOFT:
            x = x * (c(1) - c(number) * decode(*own[0], c))
        elif kind == CHILD:
            tensor, offset, strides = t.place or (i, 0, [int(np.prod(t.param.shape[d + 1 :])) for d in range(t.param.ndim)])
            keep = np.zeros(t.param.shape, bool)
            for at in np.ndindex(t.param.shape):
                keep[at] = native.kept(number, seeds[k], offset + int(np.dot(at, strides)), tensor, int(t.step))
            x = x * np.where(keep, c(1 / number), c(0))
        elif kind == FIXED:
            bits = np.unpackbits(own[0][0], bitorder="little")[: x.size].reshape(x.shape)
            x = np.where(bits == 1, x, c(0))
        elif kind == PROJECT:
            x = c(x.astype(np.float64) + coefficient * decode(*own[0], np.float64).astype(np.float64)) if coefficient else x
        else:
            theta = decode(t.param, t.dtype, c)
            x = x + c(2 * number) * (decode(*own[0], c) * (theta - decode(*own[1], c)))
    return np.asarray(x, c)


def adamw(t: Tensor, x: np.ndarray, rule: dict[str, Any]) -> None:
    """One step, written into t."""
    c = t.compute
    beta1, beta2, lr, decay, eps = (rule[k] for k in ("beta1", "beta2", "lr", "decay", "eps"))
    x = -x if rule["maximize"] else x
    p, m, v, step = decode(t.param, t.dtype, c), t.first, t.second, float(t.step) + 1
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    weight = c(1 - beta1)
    if rule["hf"]:
        m = fused(weight, x, m * c(beta1))
    else:
        p = p * c(1 - lr * decay)
        m = fused(weight - c(1), x - m, x) if 1 - beta1 >= 0.5 else fused(weight, x - m, m)
    v = fused(c(1 - beta2) * x, x, v * c(beta2))
    if rule["hf"]:
        p = p + c(-(lr * math.sqrt(bias2) / bias1)) * m / (np.sqrt(v) + c(eps))
        p = fused(c(-lr * decay), p, p) if decay else p
    else:
        p = p + c(-(lr / bias1)) * m / (np.sqrt(v) / c(bias2**0.5) + c(eps))
    t.param[...], t.first[...], t.second[...] = encode(np.asarray(p, c), t.dtype), m, v
    t.step[...] += 1


def same(a: Tensor, b: Tensor) -> bool:
    state = "f64" if a.dtype == "f64" else "f32"
    pairs = [(a.param, b.param, a.dtype), (a.first, b.first, state), (a.second, b.second, state), (a.step, b.step, "f32")]
    return all(same_bits(x, y, d) for x, y, d in pairs)


def tensor(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, grad_dtype: str, layout: Any = None) -> Tensor:
    state = "f64" if dtype == "f64" else "f32"
    n = int(np.prod(shape))

    def lay(values: np.ndarray) -> np.ndarray:
        return values.reshape(shape) if layout is None else strided(values.reshape(shape), *layout)

    first, second = lay(random_values(rng, n, state)), lay(np.abs(random_values(rng, n, state)))
    grad = random_values(rng, n, grad_dtype).reshape(shape)
    return Tensor(dtype, lay(random_values(rng, n, dtype)), grad, grad_dtype, first, second, np.array(rng.integers(0, 9), np.float32))


def with_transform(rng: np.random.Generator, t: Tensor, kind: int, number: float, dtypes: tuple[str, str], absent: bool) -> None:
    n, shape = t.param.size, t.param.shape
    if kind == CHILD:
        own = []
    elif kind == FIXED:
        own = [(np.packbits(rng.random(n) < 0.5, bitorder="little"), "u8")]
    else:
        own = [(random_values(rng, n, d).reshape(shape), d) for d in dtypes[: 2 if kind == PULL else 1]]
    if absent and kind != CHILD and n > 0:
        own = [(np.zeros(0, STORAGE[d]), d) for _, d in own]
    t.operands.append((kind, number, own))


KINDS = ((SOFT, 0.75), (CHILD, 0.3), (FIXED, 0.0), (PROJECT, 0.0), (PULL, 0.5))


@given(st.data())
def test_any_layouts_dtypes_and_transforms(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rule = {
        **RULE,
        "hf": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        "beta1": data.draw(st.sampled_from([0.0, 0.4, 0.5, 0.9])),
        "decay": data.draw(st.sampled_from([0.0, 0.1])),
    }
    tensors = []
    transforms = data.draw(st.lists(st.sampled_from(KINDS), max_size=4))
    for _ in range(data.draw(st.integers(0, 3))):
        shape, *layout = data.draw(layouts(max_dims=3, max_side=5))
        dtype, grad_dtype = data.draw(st.sampled_from(list(STORAGE)[:4])), data.draw(st.sampled_from(list(STORAGE)[:4]))
        t = tensor(rng, shape, dtype, grad_dtype, layout if data.draw(st.booleans()) else None)
        for kind, number in transforms:
            choices = ["f64", "f32", "f16", "bf16", "u8"][: 5 if kind == SOFT else 4]
            dtypes = (data.draw(st.sampled_from(choices)), data.draw(st.sampled_from(choices)))
            with_transform(rng, t, kind, number, dtypes, data.draw(st.booleans()))
        tensors.append(t)
    if data.draw(st.booleans()):
        for i, t in enumerate(tensors):
            strides = [data.draw(st.integers(1, 9)) for _ in t.param.shape]
            t.place = (data.draw(st.integers(0, 2**32 - 1)) + i & 0xFFFFFFFF, data.draw(st.integers(0, 2**40)), strides)
    seeds = tuple(data.draw(st.integers(0, 2**64 - 1)) for _ in transforms)
    scale = data.draw(st.none() | st.sampled_from([0.37, 2.0]))
    want = copy.deepcopy(tensors)
    a = arguments(tensors, seeds)
    if scale is not None:
        a.scale = [operand(np.array(scale), "f64")]
    with np.errstate(all="ignore"):
        for i, t in enumerate(want):
            adamw(t, transformed(i, t, seeds, 0.5, scale), rule)
    native.adamw_(a, *rule.values())
    assert all(same(x, y) for x, y in zip(tensors, want, strict=True))


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", [SOFT, CHILD, FIXED, PROJECT, PULL, None])
def test_bits_are_the_same_for_any_threads_and_in_any_slices(dtype: str, kind: int | None) -> None:
    made = []
    for threads, part in POOLS:
        native.set_pool(threads, part)
        rng = np.random.default_rng(0)
        tensors = [tensor(rng, (n,), dtype, dtype) for n in BOUNDARIES]
        for t in tensors:
            if kind is not None:
                with_transform(rng, t, kind, 0.4, ("f32", "f32"), False)
        a = arguments(tensors, (5,))
        dots = native.transformed_dot(a, a.first).tobytes()
        native.adamw_(a, *RULE.values())
        made.append((dots, tensors))
    for dots, tensors in made[1:]:
        assert dots == made[0][0]
        assert all(same(x, y) for x, y in zip(tensors, made[0][1], strict=True))


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("hf", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_compact_state_is_the_dense_one_without_its_zeros(dtype: str, hf: bool, keep: float) -> None:
    rule = {**RULE, "hf": hf}
    for pool in POOLS[:4]:
        native.set_pool(*pool)
        rng = np.random.default_rng(1)
        dense, masks = [], []
        for n in (1, 7, 8, 17, 1023, 2049, 5000, 40_001):
            t = tensor(rng, (n,), dtype, "f32")
            masks.append(rng.random(n) < keep)
            t.first, t.second = np.where(masks[-1], t.first, 0), np.where(masks[-1], t.second, 0)
            t.operands.append((FIXED, 0.0, [(np.packbits(masks[-1], bitorder="little"), "u8")]))
            dense.append(t)
        compact = copy.deepcopy(dense)
        for t, mask in zip(compact[::2], masks[::2], strict=True):  # the others stay dense
            t.bits, t.first, t.second = mask, t.first[mask], t.second[mask]
        for _ in range(2):
            native.adamw_(arguments(dense), *rule.values())
            native.adamw_(arguments(compact), *rule.values())
        for d, c, mask in zip(dense, compact, masks, strict=True):
            first, second = (d.first[mask], d.second[mask]) if c.bits is not None else (d.first, d.second)
            assert same(Tensor(dtype, d.param, d.grad, "f32", first, second, d.step), c)


def test_ranks_that_are_not_those_of_the_bits_are_refused() -> None:
    rng = np.random.default_rng(2)
    for change in ("ranks", "count", "second"):
        t = tensor(rng, (5000,), "f32", "f32")
        t.bits = rng.random(5000) < 0.5
        t.first, t.second = t.first[t.bits], t.second[t.bits]
        if change == "count":
            t.first = t.first[:-1].copy()
        if change == "second":
            t.second = t.second[:-1].copy()
        a = arguments([t])
        if change == "ranks":
            a.ranks = [operand(ranks(t.bits) + np.array([0, 1, 0]), "i64")]
        before = copy.deepcopy(t)
        with pytest.raises(RuntimeError, match=r"ranks|exp_avg_sqs"):
            native.adamw_(a, *RULE.values())
        assert same(t, before)


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_nothing_is_written_if_an_infinity_was_found(value: float) -> None:
    t = tensor(np.random.default_rng(3), (100,), "f32", "f32")
    before = copy.deepcopy(t)
    a = arguments([t])
    a.found_inf = [operand(np.array([value], np.float32), "f32")]
    native.adamw_(a, *RULE.values())
    native.sgd_(a, 0.1, 0.9, 0.0, 0.0, False, False, False)
    assert same(t, before)
    a.found_inf = [operand(np.zeros(1, np.float32), "f32")]
    native.adamw_(a, *RULE.values())
    assert not same(t, before)


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "first"), [(0.0, False, False), (0.9, False, True), (0.9, False, False), (0.9, True, False)]
)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_sgd(dtype: str, momentum: float, nesterov: bool, first: bool, decay: float) -> None:
    rng = np.random.default_rng(4)
    for n in (1, 31, 1500):
        t = tensor(rng, (n,), dtype, "f32")
        with_transform(rng, t, SOFT, 0.5, ("u8", "u8"), False)
        c, lr, dampening = t.compute, 0.1, 0.25 * (momentum > 0 and not nesterov)
        p, x = decode(t.param, dtype, c), -transformed(0, t, (), 0.0)
        x = fused(c(decay), p, x) if decay else x
        buffer = t.first
        if momentum:
            buffer = x if first else fused(c(1 - dampening), x, buffer * c(momentum))
            x = fused(c(momentum), buffer, x) if nesterov else buffer
        want = encode(fused(c(-lr), x, p), dtype)
        a = arguments([t])
        a.first, a.steps = a.first if momentum else [], []
        native.sgd_(a, lr, momentum, dampening, decay, nesterov, True, first)
        assert same_bits(t.param, want, dtype)
        assert same_bits(t.first, np.asarray(buffer, c), "f64" if dtype == "f64" else "f32")


def test_a_learning_rate_and_a_scale_from_memory() -> None:
    rng = np.random.default_rng(5)
    t = tensor(rng, (77,), "f32", "f32")
    want = copy.deepcopy(t)
    a = arguments([t])
    a.lr, a.scale = [operand(np.array(0.25), "f64")], [operand(np.array(0.5, np.float32), "f32")]
    native.adamw_(a, *RULE.values())
    adamw(want, want.grad * np.float32(0.5), {**RULE, "lr": 0.25})
    assert same(t, want)


def test_the_dot_of_transformed_gradients() -> None:
    rng = np.random.default_rng(6)
    tensors = [tensor(rng, (n,), "f32", "bf16") for n in (1, 100, 20_000)]
    for t in tensors:
        with_transform(rng, t, FIXED, 0.0, ("u8", "u8"), False)
    others = [random_values(rng, t.param.size, "f32") for t in tensors]
    before = copy.deepcopy(tensors)
    dot, square = native.transformed_dot(arguments(tensors), [operand(r, "f32") for r in others])
    products = np.concatenate([transformed(0, t, (), 0.0).astype(float) * r for t, r in zip(tensors, others, strict=True)])
    assert abs(dot - math.fsum(products)) <= 4 * 2.0**-53 * math.fsum(np.abs(products))
    assert square == pytest.approx(math.fsum(np.concatenate(others).astype(float) ** 2), rel=1e-15)
    assert all(same(a, b) for a, b in zip(tensors, before, strict=True))
