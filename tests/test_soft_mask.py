from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import fastcl
from fastcl import ops, reference
from fastcl.testing import CASES, clone, gradients, importances, largest_error, unit_roundoff
from layouts import BROADCASTS, FLOATING, INTERPRETED, LAYOUTS, SHAPES, STORED, identical

CASE = CASES["soft_mask_"]


def check(grads, importance, strength=1.0):
    """Run the op and the reference on the same arguments, compare bit for bit, and see that nothing else changed."""
    expected, before = clone(grads), clone(importance)
    reference.soft_mask_(expected, before, strength)
    strides = [g.stride() for g in grads]
    assert ops.soft_mask_(grads, importance, strength) is None
    for n, (g, e) in enumerate(zip(grads, expected, strict=True)):
        assert identical(g, e), f"tensor {n} of {g.dtype}, {tuple(g.shape)}, strides {g.stride()}"
    assert [g.stride() for g in grads] == strides
    assert all(identical(i, b) for i, b in zip(importance, before, strict=True))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_shapes(device, shapes, strength):
    check(gradients(shapes, torch.float32, device, 0), importances(shapes, torch.float32, device, 1), strength)


@pytest.mark.parametrize(("dtype", "stored"), list(itertools.product(FLOATING, STORED)), ids=lambda d: str(d)[6:])
def test_dtypes(device, dtype, stored):
    shapes = [(3, 5), (129,), ()]
    check(gradients(shapes, dtype, device, 0), importances(shapes, stored, device, 1), 0.7)


def test_mixed_dtypes_in_one_list(device):
    pairs = list(itertools.product(FLOATING, STORED))
    grads = [gradients([(37,)], d, device, n)[0] for n, (d, _) in enumerate(pairs)]
    check(grads, [importances([(37,)], s, device, n)[0] for n, (_, s) in enumerate(pairs)], 0.5)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("importance_layout", LAYOUTS)
def test_strides(device, grad_layout, importance_layout):
    shapes = [(6, 10), (2, 3, 4, 5), (33,), ()]
    grads = [LAYOUTS[grad_layout](g) for g in gradients(shapes, torch.float32, device, 0)]
    check(grads, [LAYOUTS[importance_layout](i) for i in importances(shapes, torch.float32, device, 1)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", BROADCASTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.uint8, torch.bfloat16], ids=str)
def test_broadcast(device, form, layout, stored):
    shapes = [(6, 10), (2, 3, 4, 5), (33,), (), (1, 7), (7, 1), (2, 1, 3)]
    grads = [LAYOUTS[layout](g) for g in gradients(shapes, torch.float32, device, 0)]
    check(grads, importances([BROADCASTS[form](s) for s in shapes], stored, device, 1), 0.9)


def test_expanded_importance(device):
    grads = gradients([(4, 5), (3, 4, 5)], torch.float32, device, 0)
    check(grads, [torch.rand(5, device=device).expand(4, 5), torch.rand(3, 1, 1, device=device).expand(3, 4, 5)])


def test_importance_may_be_shared_and_may_be_the_gradient_itself(device):
    grads = [torch.rand(50, device=device), torch.rand(50, device=device)]
    shared = torch.rand(50, device=device)
    check(grads, [shared, shared])
    own = torch.rand(70, device=device)
    expected = own * (1 - own)
    ops.soft_mask_([own], [own])
    assert identical(own, expected)


@pytest.mark.parametrize("where", [0, 64, 128])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate(device, where, value):
    for dtype in FLOATING:
        grads = [torch.ones(129, dtype=dtype, device=device), torch.ones(129, dtype=dtype, device=device)]
        importance = [torch.full((129,), 0.25, device=device) for _ in grads]
        grads[0][where] = value
        importance[1][where] = value
        check(grads, importance)
        assert not grads[0][where].isfinite()
        assert not grads[1][where].isfinite()
        assert int(sum((~g.isfinite()).sum() for g in grads)) == 2


def test_full_protection_is_exactly_zero_and_none_changes_nothing(device):
    for dtype, stored in itertools.product(FLOATING, STORED):
        one = 255 if stored == torch.uint8 else 1
        g = torch.randn(100, device=device).to(dtype)
        frozen, free = g.clone(), g.clone()
        ops.soft_mask_(
            [frozen, free], [torch.full((100,), one, dtype=stored, device=device), torch.zeros(100, dtype=stored, device=device)]
        )
        assert not frozen.any()
        assert identical(free, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_float64_is_no_worse_than_torch(device, dtype):
    args = CASE.make([(1000,), (30, 40)], dtype, torch.float32, device)
    exact = CASE.in_float64(args)
    CASE.reference(*exact)
    torch_args = clone(args)
    CASE.providers["eager"](*torch_args)
    CASE.call(*args)
    largest = max(float(e.abs().max()) for e in exact[0])
    assert largest_error(args[0], exact[0]) <= 2 * largest_error(torch_args[0], exact[0]) + unit_roundoff(torch.float32) * largest


def test_threads_and_runs_are_bitwise_equal(device):
    shapes = [(70_001,), (33, 1000), (5,)]
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            grads = gradients(shapes, torch.float32, device, 0)
            ops.soft_mask_(grads, importances(shapes, torch.float32, device, 1), 0.3)
        finally:
            torch.set_num_threads(before)
        results.append(grads)
    assert all(identical(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_writes_are_seen_by_autograd(device):
    x = torch.ones(4, device=device, requires_grad=True)
    y = x.exp()  # backward needs y
    with torch.no_grad():
        ops.soft_mask_([y.detach()], [torch.full((4,), 0.5, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors(device):
    with torch.inference_mode():
        g = [torch.ones(3, device=device)]
        check(g, [torch.full((3,), 0.5, device=device)])
    check([torch.ones(3, device=device), *g], [torch.full((3,), 0.5, device=device)] * 2)


def test_opcheck(device):
    g, i, _ = CASE.make([(4, 5), (7,)], torch.float32, torch.float32, device)
    torch.library.opcheck(torch.ops.fastcl.soft_mask_.default, (g, i, 0.5))


@pytest.mark.parametrize("stored", [torch.float32, torch.uint8], ids=str)
def test_compile_fullgraph(device, stored):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(p, grads, importance):
        doubled = [g * 2 for g in grads]
        fastcl.ops.soft_mask_(doubled, importance, 0.5)
        return [a - 0.1 * g for a, g in zip(p, doubled, strict=True)]

    shapes = [(6, 10), (7,)]
    p, grads = gradients(shapes, torch.float32, device, 3), gradients(shapes, torch.float32, device, 0)
    importance = importances(shapes, stored, device, 1)
    expected = [2 * g for g in grads]
    reference.soft_mask_(expected, importance, 0.5)
    for a, b, e in zip(step(p, grads, importance), p, expected, strict=True):
        torch.testing.assert_close(a, b - 0.1 * e)


def test_compiled_in_place_on_inputs(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda g, i: fastcl.ops.soft_mask_(g, i), fullgraph=True)
    g, i, _ = CASE.make([(6, 10), (7,)], torch.float32, torch.float32, device)
    expected = clone(g)
    reference.soft_mask_(expected, i)
    compiled(g, i)
    assert all(identical(a, b) for a, b in zip(g, expected, strict=True))


@st.composite
def drawn_pairs(draw):
    """A gradient of any layout, and importance that broadcasts to it."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 2, 3]))
    form = tuple(draw(st.booleans()) for _ in shape)
    drop = draw(st.integers(0, len(shape)))
    return shape, order, step, form, drop, draw(st.sampled_from(FLOATING)), draw(st.sampled_from(STORED)), draw(st.floats(0, 1))


def permuted(t, order):
    inverse = sorted(range(len(order)), key=lambda d: order[d])
    return t.permute(order).contiguous().permute(inverse)


@hypothesis.given(drawn=st.lists(drawn_pairs(), max_size=3), seed=st.integers(0, 999))
@hypothesis.settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, drawn, seed):
    torch.manual_seed(seed)
    grads, importance = [], []
    for shape, order, step, form, drop, dtype, stored, _ in drawn:
        g = torch.randn(shape, device=device).to(dtype)
        grads.append(torch.stack([permuted(g, order)] * step, dim=-1)[..., 0])
        importance.append(
            importances([tuple(n if full else 1 for n, full in zip(shape, form, strict=True))[drop:]], stored, device, seed)[0]
        )
    check(grads, importance, drawn[0][7] if drawn else 1.0)


BAD = {
    "length": (lambda g, i: ([*g], i[:1], 1.0), ValueError, "importance has 1 tensors and grads has 2"),
    "shape": (lambda g, i: (g, [i[0], i[1][:2]], 1.0), ValueError, r"importance\[1\] has shape \(2, 4\)"),
    "enlarging shape": (lambda g, i: (g, [i[0], i[1].expand(2, 3, 4)], 1.0), ValueError, r"importance\[1\] has shape \(2, 3, 4\)"),
    "grad dtype": (lambda g, i: ([g[0], g[1].int()], i, 1.0), TypeError, r"grads\[1\] has dtype int32; accepted are float64"),
    "complex": (lambda g, i: ([g[0], g[1].cfloat()], i, 1.0), TypeError, r"grads\[1\] has dtype complex64"),
    "importance dtype": (lambda g, i: (g, [i[0].bool(), i[1]], 1.0), TypeError, r"importance\[0\] has dtype bool"),
    "device": (lambda g, i: (g, [i[0], i[1].to("meta")], 1.0), ValueError, r"importance\[1\] is on meta and grads\[1\] is on"),
    "strength": (lambda g, i: (g, i, -0.1), ValueError, r"strength must be in \[0, 1\], got -0.1"),
    "large strength": (lambda g, i: (g, i, 1.5), ValueError, r"strength must be in \[0, 1\], got 1.5"),
    "NaN strength": (lambda g, i: (g, i, float("nan")), ValueError, "strength must be in"),
    "tensor strength": (lambda g, i: (g, i, torch.tensor(0.5)), TypeError, "strength must be a number"),
    "one tensor": (lambda g, i: (g[0], i, 1.0), TypeError, "grads must be a list or tuple of tensors, got Tensor"),
    "None inside": (lambda g, i: ([g[0], None], i, 1.0), TypeError, r"grads\[1\] must be a tensor, got NoneType"),
    "sparse": (lambda g, i: ([g[0].to_sparse(), g[1]], i, 1.0), TypeError, r"grads\[0\] must be a dense tensor"),
    "expanded gradient": (lambda g, i: ([g[0][:1].expand(5), g[1]], i, 1.0), ValueError, r"grads\[0\] has elements that share memory"),
    "same gradient twice": (lambda g, i: ([g[0], g[0]], [i[0], i[0]], 1.0), ValueError, r"grads\[1\] and grads\[0\] share memory"),
    "overlap": (lambda g, i: ([g[1].view(-1)[:8]], [g[1].view(-1)[4:]], 1.0), ValueError, r"importance\[0\] and grads\[0\] share memory"),
    "records": (lambda g, i: ([g[0].clone().requires_grad_(), g[1]], i, 1.0), ValueError, r"grads\[0\] requires grad"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    make, error, message = BAD[kind]
    grads = [torch.randn(5, device=device), torch.randn(3, 4, device=device)]
    importance = [torch.rand(5, device=device), torch.rand(3, 4, device=device)]
    before = clone((grads, importance))
    with pytest.raises(error, match=message):
        ops.soft_mask_(*make(grads, importance))
    assert all(identical(a, b) for new, old in zip((grads, importance), before, strict=True) for a, b in zip(new, old, strict=True))


class Model(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.body = nn.Linear(4, 3, device=device)
        self.head = nn.Linear(3, 2, device=device)
        self.unused = nn.Linear(2, 2, device=device)

    def forward(self, x):
        return self.head(self.body(x).relu())


class TestMaskGradients:
    def model(self, device):
        torch.manual_seed(1)
        model = Model(device)
        model(torch.randn(8, 4, device=device)).square().sum().backward()
        return model, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def test_module_with_a_mapping(self, device):
        model, before = self.model(device)
        importance = {"body.weight": torch.rand(3, 1, device=device), "head.bias": torch.rand((), device=device)}
        fastcl.mask_gradients_(model, importance, strength=0.5)
        for name, p in model.named_parameters():
            if name in before:
                factor = 1 - 0.5 * importance[name] if name in importance else 1
                assert identical(p.grad, before[name] * factor), name
            else:
                assert p.grad is None

    @pytest.mark.parametrize("where", [fastcl, reference], ids=["fastcl", "reference"])
    def test_iterable_skips_none(self, device, where):
        model, before = self.model(device)
        importance = [torch.rand_like(p) for p in model.parameters()]
        where.mask_gradients_(iter(list(model.parameters())), importance)
        for (name, p), i in zip(model.named_parameters(), importance, strict=True):
            if name in before:
                assert identical(p.grad, before[name] * (1 - i))
            else:
                assert p.grad is None

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda m: (m, {"body.wieght": torch.rand(3, 4)}), ValueError, "importance.'body.wieght'. belongs to no parameter"),
            (lambda m: (m.parameters(), {"body.weight": torch.rand(3, 4)}), TypeError, "params must be a Module"),
            (lambda m: (m, [torch.rand(3, 4)]), ValueError, "importance has 1 tensors and params has 6"),
            (lambda m: (m.body.weight, [torch.rand(3, 4)]), TypeError, "params must be a Module or an iterable"),
            (lambda m: (m, torch.rand(6)), TypeError, "importance must be"),
            (lambda m: (["a"], [torch.rand(1)]), TypeError, r"params\[0\] must be a tensor, got str"),
            (lambda m: (m, {"body.weight": 0.5}), TypeError, "importance.'body.weight'. must be a tensor, got float"),
            (lambda m: (m, {"body.weight": torch.rand(3, 4), "head.bias": torch.rand(7)}), ValueError, "importance.'head.bias'. has shape"),
            (lambda m: ([m.unused.bias, m.head.bias], [torch.rand(2), torch.rand(7)]), ValueError, r"importance\[1\] has shape"),
        ],
    )
    def test_bad_input(self, device, make, error, message):
        model, before = self.model(device)
        with pytest.raises(error, match=message):
            fastcl.mask_gradients_(*make(model))
        assert all(identical(p.grad, before[n]) for n, p in model.named_parameters() if n in before)
