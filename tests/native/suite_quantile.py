"""Quantiles and bit masks on NumPy arrays."""

from __future__ import annotations

import math

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, decode, layouts, operand, random_values, same_bits, strided
from hypothesis import given
from hypothesis import strategies as st
from suite_ops import BOUNDARIES, POOLS

QS = (0.0, 0.3, 0.5, 0.999, 1.0)
LARGE = 70_001  # beyond what is searched without a sample


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def expected(arrays: list[np.ndarray], dtypes: list[str], q: float) -> float:
    with np.errstate(invalid="ignore"):
        parts = [decode(a, d, np.float64).astype(np.float64).ravel() for a, d in zip(arrays, dtypes, strict=True)]
        return float(np.quantile(np.concatenate(parts), q))


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def check(arrays: list[np.ndarray], dtypes: list[str], qs: tuple[float, ...] = QS) -> None:
    own = [operand(a, d) for a, d in zip(arrays, dtypes, strict=True)]
    for q in qs:
        want = expected(arrays, dtypes, q)
        assert same(native.quantile(own, q), want), (q, dtypes)
        assert same(native.quantile_by_counts(own, q), want), (q, dtypes)


@given(st.data(), st.floats(0, 1))
def test_quantile_on_any_layout(data: st.DataObject, q: float) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    arrays, dtypes = [np.ones(1)], ["f64" if data.draw(st.booleans()) else "f32"]
    arrays[0] = arrays[0].astype(np.float64 if dtypes[0] == "f64" else np.float32)
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, gaps, front = data.draw(layouts())
        dtypes.append(data.draw(st.sampled_from(FLOATING)))
        values = random_values(rng, int(np.prod(shape)), dtypes[-1], special=data.draw(st.booleans())).reshape(shape)
        arrays.append(strided(values, order, gaps, front))
    check(arrays, dtypes, (q, 0.0, 1.0))


@pytest.mark.parametrize("dtype", FLOATING)
def test_many_elements_and_threads(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for threads, part in POOLS:
        native.set_pool(threads, part)
        arrays = [random_values(rng, n, dtype) for n in BOUNDARIES]
        check([*arrays, random_values(rng, 2 * LARGE, dtype)[::2]], [dtype] * (len(arrays) + 1), (0.3, 1.0))


def misleading(n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Where a sample tells little: in order, periodic, almost all equal, one block far away."""
    ramp = np.arange(n, dtype=np.float32)
    far = np.where(np.arange(n) < n // 50, 1e30, rng.random(n)).astype(np.float32)
    rare = np.where(rng.random(n) < 1e-4, rng.random(n), 0.5).astype(np.float32)
    return [ramp, ramp % 64, -ramp[::-1], far, rare, np.full(n, -0.0, np.float32)]


def test_misleading_distributions() -> None:
    native.set_pool(3, 0)
    for x in misleading(LARGE, np.random.default_rng(1)):
        check([x], ["f32"], (*QS, 0.02, 0.0199, 1e-4, 0.5 + 1e-5))
        check([x.astype(np.float64) / 3, x], ["f64", "f32"], (0.3, 0.75))


@pytest.mark.parametrize("bad", [np.nan, -np.nan])
def test_nan(bad: float) -> None:
    for n in (3, LARGE):
        for dtype, storage in (("f32", np.float32), ("f64", np.float64), ("f16", np.float16)):
            x = np.ones(n, storage)
            x[n // 2] = np.copysign(np.nan, bad)
            assert math.isnan(native.quantile([operand(x, dtype)], 0.0))
            assert math.isnan(native.quantile_by_counts([operand(x, dtype)], 1.0))


@pytest.mark.parametrize("dtype", FLOATING)
def test_counts_hold_every_element(dtype: str) -> None:
    rng = np.random.default_rng(2)
    arrays = [random_values(rng, n, dtype, special=True) for n in (5, 513, 70_001)]
    own = [operand(a, dtype) for a in arrays]
    wide = dtype == "f64"
    results = []
    for threads, part in POOLS:
        native.set_pool(threads, part)
        prefixes, found = [0, 0], []
        for level in range(6 if wide else 3):
            counts = native.radix_counts(own, prefixes, level, wide)
            found.append(counts)
            digits = [int(counts[0, :2048].argmax()), int(np.flatnonzero(counts[1, :2048])[-1])]
            width = (11, 11, 11, 11, 11, 9)[level] if wide else (11, 11, 10)[level]
            prefixes = [(p << width | d) & (2**64 - 1) for p, d in zip(prefixes, digits, strict=True)]
        results.append(np.stack(found))
    assert all(np.array_equal(r, results[0]) for r in results)
    assert results[0][0].sum() == 2 * sum(a.size for a in arrays)
    nan = sum(int(np.isnan(decode(a, dtype, np.float64)).sum()) for a in arrays)
    assert (results[0][0][:, 2048] == nan).all()


def pack(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask.ravel(), bitorder="little")


@given(st.data(), st.sampled_from(FLOATING))
def test_masks_on_any_layout(data: st.DataObject, dtype: str) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    native.set_pool(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 1, 3])))
    arrays, masks = [], []
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, gaps, front = data.draw(layouts(max_side=9))
        values = random_values(rng, int(np.prod(shape)), dtype, special=True).reshape(shape)
        arrays.append(strided(values, order, gaps, front))
        masks.append(rng.random(shape) < 0.5)
    threshold = float(rng.standard_normal())
    bits = [np.full(-(-a.size // 8), 0xAA, np.uint8) for a in arrays]
    native.threshold_bits_([operand(b, "u8") for b in bits], [operand(a, dtype) for a in arrays], threshold)
    for b, a in zip(bits, arrays, strict=True):
        assert np.array_equal(b, pack(decode(a, dtype, np.float64) >= threshold))
    kept = [np.where(m, a, np.zeros((), a.dtype)) for a, m in zip(arrays, masks, strict=True)]
    packed = [pack(m) for m in masks]
    native.bit_mask_([operand(a, dtype) for a in arrays], [operand(p, "u8") for p in packed])
    assert all(same_bits(a, k, dtype) for a, k in zip(arrays, kept, strict=True))


@pytest.mark.parametrize("dtype", FLOATING)
def test_mask_boundaries_and_threads(dtype: str) -> None:
    rng = np.random.default_rng(3)
    for threads, part in POOLS:
        native.set_pool(threads, part)
        arrays = [random_values(rng, n, dtype) for n in BOUNDARIES]
        bits = [np.zeros(-(-a.size // 8), np.uint8) for a in arrays]
        native.threshold_bits_([operand(b, "u8") for b in bits], [operand(a, dtype) for a in arrays], 0.25)
        reached = [decode(a, dtype, np.float64) >= 0.25 for a in arrays]
        assert all(np.array_equal(b, pack(r)) for b, r in zip(bits, reached, strict=True))
        kept = [np.where(r, a, np.zeros((), a.dtype)) for a, r in zip(arrays, reached, strict=True)]
        native.bit_mask_([operand(a, dtype) for a in arrays], [operand(b, "u8") for b in bits])
        assert all(same_bits(a, k, dtype) for a, k in zip(arrays, kept, strict=True))


@pytest.mark.slow
def test_more_than_2_to_the_31_real_elements() -> None:
    native.set_pool(2, 0)
    n = 2**31 + 9
    x = np.broadcast_to(np.float16(0.5), n)
    last = np.arange(1, 8, dtype=np.float16)
    own = [operand(x, "f16"), operand(last, "f16")]
    for quantile in (native.quantile, native.quantile_by_counts):
        assert quantile(own, 0.5) == 0.5
        assert quantile(own, 1.0) == 7
        assert quantile(own, (n + 3) / (n + 6)) == pytest.approx(4.0, abs=1e-5)
    counts = native.radix_counts(own, [0, 0], 0, False)
    assert counts[0].sum() == n + 7
    assert counts[0].max() == n
