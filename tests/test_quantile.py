from __future__ import annotations

import functools
import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fastcl
from fastcl import backends, ops, reference
from fastcl.ops import _dispatch
from fastcl.ops.quantile import _counts, _wide, select
from fastcl.reference.quantile import BINS, DIGITS, from_keys, radix_counts, ranks
from fastcl.testing import CASES
from fastcl.testing.quantile import skewed
from layouts import FLOATING, INTERPRETED, LAYOUTS, SHAPES, identical

LARGE = 3000 if INTERPRETED else 100_000  # beyond what the CPU searches without a sample
QS = (0.0, 0.3, 0.5, 0.999, 1.0)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 5e-324, 3e38, -3e38, 1e-6)


def flat(tensors):
    return np.concatenate([t.detach().double().cpu().numpy().ravel() for t in tensors])


def numpys(tensors, q):
    with np.errstate(invalid="ignore"):
        return float(np.quantile(flat(tensors), q))


def same(value, expected):
    """Equal to the last bit, but that the two zeros are one number."""
    value = float(value)
    return value == expected or (math.isnan(value) and math.isnan(expected))


def check(tensors, qs=QS):
    before = [t.clone() for t in tensors]
    for q in qs:
        value = ops.quantile(tensors, q)
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value.device == tensors[0].device
        assert same(value, numpys(tensors, q)), (q, float(value), numpys(tensors, q))
    assert all(identical(a, b) for a, b in zip(tensors, before, strict=True))


def values(shapes, dtype, device, seed=0):
    gen = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=gen, device=device).pow_(3).to(dtype) for s in shapes]


@pytest.mark.parametrize("shapes", [s for s in SHAPES.values() if sum(math.prod(x) for x in s)], ids=str)
def test_shapes(device, shapes):
    check(values(shapes, torch.float32, device))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, LARGE])
def test_dtypes(device, dtype, n):
    check(values([(n,)], dtype, device), (*QS, 1 / 3, 1 - 1 / n))
    check(values([(5,), (n,), (0, 4), (2, 3)], dtype, device), (*QS, 1 / 3))


def test_mixed_dtypes_in_one_list(device):
    for pair in itertools.product(FLOATING, FLOATING):
        check([t.to(d) for t, d in zip(values([(50, 7), (LARGE,)], torch.float64, device), pair, strict=True)], (0.1, 0.7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    check([LAYOUTS[layout](t) for t in values([(60, 100), (2, 3, 4, 5), (333,), ()], torch.float32, device)])
    if not INTERPRETED:
        check([LAYOUTS[layout](t) for t in values([(600, 301), (20, 30, 41, 5)], torch.float32, device)], (0.2, 0.9))


def test_expanded_tensors_count_every_element(device):
    check([torch.arange(4.0, device=device)[:, None].expand(4, 50), torch.full((), 2.5, device=device).expand(7, 3)])


KINDS = {
    "equal": lambda n: torch.full((n,), 0.3),
    "zeros of both signs": lambda n: torch.where(torch.arange(n) % 3 == 0, 0.0, -0.0),
    "two values": lambda n: (torch.arange(n) % 2).float(),
    "ascending": lambda n: torch.arange(n).float() - n / 3,
    "descending": lambda n: -torch.arange(n).float(),
    "denormals": lambda n: torch.arange(n).float().sub(n // 2).mul(1e-45),
    "negative": lambda n: -torch.rand(n),
    "one far away": lambda n: torch.cat([torch.full((1,), 1e30), torch.rand(n - 1)]),
    "skewed": lambda n: skewed([(n,)], torch.float32, "cpu", 0)[0],
    "periodic": lambda n: (torch.arange(n) % 4096).float(),
    "few bits": lambda n: torch.randn(n).mul(4).round(),
    "neighbouring floats": lambda n: (torch.arange(n, dtype=torch.int32) % 5 + 0x3F800000).view(torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [7, LARGE])
def test_distributions(device, kind, n):
    x = KINDS[kind](n).to(device)
    check([x], (*QS, 0.1, 0.299999, 2 / 3, 0.9, 1 / n, 1 - 2 / n))
    check([x.double() / 3, -x], (0.2, 0.5, 0.8))


@pytest.mark.parametrize("n", [5, LARGE])
def test_infinities_are_numpys(device, n):
    for dtype in FLOATING:
        x = values([(n,)], dtype, device)[0]
        x[0], x[-1] = math.inf, -math.inf
        check([x], (0.0, 0.01, 0.5, 0.5 + 1e-9, 1 - 0.5 / n, 0.5 / n, 1.0))
        x[: n // 2 + 1] = math.inf
        check([x], (0.3, 0.7, 1.0))


@pytest.mark.parametrize("n", [3, LARGE])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_nan_gives_nan(device, n, sign):
    for dtype, q in itertools.product(FLOATING, (0.0, 0.5, 1.0)):
        x = values([(n,), (2,)], dtype, device)
        x[0][n // 2] = math.copysign(math.nan, sign)
        assert ops.quantile(x, q).isnan()


@st.composite
def drawn(draw):
    element = st.floats(allow_nan=False, width=32) | st.sampled_from(SPECIAL)
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        held = draw(st.lists(element, max_size=9))
        t = torch.tensor(held * draw(st.integers(1, 3)), dtype=torch.float64).to(draw(st.sampled_from(FLOATING)))
        tensors.append(torch.stack([t, t], dim=-1)[..., 0] if draw(st.booleans()) else t)
    return tensors


@hypothesis.given(drawn(), st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
@hypothesis.settings(max_examples=20 if INTERPRETED else 150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list_equals_numpy(device, tensors, q):
    tensors = [t.to(device) for t in tensors]
    if sum(t.numel() for t in tensors):
        check(tensors, (q,))


def by_counts(tensors, q):
    """As on devices and over ranks: digit by digit, whatever the backend does otherwise."""
    at = tensors[0].device
    own = [t for t in tensors if t.numel()]
    return select(functools.partial(_counts, at, own, _wide(own)), sum(t.numel() for t in own), q, _wide(own), at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_select_by_counts(device, kind, dtype):
    tensors = [KINDS[kind](3000).to(device, dtype), KINDS[kind](2000).to(device).view(20, 100).t(), torch.zeros(0, device=device)]
    for q in (*QS, 0.1):
        assert same(by_counts(tensors, q), numpys(tensors, q)), q
    tensors[0][7] = math.nan
    assert by_counts(tensors, 0.5).isnan()


@pytest.mark.parametrize("wide", [False, True])
def test_counts_of_every_level_equal_the_definition(device, wide):
    for kind in ("skewed", "few bits", "negative", "zeros of both signs"):
        tensors = [KINDS[kind](5000).to(device), values([(40, 50)], torch.bfloat16, device)[0].t()]
        if wide:
            tensors.append(values([(3000,)], torch.float64, device)[0])
        tensors[0][5], tensors[0][6], tensors[0][7] = math.nan, -math.nan, -math.inf
        at = tensors[0].device
        prefixes = [0, 0]
        for level, width in enumerate(DIGITS[wide]):
            given = torch.tensor(prefixes, device=at)
            found = _dispatch.run_reading("radix_counts", at, tensors, given, level, wide)
            expected = radix_counts(tensors, given, level, wide)
            assert found.shape == (2, BINS + 1)
            assert torch.equal(found, expected), (kind, level)
            assert level or int(found.sum()) == 2 * sum(t.numel() for t in tensors)
            # On, into the fullest digit and the one of the median.
            middle = int(torch.searchsorted(found[1, :BINS].cumsum(0), found[1, :BINS].sum() // 2, right=True).clamp(max=(1 << width) - 1))
            prefixes = [(prefixes[0] << width) | int(found[0, :BINS].argmax()), (prefixes[1] << width) | middle]
            prefixes = [p - (1 << 64) if p >= 1 << 63 else p for p in prefixes]


def test_keys_are_in_the_numbers_order():
    x = torch.tensor([-math.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, math.inf], dtype=torch.float64)
    for wide, dtype in ((False, torch.float32), (True, torch.float64)):
        keys, missing = reference.quantile.__globals__["_keys"](x.to(dtype), wide)
        unsigned = [int(k) % (1 << 64) for k in keys]
        assert unsigned == sorted(unsigned)
        assert unsigned[4] == unsigned[5]
        assert len(set(unsigned)) == 8
        assert not missing.any()
        assert torch.equal(from_keys(keys, wide), x.to(dtype).double())


def test_ranks_of_more_elements_than_an_int32_counts():
    """The select itself, over counts of a made-up list of 2^33 + 1 elements."""
    half = 1 << 32
    for q, value in ((0.0, 1.0), (0.25, 1.0), (0.5, 2.0), (0.75, 2.0), (1.0, 2.0), (0.5 - 2.0**-35, 1.75)):
        assert same(select(functools.partial(_repeated, half), 2 * half + 1, q, False, torch.device("cpu")), value), q
    assert ranks(2 * half + 1, 0.5) == (half, half + 1, 0.0)


def _repeated(half, prefixes, level):
    """``half`` ones and ``half + 1`` twos."""
    return radix_counts([torch.ones(1)], prefixes, level, False) * half + radix_counts([torch.full((1,), 2.0)], prefixes, level, False) * (
        half + 1
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="hours in the interpreter")
def test_more_than_2_to_the_31_real_elements(device):
    if backends.serving(device) == "reference":
        pytest.skip("the definition sorts a float64 copy and its ranks: 64 GiB")
    n = 2**31 + 10
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    x[-7:] = torch.arange(1, 8, dtype=torch.bfloat16, device=device)
    x[:2] = -1
    for q, value in ((0.0, -1.0), (0.5, 0.0), ((n - 8) / (n - 1), 0.0), ((n - 7) / (n - 1), 1.0), ((n - 3) / (n - 1), 5.0), (1.0, 7.0)):
        assert float(ops.quantile([x], q)) == pytest.approx(value, abs=1e-6)


def test_threads_and_runs_are_bitwise_equal(device):
    tensors = values([(LARGE,), (33, 1000), (5,)], torch.float32, device)
    results = []
    for threads in (1, 2, 3, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(ops.quantile(tensors, 0.37))
        finally:
            torch.set_num_threads(before)
    assert all(identical(r, results[0]) for r in results)


def test_flushed_denormals_do_not_change_the_counting(device):
    """The order of denormals is that of their bits, in a mode in which comparisons take them for zero."""
    x = [KINDS["denormals"](LARGE).to(device)]
    expected = [numpys(x, q) for q in (0.2, 0.9)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        at = x[0].device
        p = torch.zeros(2, dtype=torch.int64, device=at)
        counts = [_dispatch.run_reading("radix_counts", at, x, p, level, False) for level in range(3)]
        found = [ops.quantile(x, q) for q in (0.2, 0.9)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(c, radix_counts(x, p, level, False)) for level, c in enumerate(counts))
    if backends.serving(device) == "cpp":  # the others compute with flushed numbers
        assert [float(f) for f in found] == expected or all(float(f) == 0 for f in found)


def test_cases_rivals_find_the_same_number(device):
    case = CASES["quantile"]
    tensors, q = case.make([(300, 40), (77,), ()], torch.float32, torch.float32, device)
    ours = float(case.call(tensors, q))
    for name in ("reference", *case.providers):
        assert float(case.provider(name)(tensors, q)) == pytest.approx(ours, rel=1e-6), name
        assert float(case.provider(name)([t.clone() for t in tensors], q)) == pytest.approx(ours, rel=1e-6), name


def test_opcheck(device):
    torch.library.opcheck(torch.ops.fastcl.quantile.default, (values([(4, 5), (7,)], torch.float32, device), 0.3))


def test_compile_fullgraph(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fastcl.ops.quantile([2 * t for t in x], 0.3) + 1, fullgraph=True)
    x = values([(6, 10), (7,)], torch.float32, device)
    assert same(compiled(x), numpys([2 * t for t in x], 0.3) + 1)


def test_inference_tensors(device):
    with torch.inference_mode():
        x = values([(50,)], torch.float32, device)
        check(x)
    check(x)


def test_nothing_is_recorded(device):
    x = torch.rand(9, device=device, requires_grad=True)
    assert not ops.quantile([x], 0.5).requires_grad


BAD = {
    "no tensors": (lambda x: ([], 0.5), ValueError, "tensors has no element"),
    "empty tensors": (lambda x: ([x[0][:0]], 0.5), ValueError, r"tensors has no element \(1 tensors\)"),
    "dtype": (lambda x: ([x[0], x[1].int()], 0.5), TypeError, r"tensors\[1\] has dtype int32; accepted are float64"),
    "uint8": (lambda x: ([x[0], x[1].to(torch.uint8)], 0.5), TypeError, r"tensors\[1\] has dtype uint8"),
    "sparse": (lambda x: ([x[0].to_sparse()], 0.5), TypeError, r"tensors\[0\] must be a dense tensor"),
    "device": (lambda x: ([x[0], x[1].to("meta")], 0.5), ValueError, r"tensors\[1\] is on meta and tensors\[0\] is on"),
    "one tensor": (lambda x: (x[0], 0.5), TypeError, "tensors must be a list or tuple of tensors, got Tensor"),
    "None": (lambda x: ([x[0], None], 0.5), TypeError, r"tensors\[1\] must be a tensor, got NoneType"),
    "negative q": (lambda x: (x, -0.1), ValueError, r"q must be in \[0, 1\], got -0.1"),
    "large q": (lambda x: (x, 70), ValueError, r"q must be in \[0, 1\], got 70"),
    "NaN q": (lambda x: (x, math.nan), ValueError, r"q must be in \[0, 1\]"),
    "tensor q": (lambda x: (x, torch.tensor(0.5)), TypeError, "q must be a number"),
    "text": (lambda x: (x, "0.5"), TypeError, "q must be a number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument(device, kind):
    make, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        ops.quantile(*make([torch.rand(5, device=device), torch.rand(3, 4, device=device)]))
