from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from fastcl import ops, reference
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
if INTERPRETED:
    SHAPES = {name: shapes for name, shapes in SHAPES.items() if name in ("one", "small", "mixed")}
NUMBERS = (1e-2, 0.9, 0.7)  # lr, momentum, strength


def arguments(step):
    return step.params, step.grads, step.M, step.H, step.inverse_factors


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value or () for t in tensors(v)]


def largest(a, b):
    return max((float((x.double() - y.double()).abs().max()) if x.numel() else 0.0 for x, y in zip(a, b, strict=True)), default=0.0)


def check_step(args, lr=NUMBERS[0], momentum=NUMBERS[1], strength=NUMBERS[2], radius=None, **keywords):
    """No list is further from float64 than twice what the definition in the own dtype is."""
    exact, own = clone(args, DOUBLE), clone(args)
    wide_lr = lr.double() if isinstance(lr, torch.Tensor) else lr
    reference.ncl_step_(*exact, wide_lr, momentum, strength, radius)
    reference.ncl_step_(*own, lr, momentum, strength, radius)
    read = clone((args[1], args[4]))
    assert ops.ncl_step_(*args, lr, momentum, strength, radius, **keywords) is None
    for name, got, torchs, wanted in zip(("params", "grads", "M", "H"), args, own, exact, strict=False):
        for n, (x, t, e) in enumerate(zip(tensors(got), tensors(torchs), tensors(wanted), strict=True)):
            scale = max(1e-30, float(e.abs().max())) if e.numel() else 0.0
            allowed = 2 * largest([t], [e]) + 2 * unit_roundoff(x.dtype) * scale + (1e-12 * scale if x.dtype == DOUBLE else 0)
            assert largest([x], [e]) <= allowed, f"{name}, tensor {n} of {x.dtype}, {tuple(x.shape)}"
    assert all(identical(a, b) for a, b in zip(tensors(read), tensors((args[1], args[4])), strict=True))


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
@pytest.mark.parametrize("radius", [None, 0.05, 1e6])
@pytest.mark.parametrize("pad", [False, True])
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
@pytest.mark.parametrize("shapes", [[(3, 4), (5, 6)], [(3, 4), (140, 150), (130, 7), (9, 300)]], ids=str)
def test_layers_without_bias(device, radius, shapes):
    check_step(arguments(without_bias(cases.make(shapes, torch.float32, device), range(len(shapes)))), radius=radius)
    check_step(arguments(without_bias(cases.make(shapes, torch.float32, device), [1])), radius=radius)
    step = without_bias(cases.make(shapes, torch.float32, device), [1])
    step.params[1], step.grads[1] = (step.params[1], None), [step.grads[1], None]
    check_step(arguments(step), radius=radius)


@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("sides", ["A", "G", "AG"])
@pytest.mark.parametrize("shapes", [[(3, 4)], [(300, 40), (5, 6), (20, 400)]], ids=str)
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
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (140, 16, 3, 3), (150, 20)], ids=str)
def test_layouts_of_weights_and_gradients(device, radius, layout, shape):
    m, n = shape[0], int(np.prod(shape[1:]))
    for own, other in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
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
    a, b = (cases.make([(5, 6), (140, 130)], dtype, device) for dtype in (torch.float32, DOUBLE))
    check_step(tuple([*x, *y] for x, y in zip(arguments(a), arguments(b), strict=True)))
    check_step(tuple([*x, *y] for x, y in zip(arguments(a), arguments(b), strict=True)), radius=0.05)


# ---- the composition, over the definitions of its stages


def stage(op):
    return getattr(definition, op, None) or getattr(reference, op)


def layers_of(args, workspace=()):
    params, grads, M, H, factors = args
    lists = [*definition.parts(params), *definition.parts(grads), list(M), list(H), list(workspace), *definition.sides(factors)]
    return _kronecker_layers.Layers(*lists)


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
