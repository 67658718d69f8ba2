"""The CPU ops on NumPy arrays: bit for bit where an element is one rounding, and for any number of threads."""

from __future__ import annotations

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, STORED, broadcastable, compute_type, decode, encode, layouts, operand, random_values, same_bits, strided
from hypothesis import given
from hypothesis import strategies as st

BOUNDARIES = (1, 63, 64, 65, 2047, 2048, 2049, 16383, 16384, 16385, 32767, 32768, 32769, 100_003)
POOLS = ((1, 0), (2, 0), (5, 0), (3, 1000), (1, 77))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def soft_mask(g: np.ndarray, g_dtype: str, i: np.ndarray, i_dtype: str, strength: float) -> np.ndarray:
    c = compute_type(g_dtype, i_dtype)
    with np.errstate(all="ignore"):
        return encode(decode(g, g_dtype, c) * (c(1) - c(strength) * decode(i, i_dtype, c)), g_dtype)


def emax(stored: np.ndarray, s_dtype: str, new: np.ndarray, n_dtype: str) -> np.ndarray:
    c = compute_type(s_dtype, n_dtype)
    a, b = decode(stored, s_dtype, c), np.broadcast_to(decode(new, n_dtype, c), stored.shape)
    return encode(np.where((a > b) | np.isnan(a), a, b), s_dtype)


def draw_pair(data: st.DataObject, dtype: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    shape, order, gaps, front = data.draw(layouts())
    own = data.draw(broadcastable(shape))
    other_order = tuple(data.draw(st.permutations(range(len(own)))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = random_values(rng, int(np.prod(shape)), dtype, special=True).reshape(shape)
    partner = random_values(rng, int(np.prod(own)), other, special=True).reshape(own)
    return strided(values, order, gaps, front), strided(partner, other_order, (data.draw(st.integers(1, 2)),) * len(own), front)


@given(st.data(), st.sampled_from(FLOATING), st.sampled_from(STORED), st.floats(0, 1))
def test_soft_mask_on_any_layout(data: st.DataObject, dtype: str, stored: str, strength: float) -> None:
    pairs = [draw_pair(data, dtype, stored) for _ in range(data.draw(st.integers(0, 3)))]
    expected = [soft_mask(g, dtype, i, stored, strength) for g, i in pairs]
    native.soft_mask_([operand(g, dtype) for g, _ in pairs], [operand(i, stored) for _, i in pairs], strength)
    assert all(same_bits(g, e, dtype) for (g, _), e in zip(pairs, expected, strict=True))


@given(st.data(), st.sampled_from(STORED), st.sampled_from(STORED))
def test_emax_on_any_layout(data: st.DataObject, stored: str, dtype: str) -> None:
    pairs = [draw_pair(data, stored, dtype) for _ in range(data.draw(st.integers(0, 3)))]
    expected = [emax(s, stored, n, dtype) for s, n in pairs]
    native.emax_([operand(s, stored) for s, _ in pairs], [operand(n, dtype) for _, n in pairs])
    assert all(same_bits(s, e, stored) for (s, _), e in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("stored", STORED)
def test_chunk_boundaries_and_threads(dtype: str, stored: str) -> None:
    rng = np.random.default_rng(0)
    grads = [random_values(rng, n, dtype, special=True) for n in BOUNDARIES]
    importance = [random_values(rng, n, stored) for n in BOUNDARIES]
    expected = [soft_mask(g, dtype, i, stored, 0.7) for g, i in zip(grads, importance, strict=True)]
    for threads, part in POOLS:
        native.set_pool(threads, part)
        out = [g.copy() for g in grads]
        native.soft_mask_([operand(g, dtype) for g in out], [operand(i, stored) for i in importance], 0.7)
        assert all(same_bits(o, e, dtype) for o, e in zip(out, expected, strict=True)), (threads, part)


def test_a_gradient_may_be_its_own_importance() -> None:
    g = np.linspace(0, 1, 5000, dtype=np.float32)
    expected = soft_mask(g, "f32", g, "f32", 1.0)
    native.soft_mask_([operand(g, "f32")], [operand(g, "f32")], 1.0)
    assert np.array_equal(g, expected)


def spg_exact(accumulated: np.ndarray, stored: str, heads: list[np.ndarray], dtype: str) -> np.ndarray:
    """In long double, before it is stored."""
    value = decode(accumulated, stored, np.float64).astype(np.longdouble)
    for g in heads:
        x = decode(g, dtype, np.float64).astype(np.longdouble)
        d = x - x.flat[0] if x.size else x  # exact; the mean of the values themselves would round in long double too
        d = d - d.mean()
        std = np.sqrt((d * d).sum() / max(1, x.size - 1))
        value = np.maximum(value, np.abs(np.tanh(d / std)) if std > 0 else np.zeros_like(d))
    return value


ROUNDING = {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}


def assert_close_to_exact(value: np.ndarray, stored: str, exact: np.ndarray, compute: type) -> None:
    error = decode(value, stored, np.float64) - exact
    slack = 8 * float(np.finfo(compute).eps)  # tanh and the standardisation
    if stored == "u8":
        assert float(error.min()) >= -slack, "stored importance protects less than it should"
        assert float(error.max()) < 1 / 255 + slack
    else:
        assert float(np.abs(error).max()) <= slack + ROUNDING[stored]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("heads", [0, 1, 3])
def test_spg_importance_and_threads(dtype: str, stored: str, heads: int) -> None:
    rng = np.random.default_rng(1)
    sizes = (2, 65, 2049, 16385, 40_001)
    start = [encode(rng.uniform(0, 0.3, n), stored) for n in sizes]
    grads = [[random_values(rng, n, dtype) for n in sizes] for _ in range(heads)]
    exact = [spg_exact(a, stored, [h[k] for h in grads], dtype) for k, a in enumerate(start)]
    results = []
    for threads, part in POOLS:
        native.set_pool(threads, part)
        out = [a.copy() for a in start]
        mean = native.spg_importance_([operand(a, stored) for a in out], [[operand(g, dtype) for g in h] for h in grads])
        results.append((mean, [a.tobytes() for a in out]))
    assert all(r == results[0] for r in results), "the number of threads shows"
    for a, e in zip(out, exact, strict=True):
        assert_close_to_exact(a, stored, e, compute_type(stored, dtype))
    values = np.concatenate([decode(a, stored, np.float64).ravel() for a in out])
    assert abs(mean - values.mean()) <= 1e-12


@given(st.data(), st.sampled_from(("f64", "f32", "bf16")), st.sampled_from(("f64", "f32", "u8")))
def test_spg_importance_on_any_layout(data: st.DataObject, dtype: str, stored: str) -> None:
    shape, order, gaps, front = data.draw(layouts())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n = int(np.prod(shape))
    start = encode(rng.uniform(0, 0.3, n), stored).reshape(shape)
    grads = [random_values(rng, n, dtype).reshape(shape) for _ in range(2)]
    a = strided(start, order, gaps, front)
    g = [strided(grads[0], tuple(reversed(order)), gaps, 0), strided(grads[1], order, (1,) * len(shape), 1)]
    mean = native.spg_importance_([operand(a, stored)], [[operand(x, dtype)] for x in g])
    if n == 0:
        assert mean == 0
    else:
        assert_close_to_exact(a, stored, spg_exact(start, stored, grads, dtype), compute_type(stored, dtype))
        assert abs(mean - decode(a, stored, np.float64).mean()) <= 1e-12


@pytest.mark.parametrize("n", [1, 5, 2048, 16385, 50_000])
@pytest.mark.parametrize("value", [0.0, 1.0, -7.3, 1e30, 1e-40])
def test_spg_importance_of_a_constant_is_exactly_zero(n: int, value: float) -> None:
    a, g = np.zeros(n, np.float32), np.full(n, value, np.float32)
    assert native.spg_importance_([operand(a, "f32")], [[operand(g, "f32")]]) == 0
    assert not a.any()


@pytest.mark.parametrize("offset", [1e4, 1e7, -1e8])
def test_a_mean_far_above_the_spread_costs_no_digits(offset: float) -> None:
    g = offset + np.random.default_rng(2).standard_normal(30_000)
    for dtype in ("f64", "f32"):
        x, a = g.astype(np.float64 if dtype == "f64" else np.float32), np.zeros(len(g), np.float64 if dtype == "f64" else np.float32)
        exact = spg_exact(a, dtype, [x], dtype)
        native.spg_importance_([operand(a, dtype)], [[operand(x, dtype)]])
        assert float(np.abs(a - exact).max()) <= 16 * float(np.finfo(x.dtype).eps)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 20_000, 39_999])
def test_nan_and_inf_reach_every_element_of_their_tensor_only(bad: float, where: int) -> None:
    rng = np.random.default_rng(3)
    grads = [rng.standard_normal(40_000).astype(np.float32), rng.standard_normal(100).astype(np.float32)]
    grads[0][where] = bad
    a = [np.zeros(40_000, np.float32), np.zeros(100, np.float32)]
    u = [np.zeros(40_000, np.uint8), np.zeros(100, np.uint8)]
    mean = native.spg_importance_([operand(x, "f32") for x in a], [[operand(g, "f32") for g in grads]])
    native.spg_importance_([operand(x, "u8") for x in u], [[operand(g, "f32") for g in grads]])
    assert np.isnan(mean)
    assert np.isnan(a[0]).all()
    assert np.isfinite(a[1]).all()
    assert (u[0] == 255).all()


@pytest.mark.slow
def test_more_than_2_to_the_31_real_elements() -> None:
    native.set_pool(2, 0)
    n = 2**31 + 5
    importance = np.zeros(n, np.uint8)
    importance[[0, 2**31 - 1, 2**31, n - 1]] = 200
    native.emax_([operand(importance, "u8")], [operand(np.array(100 / 255, np.float32), "f32")])
    assert np.array_equal(importance[[0, 1, 2**31 - 1, 2**31, 2**31 + 1, n - 2, n - 1]], [200, 100, 200, 200, 100, 100, 200])
    assert int(importance.min()) == 100
    mean = native.spg_importance_([operand(importance, "u8")], [[operand(np.broadcast_to(np.float16(1), n), "f16")]])
    assert abs(mean - (100 * n + 400) / 255 / n) < 1e-12
