"""Precision of low rank plus a diagonal on NumPy arrays."""

from __future__ import annotations

from typing import Any

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, decode, layouts, operand, random_values, strided
from hypothesis import given
from hypothesis import strategies as st
from suite_ops import BOUNDARIES, POOLS

U = {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


class Problem:
    """Lists of a step, dense but for the parameters and gradients, and their values in double."""

    def __init__(self, rng: np.random.Generator, shapes: list[Any], kept: str, rank: int, narrow: list[str], strides: list[Any]) -> None:
        self.kept, self.rank, self.narrow = kept, rank, narrow
        store = np.float64 if kept == "f64" else np.float32
        counts = [int(np.prod(s)) for s in shapes]
        self.params, self.grads = (
            [strided(random_values(rng, n, d).reshape(s), *own) for n, s, d, own in zip(counts, shapes, narrow, strides, strict=True)]
            for _ in range(2)
        )
        self.momenta, self.anchors = ([np.asarray(rng.standard_normal(s), store) for s in shapes] for _ in range(2))
        self.diagonal = [np.asarray(0.5 + rng.random(s), store) for s in shapes]
        self.basis = [(rng.standard_normal((rank, *s)) / max(sum(counts), 1) ** 0.5).astype(store) for s in shapes]

    def operands(self, *names: str) -> list[Any]:
        dtypes = {"params": self.narrow, "grads": self.narrow}
        return [
            [operand(a, d) for a, d in zip(getattr(self, n), dtypes.get(n, [self.kept] * len(self.narrow)), strict=True)] for n in names
        ]

    def wide(self, name: str) -> np.ndarray:
        own = name in ("params", "grads")
        lists = zip(getattr(self, name), self.narrow if own else [self.kept] * len(self.narrow), strict=True)
        if name == "basis":
            parts = [b.astype(np.float64).reshape(self.rank, int(np.prod(b.shape[1:]))) for b in self.basis]
            return np.concatenate(parts, axis=1)
        return np.concatenate([decode(a, d, np.float64).astype(np.float64).ravel() for a, d in lists])


@given(st.data())
def test_solve_and_step_on_any_layout(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    drawn = [data.draw(layouts()) for _ in range(data.draw(st.integers(1, 3)))]
    narrow = [data.draw(st.sampled_from(FLOATING)) for _ in drawn]
    kept, rank = data.draw(st.sampled_from(["f64", "f32"])), data.draw(st.integers(0, 9))
    momentum, strength = data.draw(st.sampled_from([0.0, 0.9])), data.draw(st.sampled_from([0.0, 0.7]))
    p = Problem(rng, [s for s, *_ in drawn], kept, rank, narrow, [own for _, *own in drawn])
    w, g, v, mu, d, q = (p.wide(n) for n in ("params", "grads", "momenta", "anchors", "diagonal", "basis"))
    size = 1 + max((float(np.abs(x).max()) for x in (w, g, v, mu) if x.size), default=0)
    u = momentum * v + strength * (w - mu)
    z, y = g / np.sqrt(d), u * np.sqrt(d)
    lists = p.operands("params", "grads", "momenta", "anchors", "diagonal", "basis")
    used = [*lists[:2], lists[2] if momentum else [], lists[3] if strength else [], *lists[4:]]
    found = native.low_rank_step_products(used, momentum, strength)
    wanted = np.concatenate([q @ z, q @ y, [z @ z, z @ y, y @ y]])
    slack = 64 * U[kept] * (1 + z.size) * size**2
    assert (np.abs(found - wanted) <= slack).all()
    assert (np.abs(native.low_rank_products(lists[1], lists[4], lists[5], True) - np.append(q @ z, z @ z)) <= slack).all()
    c = rng.standard_normal(rank)
    direction = u + (z - c @ q) / np.sqrt(d)
    native.low_rank_step_update_(used, list(c), 0.3, momentum, strength)
    limit = np.concatenate([np.full(a.size, 4 * U[n] + 64 * U[kept]) for a, n in zip(p.params, narrow, strict=True)])
    # Half's subnormal numbers are 6e-8 apart.
    assert (np.abs(p.wide("params") - (w - 0.3 * direction)) <= limit * (size + np.abs(direction)) * 4 + 6e-8).all()
    if momentum:
        assert (np.abs(p.wide("momenta") - direction) <= 64 * U[kept] * (size + np.abs(direction)) * 4).all()
    else:
        assert np.array_equal(p.wide("momenta"), v)


@pytest.mark.parametrize("kept", ["f64", "f32"])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_bits_are_the_same_for_any_threads(kept: str, rank: int) -> None:
    seen = []
    for threads, part in POOLS:
        rng = np.random.default_rng(0)
        shapes = [(n,) for n in BOUNDARIES]
        p = Problem(rng, shapes, kept, rank, [kept] * len(shapes), [((0,), (1,), 0)] * len(shapes))
        native.set_pool(threads, part)
        lists = p.operands("params", "grads", "momenta", "anchors", "diagonal", "basis")
        products = native.low_rank_step_products(lists, 0.9, 0.7)
        alone = native.low_rank_products(lists[1], lists[4], lists[5], False)
        native.low_rank_step_update_(lists, list(products[:rank]), 0.1, 0.9, 0.7)
        native.low_rank_update_(lists[1], lists[4], lists[5], list(products[:rank]))
        sigma = list(np.linspace(2, 1, rank))
        gram = native.low_rank_gram(lists[4], lists[5], sigma, [lists[0], lists[1]])
        mix = np.linalg.qr(np.random.default_rng(1).standard_normal((rank + 2, rank + 2)))[0]
        mixed = native.low_rank_compress_(lists[4], lists[5], sigma, [lists[0], lists[1]], mix)
        turned = native.low_rank_rotate_(lists[5], mix[:rank, :rank].copy())
        seen.append([x.tobytes() for x in (products, alone, gram, mixed, turned, *p.params, *p.grads, *p.momenta, *p.diagonal, *p.basis)])
    assert all(other == seen[0] for other in seen)


@given(st.data())
def test_appending_on_any_layout(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    drawn = [data.draw(layouts()) for _ in range(data.draw(st.integers(1, 3)))]
    narrow = [data.draw(st.sampled_from(FLOATING)) for _ in drawn]
    kept, rank = data.draw(st.sampled_from(["f64", "f32"])), data.draw(st.integers(0, 9))
    p = Problem(rng, [s for s, *_ in drawn], kept, rank, narrow, [own for _, *own in drawn])
    sigma = rng.random(rank) + 0.5
    d, q = p.wide("diagonal"), p.wide("basis")
    rows = np.vstack([sigma[:, None] * q, p.wide("params") / np.sqrt(d), p.wide("grads") / np.sqrt(d)])
    diagonal, basis, *vectors = p.operands("diagonal", "basis", "params", "grads")
    gram = native.low_rank_gram(diagonal, basis, list(sigma), vectors)
    assert np.allclose(gram, rows @ rows.T, rtol=1e-12, atol=1e-12 * (1 + np.abs(rows).max(initial=0) ** 2 * rows.shape[1]))
    mix = rng.standard_normal((rank + 2, rank + 2))
    mixed = mix.T @ rows
    factor = 1 + (mixed[rank:] ** 2).sum(0)
    products = native.low_rank_compress_(diagonal, basis, list(sigma), vectors, mix)
    # Rows may cancel in what is dropped.
    dropped = d * ((np.abs(mix.T) @ np.abs(rows))[rank:] ** 2).sum(0)
    assert (np.abs(p.wide("diagonal") - d * factor) <= 4 * U[kept] * d * factor + 64 * U["f64"] * dropped).all()
    stored = p.wide("basis")
    size = np.abs(mix).sum() * np.abs(rows).max(initial=0)
    assert np.allclose(stored, mixed[:rank] / np.sqrt(factor), rtol=4 * U[kept], atol=1e-13 * size)
    assert np.allclose(
        products, stored @ stored.T, rtol=1e-12, atol=1e-12 * (1 + np.abs(stored).max(initial=0) ** 2 * max(stored.shape[1], 1))
    )
    turn = rng.standard_normal((rank, rank))
    native.low_rank_rotate_(basis, turn)
    assert np.allclose(
        p.wide("basis"), turn.T @ stored, rtol=4 * U[kept], atol=1e-13 * (1 + np.abs(turn).sum() * np.abs(stored).max(initial=0))
    )
