"""The Fisher information and EWC's pull on NumPy arrays."""

from __future__ import annotations

import math

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, compute_type, decode, encode, layouts, operand, random_values, same_bits, strided
from hypothesis import given
from hypothesis import strategies as st
from suite_ops import BOUNDARIES, POOLS


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def fisher(f: np.ndarray, f_dtype: str, g: np.ndarray, g_dtype: str, weight: float, coefficient: float) -> np.ndarray:
    c = compute_type(f_dtype, g_dtype)
    with np.errstate(all="ignore"):
        x = decode(g, g_dtype, c) * c(coefficient)
        return encode(decode(f, f_dtype, c) + c(weight) * (x * x), f_dtype)


def pull(arrays: list[np.ndarray], dtypes: list[str], strength: float) -> np.ndarray:
    c = compute_type(*dtypes)
    with np.errstate(all="ignore"):
        g, theta, a, anchor = (decode(x, d, c) for x, d in zip(arrays, dtypes, strict=True))
        return encode(g + c(2 * strength) * (a * (theta - anchor)), dtypes[0])


def drawn(data: st.DataObject, shape: tuple[int, ...], dtype: str, order: tuple[int, ...], special: bool) -> np.ndarray:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = random_values(rng, int(np.prod(shape)), dtype, special=special).reshape(shape)
    gaps = tuple(data.draw(st.sampled_from([1, 1, 2])) for _ in shape)
    return strided(values, order if data.draw(st.booleans()) else tuple(range(len(shape))), gaps, data.draw(st.integers(0, 2)))


@given(st.data(), st.sampled_from(FLOATING), st.sampled_from(FLOATING), st.floats(0, 10), st.floats(0, 2))
def test_fisher_on_any_layout(data: st.DataObject, stored: str, dtype: str, weight: float, coefficient: float) -> None:
    pairs = []
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, _, _ = data.draw(layouts())
        pairs.append((drawn(data, shape, stored, order, True), drawn(data, shape, dtype, order, True)))
    start = [f.copy() for f, _ in pairs]
    fs, gs = [operand(f, stored) for f, _ in pairs], [operand(g, dtype) for _, g in pairs]
    for f, (own, _) in zip(start, pairs, strict=True):
        own[...] = f
    native.fisher_add_(fs, gs, weight, None)
    expected = [fisher(f, stored, g, dtype, weight, 1) for f, (_, g) in zip(start, pairs, strict=True)]
    assert all(same_bits(f, e, stored) for (f, _), e in zip(pairs, expected, strict=True))
    native.fisher_update_(fs, gs, weight, [coefficient] * len(pairs))
    expected = [fisher(e, stored, g, dtype, weight, coefficient) for e, (_, g) in zip(expected, pairs, strict=True)]
    assert all(same_bits(f, e, stored) for (f, _), e in zip(pairs, expected, strict=True))


@given(st.data(), st.sampled_from(FLOATING))
def test_squares_on_any_layout(data: st.DataObject, dtype: str) -> None:
    grads = []
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, _, _ = data.draw(layouts())
        grads.append(drawn(data, shape, dtype, order, False))
    exact = [math.fsum((decode(g, dtype, np.float64).ravel() ** 2).tolist()) for g in grads]
    np.testing.assert_allclose(native.fisher_squares([operand(g, dtype) for g in grads]), exact, rtol=1e-13)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("stored", FLOATING)
@pytest.mark.parametrize("max_norm", [None, 1.5])
def test_chunk_boundaries_and_threads(dtype: str, stored: str, max_norm: float | None) -> None:
    """The largest tensors are the work of all threads, the others of one each; the bits are those of the two sweeps apart."""
    rng = np.random.default_rng(0)
    sizes = (*BOUNDARIES, *([500] * 40))
    grads = [random_values(rng, n, dtype) for n in sizes]
    start = [random_values(rng, n, stored) for n in sizes]
    squares = native.fisher_squares([operand(g, dtype) for g in grads])
    factors = [1.0 if max_norm is None else min(1.0, max_norm / (math.sqrt(s) + 1e-6)) for s in squares]
    expected = [fisher(f, stored, g, dtype, 0.3, c) for f, g, c in zip(start, grads, factors, strict=True)]
    for threads, part in POOLS:
        native.set_pool(threads, part)
        assert np.array_equal(native.fisher_squares([operand(g, dtype) for g in grads]), squares)
        out = [f.copy() for f in start]
        native.fisher_add_([operand(f, stored) for f in out], [operand(g, dtype) for g in grads], 0.3, max_norm)
        assert all(same_bits(o, e, stored) for o, e in zip(out, expected, strict=True)), (threads, part)


@given(st.data(), st.lists(st.sampled_from(FLOATING), min_size=4, max_size=4), st.floats(0, 100))
def test_pull_on_any_layout(data: st.DataObject, dtypes: list[str], strength: float) -> None:
    rows = []
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, _, _ = data.draw(layouts())
        rows.append([drawn(data, shape, d, order, True) for d in dtypes])
    expected = [pull(row, dtypes, strength) for row in rows]
    lists = [[operand(row[n], d) for row in rows] for n, d in enumerate(dtypes)]
    native.ewc_pull_(*lists, strength)
    assert all(same_bits(row[0], e, dtypes[0]) for row, e in zip(rows, expected, strict=True))


@pytest.mark.parametrize("dtypes", [["f32"] * 4, ["f64"] * 4, ["bf16"] * 4, ["f16", "f32", "bf16", "f32"], ["f32", "f32", "f64", "f32"]])
def test_pull_at_chunk_boundaries_and_on_threads(dtypes: list[str]) -> None:
    rng = np.random.default_rng(0)
    lists = [[random_values(rng, n, d, special=True) for n in BOUNDARIES] for d in dtypes]
    expected = [pull(list(row), dtypes, 0.7) for row in zip(*lists, strict=True)]
    for threads, part in POOLS:
        native.set_pool(threads, part)
        out = [g.copy() for g in lists[0]]
        native.ewc_pull_(*[[operand(t, d) for t in tensors] for tensors, d in zip([out, *lists[1:]], dtypes, strict=True)], 0.7)
        assert all(same_bits(o, e, dtypes[0]) for o, e in zip(out, expected, strict=True)), (threads, part)
