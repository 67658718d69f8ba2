"""Dot products, projections and GEM's quadratic programme on NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, decode, layouts, operand, random_values, same_bits, strided
from hypothesis import given
from hypothesis import strategies as st
from suite_ops import BOUNDARIES, POOLS

U = 2.0**-53


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def flat(arrays: list[np.ndarray], dtypes: list[str]) -> np.ndarray:
    parts = [decode(a, d, np.float64).astype(np.float64).ravel() for a, d in zip(arrays, dtypes, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0)


def close(value: float, a: np.ndarray, b: np.ndarray) -> bool:
    products = (a * b).tolist()
    return abs(value - math.fsum(products)) <= 4 * U * math.fsum(map(abs, products))


def operands(arrays: list[np.ndarray], dtypes: list[str]) -> list[Any]:
    return [operand(a, d) for a, d in zip(arrays, dtypes, strict=True)]


@given(st.data())
def test_dots_and_projection_on_any_layout(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lists: list[list[np.ndarray]] = [[], [], []]
    dtypes: list[list[str]] = [[], [], []]
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, gaps, front = data.draw(layouts())
        for target, names in zip(lists, dtypes, strict=True):
            names.append(data.draw(st.sampled_from(FLOATING)))
            values = random_values(rng, int(np.prod(shape)), names[-1]).reshape(shape)
            target.append(strided(values, order if data.draw(st.booleans()) else tuple(range(len(shape))), gaps, front))
    g, r, s = (flat(a, d) for a, d in zip(lists, dtypes, strict=True))
    own = [operands(a, d) for a, d in zip(lists, dtypes, strict=True)]
    assert close(native.grad_dot(own[0], own[1]), g, r)
    products = native.gram(own)
    vectors = (g, r, s)
    assert all(close(products[i, j], vectors[i], vectors[j]) for i in range(3) for j in range(3))
    before = [a.copy() for a in lists[0]]
    dot, square, coefficient = native.project_(own[0], own[1])
    assert close(dot, g, r)
    assert close(square, r, r)
    if dot >= 0:
        assert coefficient == 0
        assert all(same_bits(a, b, d) for a, b, d in zip(lists[0], before, dtypes[0], strict=True))
    else:
        size = np.abs(flat(lists[0], dtypes[0])) + np.abs(g) + np.abs(coefficient * r)
        # One rounding to the narrowest type, bfloat16; half's subnormal numbers are 6e-8 apart.
        assert (np.abs(flat(lists[0], dtypes[0]) - (g + coefficient * r)) <= 2.0**-8 * size + 6e-8).all()


@pytest.mark.parametrize("dtype", FLOATING)
def test_bits_are_the_same_for_any_threads(dtype: str) -> None:
    rng = np.random.default_rng(0)
    grads = [random_values(rng, n, dtype) for n in BOUNDARIES]
    memories = [[random_values(rng, n, dtype) for n in BOUNDARIES] for _ in range(5)]
    seen = []
    for threads, part in POOLS:
        native.set_pool(threads, part)
        own = [g.copy() for g in grads]
        names = [dtype] * len(own)
        agem = native.project_(operands(own, names), operands(memories[0], names))
        gem = native.gem_project_(operands(own, names), [operands(m, names) for m in memories], 0.5, 1e-3)
        seen.append(
            [agem.tobytes(), gem.tobytes(), native.gram([operands(m, names) for m in memories]).tobytes(), *(g.tobytes() for g in own)]
        )
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("count", [1, 2, 7, 31, 64])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-9, 0.0])
@pytest.mark.parametrize(("margin", "ridge"), [(0.5, 1e-3), (0.0, 0.0)])
def test_the_programme_is_solved(count: int, spread: float, margin: float, ridge: float) -> None:
    rng = np.random.default_rng(count)
    for size in (3, 40, 90):
        rows = rng.standard_normal(size) + spread * rng.standard_normal((count, size))
        vectors = np.vstack([rows, rng.standard_normal(size) - rows[0]])
        products = np.ascontiguousarray(vectors @ vectors.T)
        violated, *rest = native.gem_coefficients(products, margin, ridge)
        v, dots = np.array(rest[:count]), np.array(rest[count:])
        assert violated == (products[:count, count] < 0).any()
        assert np.array_equal(dots, products[:count, count])
        if not violated:
            assert not v.any()
            continue
        quadratic = products[:count, :count] + ridge * np.eye(count)
        gradient, magnitude = quadratic @ v + dots, np.abs(quadratic) @ v + np.abs(dots)
        assert (v >= margin).all()
        assert (gradient >= -1e-10 * magnitude).all()
        assert (np.minimum(gradient / magnitude, v - margin) <= 1e-9 * max(1.0, v.max())).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_products_that_are_no_numbers_give_no_coefficients(value: float) -> None:
    for row in range(3):
        for column in range(4):
            if row == column and value == -math.inf:
                continue  # no sum of squares
            products = np.eye(4)
            products[row, column] = products[column, row] = value
            violated, *rest = native.gem_coefficients(products, 0.5, 1e-3)
            if column == 3 and value == math.inf:  # an infinite gradient that no memory opposes
                assert (violated, rest[:3]) == (0, [0, 0, 0])
            elif row != column and column < 3:  # never asked for when nothing is violated
                assert violated == 0
            else:
                assert violated == 1
                assert np.isnan(rest[:3]).all()
