from __future__ import annotations

import hypothesis
import numpy as np
import philox
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import fastcl
from fastcl import backends, ops, reference
from fastcl.ops.child_mask import child_mask_at_
from fastcl.reference import child_mask as definition
from fastcl.testing import CASES, clone, gradients
from layouts import FLOATING, INTERPRETED, LAYOUTS, SHAPES, identical

CASE = CASES["child_mask_"]
SLOW = "minutes in the interpreter, whose bits are the reference's"
MOST_SEED, MOST_STEP = 2**64 - 1, 2**32 - 1


def check(grads, keep=0.3, seed=5, step=2):
    """Run the op and the reference on the same arguments, compare bit for bit."""
    expected = clone(grads)
    reference.child_mask_(expected, keep, seed, step)
    strides = [g.stride() for g in grads]
    assert ops.child_mask_(grads, keep, seed, step) is None
    for n, (g, e) in enumerate(zip(grads, expected, strict=True)):
        assert identical(g, e), f"tensor {n} of {g.dtype}, {tuple(g.shape)}, strides {g.stride()}"
    assert [g.stride() for g in grads] == strides


def drawn(device, n, keep, seed, step, tensor=0):
    """The mask that the op draws for the tensor at a place of a list."""
    grads = [torch.ones(0, device=device)] * tensor + [torch.ones(n, device=device)]
    ops.child_mask_(grads, keep, seed, step)
    return (grads[-1] != 0).cpu().numpy()


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
def test_published_known_answers_of_philox(counter, key, words):
    assert [int(w) for w in definition.philox(counter, key)] == list(words)


def test_a_published_known_answer_through_the_op(device):
    """Of counter 0 and key 0: an element is kept where its 16 bits of the answer lie below keep * 65536; every threshold around them."""
    u = [word >> shift & 0xFFFF for word in KNOWN[0][2] for shift in (0, 16)]
    for limit in {x + d for x in u for d in (0, 1)}:
        g = [torch.ones(8, device=device)]
        ops.child_mask_(g, limit / 65536, 0, 0)
        # At the limit itself a second draw has to be below 0.
        assert (g[0] != 0).tolist() == [x < limit for x in u]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_shapes(device, shapes, keep):
    check(gradients(shapes, torch.float32, device, 0), keep)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("keep", [1.0, 0.5, 1 / 3, 2.0**-16, 1e-5, 3e-9, 65535 / 65536, 1 - 2.0**-20])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (MOST_SEED, MOST_STEP), (2**63, 7), (12345678901234567890, 2**31)])
def test_dtypes_and_numbers(device, dtype, keep, seed, step):
    check(gradients([(3, 50), (1290,), ()], dtype, device, 0), keep, seed, step)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_show(device, layout, dtype):
    grads = gradients([(60, 110), (2, 3, 4, 5), (333,), (), (1, 7, 1), (9, 1, 40)], dtype, device, 0)
    laid = [LAYOUTS[layout](g) for g in grads]
    check(laid)
    ops.child_mask_(grads, 0.3, 5, 2)
    assert all(identical(a, b) for a, b in zip(grads, laid, strict=True))


def test_keep_one_keeps_every_bit(device):
    grads = gradients([(1000,), (3, 4)], torch.float32, device, 0)
    before = clone(grads)
    ops.child_mask_(grads, 1, 3, 4)
    assert all(identical(a, b) for a, b in zip(grads, before, strict=True))


def test_what_is_kept_is_scaled_and_the_rest_is_zero(device):
    for dtype in FLOATING:
        g = torch.randn(5000, device=device).to(dtype)
        out = g.clone()
        ops.child_mask_([out], 0.3, 1, 2)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scaled = (g.to(wide) * torch.tensor(1 / 0.3, dtype=wide, device=device)).to(dtype)
        assert bool(((out == scaled) | (out == 0)).all())
        assert 1300 < int((out != 0).sum()) < 1700


def test_nan_and_inf(device):
    g = [torch.full((4000,), value, device=device) for value in (float("nan"), float("inf"), 1.0)]
    ones = [torch.ones(4000, device=device) for _ in g]
    ops.child_mask_(g, 0.3, 1, 2)
    ops.child_mask_(ones, 0.3, 1, 2)
    assert bool(g[0].isnan().all())
    assert torch.equal(g[1].isnan(), ones[1] == 0)
    assert torch.equal(g[1].isinf(), ones[1] != 0)
    assert bool(g[2].isfinite().all())


def test_the_same_numbers_give_the_same_mask_again_and_others_another(device):
    one = drawn(device, 4000, 0.5, 7, 3, 1)
    assert np.array_equal(one, drawn(device, 4000, 0.5, 7, 3, 1))
    for other in (drawn(device, 4000, 0.5, 8, 3, 1), drawn(device, 4000, 0.5, 7, 4, 1), drawn(device, 4000, 0.5, 7, 3, 2)):
        assert 0.4 < (one == other).mean() < 0.6
    assert 0.4 < (one == drawn(device, 4000, 0.5, 7 + 2**32, 3, 1)).mean() < 0.6, "the upper half of the seed counts"
    # A larger probability keeps more, and all that a smaller one keeps: the numbers are the same.
    assert bool((drawn(device, 4000, 0.6, 7, 3, 1) >= one).all())


def test_other_tensors_and_sizes_do_not_show(device):
    whole = drawn(device, 5000, 0.4, 1, 2, 1)
    assert np.array_equal(drawn(device, 1234, 0.4, 1, 2, 1), whole[:1234])


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_parts_of_tensors_are_masked_as_the_whole(device, pieces):
    g = torch.randn(50, 37, device=device)
    whole = [torch.ones(3, device=device), g.clone()]
    ops.child_mask_(whole, 0.4, 9, 8)
    for dim in (0, 1):
        parts = [p.clone() for p in g.chunk(pieces, dim)]
        starts = np.cumsum([0, *(p.shape[dim] for p in parts[:-1])]).tolist()
        child_mask_at_(parts, 0.4, 9, 8, [(1, start * (37, 1)[dim], (37, 1)) for start in starts])
        assert identical(torch.cat(parts, dim), whole[1])
        strided = [p.clone().t().contiguous().t() for p in g.chunk(pieces, dim)]
        child_mask_at_(strided, 0.4, 9, 8, [(1, start * (37, 1)[dim], [37, 1]) for start in starts])
        assert identical(torch.cat(strided, dim), whole[1])


def test_indices_beyond_32_bits(device):
    """No tensor of such a size is needed: a part says where it lies."""
    for first in (2**32 - 5, 2**35 - 3, 2**40 + 1, 2**61 - 70):
        g, expected = ([torch.ones(64, device=device)] for _ in range(2))
        child_mask_at_(g, 0.5, 3, 4, [(2**32 - 1, first, [1])])
        definition.child_mask_at_(expected, 0.5, 3, 4, [(2**32 - 1, first, [1])])
        assert identical(g[0], expected[0])
        assert not np.array_equal(philox.row(64, 0.5, 3, 4, 0, first), philox.row(64, 0.5, 3, 4, 0, first % 2**31)), "high bits count"


@pytest.mark.skipif(INTERPRETED, reason=SLOW)
def test_the_second_draw_holds_the_probability(device):
    """keep below 2^-16: only the second draw can keep anything."""
    n, keep = 1 << 19, 2.0**-17
    mask = drawn(device, n, keep, 11, 0)
    assert int(mask.sum()) > 0
    assert philox.count_p(mask, keep) > philox.ALPHA
    at_limit = np.flatnonzero(drawn(device, n, 2.0**-16, 11, 0))
    assert set(np.flatnonzero(mask)) < set(at_limit)


def test_threads_and_runs_are_bitwise_equal(device):
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            grads = gradients([(70_001,), (33, 1000), (5,)], torch.float32, device, 0)
            ops.child_mask_(grads, 0.3, 1, 2)
        finally:
            torch.set_num_threads(before)
        results.append(grads)
    assert all(identical(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(INTERPRETED, reason=SLOW)
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_statistics(device, keep):
    """Binomial counts, runs, lags, byte patterns; independence across steps, tensors and seeds."""
    n = 1 << (16 if backends.requested() == "reference" else 19)
    masks = {
        f"seed {seed} step {step} tensor {tensor}": drawn(device, n, keep, seed, step, tensor)
        for seed, step, tensor in [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (2**32, 0, 0), (1, 1, 1)]
    }
    assert philox.failures(masks, keep) == []


BROKEN = {
    "three rounds": lambda philox, c, k: philox(c, k, rounds=3),
    "lanes used again": lambda philox, c, k: [w & 0xFFFF | (w & 0xFFFF) << 16 for w in philox(c, k)],
    "words used again": lambda philox, c, k: [philox(c, k)[0]] * 4,
    "the step is not looked at": lambda philox, c, k: philox([*c[:3], 0], k),
    "the tensor is not looked at": lambda philox, c, k: philox([*c[:2], 0, c[3]], k),
    "half of the seed": lambda philox, c, k: philox(c, (k[0], 0)),
    "a bit is stuck": lambda philox, c, k: [w | 0x40000000 for w in philox(c, k)],
}


@pytest.mark.skipif(INTERPRETED, reason=SLOW)
@pytest.mark.parametrize("fault", [None, *BROKEN])
def test_the_statistics_find_a_broken_generator(monkeypatch, fault):
    if fault is not None:
        good = definition.philox
        monkeypatch.setattr(definition, "philox", lambda c, k: BROKEN[fault](good, c, k))
    masks = {str(place): philox.row(1 << 16, 0.3, *place) for place in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0)]}
    assert (philox.failures(masks, 0.3) == []) == (fault is None)


def test_writes_are_seen_by_autograd(device):
    x = torch.ones(4, device=device, requires_grad=True)
    y = x.exp()
    with torch.no_grad():
        ops.child_mask_([y.detach()], 0.5, 0, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors(device):
    with torch.inference_mode():
        g = [torch.ones(300, device=device)]
        check(g)
    check([torch.ones(30, device=device), *g])


@pytest.mark.parametrize("places", [[], [3, 8, 5, 1, 0, 2**40, 1]])
def test_opcheck(device, places):
    g = gradients([(4, 5), (7,)], torch.float32, device, 0)
    torch.library.opcheck(torch.ops.fastcl.child_mask_.default, (g, 0.5, -3, 7, places))


def test_a_seed_is_signed_for_the_dispatcher_only(device):
    direct, through = (torch.ones(500, device=device) for _ in range(2))
    ops.child_mask_([direct], 0.5, MOST_SEED - 2, 7)
    torch.ops.fastcl.child_mask_([through], 0.5, -3, 7)
    assert identical(direct, through)


def test_compile_fullgraph_with_a_step_that_counts(device):
    torch._dynamo.reset()
    compilations = []

    def backend(graph, _inputs):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def masked(grads, step):
        doubled = [g * 2 for g in grads]
        fastcl.ops.child_mask_(doubled, 0.3, MOST_SEED, step)
        return doubled

    grads = gradients([(60, 10), (7,)], torch.float32, device, 0)
    for step in range(6):
        expected = [2 * g for g in grads]
        reference.child_mask_(expected, 0.3, MOST_SEED, step)
        assert all(identical(a, b) for a, b in zip(masked(grads, step), expected, strict=True))
    assert len(compilations) <= 3, "a new step is no new graph"


def test_compiled_with_inductor(device):
    torch._dynamo.reset()
    g = gradients([(60, 10), (7,)], torch.float32, device, 0)
    expected = clone(g)
    reference.child_mask_(expected, 0.3, 1, 2)
    torch.compile(lambda g: ops.child_mask_(g, 0.3, 1, 2), fullgraph=True)(g)
    assert all(identical(a, b) for a, b in zip(g, expected, strict=True))


@hypothesis.given(
    drawn_shapes=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(FLOATING), st.integers(1, 3)), max_size=3),
    keep=st.floats(0, 1, exclude_min=True) | st.sampled_from([1.0, 2.0**-16, 0.25]),
    seed=st.integers(0, MOST_SEED),
    step=st.integers(0, MOST_STEP),
    data=st.data(),
)
@hypothesis.settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, drawn_shapes, keep, seed, step, data):
    torch.manual_seed(0)
    grads = []
    for shape, dtype, gap in drawn_shapes:
        order = data.draw(st.permutations(range(len(shape))))
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        g = torch.randn(shape, device=device).to(dtype).permute(order).contiguous().permute(inverse)
        grads.append(torch.stack([g] * gap, dim=-1)[..., 0])
    check(grads, keep, seed, step)


BAD = {
    "one tensor": (lambda g: (g[0], 0.5, 0, 0), TypeError, "grads must be a list or tuple of tensors, got Tensor"),
    "None inside": (lambda g: ([g[0], None], 0.5, 0, 0), TypeError, r"grads\[1\] must be a tensor, got NoneType"),
    "dtype": (lambda g: ([g[0], g[1].int()], 0.5, 0, 0), TypeError, r"grads\[1\] has dtype int32; accepted are float64"),
    "sparse": (lambda g: ([g[0].to_sparse(), g[1]], 0.5, 0, 0), TypeError, r"grads\[0\] must be a dense tensor"),
    "keep 0": (lambda g: (g, 0.0, 0, 0), ValueError, r"keep must be in \(0, 1\], got 0.0"),
    "keep below 0": (lambda g: (g, -0.5, 0, 0), ValueError, r"keep must be in \(0, 1\], got -0.5"),
    "keep above 1": (lambda g: (g, 1.0000001, 0, 0), ValueError, r"keep must be in \(0, 1\], got 1.0000001"),
    "keep NaN": (lambda g: (g, float("nan"), 0, 0), ValueError, r"keep must be in \(0, 1\], got nan"),
    "keep a tensor": (lambda g: (g, torch.tensor(0.5), 0, 0), TypeError, r"keep must be a number in \(0, 1\], got Tensor"),
    "seed below 0": (lambda g: (g, 0.5, -1, 0), ValueError, r"seed must be an integer in \[0, 2\^64\), got -1"),
    "seed too large": (lambda g: (g, 0.5, 2**64, 0), ValueError, r"seed must be an integer in \[0, 2\^64\), got 18446744073709551616"),
    "seed a float": (lambda g: (g, 0.5, 1.0, 0), TypeError, r"seed must be an integer in \[0, 2\^64\), got float"),
    "step below 0": (lambda g: (g, 0.5, 0, -1), ValueError, r"step must be an integer in \[0, 2\^32\), got -1"),
    "step too large": (lambda g: (g, 0.5, 0, 2**32), ValueError, r"step must be an integer in \[0, 2\^32\), got 4294967296"),
    "step a tensor": (lambda g: (g, 0.5, 0, torch.tensor(1)), TypeError, r"step must be an integer in \[0, 2\^32\), got Tensor"),
    "expanded": (lambda g: ([g[0][:1].expand(5), g[1]], 0.5, 0, 0), ValueError, r"grads\[0\] has elements that share memory"),
    "same twice": (lambda g: ([g[0], g[0]], 0.5, 0, 0), ValueError, r"grads\[1\] and grads\[0\] share memory"),
    "records": (lambda g: ([g[0].clone().requires_grad_(), g[1]], 0.5, 0, 0), ValueError, r"grads\[0\] requires grad"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    make, error, message = BAD[kind]
    grads = [torch.randn(5, device=device), torch.randn(3, 4, device=device)]
    before = clone(grads)
    with pytest.raises(error, match=message):
        ops.child_mask_(*make(grads))
    assert all(identical(a, b) for a, b in zip(grads, before, strict=True))


@pytest.mark.parametrize("places", [[0], [0, 0, 1, 0, 0, 4], [2**32, 0, 1, 0, 0, 4, 1], [0, -1, 1, 0, 0, 4, 1], [0, 0, -1, 0, 0, 4, 1]])
def test_places_that_are_none(device, places):
    grads = [torch.randn(5, device=device), torch.randn(3, 4, device=device)]
    before = clone(grads)
    with pytest.raises(ValueError, match="places"):
        torch.ops.fastcl.child_mask_(grads, 0.5, 0, 0, places)
    assert all(identical(a, b) for a, b in zip(grads, before, strict=True))


class TestChildMaskGradients:
    def model(self, device):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 30, device=device), nn.Linear(30, 20, device=device), nn.Linear(20, 10, device=device))
        for n, p in enumerate(model.parameters()):
            if n not in (1, 2):
                p.grad = torch.ones_like(p)
        return model

    @pytest.mark.parametrize("where", [fastcl, reference], ids=["fastcl", "reference"])
    @pytest.mark.parametrize("iterable", [False, True])
    def test_a_position_counts_parameters_without_a_gradient(self, device, where, iterable):
        model = self.model(device)
        where.child_mask_gradients_(iter(list(model.parameters())) if iterable else model, 0.4, seed=3, step=9)
        every = [torch.ones_like(p, requires_grad=False) for p in model.parameters()]
        reference.child_mask_(every, 0.4, 3, 9)
        for n, (p, e) in enumerate(zip(model.parameters(), every, strict=True)):
            assert p.grad is None if n in (1, 2) else identical(p.grad, e)

    def test_nothing_to_mask(self, device):
        fastcl.child_mask_gradients_(nn.Linear(2, 2, device=device), 0.5, seed=0, step=0)
        fastcl.child_mask_gradients_([], 0.5, seed=0, step=0)

    def test_bad_input(self, device):
        model = self.model(device)
        with pytest.raises(ValueError, match="keep must be in"):
            fastcl.child_mask_gradients_(model, 0.0, seed=0, step=0)
        with pytest.raises(TypeError, match="params must be a Module or an iterable"):
            fastcl.child_mask_gradients_(model[0].weight, 0.5, seed=0, step=0)
        with pytest.raises(TypeError, match="positional arguments"):
            fastcl.child_mask_gradients_(model, 0.5, 0, 0)
        model[1].bias.grad = model[2].weight.grad.view(-1)[:20]
        with pytest.raises(ValueError, match=r"grads\[4\] and grads\[3\] share memory"):
            fastcl.child_mask_gradients_(model, 0.5, seed=0, step=0)
        assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
