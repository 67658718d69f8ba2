"""The Triton kernels of masks, pull, Fisher and quantile against the reference, in the interpreter; see triton_interpreted.py."""

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import _fisher, _indices, _lists, bit_mask, child_mask, pull, quantile
from fastcl.reference import bit_mask as bits_defined
from fastcl.reference import child_mask as child_defined
from layouts import FLOATING, identical

pull_defined, counts_defined, fisher_defined = (
    importlib.import_module(f"fastcl.reference.{m}") for m in ("pull", "quantile", "importance")
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F64 = torch.float64
WHOLE = (1 << 64) - 1
# Whole blocks and tails, walks in memory order that is not row-major, gaps, memory that is not aligned, and nothing at all.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}
SHAPES = [(4096,), (4097,), (3, 43), (), (0, 3)]


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def several(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """All forms of a matrix, and row-major tensors of other shapes."""
    return [form(normal((37, 31), dtype, seed)) for form in FORMS.values()] + [normal(s, dtype, seed) for s in SHAPES]


def kept(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in tensors]


def both(ours: Any, theirs: Any, written: list[Tensor], *args: Any) -> list[Tensor]:
    a, b = kept(written), kept(written)
    ours(a, *args)
    theirs(b, *args)
    assert all(identical(x, y) for x, y in zip(a, b, strict=True))
    return a


KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    @triton.jit
    def kernel(given, out):  # type: ignore[no-untyped-def]
        c = (tl.load(given), tl.load(given + 1), tl.load(given + 2), tl.load(given + 3))
        block = c[0].to(tl.int64) | (c[1].to(tl.int64) << 32)
        drawn = child_mask._philox(block, c[2], c[3], False, (tl.load(given + 4), tl.load(given + 5)))
        for n in tl.static_range(4):
            tl.store(out + n, drawn[n])

    out = torch.empty(4, dtype=torch.uint32)
    kernel[(1,)](torch.tensor([*counter, *key], dtype=torch.uint32), out)
    assert out.tolist() == list(words)


# The second keep's first 16 bits decide nearly nothing, and the third's 2^-20 is below their step: the second draw decides.
DRAWS = [(0.3, 5, 0), (0.3 + 2.0**-17, 1 << 40, 7), (1 - 2.0**-20, WHOLE, (1 << 32) - 1), (1.0, 3, 1)]


@pytest.mark.parametrize(("keep", "seed", "step"), DRAWS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_child_mask(dtype: torch.dtype, keep: float, seed: int, step: int) -> None:
    left = both(child_mask.child_mask_, child_defined.child_mask_, several(dtype), keep, seed, step)
    assert keep < 1 - 1e-5 or all(t.all() for t in left)


@pytest.mark.parametrize("offset", [0, 8, 4099, (1 << 35) + 8, (1 << 61) + 3], ids=str)
def test_child_mask_of_parts_of_parameters(offset: int) -> None:
    """Rows, columns, every second element, and parts that begin within a block of Philox or beyond 2^32 elements."""
    grads = [*several(torch.float32)[:4], normal((4100,), torch.float32), normal((3, 4, 5), torch.float32), normal((), torch.float32)]
    strides = [(31, 1), (1, 37), (1000, 2), (93, 3), (1,), (400, 20, 4), ()]
    places = [(7 * n, offset, s) for n, s in enumerate(strides)]
    both(child_mask.child_mask_at_, child_defined.child_mask_at_, grads, 0.4, 11, 5, places)


def test_the_parts_of_a_parameter_are_masked_as_the_whole() -> None:
    whole = normal((64, 48), torch.float32)
    parts = kept([whole[:20], whole[20:], whole[:, :7], whole[:, 7:]])
    child_mask.child_mask_at_(parts, 0.5, 3, 9, [(2, 0, (48, 1)), (2, 20 * 48, (48, 1)), (2, 0, (48, 1)), (2, 7, (48, 1))])
    grads = [torch.zeros(1), torch.zeros(1), whole]
    child_mask.child_mask_(grads, 0.5, 3, 9)
    assert torch.equal(torch.cat(parts[:2]), grads[2])
    assert torch.equal(torch.cat(parts[2:], 1), grads[2])


def test_child_mask_draws_twice_where_it_must() -> None:
    """keep = 1 - 2^-20 drops an element in 16 of those whose 16 bits are the last: all that are dropped drew twice."""
    zero = torch.zeros(1 << 18)
    grads = [zero + 1]
    child_mask.child_mask_(grads, 65535.5 / 65536, 1, 1)
    assert 0 < int((grads[0] == 0).sum()) < 12
    exact = kept([zero + 1])
    child_defined.child_mask_(exact, 65535.5 / 65536, 1, 1)
    assert torch.equal(grads[0], exact[0])


def test_child_mask_multiplies() -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3e38] * 40)
    both(child_mask.child_mask_, child_defined.child_mask_, [special, special.to(torch.bfloat16), special.double()], 0.5, 2, 3)


def test_more_dims_than_one_walk_holds() -> None:
    g = normal((3, 2, 3, 2, 3, 2, 3, 2), torch.float32).permute(7, 0, 5, 2, 3, 4, 1, 6)[:, ::2]
    both(child_mask.child_mask_, child_defined.child_mask_, [g], 0.5, 2, 3)
    bits = bits_defined.pack(normal(tuple(g.shape), F64) > 0)
    both(bit_mask.bit_mask_, bits_defined.bit_mask_, [g], [bits])
    both(bit_mask.threshold_bits_, bits_defined.threshold_bits_, [torch.zeros_like(bits)], [g], torch.zeros((), dtype=F64))
    squares = _fisher.fisher_squares([g])
    torch.testing.assert_close(squares, fisher_defined.fisher_squares([g]), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_bit_mask(dtype: torch.dtype) -> None:
    grads = several(dtype)
    grads[0][3, :9] = torch.tensor([math.nan, math.inf, -math.inf] * 3)
    bits = [bits_defined.pack(normal(tuple(g.shape), F64, 1) > 0.3) for g in grads]
    both(bit_mask.bit_mask_, bits_defined.bit_mask_, grads, bits)


@pytest.mark.parametrize("wide", [False, True], ids=["32 bit", "64 bit"])
def test_indices_in_walks_of_either_width(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lists, "_wide", lambda w: wide and bool(w.sizes))
    grads = several(torch.float32)
    both(child_mask.child_mask_, child_defined.child_mask_, grads, 0.5, 3, 4)
    bits = [bits_defined.pack(normal(tuple(g.shape), F64, 1) > 0.3) for g in grads]
    both(bit_mask.bit_mask_, bits_defined.bit_mask_, grads, bits)


THRESHOLDS = [0.1, -0.0, 1e39, -1e39, math.inf, -math.inf, math.nan, 1e-320, -1e-320, 0.10000000149011613, 3.4028235677973366e38]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_threshold_bits(dtype: torch.dtype) -> None:
    special = torch.tensor([0.1, -0.1, 0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4028235e38, -3.4028235e38, 1e300], dtype=F64)
    values = [*several(dtype), special.to(dtype)]
    for limit in THRESHOLDS:
        garbage = [torch.full((-(-t.numel() // 8),), 77, dtype=torch.uint8) for t in values]
        both(bit_mask.threshold_bits_, bits_defined.threshold_bits_, garbage, values, torch.tensor(limit, dtype=F64))


@pytest.mark.parametrize(
    ("dtype", "stored"), [*zip(FLOATING, FLOATING, strict=True), (torch.bfloat16, torch.float32), (torch.float32, F64)], ids=str
)
@pytest.mark.parametrize("strength", [0.0, 1 / 3])
def test_pull(dtype: torch.dtype, stored: torch.dtype, strength: float) -> None:
    grads, params, anchor = several(dtype), several(dtype, 1)[::-1], several(stored, 2)
    params = [p.expand(g.shape) if p.dim() == 0 else normal(tuple(g.shape), dtype, 3) for g, p in zip(grads, params, strict=True)]
    precision = [normal(tuple(g.shape), stored, 4).abs() for g in grads]
    grads[1][3, 3] = math.nan
    both(pull.ewc_pull_, pull_defined.ewc_pull_, grads, params, precision, anchor, strength)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_fisher(dtype: torch.dtype, max_norm: float | None) -> None:
    grads = several(dtype, 1)
    for stored in (torch.float32, F64):
        ours = [t.abs() for t in several(stored)]
        theirs = kept(ours)
        _fisher.fisher_add_(ours, grads, 0.3, max_norm)
        fisher_defined.fisher_add_(theirs, grads, 0.3, max_norm)
        # The norm is summed in another order: its last bit may differ, and after the rounding to float32 hardly ever.
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0 if max_norm is None else 8 * torch.finfo(stored).eps, atol=0)
    again = _fisher.fisher_squares(grads)
    torch.testing.assert_close(again, fisher_defined.fisher_squares(grads), rtol=1e-14, atol=0)


def test_fisher_of_more_tensors_than_one_launch_holds() -> None:
    grads = [torch.full((n % 7,), float(n)) for n in range(70)]
    assert _fisher.fisher_squares(grads).tolist() == [float(n * n * (n % 7)) for n in range(70)]
    ours, theirs = ([torch.ones_like(g) for g in grads] for _ in range(2))
    _fisher.fisher_add_(ours, grads, 1.0, 2.0)
    fisher_defined.fisher_add_(theirs, grads, 1.0, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_norm_that_is_no_number(special: float) -> None:
    g = torch.tensor([1.0, special, 2.0])
    ours, theirs = [torch.ones(3)], [torch.ones(3)]
    _fisher.fisher_add_(ours, [g], 1.0, 1.0)
    fisher_defined.fisher_add_(theirs, [g], 1.0, 1.0)
    assert identical(ours[0], theirs[0])
    assert ours[0].isnan().any()


def counted(dtype: torch.dtype) -> list[Tensor]:
    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, 1e-40, -1e-40, -math.nan], dtype=F64).to(dtype)
    return [*several(dtype), special, torch.full((500,), 0.25, dtype=dtype)]


@pytest.mark.parametrize(("dtype", "wide"), [(F64, True), (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str)
def test_radix_counts(dtype: torch.dtype, wide: bool) -> None:
    tensors = counted(dtype)
    keys, _ = counts_defined._keys(torch.tensor([0.25, -1.5], dtype=dtype), wide)
    widths = quantile.DIGITS[wide]
    assert widths == counts_defined.DIGITS[wide]
    for level in range(len(widths)):
        prefixes = [(int(k) >> sum(widths[level:])) & ((1 << sum(widths[:level])) - 1) for k in keys]
        for pair in (prefixes, prefixes[:1] * 2):
            args = (tensors, torch.tensor(pair), level, wide)
            assert torch.equal(quantile.radix_counts(*args), counts_defined.radix_counts(*args))


def test_counts_of_several_stretches() -> None:
    length = 2 * quantile.STRETCH * _lists.BLOCK + _lists.BLOCK + 5
    values = normal((length,), torch.float32)
    counts = quantile.radix_counts([values], torch.zeros(2, dtype=torch.int64), 0, False)
    assert torch.equal(counts, counts_defined.radix_counts([values], torch.zeros(2, dtype=torch.int64), 0, False))
    assert counts.sum().item() == 2 * length


def test_no_indices_are_listed_where_the_walk_counts() -> None:
    grads = [torch.zeros(5, 5), torch.zeros(5, 5).t(), torch.zeros(2, 3)[:, :2]]
    assert [i is None for i in _indices.own_indices(grads)] == [True, False, False]
    assert all(i is not None for i in _indices.whole_indices(grads, [(0, 0, (5, 1))] * 3))
    columns = {m: column for launch, column in _indices.indexed(grads, _indices.own_indices(grads)) for m in launch.members}
    assert columns == {0: -1, 1: 1, 2: 1}


def test_numbers_arrive_whole() -> None:
    values = (0, 1, 16, 65535, 65536, (1 << 32) - 1, 1 << 48, WHOLE)
    for value, count in itertools.product(values, (1, 2, 4)):
        parts = np.array([(v - 3) // 2 for v in _lists.words(value, count)], dtype=object)
        assert sum(int(p) << 16 * n for n, p in enumerate(parts)) == value & ((1 << 16 * count) - 1)
        assert all(v % 2 and v > 1 for v in _lists.words(value, count))
