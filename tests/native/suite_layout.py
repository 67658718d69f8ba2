"""The layout arithmetic: every element is visited once, and memory that is shared is found. Oracles look at every address."""

from __future__ import annotations

import itertools

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import broadcastable, layouts, strided
from hypothesis import assume, given
from hypothesis import strategies as st


def fake(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str = "f32", address: int = 1 << 20) -> native.Operand:
    return native.at_address(address, list(shape), list(strides), dtype)


def steps(array: np.ndarray) -> tuple[int, ...]:
    return tuple(s // array.itemsize for s in array.strides)


def offsets(shape: tuple[int, ...], strides: tuple[int, ...], onto: tuple[int, ...] | None = None) -> np.ndarray:
    """The offset of every element in row-major order, broadcast to the shape ``onto``."""
    index = np.indices(shape).reshape(len(shape), -1) if shape else np.zeros((0, 1), np.int64)
    flat = (index * np.array(strides, np.int64).reshape(-1, 1)).sum(0).reshape(shape)
    return np.broadcast_to(flat, shape if onto is None else onto).ravel()


@given(st.data())
def test_walk_visits_every_element_once_with_its_partners(data: st.DataObject) -> None:
    shape, order, gaps, front = data.draw(layouts())
    views = [strided(np.zeros(shape, np.float32), order, gaps, front)]
    for _ in range(data.draw(st.integers(0, 2))):
        own = data.draw(broadcastable(shape))
        other = strided(np.zeros(own, np.float32), tuple(data.draw(st.permutations(range(len(own))))), (1,) * len(own), 0)
        views.append(other)
    numel = int(np.prod(shape))
    assume(numel > 0)
    operands = [native.of_array(v, "f32") for v in views]
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=4))})
    rows = np.concatenate([native.walked(operands, a, b) for a, b in itertools.pairwise(cuts)])
    expected = np.stack([offsets(v.shape, steps(v), shape) for v in views], axis=1)
    assert len(rows) == numel
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_equal_dense_layouts_become_one_run() -> None:
    for order in itertools.permutations(range(4)):
        dense = strided(np.zeros((2, 3, 4, 5), np.float32), order, (1, 1, 1, 1), 0)
        assert native.layout([native.of_array(dense, "f32")] * 2) == ([120], [1, 1])
    rows = [fake((6, 7), (7, 1)), fake((6, 1), (1, 1))]
    assert native.layout(rows) == ([7, 6], [1, 0, 7, 1])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4))
def test_overlap_within_a_view_is_found(dims: list[tuple[int, int]]) -> None:
    shape, strides = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
    view = fake(shape, strides)
    addresses = offsets(shape, strides)
    shared = len(set(addresses.tolist())) < len(addresses)
    answer = native.overlaps_itself(view)
    assert answer or not shared, "memory that is shared was called apart"
    if len(addresses) == 0:
        return
    # What slicing, transposing and expanding make: each stride a multiple of the extent below it. There the answer is exact.
    kept = sorted((st_, n) for n, st_ in dims if n > 1)
    nested = all(a[0] > 0 and b[0] >= a[0] * a[1] for a, b in itertools.pairwise(kept)) and all(k[0] > 0 for k in kept)
    if nested:
        assert not answer
    if any(k[0] == 0 for k in kept):
        assert answer


@given(layouts())
def test_slices_and_transposes_do_not_overlap(drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]) -> None:
    array = strided(np.zeros(drawn[0], np.float32), *drawn[1:])
    assert not native.overlaps_itself(native.of_array(array, "f32"))


SIZES = {"f64": 8, "f32": 4, "f16": 2, "u8": 1}
PIECE = st.tuples(st.integers(0, 60), st.sampled_from(list(SIZES)), st.integers(0, 4), st.integers(1, 3))


def piece(spec: tuple[int, str, int, int]) -> native.Operand:
    slot, dtype, n, stride = spec
    return fake((n,), (stride,), dtype, (1 << 20) + slot * 8)


def touched(spec: tuple[int, str, int, int]) -> list[set[int]]:
    """The bytes of each element."""
    slot, dtype, n, stride = spec
    size = SIZES[dtype]
    return [set(range(slot * 8 + e * stride * size, slot * 8 + e * stride * size + size)) for e in range(n)]


def interval(spec: tuple[int, str, int, int]) -> tuple[int, int]:
    elements = touched(spec)
    return (min(elements[0]), max(elements[-1]) + 1) if elements else (0, 0)


def must_refuse(written: list[tuple[int, str, int, int]], reads: list[list[tuple[int, str, int, int]]], by_range: bool) -> bool:
    def meet(a: tuple[int, str, int, int], b: tuple[int, str, int, int]) -> bool:
        if by_range:
            (a0, a1), (b0, b1) = interval(a), interval(b)
            return a0 < b1 and b0 < a1
        return bool(set().union(*touched(a)) & set().union(*touched(b)))

    if any(meet(a, b) for a, b in itertools.combinations(written, 2)):
        return True
    return any(meet(w, r) for read in reads for j, r in enumerate(read) for i, w in enumerate(written) if not (i == j and w == r))


@given(st.lists(PIECE, max_size=5), st.lists(st.lists(PIECE, max_size=5), max_size=2), st.booleans())
def test_overlap_between_views_is_found(
    written: list[tuple[int, str, int, int]], reads: list[list[tuple[int, str, int, int]]], partner: bool
) -> None:
    if partner:
        reads = [[*read[: len(written) // 2], *written[len(written) // 2 :]] for read in reads]
    answer = native.writes_overlap([piece(w) for w in written], [[piece(r) for r in read] for read in reads])
    # Exact for ranges of memory; interleaved views are documented to count as sharing.
    assert answer == must_refuse(written, reads, by_range=True)
    if must_refuse(written, reads, by_range=False):
        assert answer


def test_ten_thousand_views_in_any_order() -> None:
    rng = np.random.default_rng(0)
    for order in (np.arange(10_000), np.arange(10_000)[::-1], rng.permutation(10_000)):
        views = [fake((4,), (1,), "f32", (1 << 30) + int(i) * 16) for i in order]
        reads = [fake((4,), (1,), "f32", (1 << 32) + int(i) * 16) for i in order]
        assert not native.writes_overlap(views, [reads])
        assert native.writes_overlap([*views, fake((1,), (1,), "u8", (1 << 30) + 777)], [reads])
        assert native.writes_overlap(views, [[*reads, fake((1,), (1,), "u8", (1 << 30) + 777)]])


BIG = 1 << 33


@pytest.mark.parametrize("case", [
    ((BIG,), (1,), (1,), (0,)),
    ((BIG, 3), (3, 1), (BIG, 1), (1, 1)),
    ((3, BIG), (1, 3), (3, 1), (1, 1)),
    ((70_000, 70_000), (1, 70_000), (1, 70_000), (70_000, 1)),
    ((65_537, 3, 65_537), (3 * 65_537, 65_537, 1), (65_537, 1, 65_537), (65_537, 65_537, 1)),
])  # fmt: skip
def test_more_than_2_to_the_31_elements(case: tuple[tuple[int, ...], ...]) -> None:
    """No memory is touched: only the arithmetic runs, at both ends and at every power of two."""
    shape, strides, other_shape, other_strides = case
    views = [fake(shape, strides), fake(other_shape, other_strides)]
    assert views[0].numel == int(np.prod(shape, dtype=object))
    assert views[0].span == (sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1) * 4
    assert native.broadcasts(views[1], views[0])
    assert not native.overlaps_itself(views[0])
    order = sorted((d for d in range(len(shape))), key=lambda d: (strides[d], -d))
    for start in (0, *(2**k for k in range(30, 34)), views[0].numel - 7):
        if not 0 <= start <= views[0].numel - 7:
            continue
        rows = native.walked(views, start, start + 7)
        for e, row in enumerate(rows.tolist()):
            rest, first, second = start + e, 0, 0
            for d in order:
                rest, index = divmod(rest, shape[d])
                first += index * strides[d]
                second += index * other_strides[d] * (other_shape[d] != 1)
            assert row == [first, second]
    runs = native.runs(views[:1], 2**31 - 5, 2**31 + 5) if len(shape) == 1 else []
    assert runs in ([], [([2**31 - 5], 10)])
    assert native.writes_overlap([views[0], fake((1,), (1,), "u8", (1 << 20) + views[0].span - 1)], [])
    assert not native.writes_overlap([views[0], fake((1,), (1,), "u8", (1 << 20) + views[0].span)], [])
