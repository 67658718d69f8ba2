from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastcl import ops, reference
from fastcl.testing import CASES, clone, gradients, importances, largest_error, unit_roundoff
from layouts import FLOATING, INTERPRETED, LAYOUTS, SHAPES, identical

CASE = CASES["ewc_pull_"]


def make(shapes, dtypes, device, layouts=("contiguous",) * 4):
    """Gradients, parameters, precision and anchor."""
    lists = [gradients(shapes, dtypes[n], device, n) for n in range(4)]
    lists[2] = importances(shapes, dtypes[2], device, 2)
    return [[LAYOUTS[layout](t) for t in tensors] for layout, tensors in zip(layouts, lists, strict=True)]


def check(grads, params, precision, anchor, strength=0.35):
    expected, before = clone(grads), clone((params, precision, anchor))
    reference.ewc_pull_(expected, *before, strength)
    assert ops.ewc_pull_(grads, params, precision, anchor, strength) is None
    for n, (g, e) in enumerate(zip(grads, expected, strict=True)):
        assert identical(g, e), f"tensor {n} of {g.dtype}, {tuple(g.shape)}, strides {g.stride()}"
    for tensors, old in zip((params, precision, anchor), before, strict=True):
        assert all(identical(a, b) for a, b in zip(tensors, old, strict=True))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.35, 1e4])
def test_shapes(device, shapes, strength):
    check(*make(shapes, (torch.float32,) * 4, device), strength)


def test_every_combination_of_dtypes(device):
    for dtypes in itertools.product(FLOATING, repeat=4):
        check(*make([(3, 5), (129,)], dtypes, device))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_one_dtype(device, dtype):
    check(*make([(3, 500), (1290,), ()], (dtype,) * 4, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_strides(device, layout, other):
    shapes = [(60, 110), (2, 3, 4, 5), (333,), ()]
    check(*make(shapes, (torch.float32,) * 4, device, (layout, other, "contiguous", other)))
    check(*make(shapes, (torch.bfloat16, torch.float32, torch.float32, torch.float64), device, (layout, "contiguous", other, layout)))


def test_expanded_operands(device):
    g = torch.randn(40, 30, device=device)
    check([g], [torch.randn(30, device=device).expand(40, 30)], [torch.rand((), device=device).expand(40, 30)], [g.clone()])


def test_operands_may_be_shared_and_may_be_the_gradient_itself(device):
    g, shared = torch.randn(500, device=device), torch.randn(500, device=device)
    check([g], [shared], [shared], [shared])
    own = torch.randn(700, device=device)
    expected = own + 2 * 0.35 * (own * (own - shared[:1]))
    ops.ewc_pull_([own], [own], [own], [shared[:1].expand(700)], 0.35)
    assert identical(own, expected)


def test_it_is_the_gradient_of_the_penalty(device):
    g, theta, a, c = (torch.rand(50, dtype=torch.float64, device=device) for _ in range(4))
    leaf = theta.clone().requires_grad_()
    (0.7 * (a * (leaf - c) ** 2).sum()).backward()
    expected = g + leaf.grad
    ops.ewc_pull_([g], [theta], [a], [c], 0.7)
    torch.testing.assert_close(g, expected, rtol=1e-14, atol=1e-15)


def test_at_the_anchor_and_without_strength_nothing_changes(device):
    g, theta, a, c = (t[0] for t in make([(1000,)], (torch.float32,) * 4, device))
    for params, strength in ((c.clone(), 3.0), (theta, 0.0)):
        out = g.clone()
        ops.ewc_pull_([out], [params], [a], [c], strength)
        assert identical(out, g)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operand", range(4))
def test_nan_and_inf_propagate(device, value, operand):
    for dtype in FLOATING:
        lists = make([(129,), (129,)], (dtype,) * 4, device)
        lists[operand][0][64] = value
        check(*lists)
        assert not lists[0][0][64].isfinite()
        assert int(sum((~g.isfinite()).sum() for g in lists[0])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_float64_is_no_worse_than_torch(device, dtype):
    args = CASE.make([(1000,), (30, 40)], dtype, dtype, device)
    exact = CASE.in_float64(args)
    CASE.reference(*exact)
    theirs = clone(args)
    CASE.providers["eager"](*theirs)
    CASE.call(*args)
    largest = max(float(e.abs().max()) for e in exact[0])
    assert largest_error(args[0], exact[0]) <= 2 * largest_error(theirs[0], exact[0]) + unit_roundoff(torch.float32) * largest


def test_threads_and_runs_are_bitwise_equal(device):
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            lists = make([(70_001,), (33, 1000), (5,)], (torch.float32,) * 4, device)
            ops.ewc_pull_(*lists, 0.3)
        finally:
            torch.set_num_threads(before)
        results.append(lists[0])
    assert all(identical(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_writes_are_seen_by_autograd(device):
    x = torch.ones(4, device=device, requires_grad=True)
    y, other = x.exp(), torch.rand(4, device=device)
    ops.ewc_pull_([y.detach()], [other], [other], [other], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_parameters_need_no_detour(device):
    p = torch.nn.Parameter(torch.randn(30, device=device))
    check([torch.randn(30, device=device)], [p.detach()], [torch.rand(30, device=device)], [torch.randn(30, device=device)])
    g = torch.zeros(30, device=device)
    ops.ewc_pull_([g], [p], [torch.ones(30, device=device)], [torch.zeros(30, device=device)], 0.5)
    assert identical(g, p.detach())


def test_opcheck(device):
    args = CASE.make([(4, 5), (7,)], torch.float32, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.fastcl.ewc_pull_.default, args)


def test_compile_fullgraph(device):
    torch._dynamo.reset()
    args = CASE.make([(60, 10), (7,)], torch.float32, torch.float32, device)
    expected = clone(args[0])
    reference.ewc_pull_(expected, *args[1:])
    torch.compile(lambda *args: ops.ewc_pull_(*args), fullgraph=True)(*args)
    assert all(identical(a, b) for a, b in zip(args[0], expected, strict=True))


@hypothesis.given(
    drawn=st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=4), *[st.sampled_from(FLOATING)] * 4), max_size=3),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    strength=st.floats(0, 1e6),
)
@hypothesis.settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, drawn, layouts, strength):
    lists = [[], [], [], []]
    for shape, *dtypes in drawn:
        for target, tensors in zip(lists, make([tuple(shape)], dtypes, device, layouts), strict=True):
            target += tensors
    check(*lists, strength)


BAD = {
    "grads": (lambda g, p, a, c: (g[0], p, a, c, 1.0), TypeError, "grads must be a list or tuple of tensors, got Tensor"),
    "params": (lambda g, p, a, c: (g, None, a, c, 1.0), TypeError, "params must be a list or tuple of tensors, got NoneType"),
    "None inside": (lambda g, p, a, c: (g, p, [a[0], None], c, 1.0), TypeError, r"precision\[1\] must be a tensor, got NoneType"),
    "length": (lambda g, p, a, c: (g, p, a, c[:1], 1.0), ValueError, "anchor has 1 tensors and grads has 2"),
    "shape": (lambda g, p, a, c: (g, p, [a[0], a[1][:1]], c, 1.0), ValueError, r"precision\[1\] has shape \(1, 4\), grads\[1\]"),
    "dtype": (lambda g, p, a, c: (g, p, a, [c[0], c[1].byte()], 1.0), TypeError, r"anchor\[1\] has dtype uint8; accepted are float64"),
    "grad dtype": (lambda g, p, a, c: ([g[0].int(), g[1]], p, a, c, 1.0), TypeError, r"grads\[0\] has dtype int32"),
    "device": (lambda g, p, a, c: (g, [p[0], p[1].to("meta")], a, c, 1.0), ValueError, r"params\[1\] is on meta and grads\[1\] is on"),
    "strength": (lambda g, p, a, c: (g, p, a, c, -1.0), ValueError, "strength must be a finite number >= 0, got -1.0"),
    "NaN": (lambda g, p, a, c: (g, p, a, c, float("nan")), ValueError, "strength must be a finite number >= 0, got nan"),
    "infinite": (lambda g, p, a, c: (g, p, a, c, float("inf")), ValueError, "strength must be a finite number >= 0, got inf"),
    "a tensor": (lambda g, p, a, c: (g, p, a, c, torch.tensor(1.0)), TypeError, "strength must be a number >= 0, got Tensor"),
    "overlaps params": (
        lambda g, p, a, c: ([g[1].view(-1)[:5]], [g[1].view(-1)[2:7]], a[:1], c[:1], 1.0),
        ValueError,
        r"params\[0\] and grads\[0\] share memory",
    ),
    "same twice": (
        lambda g, p, a, c: ([g[0], g[0]], [p[0]] * 2, [a[0]] * 2, [c[0]] * 2, 1.0),
        ValueError,
        r"grads\[1\] and grads\[0\] share",
    ),
    "records": (lambda g, p, a, c: ([g[0].clone().requires_grad_(), g[1]], p, a, c, 1.0), ValueError, r"grads\[0\] requires grad"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    change, error, message = BAD[kind]
    lists = make([(5,), (3, 4)], (torch.float32,) * 4, device)
    before = clone(lists)
    with pytest.raises(error, match=message):
        ops.ewc_pull_(*change(*lists))
    assert all(identical(a, b) for new, old in zip(lists, before, strict=True) for a, b in zip(new, old, strict=True))
