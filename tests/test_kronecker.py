from __future__ import annotations

import itertools

import hypothesis
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import strategies as st
from torch import nn

from fastcl import BackendUnavailable, _native, backends, ops, reference, use_backend
from fastcl.ops import _kronecker_layers, _kronecker_steps
from fastcl.ops import kronecker as family
from fastcl.reference import kronecker as definition
from fastcl.testing import clone, unit_roundoff
from fastcl.testing import kronecker as cases
from layouts import FLOATING, INTERPRETED, LAYOUTS, identical

DOUBLE = torch.float64
# Small ones, those at the limit of small and one beyond it, odd ones, and large ones of several blocks of rows.
SHAPES = {
    "one": [(1, 1)],
    "small": [(3, 4), (4, 3), (17, 31), (1, 40), (40, 1)],
    "at the limit": [(128, 128), (127, 127)],
    "beyond it": [(129, 128), (128, 129), (131, 3), (3, 131)],
    "mixed": [(5, 6), (150, 140), (8, 8)],
    "blocks": [(600, 500), (5, 6)],
}
if INTERPRETED:  # the same paths through fewer elements, of which one layer has more than a program of the sweeps takes
    SHAPES = {"one": [(1, 1)], "small": [(3, 4), (17, 31)], "limits": [(128, 2), (129, 32), (2, 129)], "mixed": [(5, 6), (131, 7), (8, 8)]}
LARGE = (140, 6) if INTERPRETED else (140, 130)
NO_KERNEL = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here that does not run elsewhere in this file")
NUMBERS = (1e-2, 0.9, 0.7)  # lr, momentum, strength


def arguments(step):
    return step.params, step.grads, step.M, step.H, step.inverse_factors


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value or () for t in tensors(v)]


def largest(a, b):
    return max((float((x.double() - y.double()).abs().max()) if x.numel() else 0.0 for x, y in zip(a, b, strict=True)), default=0.0)


def roundings(before, exact, lr, momentum, strength, radius):
    """What the step's own roundings may amount to, for each layer: in its parameters, in M and in H.

    A product of length k is off by about sqrt(k) roundings of the sum of its terms' sizes (Higham and Mary 2019); four times that is
    allowed, and no more than the certain bound of k + 2 of them.
    """
    (_, grads, M, H, factors), after = before, exact[2]
    u = unit_roundoff(factors[0][0].dtype) if factors else 0.0
    sized, V = [], []
    for m, (a, g) in zip(after, exact[4], strict=True):
        left, right = (f.diag() if f.dim() == 1 else f for f in (g, a))
        V.append(left @ m @ right)
        k = sum(m.shape)
        sized.append(min(4 * k**0.5, k + 2.0) * u * (left.abs() @ m.abs() @ right.abs()))
    q = sum(float((m * v).sum()) for m, v in zip(after, V, strict=True))
    bounded = radius is not None and q > 0 and radius / q**0.5 < 1.01 * float(lr)
    step = min(float(lr), radius / q**0.5) if radius is not None and q > 0 else float(lr)
    off = step * sum(float((m.abs() * d).sum()) for m, d in zip(after, sized, strict=True)) / (2 * q) if bounded else 0.0
    for m, v, d, old, gradient, h in zip(after, V, sized, M, grads, H, strict=True):
        g = cases.joined(gradient) if isinstance(gradient, (tuple, list)) and gradient[1] is not None else None
        terms = momentum * old.abs().double() + strength * h.abs().double() + (m.abs() if g is None else g.abs().to(old).double())
        in_M = 4 * u * (terms + m.abs())
        yield (
            float((step * d + off * v.abs() + 4 * u * step * v.abs()).max()) if m.numel() else 0.0,
            float(in_M.max()) if m.numel() else 0.0,
            float((step * in_M + off * m.abs() + 4 * u * (h.abs() + step * m.abs())).max()) if m.numel() else 0.0,
        )


def check_step(args, lr=NUMBERS[0], momentum=NUMBERS[1], strength=NUMBERS[2], radius=None, **keywords):
    """No list is further from float64 than its roundings and twice what the definition in the own dtype is."""
    exact, own, before = clone(args, DOUBLE), clone(args), clone(args)
    wide_lr = lr.double() if isinstance(lr, torch.Tensor) else lr
    reference.ncl_step_(*exact, wide_lr, momentum, strength, radius)
    reference.ncl_step_(*own, lr, momentum, strength, radius)
    assert ops.ncl_step_(*args, lr, momentum, strength, radius, **keywords) is None
    rounded = list(roundings(before, exact, lr, momentum, strength, radius))
    for name, column in ("params", 0), ("M", 2), ("H", 3):
        for i, (got, torchs, wanted) in enumerate(zip(args[column], own[column], exact[column], strict=True)):
            for x, t, e in zip(tensors(got), tensors(torchs), tensors(wanted), strict=True):
                scale = max(1e-30, float(e.abs().max())) if e.numel() else 0.0
                allowed = 2 * largest([t], [e]) + 2 * unit_roundoff(x.dtype) * scale + rounded[i][(0, 0, 1, 2)[column]]
                assert largest([x], [e]) <= allowed, f"{name}, layer {i}, {x.dtype}, {tuple(x.shape)}"
    assert all(identical(a, b) for a, b in zip(tensors((before[1], before[4])), tensors((args[1], args[4])), strict=True))


# ---- against dense oracles


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 4), (7, 2), (13, 16)])
def test_solve_and_quadratic_are_those_of_the_dense_precision(device, m, n):
    step = cases.make([(m, n)], DOUBLE, device)
    (A, G), X = step.factors[0], cases.joined(step.grads[0])
    dense = np.kron(G.cpu().numpy(), A.cpu().numpy())  # of the row-major vec
    flat = X.cpu().numpy().ravel()
    q = ops.kron_quadratic(step.grads, step.factors)
    np.testing.assert_allclose(float(q), flat @ dense @ flat, rtol=1e-12)
    assert (q.dtype, q.shape, q.device) == (DOUBLE, (), X.device)
    ops.kron_solve_(step.grads, step.inverse_factors)
    expected = scipy.linalg.solve(dense, flat, assume_a="pos").reshape(m, n + 1)
    np.testing.assert_allclose(cases.joined(step.grads[0]).cpu().numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_solve_and_quadratic_of_any_size(device, shapes):
    step = cases.make(shapes, DOUBLE, device)
    X = [cases.joined(g) for g in step.grads]
    total = sum(float((x * (g @ x @ a)).sum()) for x, (a, g) in zip(X, step.factors, strict=True))
    np.testing.assert_allclose(float(ops.kron_quadratic(step.grads, step.factors)), total, rtol=1e-11)
    solved = clone(step.grads)
    ops.kron_solve_(solved, step.inverse_factors)
    for x, pair, (a, g) in zip(X, solved, step.factors, strict=True):
        expected = scipy.linalg.solve(a.cpu().numpy(), scipy.linalg.solve(g.cpu().numpy(), x.cpu().numpy()).T).T
        np.testing.assert_allclose(cases.joined(pair).cpu().numpy(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    ops.kron_solve_(solved, step.factors)
    for x, pair in zip(X, solved, strict=True):
        torch.testing.assert_close(cases.joined(pair), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_direction_is_the_inverse_of_the_dual_momentum_and_q_its_norm(device, shapes):
    step = cases.make(shapes, DOUBLE, device)
    V = [torch.full_like(m, torch.nan) for m in step.M]
    before = clone((step.M, step.H))
    q = family.ncl_direction_(step.grads, step.M, V, step.H, step.inverse_factors, 0.9, 0.7)
    expected = [0.9 * m + cases.joined(g) + 0.7 * h for m, h, g in zip(*before, step.grads, strict=True)]
    assert largest(step.M, expected) <= 1e-14 * max(float(e.abs().max()) for e in expected)
    assert all(identical(a, b) for a, b in zip(step.H, before[1], strict=True))
    for v, m, (a, g) in zip(V, step.M, step.factors, strict=True):
        torch.testing.assert_close(g @ v @ a, m, rtol=0, atol=1e-10 * float(m.abs().max()))
    norm = ops.kron_quadratic([(v[:, :-1], v[:, -1]) for v in V], step.factors)
    np.testing.assert_allclose(float(q), float(norm), rtol=1e-9)
    before = clone((step.params, step.H))
    family.ncl_apply_(step.params, step.H, V, step.M, torch.tensor(0.25, dtype=DOUBLE, device=device))
    for pair, old, v in zip(step.params, before[0], V, strict=True):
        torch.testing.assert_close(cases.joined(pair), cases.joined(old) - 0.25 * v, rtol=1e-13, atol=1e-14)
    for h, old, m in zip(step.H, before[1], step.M, strict=True):
        torch.testing.assert_close(h, old - 0.25 * m, rtol=1e-13, atol=1e-13)


# ---- the step against its definition


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("radius", [None, 0.05] if INTERPRETED else [None, 0.05, 1e6])
@pytest.mark.parametrize("pad", [True] if INTERPRETED else [False, True])
def test_step(device, shapes, radius, pad):
    for dtype in (torch.float32, DOUBLE):
        check_step(arguments(cases.make(shapes, dtype, device, pad=pad)), radius=radius)


@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes_of_parameters_and_gradients(device, radius, dtype):
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    for shapes in SHAPES["small"], SHAPES["mixed"]:
        check_step(arguments(cases.make(shapes, wide, device, narrow=dtype)), radius=radius)
    step = cases.make(SHAPES["mixed"], torch.float32, device)
    step.grads = [(w.to(dtype), b.to(torch.float16)) for w, b in step.grads]
    check_step(arguments(step), radius=radius)


@pytest.mark.parametrize("radius", [None, 0.05])
def test_lr_and_workspace_as_tensors(device, radius):
    for shapes, kind in itertools.product((SHAPES["small"], SHAPES["mixed"]), (torch.float32, DOUBLE)):
        step = cases.make(shapes, torch.float32, device)
        check_step(arguments(step), torch.tensor(0.015625, dtype=kind, device=device), radius=radius)
        workspace = [cases.padded(*m.shape, m).fill_(torch.nan) for m in step.M]
        check_step(arguments(step), radius=radius, workspace=workspace)


def without_bias(step, members):
    for i in members:
        step.params[i], step.grads[i] = step.params[i][0], step.grads[i][0]
        step.M[i], step.H[i] = step.M[i][:, :-1], step.H[i][:, :-1]
        a, g = step.inverse_factors[i]
        step.inverse_factors[i] = a[:-1, :-1], g
    return step


@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("shapes", [[(3, 4), (5, 6)], [(3, 4), LARGE, (130, 7), (9, 140 if INTERPRETED else 300)]], ids=str)
def test_layers_without_bias(device, radius, shapes):
    check_step(arguments(without_bias(cases.make(shapes, torch.float32, device), range(len(shapes)))), radius=radius)
    check_step(arguments(without_bias(cases.make(shapes, torch.float32, device), [1])), radius=radius)
    step = without_bias(cases.make(shapes, torch.float32, device), [1])
    step.params[1], step.grads[1] = (step.params[1], None), [step.grads[1], None]
    check_step(arguments(step), radius=radius)


@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("sides", ["A", "G", "AG"])
@pytest.mark.parametrize("shapes", [[(3, 4)], [(130, 4), (5, 6), (2, 130)] if INTERPRETED else [(300, 40), (5, 6), (20, 400)]], ids=str)
def test_diagonal_factors(device, radius, sides, shapes):
    def diagonal(pair):
        a, g = pair
        return a.diagonal().contiguous() if "A" in sides else a, g.diagonal().contiguous() if "G" in sides else g

    step = cases.make(shapes, DOUBLE, device)
    step.inverse_factors = [diagonal(pair) for pair in step.inverse_factors]
    grads = clone(step.grads)
    ops.kron_solve_(grads, step.inverse_factors)
    whole = [tuple(t.diag() if t.dim() == 1 else t for t in pair) for pair in step.inverse_factors]
    for pair, x, (a, g) in zip(grads, step.grads, whole, strict=True):
        torch.testing.assert_close(cases.joined(pair), g @ cases.joined(x) @ a, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(float(ops.kron_quadratic(grads, step.inverse_factors)), float(ops.kron_quadratic(grads, whole)), rtol=1e-11)
    check_step(arguments(step), radius=radius)


@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), *([(130, 2, 2, 3)] if INTERPRETED else [(140, 16, 3, 3), (150, 20)])], ids=str)
def test_layouts_of_weights_and_gradients(device, radius, layout, shape):
    m, n = shape[0], int(np.prod(shape[1:]))
    for own, other in ((layout, "contiguous"), ("contiguous", layout), (layout, layout))[2 * INTERPRETED :]:
        step = cases.make([(m, n)], torch.float32, device)
        (w, b), (gw, gb) = step.params[0], step.grads[0]
        step.params = [(LAYOUTS[own](w.view(shape)), LAYOUTS[own](b))]
        step.grads = [(LAYOUTS[other](gw.view(shape)), LAYOUTS[other](gb))]
        strides = step.params[0][0].stride()
        check_step(arguments(step), radius=radius)
        assert step.params[0][0].stride() == strides
        for op_grads, factors in ((step.grads, step.inverse_factors),):
            expected = definition.product(definition.joined(*op_grads[0], DOUBLE), factors[0][0].double(), factors[0][1].double())
            q = float((expected * definition.joined(*op_grads[0], DOUBLE)).sum())
            np.testing.assert_allclose(float(ops.kron_quadratic(op_grads, factors)), q, rtol=1e-4)
            ops.kron_solve_(op_grads, factors)
            got = definition.joined(*op_grads[0], DOUBLE)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_empty_lists(device):
    ops.ncl_step_([], [], [], [], [], 0.1)
    ops.kron_solve_([], [])
    assert float(ops.kron_quadratic([], [])) == 0
    assert float(family.ncl_direction_([], [], [], [], [])) == 0


def test_layers_of_two_types_in_one_call(device):
    a, b = (cases.make([(5, 6), LARGE], dtype, device) for dtype in (torch.float32, DOUBLE))
    check_step(tuple([*x, *y] for x, y in zip(arguments(a), arguments(b), strict=True)))
    check_step(tuple([*x, *y] for x, y in zip(arguments(a), arguments(b), strict=True)), radius=0.05)


# ---- the composition, over the definitions of its stages


def stage(op):
    return getattr(definition, op, None) or getattr(reference, op)


def layers_of(args, workspace=()):
    params, grads, M, H, factors = args
    lists = [*definition.parts(params), *definition.parts(grads), list(M), list(H), list(workspace), *definition.sides(factors)]
    return _kronecker_layers.Layers(*lists)


@NO_KERNEL
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("narrow", [DOUBLE, torch.bfloat16], ids=str)
def test_the_composition_over_reference_stages_is_the_whole_op(shapes, radius, narrow):
    for lr in (1e-2, torch.tensor(1e-2, dtype=DOUBLE)):
        args = arguments(cases.make(shapes, DOUBLE, narrow=narrow))
        expected = clone(args)
        reference.ncl_step_(*expected, lr, 0.9, 0.7, radius)
        _kronecker_steps.step_(layers_of(args), lr, 0.9, 0.7, radius, stage)
        atol = 1e-11 if narrow == DOUBLE else 0.05
        for x, e in zip(tensors(args), tensors(expected), strict=True):
            torch.testing.assert_close(x, e, rtol=0, atol=atol * max(1.0, float(e.abs().max())))
    step = cases.make(shapes, DOUBLE)
    layers = layers_of(arguments(step))
    layers.weights, layers.biases = layers.weight_grads, layers.bias_grads
    np.testing.assert_allclose(
        float(_kronecker_steps.quadratic(layers, stage)), float(reference.kron_quadratic(step.grads, step.inverse_factors)), rtol=1e-11
    )
    expected = clone(step.grads)
    reference.kron_solve_(expected, step.inverse_factors)
    _kronecker_steps.solve_(layers, stage)
    for x, e in zip(tensors(step.grads), tensors(expected), strict=True):
        torch.testing.assert_close(x, e, rtol=0, atol=1e-10 * max(1.0, float(e.abs().max())))


# ---- what the step is


@pytest.mark.parametrize("shapes", [[(4, 3), (2, 4)], [(3, 4), LARGE]], ids=str)
@pytest.mark.parametrize("strength", [1.0] if INTERPRETED else [0.0, 1.0, 3.5])
def test_on_the_first_task_it_is_sgd_with_momentum_and_weight_decay(device, shapes, strength):
    """With Lambda_0 = I / N around 0, the paper's learning rate lr and the op's lr / N."""
    n_data, lr = 1000, 0.05
    step = cases.make(shapes, DOUBLE, device)
    theirs = [nn.Parameter(t.clone()) for t in tensors(step.params)]
    optimizer = torch.optim.SGD(theirs, lr, momentum=0.9, weight_decay=strength / n_data)
    eye = [tuple(torch.eye(k, dtype=DOUBLE, device=device) * n_data**0.5 for k in (n + 1, m)) for m, n in shapes]
    M = [torch.zeros_like(m) for m in step.M]
    H = [cases.joined(pair) / n_data for pair in step.params]
    for k in range(4 if INTERPRETED else 20):
        grads = cases.make(shapes, DOUBLE, device, seed=k).grads
        for p, g in zip(theirs, tensors(grads), strict=True):
            p.grad = g
        optimizer.step()
        ops.ncl_step_(step.params, grads, M, H, eye, lr / n_data, 0.9, strength)
    for p, t in zip(theirs, tensors(step.params), strict=True):
        torch.testing.assert_close(t, p.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(INTERPRETED, reason="drift takes thousands of steps")
@pytest.mark.parametrize(
    ("shapes", "lr", "radius"),
    [([(20, 15)], 2e-5, None), ([(20, 15)], 1e-3, 0.05), ([(132, 9)], 2e-5, None), ([(132, 9)], 1e-3, 0.05)],
    ids=["small", "small, radius", "large", "large, radius"],
)
def test_h_stays_lambda_times_the_distance_to_the_anchor(device, shapes, lr, radius):
    """In float32, with condition numbers of 100 on both sides and noisy gradients of a loss whose minimum is elsewhere."""
    step = cases.make(shapes, torch.float32, device)
    generator = torch.Generator(device).manual_seed(5)
    (params, grads, anchors), (M, H) = (x[0] for x in (step.params, step.grads, step.anchors)), (step.M[0].zero_(), step.H[0].zero_())
    targets = [torch.randn(t.shape, generator=generator, device=device) for t in params]
    for t, start in zip(params, anchors, strict=True):
        t.copy_(start)
    for _ in range(5000):
        for p, g, t in zip(params, grads, targets, strict=True):
            torch.sub(p, t, out=g)
            g += 0.1 * torch.randn(g.shape, generator=generator, device=device)
        ops.ncl_step_([params], [grads], [M], [H], step.inverse_factors, lr, 0.9, 1.0, radius)
    a, g = step.factors[0]
    expected = g.double() @ (cases.joined(params).double() - cases.joined(anchors).double()) @ a.double()
    assert float(expected.norm()) > 0.1
    assert float((H.double() - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("shapes", [[(3, 4), (5, 6)], [LARGE, (8, 9)]], ids=["small", "large"])
@pytest.mark.parametrize("kind", [float, "tensor"])
def test_no_step_is_longer_than_the_radius_in_the_metric(device, shapes, kind):
    lengths = []
    for radius in (1e-3, 0.1, 1e9):
        step = cases.make(shapes, DOUBLE, device)
        before = clone(step.params)
        lr = 0.01 if kind is float else torch.tensor(0.01, dtype=DOUBLE, device=device)
        ops.ncl_step_(step.params, step.grads, step.M, step.H, step.inverse_factors, lr, 0.9, 1.0, radius)
        moved = [tuple(x - y for x, y in zip(new, old, strict=True)) for new, old in zip(step.params, before, strict=True)]
        lengths.append(float(ops.kron_quadratic(moved, step.factors)) ** 0.5)
    free = cases.make(shapes, DOUBLE, device)
    ops.ncl_step_(free.params, free.grads, free.M, free.H, free.inverse_factors, 0.01, 0.9, 1.0)
    np.testing.assert_allclose(lengths[:2], [1e-3, 0.1], rtol=1e-9)
    for a, b in zip(tensors(free.params), tensors(step.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_gradient_and_pull_nothing_moves(device):
    for radius in (None, 0.5):
        step = cases.make([(3, 4), LARGE], torch.float32, device)
        for t in (*tensors(step.grads), *step.M, *step.H):
            t.zero_()
        before = clone(step.params)
        ops.ncl_step_(*arguments(step), 0.1, 0.9, 1.0, radius)
        assert all(torch.equal(a, b) for a, b in zip(tensors(step.params), tensors(before), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("hit", [0, 1])
def test_nan_and_inf_spread_over_their_layer_and_with_a_radius_over_all(device, value, hit):
    shapes = [(3, 4), LARGE]
    for place in (0, 1):
        step = cases.make(shapes, torch.float32, device)
        step.grads[hit][place].view(-1)[-1] = value
        ops.ncl_step_(*arguments(step), 0.1, 0.9, 1.0)
        assert not any(bool(t.isfinite().any()) for t in step.params[hit])
        assert all(bool(t.isfinite().all()) for t in step.params[1 - hit])
        step = cases.make(shapes, torch.float32, device)
        step.grads[hit][place].view(-1)[-1] = value
        ops.ncl_step_(*arguments(step), 0.1, 0.9, 1.0, 0.5)
        assert not any(bool(t.isfinite().any()) for t in step.params[hit])
        if value != value:
            assert all(bool(t.isnan().all()) for t in tensors(step.params))


def test_singular_zero_and_nan_factors(device):
    """A quadratic form asks nothing of its factors."""
    for m, n in ((3, 4), LARGE):
        step = cases.make([(m, n)], DOUBLE, device)
        X, (u, v) = cases.joined(step.grads[0]), (torch.rand(k, dtype=DOUBLE, device=device) for k in (m, n + 1))
        rank_one = [(torch.outer(v, v), torch.outer(u, u))]
        np.testing.assert_allclose(float(ops.kron_quadratic(step.grads, rank_one)), float(u @ X @ v) ** 2, rtol=1e-9)
        zeros = [tuple(torch.zeros_like(t) for t in rank_one[0])]
        assert float(ops.kron_quadratic(step.grads, zeros)) == 0
        zeros[0][0][-1, -1] = torch.nan
        assert bool(ops.kron_quadratic(step.grads, zeros).isnan())


# ---- how it is called


def written_by(op, step):
    V = [torch.zeros_like(m) for m in step.M]
    calls = {
        "kron_solve_": lambda: (ops.kron_solve_(step.grads, step.inverse_factors), step.grads),
        "ncl_step_": lambda: (ops.ncl_step_(*arguments(step), 0.1), (step.params, step.M, step.H)),
        "ncl_step_, radius": lambda: (ops.ncl_step_(*arguments(step), 0.1, radius=1.0), (step.params, step.M, step.H)),
        "ncl_direction_": lambda: (family.ncl_direction_(step.grads, step.M, V, step.H, step.inverse_factors), (step.M, V)),
        "ncl_apply_": lambda: (
            family.ncl_apply_(step.params, step.H, V, step.M, torch.ones((), dtype=DOUBLE, device=V[0].device)),
            (step.params, step.H),
        ),
    }
    return V, calls[op]


@pytest.mark.parametrize("op", ["kron_solve_", "ncl_step_", "ncl_step_, radius", "ncl_direction_", "ncl_apply_"])
@pytest.mark.parametrize("shapes", [[(3, 4)], [(3, 4), LARGE], [LARGE]], ids=str)
def test_writes_are_seen_by_autograd(device, op, shapes):
    step = cases.make(shapes, torch.float32, device)
    V, call = written_by(op, step)
    everything = tensors((arguments(step), V))
    before = [t._version for t in everything]
    _, written = call()
    changed = {id(t) for t in tensors(written)}
    for t, old in zip(everything, before, strict=True):
        assert (t._version > old) == (id(t) in changed)


@pytest.mark.parametrize("shapes", [[(3, 4)], [(3, 4), LARGE]], ids=str)
@pytest.mark.parametrize("radius", [None, 0.1])
def test_parameters_and_inference_tensors(device, shapes, radius):
    step = cases.make(shapes, torch.float32, device)
    expected = clone(arguments(step))
    reference.ncl_step_(*expected, 0.1, 0.9, 1.0, radius)
    leaves = [tuple(nn.Parameter(t.clone()) for t in pair) for pair in step.params]
    with torch.no_grad():
        ops.ncl_step_(leaves, clone(step.grads), clone(step.M), clone(step.H), step.inverse_factors, 0.1, 0.9, 1.0, radius)
    with torch.inference_mode():
        frozen = clone(arguments(step))
        ops.ncl_step_(*clone(arguments(step)), 0.1, 0.9, 1.0, radius)
    ops.ncl_step_(*frozen, 0.1, 0.9, 1.0, radius)
    for a, b, e in zip(tensors(leaves), tensors(frozen[0]), tensors(expected[0]), strict=True):
        torch.testing.assert_close(a.detach(), e, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b, e, rtol=1e-4, atol=1e-4)


@NO_KERNEL
@pytest.mark.parametrize("radius", [None, 0.1])
def test_autocast_narrows_nothing(device, radius):
    results = []
    for enabled in (False, True):
        step = cases.make([(3, 4), LARGE], torch.float32, device)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            q = ops.kron_quadratic(step.grads, step.factors)
            ops.ncl_step_(*arguments(step), 0.1, 0.9, 1.0, radius)
            ops.kron_solve_(step.grads, step.inverse_factors)
        results.append([q, *tensors(arguments(step))])
    assert all(identical(a, b) for a, b in zip(*results, strict=True))


def test_threads_and_runs_are_bitwise_equal_for_small_layers(device):
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            step = cases.make([(33, 6), (5, 7)] if INTERPRETED else [(128, 127), (33, 64)] * 4, torch.float32, device)
            q = ops.kron_quadratic(step.grads, step.factors)
            ops.ncl_step_(*arguments(step), 0.1, radius=0.3)
            ops.ncl_step_(*arguments(step), 0.1)
            ops.kron_solve_(step.grads, step.inverse_factors)
        finally:
            torch.set_num_threads(before)
        results.append([q, *tensors(arguments(step))])
    assert all(identical(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@NO_KERNEL
@pytest.mark.parametrize("shapes", [[(3, 4), (5, 6)], [(3, 4), LARGE]], ids=str)
def test_opcheck(device, shapes):
    def flat(step):
        return *definition.parts(step.params), *definition.parts(step.grads), step.M, step.H

    def sides(step):
        return definition.sides(step.inverse_factors)

    def fresh():
        step = cases.make(shapes, torch.float32, device)
        return step, [torch.zeros_like(m) for m in step.M]

    step, V = fresh()
    lr = torch.tensor(0.1, dtype=DOUBLE, device=device)
    torch.library.opcheck(torch.ops.fastcl.kron_solve_.default, (*definition.parts(step.grads), *sides(step)))
    torch.library.opcheck(torch.ops.fastcl.kron_quadratic.default, (*definition.parts(step.grads), *sides(step)))
    torch.library.opcheck(torch.ops.fastcl.ncl_step_.default, (*flat(step), [], *sides(step), None, 0.1, 0.9, 1.0, None))
    torch.library.opcheck(torch.ops.fastcl.ncl_step_.default, (*flat(step), V, *sides(step), lr, 0.0, 0.9, 1.0, 0.5))
    step, V = fresh()
    grads = definition.parts(step.grads)
    torch.library.opcheck(torch.ops.fastcl.ncl_direction_.default, (step.M, V, *grads, step.H, *sides(step), 0.9, 1.0))
    torch.library.opcheck(torch.ops.fastcl.ncl_apply_.default, (*definition.parts(step.params), step.H, V, step.M, lr))


@NO_KERNEL
@pytest.mark.parametrize("radius", [None, 0.5])
def test_compile_fullgraph(device, radius):
    torch._dynamo.reset()
    step = without_bias(cases.make([(3, 4), LARGE, (5, 6)], torch.float32, device), [2])
    expected = clone(arguments(step))

    def run(params, grads, M, H, factors):
        ops.ncl_step_(params, grads, M, H, factors, 0.1, 0.9, 1.0, radius)
        q = ops.kron_quadratic(grads, factors)
        ops.kron_solve_(grads, factors)
        return q

    wanted = run(*expected)
    q = torch.compile(run, fullgraph=True)(*arguments(step))
    assert identical(q, wanted)
    for a, b in zip(tensors(arguments(step)), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the sizes that matter take minutes")
def test_no_temporary_of_the_models_size(device):
    """Of every allocation, the largest sum alive: an eighth of the elements, where torch's four lines need all of them."""
    if device != "cpu" or backends.serving("cpu") == "reference":
        pytest.skip("the definition makes what it likes")
    step = cases.make([(1000, 999), (999, 1000)], torch.float32, device, pad=True)
    model = sum(m.numel() for m in step.M) * 4

    def peak(function):
        function()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        alive = highest = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            highest = max(highest, alive)
        return highest

    assert peak(lambda: cases.eager(step)) > model / 2
    assert 0 < peak(lambda: cases.fastcl(step)) <= max(4 << 18, model / 8) * 1.05
    workspace = [torch.empty_like(m) for m in step.M]
    assert 0 < peak(lambda: ops.ncl_step_(*arguments(step), 0.1, radius=1.0, workspace=workspace)) <= max(4 << 18, model / 8) * 1.05
    assert 0 < peak(lambda: ops.kron_solve_(step.grads, step.inverse_factors)) <= max(4 << 18, model / 8) * 1.05
    assert 0 < peak(lambda: ops.kron_quadratic(step.grads, step.inverse_factors)) <= 2 * max(4 << 18, model / 8) * 1.05


@NO_KERNEL
def test_dtensors_are_sent_to_the_optimizer(device):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    step = cases.make([(4, 3)], torch.float32, "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [tuple(distribute_tensor(t, mesh, [Shard(0)]) for t in step.params[0])]
        with pytest.raises(TypeError, match=r"params has DTensors: fastcl.optim.NCL takes them"):
            ops.ncl_step_(sharded, *arguments(step)[1:], 0.1)
        with pytest.raises(TypeError, match=r"grads has DTensors"):
            ops.kron_solve_(sharded, step.inverse_factors)
        with pytest.raises(TypeError, match=r"B_L is a DTensor; factors are whole on every rank"):
            ops.kron_merge(distribute_tensor(torch.eye(2), mesh, [Shard(0)]), *[torch.eye(2)] * 3)
    finally:
        dist.destroy_process_group()


@hypothesis.given(
    drawn=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.sampled_from(sorted(LAYOUTS))), max_size=3),
    narrow=st.sampled_from(FLOATING),
    numbers=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 10)),
    radius=st.none() | st.floats(1e-3, 1e3),
)
@hypothesis.settings(max_examples=10 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, drawn, narrow, numbers, radius):
    wide = DOUBLE if narrow == DOUBLE else torch.float32
    step = cases.make([(m, n) for m, n, _, _ in drawn], wide, device, narrow=narrow)
    for pairs in (step.params, step.grads):
        pairs[:] = [tuple(LAYOUTS[layout](t) for t in pair) for pair, (_, _, _, layout) in zip(pairs, drawn, strict=True)]
    without_bias(step, [i for i, (_, _, biased, _) in enumerate(drawn) if not biased])
    check_step(arguments(step), *numbers, radius)


# ---- bad input


def put(index, **changes):
    """A change of one layer in the named arguments."""

    def change(args):
        for name, value in changes.items():
            args[name] = [value(x) if i == index else x for i, x in enumerate(args[name])]

    return change


def number(**values):
    return lambda args: args.update(values)


BAD = {
    "params": (number(params=3), TypeError, r"params must be a list with a tensor or a pair \(weight, bias\) for each layer, got int"),
    "a triple": (put(1, grads=lambda g: (*g, None)), TypeError, r"grads\[1\] must be a tensor or a pair \(weight, bias\), got tuple of 3"),
    "no bias here": (put(1, grads=lambda g: g[0]), ValueError, r"the bias of grads\[1\] has shape \(0,\), the bias of params\[1\]"),
    "weight": (put(0, params=lambda p: (None, p[1])), TypeError, r"the weight of params\[0\] must be a tensor, got NoneType"),
    "bias": (put(0, params=lambda p: (p[0], 1)), TypeError, r"the bias of params\[0\] must be a tensor or None, got int"),
    "no pair": (put(1, factors=lambda f: f[0]), TypeError, r"inverse_factors\[1\] must be a pair of tensors \(A \[n, n\], G \[m, m\]\)"),
    "length": (number(M=[]), ValueError, r"M has 0 elements and params has 2; pass one for each layer"),
    "factors' length": (lambda args: args["factors"].pop(), ValueError, "inverse_factors has 1 pairs and params has 2 layers"),
    "1-D weight": (
        put(0, params=lambda p: (p[0][0], p[1]), grads=lambda g: (g[0][0], g[1])),
        ValueError,
        r"params\[0\] has a weight of shape",
    ),
    "bias's shape": (
        put(0, params=lambda p: (p[0], p[1][:2]), grads=lambda g: (g[0], g[1][:2])),
        ValueError,
        r"params\[0\] has a bias of sh",
    ),
    "gradient's shape": (
        put(1, grads=lambda g: (g[0][:, :2], g[1])),
        ValueError,
        r"the weight of grads\[1\] has shape .* they must be equal",
    ),
    "A's shape": (
        put(1, factors=lambda f: (f[0][:2, :2], f[1])),
        ValueError,
        r"A of inverse_factors\[1\] has shape \(2, 2\); params\[1\] is",
    ),
    "another layer's": (
        lambda args: args["factors"].reverse(),
        ValueError,
        r"A of inverse_factors\[0\] has shape .* with a bias, so accepted",
    ),
    "G's shape": (put(0, factors=lambda f: (f[0], f[1][:1])), ValueError, r"G of inverse_factors\[0\] has shape \(1, "),
    "A transposed": (
        put(0, factors=lambda f: (f[0].t(), f[1])),
        ValueError,
        r"A of inverse_factors\[0\] has strides \(1, \d+\); accepted are",
    ),
    "two dtypes": (
        put(0, factors=lambda f: (f[0].double(), f[1])),
        TypeError,
        r"A of inverse_factors\[0\] has dtype torch.float64 and G has",
    ),
    "factors' dtype": (put(0, factors=lambda f: (f[0].half(), f[1].half())), TypeError, r"A of inverse_factors\[0\] has dtype float16"),
    "M's shape": (put(1, M=lambda m: m[:, 1:]), ValueError, r"M\[1\] has shape .* the bias being the last column"),
    "M's dtype": (
        put(1, M=lambda m: m.double()),
        TypeError,
        r"M\[1\] has dtype torch.float64; accepted is that of the factors, torch.float32",
    ),
    "H's strides": (put(1, H=lambda h: h.t().contiguous().t()), ValueError, r"H\[1\] has strides \(1, \d+\); accepted are contiguous rows"),
    "H expanded": (put(1, H=lambda h: h[:1].expand(h.shape)), ValueError, r"H\[1\] has strides \(0, 1\)"),
    "workspace": (number(workspace=[torch.zeros(1, 1)] * 2, radius=1.0), ValueError, r"workspace\[0\] has shape \(1, 1\)"),
    "params' dtype": (put(0, params=lambda p: (p[0].int(), p[1])), TypeError, r"the weight of params\[0\] has dtype int32"),
    "device": (put(1, M=lambda m: m.to("meta")), ValueError, "M.1. is on meta and"),
    "gradient's device": (put(1, grads=lambda g: (g[0].to("meta"), g[1])), ValueError, r"the weight of grads\[1\] is on meta and"),
    "lr": (number(lr=-1.0), ValueError, "lr must be a finite number >= 0, got -1.0"),
    "lr as a list": (number(lr=[0.1]), TypeError, "lr must be a number >= 0, got list"),
    "lr as a vector": (
        number(lr=torch.ones(1)),
        ValueError,
        r"lr has dtype torch.float32 and shape \(1,\); accepted are a number, or a 0-d",
    ),
    "lr elsewhere": (number(lr=torch.ones((), device="meta")), ValueError, "lr is on meta and params.0. on"),
    "momentum": (number(momentum=float("nan")), ValueError, "momentum must be a finite number >= 0, got nan"),
    "strength": (number(strength=-0.5), ValueError, "strength must be a finite number >= 0, got -0.5"),
    "radius": (number(radius=0.0), ValueError, "radius must be a finite number > 0, got 0.0"),
    "radius' type": (number(radius="1"), TypeError, "radius must be a number > 0, got str"),
    "H is M": (lambda args: args.update(H=args["M"]), ValueError, r"(M|H)\[\d\] and (M|H)\[\d\] share memory"),
    "records": (
        put(0, params=lambda p: (p[0].requires_grad_(), p[1])),
        ValueError,
        r"the weight of params\[0\] requires grad, and this op",
    ),
}


@NO_KERNEL
@pytest.mark.parametrize("shapes", [[(3, 4), (5, 7)], [(3, 4), LARGE], [LARGE, (150, 7)]], ids=["small", "mixed", "large"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_the_layer_and_writes_nothing(device, kind, shapes):
    change, error, message = BAD[kind]
    params, grads, M, H, factors = arguments(cases.make(shapes, torch.float32, device))
    before = clone((params, M, H))
    args = {"params": params, "grads": grads, "M": M, "H": H, "factors": factors, "lr": 0.1, "momentum": 0.9, "strength": 1.0}
    args |= {"radius": None, "workspace": None}
    change(args)
    with pytest.raises(error, match=message):
        ops.ncl_step_(*list(args.values())[:9], workspace=args["workspace"])
    assert all(identical(a, b) for a, b in zip(tensors((params, M, H)), tensors(before), strict=True))


@NO_KERNEL
def test_shared_memory_is_found(device):
    for shape in ((4, 4), (140, 139)):
        step = cases.make([shape, shape], torch.float32, device)
        params, grads, M, H, factors = arguments(step)
        with pytest.raises(ValueError, match=r"the weight of params\[1\] and the weight of params\[0\] share memory"):
            ops.ncl_step_([params[0], (params[0][0], params[1][1])], grads, M, H, factors, 0.1)
        with pytest.raises(ValueError, match=r"share memory"):
            ops.ncl_step_(params, [grads[0], params[1]], M, H, factors, 0.1)
        with pytest.raises(ValueError, match=r"share memory"):
            ops.kron_solve_([grads[0], grads[0]], factors)
        flat = torch.zeros(4 * shape[0] * (shape[1] + 1), device=device)
        overlapping = [flat.as_strided(M[0].shape, M[0].stride(), k) for k in (0, 8)]
        with pytest.raises(ValueError, match=r"M\[1\] and M\[0\] share memory or interleave"):
            ops.ncl_step_(params, grads, overlapping, H, factors, 0.1)
        shared = [factors[0], factors[0]]
        ops.ncl_step_(params, grads, M, H, shared, 0.1)


@NO_KERNEL
def test_a_named_backend_without_the_module_raises(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda module: f"{module} is missing for a test")
    step = cases.make([LARGE])
    with use_backend("cpp"), pytest.raises(BackendUnavailable, match="_C is missing for a test"):
        ops.ncl_step_(*arguments(step), 0.1)
