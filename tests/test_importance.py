from __future__ import annotations

import itertools
import os

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fastcl
from fastcl import ops, reference
from fastcl.testing import CASES, clone, gradients, importances, largest_error, unit_roundoff
from layouts import BROADCASTS, CHUNK, FLOATING, INTERPRETED, LAYOUTS, SHAPES, STORED, identical

SPG = CASES["spg_importance_"]


def check_emax(importance, new):
    """Bit for bit the reference, and the new importance is only read."""
    expected, before = clone(importance), clone(new)
    reference.emax_(expected, before)
    assert ops.emax_(importance, new) is None
    for i, e in zip(importance, expected, strict=True):
        assert identical(i, e), f"{i.dtype}, {tuple(i.shape)}, strides {i.stride()}"
    assert all(identical(n, b) for n, b in zip(new, before, strict=True))


class TestEMax:
    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    def test_shapes(self, device, shapes):
        check_emax(importances(shapes, torch.float32, device, 0), importances(shapes, torch.float32, device, 1))

    @pytest.mark.parametrize(("stored", "new"), list(itertools.product(STORED, STORED)), ids=lambda d: str(d)[6:])
    def test_dtypes(self, device, stored, new):
        shapes = [(3, 5), (129,), ()]
        check_emax(importances(shapes, stored, device, 0), importances(shapes, new, device, 1))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("form", BROADCASTS)
    def test_strides_and_broadcast(self, device, layout, form):
        shapes = [(6, 10), (2, 3, 4, 5), (33,), (), (1, 7)]
        written = [LAYOUTS[layout](i) for i in importances(shapes, torch.float32, device, 0)]
        check_emax(written, importances([BROADCASTS[form](s) for s in shapes], torch.bfloat16, device, 1))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("where", [0, 64, 128])
    def test_nan_and_inf(self, device, value, where):
        for stored, side in itertools.product(FLOATING, (0, 1)):
            pair = [torch.full((129,), 0.5, dtype=stored, device=device), torch.full((129,), 0.25, dtype=stored, device=device)]
            pair[side][where] = value
            check_emax([pair[0]], [pair[1]])
            assert pair[0].isnan().any() == (value != value)

    def test_uint8_never_weakens_and_is_idempotent(self, device):
        codes = torch.arange(256, device=device)
        exact = codes.double() / 255
        for dtype in FLOATING:
            for value in (
                exact.to(dtype),
                torch.nextafter(exact.float(), torch.tensor(2.0, device=device)).to(dtype),
                torch.rand(256, device=device).to(dtype),
            ):
                stored = torch.zeros(256, dtype=torch.uint8, device=device)
                ops.emax_([stored], [value])
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                inside = value.to(wide).clamp(0, 1)
                assert bool((stored.to(wide) / 255 >= inside).all()), "protection weakened"
                assert bool(((stored.to(wide) - 1) / 255 < inside).all()), "not the smallest code"
                again = stored.clone()
                ops.emax_([again], [stored.to(wide) / 255])
                assert torch.equal(again, stored)
        odd = torch.tensor([float("nan"), 2.0, -1.0, float("inf"), float("-inf"), -0.0], device=device)
        stored = torch.zeros(6, dtype=torch.uint8, device=device)
        ops.emax_([stored], [odd])
        assert stored.tolist() == [255, 255, 0, 255, 0, 0]

    def test_opcheck(self, device):
        torch.library.opcheck(torch.ops.fastcl.emax_.default, CASES["emax_"].make([(4, 5), (7,)], torch.float32, torch.uint8, device))

    def test_compile_fullgraph(self, device):
        torch._dynamo.reset()
        a, n = CASES["emax_"].make([(6, 10), (7,)], torch.float32, torch.float32, device)
        expected = clone(a)
        reference.emax_(expected, n)
        torch.compile(lambda a, n: ops.emax_(a, n), fullgraph=True)(a, n)
        assert all(identical(x, e) for x, e in zip(a, expected, strict=True))

    def test_writes_are_seen_by_autograd(self, device):
        x = torch.ones(4, device=device, requires_grad=True)
        y = x.exp()
        ops.emax_([y.detach()], [torch.full((4,), 0.5, device=device)])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda i, n: (i, n[:1]), ValueError, "new has 1 tensors and importance has 2"),
            (lambda i, n: (i, [n[0], n[1][:, :2]]), ValueError, r"new\[1\] has shape \(3, 2\)"),
            (lambda i, n: ([i[0].int(), i[1]], n), TypeError, r"importance\[0\] has dtype int32"),
            (lambda i, n: (i, [n[0].cfloat(), n[1]]), TypeError, r"new\[0\] has dtype complex64"),
            (lambda i, n: (i, [n[0], n[1].to("meta")]), ValueError, r"new\[1\] is on meta"),
            (lambda i, n: (i, None), TypeError, "new must be a list or tuple"),
            (lambda i, n: ([i[0], i[0]], [n[0], n[0]]), ValueError, r"importance\[1\] and importance\[0\] share memory"),
        ],
    )
    def test_bad_input(self, device, make, error, message):
        i, n = CASES["emax_"].make([(5,), (3, 4)], torch.float32, torch.float32, device)
        before = clone((i, n))
        with pytest.raises(error, match=message):
            ops.emax_(*make(i, n))
        assert all(identical(a, b) for x, y in zip((i, n), before, strict=True) for a, b in zip(x, y, strict=True))


def check_spg(accumulated, grads_by_head):
    """The error rule: at most twice the error of torch in the same dtype, plus a rounding of what is stored."""
    exact = clone((accumulated, grads_by_head), torch.float64)
    rival = clone((accumulated, grads_by_head))
    before = clone(grads_by_head)
    exact_mean = float(reference.spg_importance_(*exact))
    mean = ops.spg_importance_(accumulated, grads_by_head)
    assert mean.dtype == torch.float64
    assert mean.shape == ()
    for n, (a, e) in enumerate(zip(accumulated, exact[0], strict=True)):
        allowed = 4 * unit_roundoff(torch.float64)
        if any(head[n].dtype != torch.float64 for head in grads_by_head) or a.dtype != torch.float64:
            allowed = 8 * unit_roundoff(torch.float32)
        if a.dtype in (torch.bfloat16, torch.float16, torch.uint8):
            allowed += unit_roundoff(a.dtype)
        if a.numel() > 1 and grads_by_head:
            one = [rival[0][n]], [[head[n]] for head in rival[1]]
            SPG.providers["eager"](*one)
            theirs = largest_error([rival[0][n]], [e])
            allowed += 2 * theirs if np.isfinite(theirs) else 0
        error = largest_error([a], [e])
        assert error <= allowed, f"tensor {n}, {a.dtype}: error {error} > {allowed}"
    assert all(identical(g, b) for x, y in zip(grads_by_head, before, strict=True) for g, b in zip(x, y, strict=True))
    stored = [a.double() / 255 if a.dtype == torch.uint8 else a.double() for a in accumulated]
    count = sum(a.numel() for a in accumulated)
    own = float(sum(float(s.sum()) for s in stored)) / max(1, count)
    assert float(mean) == pytest.approx(own, rel=1e-12, nan_ok=True)
    return float(mean), exact_mean


class TestSpg:
    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("heads", [0, 1, 3])
    def test_shapes(self, device, shapes, heads):
        check_spg(*SPG.make(shapes, torch.float32, torch.float32, device, heads=heads))

    @pytest.mark.parametrize(("dtype", "stored"), list(itertools.product(FLOATING, STORED)), ids=lambda d: str(d)[6:])
    def test_dtypes(self, device, dtype, stored):
        check_spg(*SPG.make([(3, 50), (1290,)], dtype, stored, device, heads=2))

    def test_mixed_dtypes(self, device):
        pairs = list(itertools.product(STORED, FLOATING, FLOATING))
        accumulated = [importances([(70,)], s, device, n)[0] for n, (s, _, _) in enumerate(pairs)]
        heads = [[gradients([(70,)], pair[h], device, n + 100 * h)[0] for n, pair in enumerate(pairs)] for h in (1, 2)]
        check_spg(accumulated, heads)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("grad_layout", LAYOUTS)
    def test_strides(self, device, layout, grad_layout):
        a, heads = SPG.make([(60, 110), (2, 3, 4, 5), (333,), ()], torch.float32, torch.float32, device, heads=2)
        check_spg([LAYOUTS[layout](t) for t in a], [[LAYOUTS[grad_layout](g) for g in heads[0]], heads[1]])

    def test_formula_by_hand(self, device):
        g = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64, device=device)
        a = torch.zeros(4, dtype=torch.float64, device=device)
        mean = ops.spg_importance_([a], [[g]])
        x = np.array([1.0, 2.0, 4.0, 9.0])
        expected = np.abs(np.tanh((x - 4) / np.std(x, ddof=1)))
        np.testing.assert_allclose(a.cpu().numpy(), expected, rtol=1e-14)
        assert float(mean) == pytest.approx(expected.mean(), rel=1e-14)

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_no_spread_is_no_importance(self, device, dtype):
        grads = [torch.full((n,), v, dtype=dtype, device=device) for n in (1, 2, 1000, CHUNK + 3) for v in (0.0, 0.1, -3.0)]
        a = [torch.zeros_like(g) for g in grads]
        assert float(ops.spg_importance_(a, [grads])) == 0
        assert all(not t.any() for t in a)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("where", [0, 64, 128])
    def test_nan_and_inf_reach_the_whole_tensor_and_no_other(self, device, value, where):
        g = gradients([(129,), (129,)], torch.float32, device, 0)
        g[0][where] = value
        for stored in STORED:
            a = [torch.zeros(129, dtype=stored, device=device) for _ in g]
            mean = ops.spg_importance_(a, [g])
            if stored == torch.uint8:
                assert bool((a[0] == 255).all())
            else:
                assert bool(a[0].isnan().all())
                assert bool(mean.isnan())
                assert bool(a[1].isfinite().all())
        one = [torch.zeros(1, device=device)]
        assert bool(ops.spg_importance_(one, [[torch.tensor([value], device=device)]]).isnan())

    @pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
    @pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-36, 1e30])
    def test_large_mean_and_extreme_scale(self, device, offset, scale):
        g = ((torch.randn(5000, device=device, dtype=torch.float64) + offset) * scale).float()
        check_spg([torch.zeros(5000, device=device)], [[g]])

    def test_an_outlier_first(self, device):
        g = torch.randn(5000, device=device)
        g[0] = 1e4
        check_spg([torch.zeros(5000, device=device)], [[g]])

    def test_heads_are_a_maximum(self, device):
        a, heads = SPG.make([(1000,), (30, 7)], torch.float32, torch.float32, device, heads=4)
        one_by_one = clone(a)
        together = ops.spg_importance_(a, heads)
        for head in heads:
            last = ops.spg_importance_(one_by_one, [head])
        assert all(identical(x, y) for x, y in zip(a, one_by_one, strict=True))
        assert float(together) == float(last)

    def test_threads_and_runs_are_bitwise_equal(self, device):
        results = []
        for threads in (1, 2, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                a, heads = SPG.make([(70_001,), (33, 1000), (5,)], torch.float32, torch.float32, device, heads=2)
                mean = ops.spg_importance_(a, heads)
            finally:
                torch.set_num_threads(before)
            results.append([*a, mean])
        assert all(identical(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))

    def test_opcheck(self, device):
        a, heads = SPG.make([(4, 5), (7,)], torch.float32, torch.float32, device, heads=2)
        torch.library.opcheck(torch.ops.fastcl.spg_importance_.default, (a, [*heads[0], *heads[1]], 2))

    def test_compile_fullgraph(self, device):
        torch._dynamo.reset()
        a, heads = SPG.make([(60, 10), (70,)], torch.float32, torch.float32, device, heads=2)
        plain = clone(a)
        mean = torch.compile(lambda a, heads: ops.spg_importance_(a, heads) * 2, fullgraph=True)(a, heads)
        assert float(mean) == 2 * float(ops.spg_importance_(plain, heads))
        assert all(identical(x, y) for x, y in zip(a, plain, strict=True))

    def test_mean_masks_heads_without_leaving_the_device(self, device):
        a, heads = SPG.make([(60,)], torch.float32, torch.float32, device)
        mean = ops.spg_importance_(a, heads)
        g = torch.ones(3, device=device)
        ops.soft_mask_([g], [mean])
        torch.testing.assert_close(g, (1 - mean).float().expand(3))

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda a, h: (a, [h[0][:1]]), ValueError, r"grads_by_head\[0\] has 1 tensors and accumulated has 2"),
            (lambda a, h: (a, h[0]), TypeError, r"grads_by_head\[0\] must be a list or tuple"),
            (lambda a, h: (a, h[0][0]), TypeError, "grads_by_head must be a list"),
            (lambda a, h: (a, [[h[0][0], h[0][1].t()]]), ValueError, r"grads_by_head\[0\]\[1\] has shape \(4, 3\)"),
            (lambda a, h: (a, [[h[0][0].int(), h[0][1]]]), TypeError, r"grads_by_head\[0\]\[0\] has dtype int32"),
            (lambda a, h: (a, [[h[0][0], h[0][1].byte()]]), TypeError, r"grads_by_head\[0\]\[1\] has dtype uint8"),
            (lambda a, h: ([a[0].bool(), a[1]], h), TypeError, r"accumulated\[0\] has dtype bool"),
            (lambda a, h: (a, [[h[0][0], h[0][1].to("meta")]]), ValueError, r"grads_by_head\[0\]\[1\] is on meta"),
            (lambda a, h: ([a[0], a[0]], [[h[0][0], h[0][0]]]), ValueError, r"accumulated\[1\] and accumulated\[0\] share memory"),
            (lambda a, h: (a, [h[0], a]), ValueError, r"share memory"),
            (lambda a, h: ([a[0].clone().requires_grad_(), a[1]], h), ValueError, r"accumulated\[0\] requires grad"),
        ],
    )
    def test_bad_input(self, device, make, error, message):
        a, heads = SPG.make([(5,), (3, 4)], torch.float32, torch.float32, device)
        before = clone((a, heads))
        with pytest.raises(error, match=message):
            ops.spg_importance_(*make(a, heads))
        assert all(identical(x, y) for x, y in zip(a, before[0], strict=True))

    @hypothesis.given(
        sizes=st.lists(st.sampled_from([0, 1, 2, 3, 63, 65, 511, 513, CHUNK + 1]), max_size=4),
        heads=st.integers(0, 3),
        seed=st.integers(0, 999),
        dtype=st.sampled_from(FLOATING),
        stored=st.sampled_from(STORED),
    )
    @hypothesis.settings(max_examples=15 if INTERPRETED else 25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    def test_any_list(self, device, sizes, heads, seed, dtype, stored):
        check_spg(*SPG.make([(n,) for n in sizes], dtype, stored, device, seed, heads=heads))


def test_public_names_match_the_references():
    import inspect

    stated_in_full = {"adamw_", "sgd_"}  # in reference.optimizers, as the backends take them
    for name in (*(n for n in ops.__all__ if n not in stated_in_full and not inspect.isclass(getattr(ops, n))), "mask_gradients_"):
        public = getattr(ops, name, None) or getattr(fastcl, name)
        # A workspace that a definition has no use for.
        arguments = [a for a in inspect.signature(public).parameters if a != "workspace"]
        assert arguments == list(inspect.signature(getattr(reference, name)).parameters), name


def check_fisher(fisher, grads, weight=0.125, max_norm=None):
    """Bit for bit the reference; with a norm, up to what another order of its sum can do: a rounding of the coefficient."""
    expected, before = clone(fisher), clone(grads)
    reference.fisher_add_(expected, before, weight, max_norm)
    assert ops.fisher_add_(fisher, grads, weight, max_norm) is None
    for n, (f, e) in enumerate(zip(fisher, expected, strict=True)):
        case = f"tensor {n} of {f.dtype}, {tuple(f.shape)}, strides {f.stride()}"
        if max_norm is None:
            assert identical(f, e), case
        else:
            wide = unit_roundoff(torch.float64 if torch.float64 in (f.dtype, grads[n].dtype) else torch.float32)
            torch.testing.assert_close(f, e, rtol=2 * unit_roundoff(f.dtype) + 8 * wide, atol=1e-30, equal_nan=True, msg=case)
    assert all(identical(g, b) for g, b in zip(grads, before, strict=True))


def fisher_inputs(shapes, stored, dtype, device):
    return importances(shapes, stored, device, 0), gradients(shapes, dtype, device, 1)


def tensors_of_every_size():
    """Tensors that are one thread's work, small and of several chunks, and one that is not."""
    return [(1_000_003,), *[(CHUNK + n,) for n in (-1, 0, 1)], (2, 0), *[(n % 7 + 1,) for n in range(60)], (30, 40), ()]


def not_in_triton():
    if os.environ.get("FASTCL_BACKEND") != "triton":
        return False
    from fastcl.kernels import importance

    return not hasattr(importance, "fisher_add_")


@pytest.mark.skipif(not_in_triton(), reason="fastcl.kernels.importance has no fisher_add_")
class TestFisher:
    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
    def test_shapes(self, device, shapes, max_norm):
        check_fisher(*fisher_inputs(shapes, torch.float32, torch.float32, device), max_norm=max_norm)

    @pytest.mark.parametrize("max_norm", [None, 1.0])
    def test_every_size_at_once(self, device, max_norm):
        shapes = tensors_of_every_size()[1 if os.environ.get("TRITON_INTERPRET") else 0 :]
        check_fisher(*fisher_inputs(shapes, torch.float32, torch.float32, device), max_norm=max_norm)

    @pytest.mark.parametrize(("stored", "dtype"), list(itertools.product(FLOATING, FLOATING)), ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("max_norm", [None, 2.0])
    def test_dtypes(self, device, stored, dtype, max_norm):
        check_fisher(*fisher_inputs([(3, 50), (1290,), ()], stored, dtype, device), max_norm=max_norm)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("grad_layout", LAYOUTS)
    def test_strides(self, device, layout, grad_layout):
        fisher, grads = fisher_inputs([(60, 110), (2, 3, 4, 5), (333,), ()], torch.float32, torch.float32, device)
        for max_norm in (None, 0.5):
            check_fisher([LAYOUTS[layout](f) for f in fisher], [LAYOUTS[grad_layout](g) for g in grads], max_norm=max_norm)

    def test_it_clips_each_tensor_as_torch_does(self, device):
        """Active for some tensors and not for others."""
        grads = gradients([(400,), (30, 40), (5,), ()], torch.float64, device, 0)
        fisher = [torch.zeros_like(g) for g in grads]
        norms = [float(g.norm()) for g in grads]
        max_norm = sorted(norms)[2] * 0.9
        ops.fisher_add_(fisher, grads, 0.25, max_norm)
        for f, g in zip(fisher, grads, strict=True):
            p = torch.nn.Parameter(torch.zeros_like(g))
            p.grad = g.clone()
            torch.nn.utils.clip_grad_norm_(p, max_norm)
            torch.testing.assert_close(f, 0.25 * p.grad**2, rtol=1e-14, atol=0)

    def test_a_norm_that_is_small_enough_changes_nothing(self, device):
        fisher, grads = fisher_inputs([(1000,), (33, 7)], torch.float32, torch.float32, device)
        plain = clone(fisher)
        ops.fisher_add_(fisher, grads, 0.5, 1e9)
        ops.fisher_add_(plain, grads, 0.5)
        assert all(identical(a, b) for a, b in zip(fisher, plain, strict=True))

    @pytest.mark.parametrize("max_norm", [None, 1.0])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_nan_and_inf(self, device, value, max_norm):
        grads = [torch.ones(129, device=device), torch.ones(129, device=device)]
        grads[0][64] = value
        fisher = [torch.zeros(129, device=device) for _ in grads]
        check_fisher(fisher, grads, max_norm=max_norm)
        assert bool(fisher[1].isfinite().all())
        if max_norm is None:
            assert int((~fisher[0].isfinite()).sum()) == 1
        elif value != value:
            assert bool(fisher[0].isnan().all())
        else:  # as in torch: a coefficient of 0, and 0 times Inf at the one place
            assert fisher[0].isnan().nonzero().tolist() == [[64]]
            assert int((fisher[0] == 0).sum()) == 128

    def test_a_norm_of_zero(self, device):
        fisher = [torch.ones(50, device=device)]
        ops.fisher_add_(fisher, [torch.zeros(50, device=device)], 1.0, 1e-8)
        assert bool((fisher[0] == 1).all())

    @pytest.mark.parametrize("max_norm", [None, 1.0])
    def test_the_gradient_may_be_the_sum_itself(self, device, max_norm):
        f = torch.rand(40_000, device=device)
        expected = [f.clone()]
        reference.fisher_add_(expected, [f.clone()], 0.5, max_norm)
        ops.fisher_add_([f], [f], 0.5, max_norm)
        torch.testing.assert_close(f, expected[0], rtol=1e-6, atol=0)

    def test_threads_and_runs_are_bitwise_equal(self, device):
        results = []
        for threads in (1, 2, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                fisher, grads = fisher_inputs(tensors_of_every_size()[1:], torch.float64, torch.float64, device)
                ops.fisher_add_(fisher, grads, 0.5, 1.0)
            finally:
                torch.set_num_threads(before)
            results.append(fisher)
        assert all(identical(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))

    def test_other_tensors_do_not_show(self, device):
        """The same bits, whether a tensor is one thread's work or all threads'."""
        fisher, grads = fisher_inputs([(70_001,), (600, 130), (5,)], torch.float64, torch.float64, device)
        alone, together = clone(fisher), clone(fisher)
        for f, g in zip(alone, grads, strict=True):
            ops.fisher_add_([f], [g], 0.5, 1.0)
        many = [torch.rand(90_000, dtype=torch.float64, device=device) for _ in range(2 if INTERPRETED else 40)]
        ops.fisher_add_([*together, *clone(many)], [*grads, *many], 0.5, 1.0)
        assert all(identical(x, y) for x, y in zip(alone, together, strict=True))

    def test_the_norm_of_many_elements_is_exact_to_double(self, device):
        g = torch.full((1 << 20,), 1e-3, device=device)
        f = [torch.zeros(1 << 20, dtype=torch.float64, device=device)]
        ops.fisher_add_(f, [g], 1.0, 0.5)
        value = float(g[0])
        c = 0.5 / (value * 1024 + 1e-6)
        torch.testing.assert_close(f[0], torch.full_like(f[0], (c * value) ** 2), rtol=1e-13, atol=0)

    def test_writes_are_seen_by_autograd(self, device):
        x = torch.ones(4, device=device, requires_grad=True)
        y = x.exp()
        ops.fisher_add_([y.detach()], [torch.rand(4, device=device)])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("max_norm", [None, 1.0])
    def test_opcheck(self, device, max_norm):
        fisher, grads = fisher_inputs([(4, 5), (7,)], torch.float32, torch.bfloat16, device)
        torch.library.opcheck(torch.ops.fastcl.fisher_add_.default, (fisher, grads, 0.5, max_norm))

    @pytest.mark.parametrize("max_norm", [None, 1.0])
    def test_compile_fullgraph(self, device, max_norm):
        torch._dynamo.reset()
        fisher, grads = fisher_inputs([(60, 10), (7,)], torch.float32, torch.float32, device)
        plain = clone(fisher)
        torch.compile(lambda f, g: ops.fisher_add_(f, g, 0.5, max_norm), fullgraph=True)(fisher, grads)
        ops.fisher_add_(plain, grads, 0.5, max_norm)
        assert all(identical(x, y) for x, y in zip(fisher, plain, strict=True))

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda f, g: (f, g[:1]), ValueError, "grads has 1 tensors and fisher has 2"),
            (lambda f, g: (f, [g[0], g[1][:, :1]]), ValueError, r"grads\[1\] has shape \(3, 1\), fisher\[1\] has shape \(3, 4\)"),
            (lambda f, g: ([f[0].byte(), f[1]], g), TypeError, r"fisher\[0\] has dtype uint8; accepted are float64"),
            (lambda f, g: (f, [g[0].int(), g[1]]), TypeError, r"grads\[0\] has dtype int32"),
            (lambda f, g: (f, [g[0], g[1].to("meta")]), ValueError, r"grads\[1\] is on meta"),
            (lambda f, g: (f, None), TypeError, "grads must be a list or tuple"),
            (lambda f, g: (f, g, -1.0), ValueError, "weight must be a finite number >= 0, got -1.0"),
            (lambda f, g: (f, g, float("nan")), ValueError, "weight must be a finite number >= 0, got nan"),
            (lambda f, g: (f, g, "1"), TypeError, "weight must be a number >= 0, got str"),
            (lambda f, g: (f, g, 1.0, 0.0), ValueError, "max_norm must be a finite number > 0, got 0.0"),
            (lambda f, g: (f, g, 1.0, -1), ValueError, "max_norm must be a finite number > 0, got -1.0"),
            (lambda f, g: (f, g, 1.0, float("inf")), ValueError, "max_norm must be a finite number > 0, got inf"),
            (lambda f, g: (f, g, 1.0, torch.tensor(1.0)), TypeError, "max_norm must be a number > 0, got Tensor"),
            (lambda f, g: ([f[0], f[0]], [g[0], g[0]]), ValueError, r"fisher\[1\] and fisher\[0\] share memory"),
            (lambda f, g: ([f[1].view(-1)[:5]], [f[1].view(-1)[3:8]]), ValueError, r"grads\[0\] and fisher\[0\] share memory"),
            (lambda f, g: ([f[0].clone().requires_grad_(), f[1]], g), ValueError, r"fisher\[0\] requires grad"),
        ],
    )
    def test_bad_input(self, device, make, error, message):
        fisher, grads = fisher_inputs([(5,), (3, 4)], torch.float32, torch.float32, device)
        before = clone((fisher, grads))
        with pytest.raises(error, match=message):
            ops.fisher_add_(*make(fisher, grads))
        assert all(identical(a, b) for x, y in zip((fisher, grads), before, strict=True) for a, b in zip(x, y, strict=True))

    @hypothesis.given(
        drawn=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), *[st.sampled_from(FLOATING)] * 2), max_size=4),
        layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
        weight=st.floats(0, 100),
        max_norm=st.none() | st.floats(1e-3, 1e3),
    )
    @hypothesis.settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    def test_any_list(self, device, drawn, layouts, weight, max_norm):
        fisher, grads = [], []
        for n, (shape, stored, dtype) in enumerate(drawn):
            fisher.append(LAYOUTS[layouts[0]](importances([tuple(shape)], stored, device, n)[0]))
            grads.append(LAYOUTS[layouts[1]](gradients([tuple(shape)], dtype, device, n)[0]))
        check_fisher(fisher, grads, weight, max_norm)
