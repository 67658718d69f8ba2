"""The child mask on NumPy arrays: Philox by Python's integers, one element at a time."""

from __future__ import annotations

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import FLOATING, compute_type, decode, encode, layouts, operand, random_values, same_bits, strided
from hypothesis import given
from hypothesis import strategies as st
from suite_ops import BOUNDARIES, POOLS

LOW = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    native.set_pool(1, 0)


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    c, k = list(counter), list(key)
    for r in range(10):
        if r > 0:
            k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & LOW, p0 >> 32 ^ c[3] ^ k[1], p0 & LOW]
    return c


def kept(e: int, tensor: int, step: int, keep: float, seed: int) -> bool:
    key, threshold = (seed & LOW, seed >> 32), round(keep * 2**48)
    word = philox((e >> 3 & LOW, e >> 35, tensor, step), key)[e >> 1 & 3]
    u = word >> 16 if e & 1 else word & 0xFFFF
    if u != threshold >> 32:
        return u < threshold >> 32
    return philox((e >> 2 & LOW, e >> 34 | 1 << 31, tensor, step), key)[e & 3] < threshold & LOW


def masked(g: np.ndarray, dtype: str, mask: np.ndarray, keep: float) -> np.ndarray:
    c = compute_type(dtype)
    with np.errstate(all="ignore"):
        return encode(decode(g, dtype, c) * np.where(mask, c(1 / keep), c(0)), dtype)


KNOWN = [
    ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((LOW,) * 4, (LOW, LOW), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
@pytest.mark.parametrize("blocks", [1, 7, 8, 31, 32, 33, 72])
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: list[int], blocks: int) -> None:
    assert philox(counter, key) == words
    assert native.philox(counter, key) == words
    for place in {0, blocks // 2, blocks - 1}:  # in every lane of the vectorised draw
        first = ((counter[0] | counter[1] << 32) - place) % 2**64
        bits = native.draw_blocks(first, blocks, counter[2], counter[3], key[0] | key[1] << 32)
        assert bits[8 * place : 8 * place + 8] == [w >> shift & 0xFFFF for w in words for shift in (0, 16)]


KEEPS = st.sampled_from([1.0, 0.5, 0.3, 2.0**-16, 2.0**-17, 65535 / 65536, 1 - 2.0**-40]) | st.floats(0, 1, exclude_min=True)


@given(KEEPS, st.integers(0, 2**64 - 1), st.integers(0, LOW), st.integers(0, LOW), st.integers(0, 2**62), st.integers(1, 70))
def test_one_by_one(keep: float, seed: int, tensor: int, step: int, first: int, n: int) -> None:
    found = native.child_kept(keep, seed, tensor, step, first + np.arange(n))
    assert found.tolist() == [kept(first + e, tensor, step, keep, seed) for e in range(n)]


@given(st.data(), KEEPS, st.sampled_from(FLOATING))
def test_any_layout_and_place(data: st.DataObject, keep: float, dtype: str) -> None:
    grads, places, expected = [], [], []
    for _ in range(data.draw(st.integers(0, 3))):
        shape, order, gaps, front = data.draw(layouts())
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        g = strided(random_values(rng, int(np.prod(shape)), dtype, special=True).reshape(shape), order, gaps, front)
        whole = [s + data.draw(st.integers(0, 3)) for s in shape]
        strides = [int(np.prod(whole[d + 1 :])) for d in range(len(shape))]
        place = (data.draw(st.integers(0, LOW)), data.draw(st.integers(0, 2**60)), strides)
        index = place[1] + sum((i * s for i, s in zip(np.indices(shape), strides, strict=True)), np.zeros(shape, np.int64))
        mask = native.child_kept(keep, 9, place[0], 4, index.ravel()).reshape(shape)
        grads.append(g)
        places.append(place)
        expected.append(masked(g, dtype, mask, keep))
    native.child_mask_([operand(g, dtype) for g in grads], keep, 9, 4, places)
    assert all(same_bits(g, e, dtype) for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("keep", [1.0, 0.3, 2.0**-15])
def test_chunk_boundaries_and_threads(dtype: str, keep: float) -> None:
    rng = np.random.default_rng(0)
    grads = [random_values(rng, n, dtype, special=True) for n in BOUNDARIES]
    masks = [native.child_kept(keep, 5, i, 6, np.arange(g.size)) for i, g in enumerate(grads)]
    expected = [masked(g, dtype, m, keep) for g, m in zip(grads, masks, strict=True)]
    for threads, part in POOLS:
        native.set_pool(threads, part)
        out = [g.copy() for g in grads]
        native.child_mask_([operand(g, dtype) for g in out], keep, 5, 6)
        assert all(same_bits(o, e, dtype) for o, e in zip(out, expected, strict=True)), (threads, part)
