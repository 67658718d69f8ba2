"""The stages of the Kronecker-factored precision on NumPy arrays, against the formulas in long double."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, STORAGE, decode, encode, layouts, operand, same_bits, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_ops import ROUNDING

RHO, STRENGTH, LR = 0.9, 0.7, 0.03
# Sides around those of the tiles (4 and 8 rows, 8 and 16 columns and their multiples) and the largest.
SIDES = ((1, 1), (2, 3), (3, 8), (4, 9), (5, 16), (7, 17), (8, 31), (9, 33), (12, 40), (17, 49), (33, 65), (64, 72), (100, 96), (128, 129))
POOLS = ((1, 0), (2, 0), (3, 700), (5, 20_000))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def padded(values: np.ndarray, gap: int) -> np.ndarray:
    """Rows of unit stride with a gap after each, which holds NaN; the last row ends where the memory ends."""
    rows, columns = values.shape
    memory = np.full(max(rows * (columns + gap) - gap, 0), np.nan, values.dtype)
    out = np.lib.stride_tricks.as_strided(memory, values.shape, ((columns + gap) * values.itemsize, values.itemsize))
    out[...] = values
    return out


@dataclass
class Layers:
    """A call's arrays; weights and biases of one dtype, gradients of another, all else of the compute type."""

    dtype: str
    grad_dtype: str
    compute: str
    weights: list[np.ndarray] = field(default_factory=list)
    biases: list[np.ndarray] = field(default_factory=list)
    weight_grads: list[np.ndarray] = field(default_factory=list)
    bias_grads: list[np.ndarray] = field(default_factory=list)
    M: list[np.ndarray] = field(default_factory=list)
    H: list[np.ndarray] = field(default_factory=list)
    A: list[np.ndarray] = field(default_factory=list)
    G: list[np.ndarray] = field(default_factory=list)

    def add(
        self, rng: np.random.Generator, shape: tuple[int, ...], biased: bool, gap: int, order: tuple[int, ...], gaps: tuple[int, ...]
    ) -> None:
        m, inputs = shape[0], int(np.prod(shape[1:], dtype=int))
        n = inputs + biased
        for weights, biases, dtype in ((self.weights, self.biases, self.dtype), (self.weight_grads, self.bias_grads, self.grad_dtype)):
            weights.append(strided(encode(rng.standard_normal(shape), dtype), order, gaps, 1))
            biases.append(strided(encode(rng.standard_normal(m if biased else 0), dtype), (0,), (gap + 1,), 0))
        own = STORAGE[self.compute]
        for target, size in ((self.M, (m, n)), (self.H, (m, n)), (self.A, (n, n)), (self.G, (m, m))):
            target.append(padded(rng.standard_normal(size).astype(own), gap))

    def copy(self) -> Layers:
        def again(x: np.ndarray) -> np.ndarray:
            out = (
                np.lib.stride_tricks.as_strided(
                    np.zeros(1 + sum((n - 1) * abs(s) // x.itemsize for n, s in zip(x.shape, x.strides, strict=True)), x.dtype),
                    x.shape,
                    x.strides,
                )
                if x.size
                else x.copy()
            )
            out[...] = x
            return out

        names = ("weights", "biases", "weight_grads", "bias_grads", "M", "H", "A", "G")
        return Layers(self.dtype, self.grad_dtype, self.compute, **{k: [again(x) for x in getattr(self, k)] for k in names})

    def operands(self, name: str) -> list[Any]:
        dtype = {"weights": self.dtype, "biases": self.dtype, "weight_grads": self.grad_dtype, "bias_grads": self.grad_dtype}.get(
            name, self.compute
        )
        return [operand(x, dtype) for x in getattr(self, name)]

    def bits(self) -> list[bytes]:
        return [x.tobytes() for name in ("weights", "biases", "M", "H") for x in getattr(self, name)]


def joined(weights: list[np.ndarray], biases: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    out = []
    for w, b in zip(weights, biases, strict=True):
        wide = decode(np.ascontiguousarray(w), dtype, np.float64).astype(np.longdouble).reshape(w.shape[0], int(np.prod(w.shape[1:])))
        out.append(np.hstack([wide, decode(b, dtype, np.float64).astype(np.longdouble)[:, None]]) if b.size else wide)
    return out


def wide(matrices: list[np.ndarray]) -> list[np.ndarray]:
    return [x.astype(np.longdouble) for x in matrices]


def close(value: np.ndarray, exact: np.ndarray, size: np.ndarray, terms: int, unit: float) -> bool:
    """Within (terms + 4) roundings of the sizes that were added up."""
    return bool(np.all(np.abs(value.astype(np.longdouble) - exact) <= (terms + 4) * unit * size))


def check(layers: Layers) -> None:
    """All six stages on these layers."""
    unit, stored = float(ROUNDING[layers.compute]), float(ROUNDING[layers.dtype])
    X, g = joined(layers.weights, layers.biases, layers.dtype), joined(layers.weight_grads, layers.bias_grads, layers.grad_dtype)
    M, H, A, G = (wide(getattr(layers, name)) for name in ("M", "H", "A", "G"))
    dual = [RHO * m + x + STRENGTH * h for m, x, h in zip(M, g, H, strict=True)]
    dual_size = [RHO * np.abs(m) + np.abs(x) + STRENGTH * np.abs(h) for m, x, h in zip(M, g, H, strict=True)]
    V = [left @ m @ right for left, m, right in zip(G, dual, A, strict=True)]
    V_size = [np.abs(left) @ m @ np.abs(right) for left, m, right in zip(G, dual_size, A, strict=True)]
    terms = [sum(x.shape) for x in X]

    def stepped(own: Layers) -> None:
        for k, x in enumerate(joined(own.weights, own.biases, own.dtype)):
            exact = X[k] - LR * V[k]
            assert close(own.M[k], dual[k], dual_size[k], 0, unit)
            assert close(own.H[k], H[k] - LR * dual[k], np.abs(H[k]) + LR * dual_size[k], 2, unit)
            # One more rounding to the parameter's dtype; half's subnormal numbers are 6e-8 apart.
            slack = 1.01 * stored * np.abs(exact) + 6e-8 * (own.dtype == "f16")
            assert np.all(np.abs(x - exact) <= (terms[k] + 4) * unit * (np.abs(X[k]) + LR * V_size[k]) + slack)

    own = layers.copy()
    native.ncl_small_step_(
        *(own.operands(k) for k in ("weights", "biases", "weight_grads", "bias_grads", "M", "H", "A", "G")), LR, RHO, STRENGTH
    )
    stepped(own)

    own = layers.copy()
    out = [padded(np.full(m.shape, np.nan, m.dtype), 3) for m in own.M]
    directions = [operand(v, own.compute) for v in out]
    products = native.ncl_small_direction_(
        own.operands("M"), directions, *(own.operands(k) for k in ("weight_grads", "bias_grads", "H", "A", "G")), RHO, STRENGTH
    )
    for k, v in enumerate(out):
        assert close(v, V[k], V_size[k], terms[k], unit)
        exact = (own.M[k].astype(np.longdouble) * v).sum()
        assert abs(products[k] - exact) <= 1e-15 * np.abs(own.M[k].astype(np.longdouble) * v).sum()
        assert np.array_equal(own.H[k], layers.H[k])
    native.ncl_apply_(own.operands("weights"), own.operands("biases"), own.operands("H"), directions, own.operands("M"), LR)
    stepped(own)

    for lr in (None, LR):
        own = layers.copy()
        native.ncl_momentum_(*(own.operands(k) for k in ("M", "H", "weight_grads", "bias_grads")), RHO, STRENGTH, lr)
        for k, m in enumerate(own.M):
            assert close(m, dual[k], dual_size[k], 0, unit)
            assert close(own.H[k], H[k] - (lr or 0) * dual[k], np.abs(H[k]) + LR * dual_size[k], 2, unit)

    own = layers.copy()
    products = [left @ x @ right for left, x, right in zip(G, X, A, strict=True)]
    sizes = [np.abs(left) @ np.abs(x) @ np.abs(right) for left, x, right in zip(G, X, A, strict=True)]
    quadratic = native.kron_small_quadratic(*(own.operands(k) for k in ("weights", "biases", "A", "G")))
    exact = sum(((x * p).sum() for x, p in zip(X, products, strict=True)), np.longdouble(0))
    slack = sum((((t + 8) * (unit + 2e-16) * np.abs(x) * s).sum() for t, x, s in zip(terms, X, sizes, strict=True)), np.longdouble(0))
    # A float64 parameter over float32 factors is read as float32.
    slack += sum(((2 * unit * np.abs(x) * s).sum() for x, s in zip(X, sizes, strict=True)), np.longdouble(0))
    assert abs(quadratic - exact) <= slack
    native.kron_small_(*(own.operands(k) for k in ("weights", "biases", "A", "G")))
    for k, x in enumerate(joined(own.weights, own.biases, own.dtype)):
        slack = 1.01 * stored * np.abs(products[k]) + 6e-8 * (own.dtype == "f16")
        assert np.all(np.abs(x - products[k]) <= (terms[k] + 5) * unit * sizes[k] + slack)


def some_layers(dtype: str, grad_dtype: str, compute: str, sides: tuple[tuple[int, int], ...] = SIDES) -> Layers:
    rng = np.random.default_rng(4)
    layers = Layers(dtype, grad_dtype, compute)
    for (m, n), biased in itertools.product(sides, (False, True)):
        if n > biased:
            layers.add(rng, (m, n - biased), biased, (m + n) % 4, (1, 0), (1, 1))
    return layers


@pytest.mark.parametrize(
    ("dtype", "compute"), [("f64", "f64"), ("f32", "f32"), ("f64", "f32"), ("bf16", "f32"), ("f16", "f32"), ("f32", "f64")]
)
def test_every_side_of_a_tile(dtype: str, compute: str) -> None:
    check(some_layers(dtype, dtype, compute))


@settings(deadline=None)
@given(st.data(), st.sampled_from(FLOATING), st.sampled_from(FLOATING), st.sampled_from(("f32", "f64")))
def test_any_layout(data: st.DataObject, dtype: str, grad_dtype: str, compute: str) -> None:
    layers = Layers(dtype, grad_dtype, compute)
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, gaps, _ = data.draw(layouts(max_dims=5, max_side=3).filter(lambda drawn: len(drawn[0]) >= 2))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        layers.add(rng, shape, data.draw(st.booleans()) and shape[0] > 0, data.draw(st.integers(0, 3)), order, gaps)
    check(layers)


@pytest.mark.parametrize(("dtype", "compute"), [("f32", "f32"), ("bf16", "f32"), ("f64", "f64")])
def test_bits_are_the_same_for_any_threads(dtype: str, compute: str) -> None:
    layers = some_layers(dtype, dtype, compute, (*SIDES, (64, 65), (32, 33), (1, 17)))
    seen = []
    for threads, part in POOLS:
        native.set_pool(threads, part)
        own = layers.copy()
        out = [np.zeros_like(m) for m in own.M]
        directions = [operand(v, compute) for v in out]
        products = native.ncl_small_direction_(
            own.operands("M"), directions, *(own.operands(k) for k in ("weight_grads", "bias_grads", "H", "A", "G")), RHO, STRENGTH
        )
        native.ncl_momentum_(*(own.operands(k) for k in ("M", "H", "weight_grads", "bias_grads")), RHO, STRENGTH, LR)
        native.ncl_apply_(own.operands("weights"), own.operands("biases"), own.operands("H"), directions, own.operands("M"), LR)
        native.ncl_small_step_(
            *(own.operands(k) for k in ("weights", "biases", "weight_grads", "bias_grads", "M", "H", "A", "G")), LR, RHO, STRENGTH
        )
        quadratic = native.kron_small_quadratic(*(own.operands(k) for k in ("weights", "biases", "A", "G")))
        native.kron_small_(*(own.operands(k) for k in ("weights", "biases", "A", "G")))
        seen.append([products.tobytes(), quadratic, *(v.tobytes() for v in out), *own.bits()])
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(3, 50_001), (50_001, 3), (1, 200_000), (300, 257)])
def test_sweeps_over_large_layers(shape: tuple[int, int], biased: bool) -> None:
    rng = np.random.default_rng(5)
    for dtype in ("f32", "bf16"):
        seen = []
        for threads, part in ((1, 0), (4, 0), (3, 40_000)):
            native.set_pool(threads, part)
            rng = np.random.default_rng(5)
            w, g = (encode(rng.standard_normal(shape), dtype) for _ in range(2))
            b, bg = (encode(rng.standard_normal(shape[0] if biased else 0), dtype) for _ in range(2))
            m, h, v = (padded(rng.standard_normal((shape[0], shape[1] + biased)).astype(np.float32), 2) for _ in range(3))
            X, grads = joined([w], [b], dtype)[0], joined([g], [bg], dtype)[0]
            M, H = m.astype(np.longdouble), h.astype(np.longdouble)
            operands = [[operand(x, d)] for x, d in ((m, "f32"), (h, "f32"), (g, dtype), (bg, dtype), (w, dtype), (b, dtype), (v, "f32"))]
            native.ncl_momentum_(*operands[:4], RHO, STRENGTH, None)
            assert close(m, RHO * M + grads + STRENGTH * H, RHO * np.abs(M) + np.abs(grads) + STRENGTH * np.abs(H), 0, 2.0**-24)
            native.ncl_apply_(operands[4], operands[5], operands[1], operands[6], operands[0], LR)
            exact = X - LR * v.astype(np.longdouble)
            size = np.abs(X) + LR * np.abs(v)
            assert np.all(np.abs(joined([w], [b], dtype)[0] - exact) <= 4 * 2.0**-24 * size + 1.01 * ROUNDING[dtype] * np.abs(exact))
            assert close(h, H - LR * m.astype(np.longdouble), np.abs(H) + LR * np.abs(m), 0, 2.0**-24)
            seen.append([x.tobytes() for x in (m, h, w, b)])
        assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 31, 32])
def test_nan_and_inf_stay_in_their_layer(bad: float, where: int) -> None:
    layers = some_layers("f32", "f32", "f32", ((32, 33), (16, 20)))
    row = layers.bias_grads[1] if where == 32 else layers.weight_grads[1][5]
    row[5 if where == 32 else where] = bad
    native.ncl_small_step_(
        *(layers.operands(k) for k in ("weights", "biases", "weight_grads", "bias_grads", "M", "H", "A", "G")), LR, RHO, STRENGTH
    )
    assert not np.isfinite(layers.weights[1]).any()
    assert not np.isfinite(layers.biases[1]).any()
    for k in (0, 2, 3):
        assert np.isfinite(layers.weights[k]).all()
        assert np.isfinite(layers.M[k]).all()


def test_layers_without_elements() -> None:
    for shape in ((0, 4), (4, 0), (0, 0)):
        layers = Layers("f32", "f32", "f32")
        layers.add(np.random.default_rng(6), shape, shape[0] > 0, 0, (1, 0), (1, 1))
        layers.add(np.random.default_rng(7), (3, 4), True, 0, (1, 0), (1, 1))
        check(layers)


def test_a_float64_parameter_keeps_its_digits_over_float32_factors() -> None:
    layers = Layers("f64", "f64", "f32")
    layers.add(np.random.default_rng(8), (8, 8), True, 0, (1, 0), (1, 1))
    before = [layers.weights[0].copy(), layers.biases[0].copy()]
    native.ncl_small_step_(
        *(layers.operands(k) for k in ("weights", "biases", "weight_grads", "bias_grads", "M", "H", "A", "G")), 0.0, RHO, STRENGTH
    )
    assert same_bits(layers.weights[0], before[0], "f64")
    assert same_bits(layers.biases[0], before[1], "f64")
