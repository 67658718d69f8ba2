"""Conversions, tanh and moments: one element at a time, against NumPy, integers and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import bf16_to_float, float_to_bf16, smallest_code
from hypothesis import given
from hypothesis import strategies as st

ALL_16 = np.arange(65536, dtype=np.uint16)


def float_patterns() -> np.ndarray:
    """Every exponent and sign with mantissas around each rounding boundary of both half formats, and random patterns."""
    tops = (np.arange(512, dtype=np.uint64) << 23)[:, None, None]
    high = np.array([0, 1, 0x3FF, 0x200, 0x155, 0x7F << 3])[None, :, None].astype(np.uint64) << 13
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).astype(np.uint64)
    boundaries = (tops + high + low).ravel() & 0xFFFFFFFF
    random = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint64)
    # Every half and every midpoint between two halves, one bit to each side as well.
    halves = np.arange(0, 0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    near = np.concatenate([halves, middles]).view(np.uint32).astype(np.int64)
    near = np.concatenate([near - 1, near, near + 1]) & 0x7FFFFFFF
    return np.concatenate([boundaries, random, near.astype(np.uint64), near.astype(np.uint64) | 0x80000000]).astype(np.uint32)


def test_every_half_and_bfloat16_widens_exactly() -> None:
    half, brain = native.widen_f16(ALL_16), native.widen_bf16(ALL_16)
    expected = ALL_16.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(half.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(half[nan]).all()
    assert np.array_equal(brain.view(np.uint32), bf16_to_float(ALL_16).view(np.uint32))


def test_every_half_and_bfloat16_comes_back() -> None:
    for widen, narrow in ((native.widen_f16, native.to_f16), (native.widen_bf16, native.to_bf16)):
        wide = widen(ALL_16)
        nan = np.isnan(wide)
        assert np.array_equal(narrow(wide)[~nan], ALL_16[~nan])
        assert np.isnan(widen(narrow(wide)))[nan].all()


def test_floats_round_to_nearest_even() -> None:
    x = float_patterns().view(np.float32)
    nan = np.isnan(x)
    with np.errstate(over="ignore", invalid="ignore"):
        half = x.astype(np.float16).view(np.uint16)
    assert np.array_equal(native.to_f16(x)[~nan], half[~nan])
    assert np.array_equal(native.to_bf16(x)[~nan], float_to_bf16(x)[~nan])
    assert np.isnan(native.widen_f16(native.to_f16(x[nan]))).all()
    assert np.isnan(native.widen_bf16(native.to_bf16(x[nan]))).all()


def test_doubles_go_by_way_of_float() -> None:
    x = np.random.default_rng(1).standard_normal(100_000) * 10.0 ** np.random.default_rng(2).integers(-50, 50, 100_000)
    x = np.concatenate([x, [np.inf, -np.inf, np.nan, 0.0, -0.0, 65504.0, 65519.999, 65520.0, 1e300, 5e-324]])
    with np.errstate(over="ignore"):
        f = x.astype(np.float32)
    assert np.array_equal(native.store_f16_f64(x), native.to_f16(f))
    assert np.array_equal(native.store_bf16_f64(x), native.to_bf16(f))


@pytest.mark.parametrize(
    ("dtype", "load", "store"), [(np.float32, "load_u8_f32", "store_u8_f32"), (np.float64, "load_u8_f64", "store_u8_f64")]
)
def test_uint8_stores_the_smallest_code_that_protects_enough(dtype: type, load: str, store: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    steps = getattr(native, load)(codes)
    assert np.array_equal(steps, codes.astype(dtype) / dtype(255))
    assert np.array_equal(getattr(native, store)(steps), codes), "a stored value is written back unchanged"
    raw = steps.view(np.uint32 if dtype is np.float32 else np.uint64).astype(np.int64)
    near = (raw[:, None] + np.arange(-300, 301)).clip(0).astype(np.uint32 if dtype is np.float32 else np.uint64).view(dtype).ravel()
    random = np.random.default_rng(3).uniform(-0.5, 1.5, 200_000).astype(dtype)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, np.nextafter(dtype(1), dtype(2)), 1e-45, -1e-45, 1e38], dtype)
    x = np.concatenate([near, random, special])
    stored = getattr(native, store)(x)
    assert np.array_equal(stored, smallest_code(x))
    assert stored[-10:].tolist() == [255, 255, 0, 0, 0, 255, 255, 1, 0, 255]


def tanh_range(dtype: type) -> np.ndarray:
    rng = np.random.default_rng(4)
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.concatenate(
        [
            np.geomspace(np.finfo(dtype).tiny, 30, 200_000, dtype=np.longdouble).astype(dtype),
            np.linspace(0, 25, 200_000, dtype=np.longdouble).astype(dtype),
            (np.arange(1, 60) * np.log(2) / 4).astype(dtype).repeat(64) * (1 + rng.uniform(-1e-5, 1e-5, 59 * 64)).astype(dtype),
            np.array([0, tiny, 8 * tiny, np.finfo(dtype).max], dtype),
        ]
    )
    return np.concatenate([x, -x])


@pytest.mark.parametrize(("dtype", "function"), [(np.float32, "abs_tanh_f32"), (np.float64, "abs_tanh_f64")])
def test_abs_tanh(dtype: type, function: str) -> None:
    x = tanh_range(dtype)
    y = getattr(native, function)(x)
    # numpy's longdouble has 64 bits of mantissa on x86-64; where it is a plain double the oracle of the double version is no better.
    exact = np.tanh(np.abs(x).astype(np.longdouble))
    ulps = np.abs(y.astype(np.longdouble) - exact) / np.spacing(exact.astype(dtype)).astype(np.longdouble)
    assert float(ulps.max()) <= 3
    assert y.max() <= 1
    assert y.min() >= 0
    ascending = y[np.argsort(np.abs(x), kind="stable")].astype(np.longdouble)
    falls = np.maximum.accumulate(ascending) - ascending
    assert float((falls / np.spacing(ascending.astype(dtype))).max()) <= 4, "no fall beyond the error of two values"
    special = getattr(native, function)(np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0], dtype))
    assert special[:2].tolist() == [1, 1]
    assert np.isnan(special[2:4]).all()
    assert special[4] == 0


def moments(parts: list[list[float]]) -> tuple[float, float, float]:
    shift = next((p[0] for p in parts if p), 0.0)
    rows = []
    for part in parts:
        x = np.array(part, np.float64) - shift
        rows.append((float(len(part)), float(x.mean()) if part else 0.0, float(((x - x.mean()) ** 2).sum()) if part else 0.0))
    count, mean, m2 = native.combine(rows)
    return count, shift + mean, m2


def exact_moments(values: list[float]) -> tuple[Fraction, Fraction]:
    x = [Fraction(v) for v in values]
    mean = sum(x, Fraction(0)) / len(x)
    return mean, sum(((v - mean) ** 2 for v in x), Fraction(0))


@given(
    st.lists(st.lists(st.floats(-1, 1), max_size=6), min_size=1, max_size=12),
    st.sampled_from([0.0, 1.0, 1e4, -1e8]),
    st.sampled_from([1e-30, 1.0]),
)
def test_parts_combine_to_the_exact_moments(parts: list[list[float]], offset: float, spread: float) -> None:
    parts = [[offset * spread + v * spread for v in p] for p in parts]
    values = [v for p in parts for v in p]
    if not values:
        assert native.combine([(0.0, 0.0, 0.0)] * len(parts))[0] == 0
        return
    count, mean, m2 = moments(parts)
    exact_mean, exact_m2 = exact_moments(values)
    widest = max(abs(v) for v in values)
    assert count == len(values)
    assert abs(mean - float(exact_mean)) <= 4 * np.finfo(np.float64).eps * widest
    # Conditioned by the distance of the first element, which the spread bounds: the mean, 1e8 times larger, costs nothing.
    reach = max(abs(Fraction(v) - Fraction(values[0])) for v in values)
    assert abs(m2 - float(exact_m2)) <= 16 * np.finfo(np.float64).eps * len(values) * float(reach) ** 2


@given(st.floats(-1e30, 1e30), st.integers(1, 50))
def test_a_constant_has_no_variance(value: float, count: int) -> None:
    assert moments([[value]] * count)[2] == 0


EXTREMES = [(np.float32, s) for s in (1e-40, 1e-30, 1.0, 1e30, 8e37)] + [(np.float64, s) for s in (1e-140, 1e-40, 1e38, 1e140)]


@pytest.mark.parametrize(("dtype", "std"), EXTREMES)
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_the_normaliser_keeps_extreme_gradients_in_range(dtype: type, std: float, mean: float) -> None:
    g = ((np.random.default_rng(5).standard_normal(2000).clip(-3, 3) * 0.3 + mean) * std / 4).astype(dtype)
    exact = g.astype(np.longdouble)
    mu, count = exact.mean(), len(g)
    m2 = ((exact - mu) ** 2).sum()
    shift = float(g[0])
    normalise = native.normalise_f32 if dtype is np.float32 else native.normalise_f64
    value = normalise(g, shift, float(count), float(mu - np.longdouble(shift)), float(m2))
    expected = np.abs(np.tanh((exact - mu) / np.sqrt(m2 / (count - 1))))
    # Two subtractions, one product, tanh: a few units in the last place of the largest value in the expression.
    assert float(np.abs(value - expected).max()) <= 8 * np.finfo(dtype).eps
    assert np.isfinite(value).all()


def test_the_normaliser_without_spread_or_with_nan() -> None:
    g = np.array([3, 3, 3], np.float32)
    assert native.normalise_f32(g, 3.0, 3.0, 0.0, 0.0).tolist() == [0, 0, 0]
    assert native.normalise_f32(g[:1], 3.0, 1.0, 0.0, 0.0).tolist() == [0]
    assert np.isnan(native.normalise_f32(g, np.nan, 3.0, np.nan, np.nan)).all()
    assert np.isnan(native.normalise_f32(g, 3.0, 3.0, np.inf, np.nan)).all()
