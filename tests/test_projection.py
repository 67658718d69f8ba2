from __future__ import annotations

import itertools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastcl
from fastcl import ops
from fastcl.testing import clone, gradients, unit_roundoff
from layouts import FLOATING, INTERPRETED, LAYOUTS, SHAPES, identical

U = 2.0**-53
SMALL = [(6, 10), (2, 3, 4, 5), (33,), ()]


def flat(tensors):
    """All elements in float64, in order."""
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors]) if tensors else torch.zeros(0, dtype=torch.float64)


def exact_dot(a, b):
    """The dot product rounded once, and the sum of magnitudes; products of narrow types are exact in float64."""
    products = (flat(a) * flat(b)).tolist()
    return math.fsum(products), math.fsum(map(abs, products))


def close_dot(value, a, b):
    exact, magnitude = exact_dot(a, b)
    return value.dtype == torch.float64 and abs(float(value) - exact) <= 4 * U * magnitude


def opposed(grads, seed=5):
    """A reference that the gradients violate."""
    return [(-g.double() + 0.3 * n.double()).to(g.dtype) for g, n in zip(grads, like(grads, seed), strict=True)]


def like(grads, seed):
    device = grads[0].device.type if grads else "cpu"
    return [n.to(g.dtype) for n, g in zip(gradients([tuple(g.shape) for g in grads], torch.float32, device, seed), grads, strict=True)]


def check_written(grads, want, in_double):
    """One rounding from float64, in which the terms may cancel."""
    for t, own in zip(grads, want.split([t.numel() for t in grads]), strict=True):
        limits = torch.finfo(t.dtype)
        slack = 1.01 * unit_roundoff(t.dtype) * own.abs() + limits.tiny * limits.eps + in_double
        assert bool(((flat([t]) - own).abs() <= slack).all()), t.dtype


def check_project(grads, reference):
    """Against the formula on one float64 vector; what is stored may differ by one rounding to its dtype."""
    before, memory = clone(grads), clone(reference)
    g, r = flat(before), flat(reference)
    info = ops.project_(grads, reference)
    assert close_dot(info.dot, before, reference)
    assert close_dot(info.reference_sq, reference, reference)
    violated = float(info.dot) < 0
    assert bool(info.violated) == violated
    assert all(t.device == (grads[0].device if grads else torch.device("cpu")) for t in info)
    assert all(identical(m, r) for m, r in zip(memory, reference, strict=True))
    if not violated:
        assert all(identical(a, b) for a, b in zip(grads, before, strict=True))
        return
    check_written(grads, g - (info.dot / info.reference_sq).cpu() * r, 1e-14)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dots_over_shapes(device, shapes, dtype):
    a, b = gradients(shapes, dtype, device, 0), gradients(shapes, dtype, device, 1)
    assert close_dot(ops.grad_dot(a, b), a, b)
    matrix = ops.gram([a, b, a])
    for (i, x), (j, y) in itertools.product(enumerate([a, b, a]), repeat=2):
        assert close_dot(matrix[i, j], x, y)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("violated", [True, False])
def test_project_over_shapes(device, shapes, violated):
    grads = gradients(shapes, torch.float32, device, 0)
    check_project(grads, opposed(grads) if violated else [-r for r in opposed(grads)])


@pytest.mark.parametrize(("dtype", "other"), list(itertools.product(FLOATING, FLOATING)), ids=lambda d: str(d)[6:])
def test_dtypes(device, dtype, other):
    grads = gradients([(3, 5), (129,), ()], dtype, device, 0)
    memory = [r.to(other) for r in opposed(grads)]
    assert close_dot(ops.grad_dot(grads, memory), grads, memory)
    check_project(grads, memory)


def test_mixed_dtypes_in_one_list(device):
    pairs = list(itertools.product(FLOATING, FLOATING))
    grads = [gradients([(37,)], d, device, n)[0] for n, (d, _) in enumerate(pairs)]
    memory = [r.to(d) for r, (_, d) in zip(opposed(grads), pairs, strict=True)]
    assert close_dot(ops.gram([grads, memory])[0, 1], grads, memory)
    check_gem(clone(grads), [memory, like(grads, 3)])
    check_project(grads, memory)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("memory_layout", LAYOUTS)
def test_strides(device, grad_layout, memory_layout):
    grads = [LAYOUTS[grad_layout](g) for g in gradients(SMALL, torch.float32, device, 0)]
    memory = [LAYOUTS[memory_layout](r) for r in opposed(grads)]
    assert close_dot(ops.grad_dot(grads, memory), grads, memory)
    check_gem(clone(grads), [memory, like(grads, 3)])
    check_project(grads, memory)


def test_expanded_memories_are_read(device):
    grads = gradients([(4, 5), (3, 4)], torch.float32, device, 0)
    memory = [torch.full((), -1.0, device=device).expand(4, 5), torch.linspace(-1, 1, 4, device=device).expand(3, 4)]
    check_project(grads, memory)


def test_bits_do_not_depend_on_threads_or_runs(device):
    shapes = [(9001,), (5,)] if INTERPRETED else [(70_001,), (33, 1000), (5,), (20_000,)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = []
        for threads in (1, 2, 3, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                grads = gradients(shapes, dtype, device, 0)
                memory = opposed(grads)
                info = ops.project_(grads, memory)
                gem = clone(grads)
                gem_info = ops.gem_project_(gem, [memory, [-r for r in opposed(grads, 6)], memory])
            finally:
                torch.set_num_threads(before)
            results.append([info.dot, info.reference_sq, *grads, *gem, gem_info.coefficients, ops.gram([memory, grads])])
        assert all(identical(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_zero_reference_changes_nothing(device):
    grads = gradients(SMALL, torch.float32, device, 0)
    before = clone(grads)
    info = ops.project_(grads, [torch.zeros_like(g) for g in grads])
    assert all(identical(a, b) for a, b in zip(grads, before, strict=True))
    assert (float(info.dot), float(info.reference_sq), bool(info.violated)) == (0, 0, False)
    assert not bool(ops.gem_project_(grads, [[torch.zeros_like(g) for g in grads]] * 2).violated)
    assert all(identical(a, b) for a, b in zip(grads, before, strict=True))


def test_a_vanishing_reference_still_gives_its_direction(device):
    grads = [torch.tensor([1.0, 2.0], device=device)]
    ops.project_(grads, [torch.tensor([-1e-42, 0.0], device=device)])
    torch.testing.assert_close(grads[0], torch.tensor([0.0, 2.0], device=device))


@pytest.mark.parametrize("place", [0, 64, 128])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_the_gradients(device, place, value):
    for where, dtype in itertools.product(("gradient", "memory"), FLOATING):
        grads = [torch.ones(129, dtype=dtype, device=device), torch.ones(3, dtype=dtype, device=device)]
        memory = [torch.ones(129, dtype=dtype, device=device), torch.ones(3, dtype=dtype, device=device)]
        (grads if where == "gradient" else memory)[0][place] = value
        gem = clone(grads)
        ops.project_(grads, memory)
        ops.gem_project_(gem, [memory, memory])
        assert not all(bool(g.isfinite().all()) for g in grads), where
        assert not all(bool(g.isfinite().all()) for g in gem), where


def test_missing_gradients_count_as_zero(device):
    full = gradients([(4,), (5,), (6,)], torch.float32, device, 0)
    memory = opposed(full)
    zero = torch.zeros(5, device=device)
    dense, part = [full[0].clone(), full[1].clone(), full[2].clone()], clone(full)
    want = ops.project_(dense, [memory[0], zero, memory[2]])
    info = ops.project_([part[0], part[1], part[2], None], [memory[0], None, memory[2], None])
    assert torch.equal(torch.stack(want), torch.stack(info))
    assert all(identical(a, b) for a, b in zip(dense, part, strict=True))
    assert torch.equal(ops.grad_dot([full[0], None], [memory[0], memory[1]]), ops.grad_dot(full[:1], memory[:1]))
    assert torch.equal(ops.gram([[None, full[1]], [full[0], None]]), ops.gram([[full[0] * 0, full[1]], [full[0], full[1] * 0]]))
    with pytest.raises(ValueError, match=r"grads\[1\] is None and reference\[1\] is not"):
        ops.project_([part[0], None], memory[:2])


# ---- GEM


def check_gem(grads, memories, margin=0.5, ridge=1e-3):
    """Against the conditions that only the optimum of the quadratic programme fulfils."""
    before = clone(grads)
    g, rows = flat(before), torch.stack([flat(m) for m in memories])
    info = ops.gem_project_(grads, memories, margin, ridge)
    dots = torch.stack([ops.grad_dot(m, before) for m in memories])
    torch.testing.assert_close(info.dots, dots, rtol=0, atol=float(8 * U * (rows.abs() @ g.abs()).max()))
    if not bool((info.dots < 0).any()):
        assert not bool(info.violated)
        assert not info.coefficients.any()
        assert all(identical(a, b) for a, b in zip(grads, before, strict=True))
        return
    v = info.coefficients.cpu()
    assert bool(info.violated)
    check_optimal(rows @ rows.T, rows @ g, v, margin, ridge)
    check_written(grads, g + rows.T @ v, 1e-13 * float((rows.abs().T @ v).max()))


def check_optimal(products, dots, v, margin, ridge):
    """Karush, Kuhn, Tucker: v >= margin, the gradient is >= 0, and one of the two is 0."""
    quadratic = products + ridge * torch.eye(len(v), dtype=torch.float64)
    gradient = quadratic @ v + dots
    size = quadratic.abs() @ v + dots.abs()
    assert bool((v >= margin).all())
    assert bool((gradient >= -1e-9 * size).all())
    assert float((torch.minimum(gradient / size.clamp_min(1e-300), (v - margin) / v.abs().max().clamp_min(1e-300))).max()) <= 1e-8


@pytest.mark.parametrize("count", [1, 2, 3, 10, 17, 64])
@pytest.mark.parametrize("kind", ["independent", "near-collinear", "duplicates", "scales"])
@pytest.mark.parametrize(("margin", "ridge"), [(0.5, 1e-3), (0.0, 1e-3), (0.0, 0.0)])
def test_gem_solves_its_programme(device, count, kind, margin, ridge):
    if INTERPRETED and count > 3 and (kind != "duplicates" or count == 64):
        pytest.skip("ten seconds each in Triton's interpreter, whose own suite has these")
    gen = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 100, dtype=torch.float64, generator=gen)
    if kind == "near-collinear":
        rows = rows[:1] + 1e-6 * rows
    if kind == "duplicates":
        rows = rows[torch.arange(count) % max(1, count // 3)]
    if kind == "scales":
        rows = rows * 10.0 ** ((torch.arange(count) % 7)[:, None] - 3)
    g = torch.randn(100, dtype=torch.float64, generator=gen) - rows.mean(0) / rows.mean(0).norm() * 5
    memories = [[r[:60].to(device), r[60:].to(device)] for r in rows]
    check_gem([g[:60].to(device), g[60:].to(device)], memories, margin, ridge)


def test_gem_agrees_with_scipy(device):
    optimize = pytest.importorskip("scipy.optimize")
    gen = torch.Generator().manual_seed(0)
    for count, size in itertools.product((2, 5, 20) if INTERPRETED else (2, 5, 20, 64), (8, 70)):
        rows, g = torch.randn(count, size, dtype=torch.float64, generator=gen), torch.randn(size, dtype=torch.float64, generator=gen)
        g -= rows.mean(0)
        grads = [g.clone().to(device)]
        info = ops.gem_project_(grads, [[r.to(device)] for r in rows], 0.5, 1e-3)
        # 1/2 v (G G^T + ridge) v + (G g) v is half the square of |[G^T; sqrt(ridge)] v + [g; 0]|; v = u + margin.
        stacked = torch.cat([rows.T, math.sqrt(1e-3) * torch.eye(count, dtype=torch.float64)])
        right = -torch.cat([g, torch.zeros(count, dtype=torch.float64)]) - stacked.sum(1) * 0.5
        u, _ = optimize.nnls(stacked.numpy(), right.numpy(), maxiter=5000)
        v = torch.tensor(u) + 0.5
        assert float((info.coefficients.cpu() - v).abs().max()) <= 1e-8 * float(v.max())
        assert float((grads[0].cpu() - (g + rows.T @ v)).abs().max()) <= 1e-8 * float(g.abs().max() + v.max())


def test_gem_with_one_memory_is_the_closed_form_and_without_margin_a_gem(device):
    grads = gradients(SMALL, torch.float64, device, 0)
    memory = opposed(grads)
    dot, square = ops.grad_dot(grads, memory), ops.grad_dot(memory, memory)
    for margin, ridge in ((0.5, 1e-3), (0.0, 0.0), (2.0, 0.1)):
        info = ops.gem_project_(clone(grads), [memory], margin, ridge)
        torch.testing.assert_close(info.coefficients[0], torch.clamp_min(-dot / (square + ridge), margin))
    gem, agem = clone(grads), clone(grads)
    ops.gem_project_(gem, [memory], 0.0, 0.0)
    ops.project_(agem, memory)
    torch.testing.assert_close(gem, agem, rtol=1e-13, atol=1e-13)


def test_gem_with_duplicate_memories_is_gem_with_one(device):
    grads = gradients(SMALL, torch.float32, device, 0)
    memory, one, many = opposed(grads), clone(grads), clone(grads)
    ops.gem_project_(one, [memory], 0.0, 0.0)
    ops.gem_project_(many, [memory] * (8 if INTERPRETED else 64), 0.0, 0.0)
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


# ---- autograd, compilation


def test_writes_are_seen_by_autograd(device):
    for project in (lambda g, r: ops.project_([g], [r]), lambda g, r: ops.gem_project_([g], [[r]])):
        x = torch.ones(4, device=device, requires_grad=True)
        y = x.exp()  # backward needs y
        with torch.no_grad():
            project(y.detach(), -torch.ones(4, device=device))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_opcheck(device):
    g = gradients([(4, 5), (7,)], torch.float32, device, 0)
    r = opposed(g)
    torch.library.opcheck(torch.ops.fastcl.grad_dot.default, (g, r))
    torch.library.opcheck(torch.ops.fastcl.gram.default, ([*g, *r, *g], 3))
    torch.library.opcheck(torch.ops.fastcl.project_.default, (clone(g), r))
    torch.library.opcheck(torch.ops.fastcl.gem_project_.default, (clone(g), [*r, *g], 2, 0.5, 1e-3))


def test_compile_the_tail_of_a_step(device):
    torch._dynamo.reset()
    params = [torch.nn.Parameter(p) for p in gradients([(6, 10), (7,)], torch.float32, device, 3)]
    grads = gradients([(6, 10), (7,)], torch.float32, device, 0)
    memory = opposed(grads)

    def tail(memory, both):
        info = fastcl.project_gradients_(params, memory)
        gem = fastcl.gem_project_gradients_(params, both)
        with torch.no_grad():
            for p in params:
                p.sub_(0.1 * p.grad)
        return info.dot, info.violated, gem.coefficients

    results = []
    start = clone([p.detach() for p in params])
    for function in (tail, torch.compile(tail, fullgraph=True)):
        with torch.no_grad():
            for p, s, g in zip(params, start, grads, strict=True):
                p.copy_(s)
                p.grad = g.clone()
        out = function(memory, [memory, like(grads, 8)])
        results.append([*out, *(p.detach().clone() for p in params)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@hypothesis.given(
    drawn=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3), st.sampled_from(FLOATING), st.sampled_from(FLOATING), st.sampled_from(list(LAYOUTS))
        ),
        max_size=4,
    ),
    seed=st.integers(0, 999),
    sign=st.sampled_from([-1, 1]),
)
@hypothesis.settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, drawn, seed, sign):
    torch.manual_seed(seed)
    grads = [LAYOUTS[layout](torch.randn(shape, device=device).to(dtype)) for shape, dtype, _, layout in drawn]
    memory = [(sign * g.double() + torch.randn(g.shape, device=device) * 0.5).to(d) for g, (_, _, d, _) in zip(grads, drawn, strict=True)]
    check_gem(clone(grads), [memory, like(grads, seed)])
    check_project(grads, memory)


# ---- bad input

BAD = {
    "length": (lambda g, r: (g, r[:1]), ValueError, "reference has 1 tensors and grads has 2; pass one for each"),
    "shape": (lambda g, r: (g, [r[0], r[1][:2]]), ValueError, r"reference\[1\] has shape \(2, 4\), grads\[1\] has shape \(3, 4\)"),
    "broadcast": (lambda g, r: (g, [r[0], r[1][:, :1]]), ValueError, r"reference\[1\] has shape \(3, 1\)"),
    "integer": (lambda g, r: ([g[0], g[1].int()], r), TypeError, r"grads\[1\] has dtype int32; accepted are float64"),
    "integer memory": (lambda g, r: (g, [r[0].int(), r[1]]), TypeError, r"reference\[0\] has dtype int32"),
    "device": (lambda g, r: (g, [r[0], r[1].to("meta")]), ValueError, r"reference\[1\] is on meta and grads\[0\] is on"),
    "tensor": (lambda g, r: (g[0], r), TypeError, "grads must be a list or tuple of tensors, got Tensor"),
    "no tensor": (lambda g, r: (g, [r[0], 3]), TypeError, r"reference\[1\] must be a tensor, got int"),
    "sparse": (lambda g, r: (g, [r[0].to_sparse(), r[1]]), TypeError, r"reference\[0\] must be a dense tensor"),
    "alias": (lambda g, r: (g, g), ValueError, "share memory"),
    "overlap": (lambda g, r: ([g[1].view(-1)[:8]], [g[1].view(-1)[4:]]), ValueError, "share memory"),
    "expanded": (lambda g, r: ([g[0][:1].expand(5), g[1]], r), ValueError, r"grads\[0\] has elements that share memory"),
    "records": (lambda g, r: ([g[0].clone().requires_grad_(), g[1]], r), ValueError, r"grads\[0\] requires grad"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    make, error, message = BAD[kind]
    g = gradients([(5,), (3, 4)], torch.float32, device, 0)
    grads, memory = make(g, opposed(g))
    before = clone(g)
    with pytest.raises(error, match=message):
        ops.project_(grads, memory)
    for name in ("reference", "grads"):
        message = message.replace(name, {"reference": r"memories\[1\]", "grads": "grads"}[name])
    with pytest.raises(error, match=message):
        ops.gem_project_(grads, [opposed(g) if len(grads) == 2 else memory, memory] if kind != "overlap" else [memory, memory])
    assert all(identical(a, b) for a, b in zip(g, before, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: ops.gem_project_(g, []), ValueError, "memories has 0 lists; accepted are 1 to 64"),
        (lambda g: ops.gem_project_(g, [g] * 65), ValueError, "memories has 65 lists; accepted are 1 to 64"),
        (lambda g: ops.gem_project_(g, g), TypeError, r"memories\[0\] must be a list or tuple of tensors, got Tensor"),
        (lambda g: ops.gem_project_(g, g[0]), TypeError, "memories must be a list of lists of tensors, got Tensor"),
        (lambda g: ops.gem_project_(g, [opposed(g)], margin=-1), ValueError, "margin must be a finite number >= 0, got -1"),
        (lambda g: ops.gem_project_(g, [opposed(g)], margin=math.nan), ValueError, "margin must be a finite number >= 0, got nan"),
        (lambda g: ops.gem_project_(g, [opposed(g)], ridge=math.inf), ValueError, "ridge must be a finite number >= 0, got inf"),
        (lambda g: ops.gem_project_(g, [opposed(g)], ridge="1"), TypeError, "ridge must be a number >= 0, got str"),
        (lambda g: ops.gem_project_(g, [opposed(g)], margin=torch.tensor(1.0)), TypeError, "margin must be a number >= 0, got Tensor"),
        (lambda g: ops.gram([]), ValueError, "vectors has 0 lists; accepted are 1 to 65"),
        (lambda g: ops.gram([g, g[:1]]), ValueError, r"vectors\[1\] has 1 tensors and vectors\[0\] has 2"),
        (lambda g: ops.grad_dot(g, [g[0], g[1][:1]]), ValueError, r"b\[1\] has shape"),
        (lambda g: ops.grad_dot(g, [g[0].long(), g[1]]), TypeError, r"b\[0\] has dtype int64"),
        (lambda g: ops.grad_dot(g, [g[0], g[1].to("meta")]), ValueError, r"b\[1\] is on meta and a\[0\] is on"),
    ],
)
def test_other_bad_input(device, call, error, message):
    g = gradients([(5,), (3, 4)], torch.float32, device, 0)
    before = clone(g)
    with pytest.raises(error, match=message):
        call(g)
    assert all(identical(a, b) for a, b in zip(g, before, strict=True))


def test_squares_beyond_float64_and_below_it(device):
    for value, changed in ((-1e200, True), (1e200, True), (-1e-200, False), (1e-200, False)):
        grads = [torch.ones(5, dtype=torch.float64, device=device)]
        ops.project_(grads, [torch.full((5,), value, dtype=torch.float64, device=device)])
        assert bool(grads[0].isnan().all()) == changed, value
        assert changed or bool((grads[0] == 1).all()), value


def test_conjugate_views_are_refused_by_name(device):
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype complex64"):
        ops.project_([torch.ones(4, dtype=torch.complex64, device=device).conj()], [torch.ones(4, device=device)])


@pytest.mark.parametrize("noise", [1e-6, 1e-7, 1e-8, 1e-9])
def test_dependent_memories_but_for_noise_stay_near_their_constraints(device, noise):
    count, size = (6, 9) if INTERPRETED else (20, 30)
    for seed in range(3 if INTERPRETED else 30):
        gen = torch.Generator().manual_seed(seed)
        low = torch.randn(count, count // 2, dtype=torch.float64, generator=gen) @ torch.randn(
            count // 2, size, dtype=torch.float64, generator=gen
        )
        rows = low / count**0.5 + noise * torch.randn(count, size, dtype=torch.float64, generator=gen)
        g = torch.randn(size, dtype=torch.float64, generator=gen)
        grads = [g.clone().to(device)]
        info = ops.gem_project_(grads, [[r.to(device)] for r in rows], 0.5, 0.0)
        if bool(info.violated):
            worst = float((rows @ grads[0].cpu() / rows.norm(dim=1) / g.norm()).min())
            assert worst >= -1e-5, (seed, worst)
