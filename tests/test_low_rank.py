from __future__ import annotations

import itertools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastcl import backends, ops, reference
from fastcl.ops import _low_rank_compress, _low_rank_operators, _low_rank_stages
from fastcl.testing import CASES, clone, gradients, largest_error, unit_roundoff
from fastcl.testing.low_rank import low_rank_precision
from layouts import FLOATING, INTERPRETED, LAYOUTS, SHAPES, identical

F64, F32 = torch.float64, torch.float32
SMALL = [(6, 10), (2, 3, 4, 5), (33,), (), (0, 3)]
LISTS = SHAPES if not INTERPRETED else {k: v if k != "chunk edges" else [(n // 8,) for (n,) in v] for k, v in SHAPES.items()}
NO_KERNEL = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here that does not run elsewhere in this file")


def flat(tensors):
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors]) if tensors else torch.zeros(0, dtype=F64)


def rows_of(basis):
    return torch.cat([b.double().cpu().reshape(len(b), b.shape[1:].numel()) for b in basis], dim=1)


def dense(diagonal, basis, sigma):
    """The matrix itself."""
    d = flat(diagonal)
    factor = d.sqrt()[:, None] * rows_of(basis).T * sigma.cpu()
    return torch.diag(d) + factor @ factor.T


def split(value, like):
    return [v.view(t.shape) for v, t in zip(value.split([t.numel() for t in like]), like, strict=True)]


def close(tensors, want, ulps, size=None):
    """Within so many roundings of the tensors' own dtype, of the largest element."""
    largest = size if size is not None else float(want.abs().max()) if len(want) else 0
    for t, w in zip(tensors, split(want, tensors), strict=True):
        u = unit_roundoff(t.dtype)
        assert float((t.double().cpu() - w).abs().max() if t.numel() else 0) <= u * ulps * largest + (torch.finfo(t.dtype).tiny), t.dtype


def step_lists(shapes, dtype, kept, device, seed=0):
    params, grads = (gradients(shapes, dtype, device, seed + n) for n in range(2))
    momenta, anchors = (gradients(shapes, kept, device, seed + n) for n in range(2, 4))
    return params, grads, momenta, anchors


def spread(shapes, dtype, device, seed, longest=3):
    """Vectors whose lengths span decades."""
    return [[g * 10.0**-k for g in gradients(shapes, dtype, device, seed + k)] for k in range(longest)]


# ---- the identities, against the dense matrix


@pytest.mark.parametrize("rank", [0, 1, 5] if INTERPRETED else [0, 1, 2, 4, 5, 9])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_solve_and_quadratic_are_those_of_the_matrix(device, rank, dtype):
    diagonal, basis, sigma = low_rank_precision(SMALL, dtype, rank, device)
    matrix, grads = dense(diagonal, basis, sigma), gradients(SMALL, dtype, device, 3)
    g = flat(grads)
    square = ops.low_rank_quadratic(grads, diagonal, basis, sigma)
    assert square.dtype == F64
    assert square.shape == ()
    assert float(square) == pytest.approx(float(g @ matrix @ g), rel=64 * unit_roundoff(dtype))
    ops.low_rank_solve_(grads, diagonal, basis, sigma)
    close(grads, torch.linalg.solve(matrix, g), 64)


def test_against_scipy_and_woodbury(device):
    linalg = pytest.importorskip("scipy.linalg")
    diagonal, basis, sigma = low_rank_precision([(5, 8), (11,)], F64, 6, device)
    grads = gradients([(5, 8), (11,)], F64, device, 2)
    matrix, g = dense(diagonal, basis, sigma), flat(grads)
    factor = linalg.cho_factor(matrix.numpy())
    ops.low_rank_solve_(grads, diagonal, basis, sigma)
    close(grads, torch.tensor(linalg.cho_solve(factor, g.numpy())), 256)
    d = flat(diagonal)
    u = d.sqrt()[:, None] * rows_of(basis).T * sigma.cpu()
    inner = torch.eye(6, dtype=F64) + u.T @ (u / d[:, None])
    woodbury = g / d - (u / d[:, None]) @ torch.linalg.solve(inner, u.T @ (g / d))
    close(grads, woodbury, 256)


@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("rank", [3] if INTERPRETED else [0, 3])
def test_solve_over_shapes(device, shapes, rank):
    """Against the definition in float64, twice: multiplied back it is the gradient."""
    diagonal, basis, sigma = low_rank_precision(shapes, F32, rank, device)
    grads = gradients(shapes, F32, device, 0)
    exact = clone((grads, diagonal, basis), F64)
    reference.low_rank_solve_(*exact, sigma)
    ops.low_rank_solve_(grads, diagonal, basis, sigma)
    if grads:
        close(grads, flat(exact[0]), 48)
        square = ops.low_rank_quadratic(grads, diagonal, basis, sigma)
        wanted = reference.low_rank_quadratic(clone(grads, F64), *exact[1:], sigma)
        assert float(square) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["low_rank_solve_", "low_rank_step_"])
@pytest.mark.parametrize(("dtype", "stored"), list(itertools.product(FLOATING, (F32, F64))), ids=lambda d: str(d)[6:])
def test_error_against_float64_is_no_worse_than_torch(device, name, dtype, stored):
    case = CASES[name]
    args = case.make([(1000,), (30, 40), (70,)], dtype, stored, device)
    exact, theirs = case.in_float64(args), clone(args)
    case.reference(*exact)
    case.providers["eager"](*theirs)
    case.call(*args)
    largest = max(float(e.abs().max()) for e in exact[0])
    kept = args[1 if name == "low_rank_solve_" else 4][0].dtype
    allowed = 2 * largest_error(theirs[0], exact[0]) + (unit_roundoff(dtype) + 8 * unit_roundoff(kept)) * largest
    assert largest_error(args[0], exact[0]) <= allowed


# ---- the step


@pytest.mark.parametrize("radius", [0.37] if INTERPRETED else [None, 1e6, 0.37])
@pytest.mark.parametrize(("momentum", "strength"), [(0.9, 0.7), (0.0, 0.7), (0.9, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("rank", [5] if INTERPRETED else [0, 5])
def test_the_step_is_the_dual_form_with_the_dense_matrix(device, rank, momentum, strength, radius):
    """M <- rho M + g + lambda H; V = Lambda^-1 M; W <- W - s V; H <- H - s M, where M = Lambda V and H = Lambda (W - mu)."""
    for dtype in (F64, F32):
        diagonal, basis, sigma = low_rank_precision(SMALL, dtype, rank, device)
        matrix = dense(diagonal, basis, sigma)
        params, _, momenta, anchors = step_lists(SMALL, dtype, dtype, device)
        w, mu = flat(params), flat(anchors)
        m, h = matrix @ flat(momenta), matrix @ (w - mu)
        for step in range(2 if INTERPRETED else 4):
            grads = gradients(SMALL, dtype, device, 20 + step)
            m = momentum * m + flat(grads) + strength * h
            v = torch.linalg.solve(matrix, m)
            q = float(m @ v)
            s = 0.05 if radius is None else min(0.05, radius / math.sqrt(q))
            w, h = w - s * v, h - s * m
            before = clone(momenta)
            ops.low_rank_step_(params, grads, momenta, anchors, diagonal, basis, sigma, 0.05, momentum, strength, radius)
            close(params, w, 256)
            if momentum:
                close(momenta, v, 512)
            else:
                assert all(identical(a, b) for a, b in zip(momenta, before, strict=True))


@NO_KERNEL
def test_no_step_is_longer_than_the_radius(device):
    for seed, (momentum, strength) in itertools.product(range(4), [(0.9, 0.7), (0.0, 1.0), (0.9, 0.0)]):
        diagonal, basis, sigma = low_rank_precision([(30, 10), (40,)], F64, 6, device, seed)
        matrix = dense(diagonal, basis, sigma * 100)
        params, grads, momenta, anchors = step_lists([(30, 10), (40,)], F64, F64, device, seed)
        for size in (1e-3, 1.0, 1e3):
            before = flat(params)
            scaled = [g * size for g in grads]
            ops.low_rank_step_(params, scaled, momenta, anchors, diagonal, basis, sigma * 100, 0.1, momentum, strength, 0.02)
            moved = flat(params) - before
            assert float(moved @ matrix @ moved) ** 0.5 <= 0.02 * (1 + 1e-9)


def test_a_direction_of_zero_moves_nothing(device):
    diagonal, basis, sigma = low_rank_precision([(9,)], F32, 2, device)
    w = torch.randn(9, device=device)
    before = w.clone()
    ops.low_rank_step_([w], [torch.zeros(9, device=device)], [], [w.clone()], diagonal, basis, sigma, 0.1, 0.0, 1.0, 0.5)
    assert identical(w, before)


def test_the_rate_may_be_a_tensor(device):
    results = []
    for lr in (0.03125, torch.tensor(0.03125, device=device), torch.tensor(0.03125, dtype=F64, device=device)):
        for radius in (None, 0.1):
            args = list(CASES["low_rank_step_"].make([(40, 3), (5,)], F32, F32, device))
            args[7], args[10] = lr, radius
            ops.low_rank_step_(*args)
            results.append((radius, args[0]))
    for radius, params in results[2:]:
        same = next(p for r, p in results if r == radius)
        assert all(identical(a, b) for a, b in zip(params, same, strict=True))


def test_what_is_left_out_is_not_looked_at(device):
    args = list(CASES["low_rank_step_"].make([(40, 3), (5,)], F32, F32, device))
    nothing = clone(args)
    nan = [torch.full_like(t, math.nan) for t in args[2]]
    args[2:4] = nan, clone(nan)
    nothing[2:4] = [], []
    for a in (args, nothing):
        ops.low_rank_step_(*a[:8], momentum=0, strength=0.0)
    assert all(identical(a, b) for a, b in zip(args[0], nothing[0], strict=True))
    assert all(bool(t.isnan().all()) for t in args[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_strides_of_params_and_grads(device, layout, other):
    if INTERPRETED and "contiguous" not in (layout, other):
        pytest.skip("minutes in the interpreter")
    shapes = [(6, 11), (2, 3, 4, 5), (33,), ()] if INTERPRETED else [(60, 11), (2, 3, 4, 5), (333,), ()]
    for dtype, kept in ((torch.bfloat16, F32), (F64, F32), (F32, F64), (F32, F32))[3 * INTERPRETED :]:
        for momentum, strength, radius in ((0.0, 0.0, None), (0.9, 0.7, 0.3))[INTERPRETED:]:
            diagonal, basis, sigma = low_rank_precision(shapes, kept, 5, device)
            lists = step_lists(shapes, dtype, kept, device)
            args = [*lists, diagonal, basis, sigma, 0.03, momentum, strength, radius]
            plain = clone(args)
            args[0], args[1] = [LAYOUTS[layout](t) for t in args[0]], [LAYOUTS[other](t) for t in args[1]]
            ops.low_rank_step_(*args)
            ops.low_rank_step_(*plain)
            coarser = max(1, unit_roundoff(kept) / unit_roundoff(dtype))
            close(args[0], flat(plain[0]), 16 * coarser)
            grads, dense_grads = [LAYOUTS[layout](g) for g in lists[1]], clone(lists[1])
            ops.low_rank_solve_(grads, diagonal, basis, sigma)
            ops.low_rank_solve_(dense_grads, diagonal, basis, sigma)
            close(grads, flat(dense_grads), 16 * coarser)


def test_float64_parameters_keep_their_bits_with_a_float32_precision(device):
    """The direction is float32, the parameter is not rounded to it."""
    diagonal, basis, sigma = low_rank_precision([(50,)], F32, 2, device)
    w = torch.rand(50, dtype=F64, device=device)
    before = w.clone()
    ops.low_rank_step_([w], [torch.full((50,), 1e-20, device=device)], [], [], diagonal, basis, sigma, 1e-20, 0, 0)
    assert identical(w, before)


@pytest.mark.parametrize("place", [0, 64, 128])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_of_a_gradient_reach_everything(device, place, value):
    diagonal, basis, sigma = low_rank_precision([(129,), (3,)], F32, 2, device)
    grads = [torch.ones(129, device=device), torch.ones(3, device=device)]
    grads[0][place] = value
    for radius in (None, 1.0):
        params = [torch.zeros_like(g) for g in grads]
        ops.low_rank_step_(params, grads, [], [], diagonal, basis, sigma, 0.1, 0, 0, radius)
        assert not any(bool(p.isfinite().any()) for p in params)
    assert not bool(ops.low_rank_quadratic(grads, diagonal, basis, sigma).isfinite())
    ops.low_rank_solve_(grads, diagonal, basis, sigma)
    assert not any(bool(g.isfinite().any()) for g in grads)
    alone = [torch.ones(4, device=device)]
    alone[0][1] = value
    ops.low_rank_solve_(alone, [torch.ones(4, device=device)], [torch.ones(0, 4, device=device)], torch.zeros(0, dtype=F64, device=device))
    assert alone[0].isfinite().tolist() == [True, False, True, True]


# ---- appending


def check_form(diagonal, basis, sigma):
    """Rows that are used are orthonormal, the others zero; sigma descends."""
    rows, used = rows_of(basis), (sigma > 0).cpu()
    assert float((rows @ rows.T - torch.diag(used.double())).abs().max() if len(sigma) else 0) <= 1e-5
    assert bool((sigma[:-1] >= sigma[1:]).all())
    assert bool((sigma >= 0).all())
    assert all(bool((d > 0).all()) for d in diagonal)


def appended(diagonal, basis, sigma, vectors, weight=1.0):
    """The matrix that was asked for."""
    matrix = dense(diagonal, basis, sigma)
    for v in vectors:
        matrix = matrix + weight * torch.outer(flat(v), flat(v))
    ops.low_rank_append_(diagonal, basis, sigma, vectors, weight)
    check_form(diagonal, basis, sigma)
    return matrix


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("other", FLOATING, ids=str)
def test_append_up_to_the_rank_is_exact(device, dtype, other):
    diagonal, basis, sigma = low_rank_precision(SMALL, dtype, 8, device)
    basis, sigma = [torch.zeros_like(b) for b in basis], torch.zeros_like(sigma)
    before = clone(diagonal)
    for seed, weight in ((0, 1.0), (10, 0.25)):
        matrix = appended(diagonal, basis, sigma, [clone(v) for v in spread(SMALL, other, device, seed)], weight)
        got = dense(diagonal, basis, sigma)
        # float64 sees the decompositions' own roundings, of matrices with 11 rows.
        assert float((got - matrix).norm() / matrix.norm()) <= (16 if dtype == F32 else 8 * 11) * unit_roundoff(dtype)
        assert all(identical(a, b) for a, b in zip(diagonal, before, strict=True))
    assert int((sigma > 0).sum()) == 6


@pytest.mark.parametrize("rank", [0, 4] if INTERPRETED else [0, 1, 4, 9])
@pytest.mark.parametrize("count", [5] if INTERPRETED else [1, 5])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_append_keeps_every_diagonal_element(device, rank, count, dtype):
    diagonal, basis, sigma = low_rank_precision(SMALL, dtype, rank, device)
    for n in range(3):
        matrix = appended(diagonal, basis, sigma, spread(SMALL, dtype, device, 7 * n, count), 2.0)
        kept = dense(diagonal, basis, sigma)
        # The decomposition's own roundings, relative to the largest singular value.
        largest = float(sigma.max()) ** 2 if rank else 0
        assert float((kept.diagonal() / matrix.diagonal() - 1).abs().max()) <= 32 * unit_roundoff(dtype) + 2.0**-53 * largest


def test_append_keeps_the_principal_directions(device):
    """Against the definition by singular value decompositions of the whole matrices."""
    diagonal, basis, sigma = low_rank_precision([(40, 20), (50,)], F64, 4, device)
    vectors = spread([(40, 20), (50,)], F64, device, 3, 4)
    wanted = clone((diagonal, basis, sigma))
    reference.low_rank_append_(*wanted, vectors, 1.5)
    ops.low_rank_append_(diagonal, basis, sigma, vectors, 1.5)
    torch.testing.assert_close(sigma, wanted[2], rtol=1e-10, atol=0)
    torch.testing.assert_close(dense(diagonal, basis, sigma), dense(*wanted), rtol=1e-9, atol=1e-9)


DEPENDENT = {
    "zero": lambda v: [v[0], [t * 0 for t in v[0]], [t * 0 for t in v[0]]],
    "all zero": lambda v: [[t * 0 for t in v[0]]] * 2,
    "duplicates": lambda v: [v[0], v[1], v[0], v[1]],
    "scaled copies": lambda v: [v[0], [t * 1e-6 for t in v[0]], [t * 1e5 for t in v[0]]],
    "sum": lambda v: [v[0], v[1], [a + b for a, b in zip(v[0], v[1], strict=True)]],
}


@pytest.mark.parametrize("kind", ["duplicates"] if INTERPRETED else DEPENDENT)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_dependent_vectors(device, kind, dtype):
    diagonal, basis, sigma = low_rank_precision([(20, 5), (7,)], dtype, 6, device)
    basis, sigma = [torch.zeros_like(b) for b in basis], torch.zeros_like(sigma)
    vectors = DEPENDENT[kind](spread([(20, 5), (7,)], dtype, device, 0))
    for _ in range(2):
        matrix = appended(diagonal, basis, sigma, vectors)
        got = dense(diagonal, basis, sigma)
        assert float((got - matrix).norm() / matrix.norm()) <= 64 * unit_roundoff(dtype)
    assert int((sigma > 0).sum()) <= 3


def test_the_same_vector_again_and_again(device):
    diagonal, basis, sigma = low_rank_precision([(300,)], F32, 4, device)
    v = gradients([(300,)], F32, device, 5)
    matrix = dense(diagonal, basis, sigma)
    for n in range(2 if INTERPRETED else 30):
        ops.low_rank_append_(diagonal, basis, sigma, [v], 0.5)
        check_form(diagonal, basis, sigma)
        matrix = matrix + 0.5 * torch.outer(flat(v), flat(v))
        assert float((dense(diagonal, basis, sigma).diagonal() / matrix.diagonal() - 1).abs().max()) <= 1e-6 * (n + 1)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_rows_stay_orthonormal_where_singular_values_span_six_decades(device, dtype):
    shapes = [(100,), (17, 3)] if INTERPRETED else [(3000,), (17, 30)]
    diagonal, basis, sigma = low_rank_precision(shapes, dtype, 12, device)
    basis, sigma = [torch.zeros_like(b) for b in basis], torch.zeros_like(sigma)
    vectors = [[g * 10.0 ** -(k / 2) for g in gradients(shapes, dtype, device, k)] for k in range(12)]
    mixed = [[sum(c * t[i] for c, t in zip(row, vectors, strict=True)) for i in range(2)] for row in torch.randn(12, 12, device=device)]
    for lists in (vectors, mixed, vectors):
        matrix_diagonal = flat(diagonal) * (1 + ((sigma[:, None].cpu() * rows_of(basis)) ** 2).sum(0)) + sum(flat(v) ** 2 for v in lists)
        ops.low_rank_append_(diagonal, basis, sigma, lists)
        check_form(diagonal, basis, sigma)
        kept = flat(diagonal) * (1 + ((sigma[:, None].cpu() * rows_of(basis)) ** 2).sum(0))
        assert float((kept / matrix_diagonal - 1).abs().max()) <= 64 * unit_roundoff(dtype) + 2.0**-53 * float(sigma.max()) ** 2
    assert float(sigma.max() / sigma.min()) > 1e5


@NO_KERNEL
def test_heavy_drops_turn_the_rows_and_they_are_made_orthonormal_again(device):
    """What is dropped widens the diagonal where kept rows are large: after it they are far from orthonormal."""
    n = 400
    diagonal, basis, sigma = [torch.ones(n, device=device)], [torch.zeros(2, n, device=device)], torch.zeros(2, dtype=F64, device=device)
    shared = torch.zeros(n, device=device)
    shared[:200] = 1
    a, b = shared.clone(), shared.clone()
    a[200:300], b[300:] = 0.7, -0.7
    noise = [torch.randn(n, device=device) * shared * 0.5 for _ in range(5)]
    matrix = appended(diagonal, basis, sigma, [[3 * a], [3 * b], *[[x] for x in noise]])
    kept = dense(diagonal, basis, sigma)
    assert float((kept.diagonal() / matrix.diagonal() - 1).abs().max()) <= 1e-6


def test_a_gram_matrix_that_lies_is_repaired_by_rotations(device):
    """Rows that leave the compression far from orthonormal are rotated until they are."""
    diagonal, basis, sigma = low_rank_precision([(500,)], F32, 4, device)
    skew = torch.eye(4, dtype=F64, device=device)
    skew[0, 1], skew[2, 3] = 0.5, 0.3
    factor = sigma[:, None].cpu() * (skew.cpu() @ rows_of(basis))
    basis[0].copy_((skew @ basis[0].double()).float())
    place = _low_rank_operators.whole(torch.device(device))
    gram = backends.implementation("low_rank_rotate_", torch.device(device))(basis, torch.eye(4, dtype=F64, device=device)).cpu()
    values = sigma.cpu().clone()
    _low_rank_compress._orthonormalise_(place, basis, values, gram)
    check_form(diagonal, basis, values)
    again = values[:, None] * rows_of(basis)
    torch.testing.assert_close(again.T @ again, factor.T @ factor, rtol=1e-5, atol=1e-5)


@NO_KERNEL
def test_rows_that_cannot_be_made_orthonormal_raise(device):
    _, basis, sigma = low_rank_precision([(50,)], F32, 2, device)
    place = _low_rank_operators.whole(torch.device(device))
    with pytest.raises(RuntimeError, match="not orthonormal after 4 rotations: nan"):
        _low_rank_compress._orthonormalise_(_stuck(place), basis, sigma.cpu(), torch.eye(2, dtype=F64) * 2)


def _stuck(place):
    class Call(_low_rank_stages.Checked):
        def write(self, op, written, *args):
            return torch.full((2, 2), math.nan, dtype=F64) if op == "low_rank_rotate_" else super().write(op, written, *args)

    return _low_rank_stages.Place(Call(), place.device)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 2])
def test_nan_in_a_vector_raises_before_anything_is_written(device, value, rank):
    form = low_rank_precision([(30,), (4, 5)], F32, rank, device)
    before = clone(form)
    vectors = spread([(30,), (4, 5)], F32, device, 0)
    vectors[1][1][2, 3] = value
    with pytest.raises(ValueError, match=r"vectors\[1\] holds NaN or Inf"):
        ops.low_rank_append_(*form, vectors)
    for new, old in zip((*form[0], *form[1], form[2]), (*before[0], *before[1], before[2]), strict=True):
        assert identical(new, old)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_of_any_strides(device, layout):
    shapes = [(6, 11), (2, 3, 4, 5), (33,), ()] if INTERPRETED else [(60, 11), (2, 3, 4, 5), (333,), ()]
    form = low_rank_precision(shapes, F32, 3, device)
    plain, vectors = clone(form), spread(shapes, F32, device, 0)
    ops.low_rank_append_(*form, [[LAYOUTS[layout](t) for t in v] for v in vectors])
    ops.low_rank_append_(*plain, vectors)
    torch.testing.assert_close(form[2], plain[2], rtol=1e-12, atol=0)
    torch.testing.assert_close(dense(*form).diagonal(), dense(*plain).diagonal(), rtol=1e-6, atol=0)


# ---- bits, autograd, compilation


def test_bits_do_not_depend_on_threads_or_runs(device):
    shapes = [(2001,), (5,)] if INTERPRETED else [(70_001,), (33, 1000), (5,), (20_000,)]
    results = []
    for threads in (1, 2, 3, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            args = list(CASES["low_rank_step_"].make(shapes, F32, F32, device))
            args[10] = 0.4
            ops.low_rank_step_(*args)
            square = ops.low_rank_quadratic(args[1], *args[4:7])
            ops.low_rank_solve_(args[1], *args[4:7])
            stages = backends.implementation("low_rank_gram", torch.device(device))
            gram = stages(args[4], args[5], args[6], [args[1], args[0]])
        finally:
            torch.set_num_threads(before)
        results.append([square, gram, *args[0], *args[1], *args[2]])
    assert all(identical(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_writes_are_seen_by_autograd(device):
    form = low_rank_precision([(4,)], F32, 2, device)

    def saved(write):
        x = torch.ones(4, device=device, requires_grad=True)
        y = x.exp()  # backward needs y
        write(y.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    g, v, mu = (torch.ones(4, device=device) for _ in range(3))
    saved(lambda y: ops.low_rank_solve_([y], *form))
    saved(lambda y: ops.low_rank_step_([y], [g], [v], [mu], *form, 0.1))
    saved(lambda y: ops.low_rank_step_([v], [g], [y], [mu], *form, 0.1, radius=0.1))
    saved(lambda y: ops.low_rank_append_([y], *clone(form[1:]), [[g]]))
    versions = [t._version for t in (form[0][0], form[1][0], form[2])]
    ops.low_rank_append_(*form, [[g]])
    assert all(t._version > old for t, old in zip((form[0][0], form[1][0], form[2]), versions, strict=True))


@NO_KERNEL
def test_opcheck(device):
    for dtype, kept in ((F32, F32), (torch.bfloat16, F32), (F64, F64)):
        form = low_rank_precision([(4, 5), (7,)], kept, 3, device)
        lists = step_lists([(4, 5), (7,)], dtype, kept, device)
        check = torch.library.opcheck
        check(torch.ops.fastcl.low_rank_solve_.default, (lists[1], *form))
        check(torch.ops.fastcl.low_rank_quadratic.default, (lists[1], *form))
        check(torch.ops.fastcl.low_rank_step_.default, (*lists, *form, None, 0.1, 0.9, 1.0, 0.5))
        check(torch.ops.fastcl.low_rank_step_.default, (*lists[:2], [], [], *form, torch.tensor(0.1, device=device), 0.0, 0.0, 0.0, None))
        check(torch.ops.fastcl.low_rank_append_.default, (*form, [*lists[2], *lists[3]], 2, 0.5))


@NO_KERNEL
def test_compile_fullgraph(device):
    torch._dynamo.reset()
    shapes = [(60, 10), (7,)]

    def everything(params, grads, momenta, anchors, diagonal, basis, sigma, vectors):
        ops.low_rank_step_(params, grads, momenta, anchors, diagonal, basis, sigma, 0.1, 0.9, 0.5, 0.3)
        ops.low_rank_step_(params, grads, [], [], diagonal, basis, sigma, 0.1, 0.0, 0.0)
        square = ops.low_rank_quadratic(grads, diagonal, basis, sigma)
        ops.low_rank_append_(diagonal, basis, sigma, vectors, 0.5)
        ops.low_rank_solve_(grads, diagonal, basis, sigma)
        return square

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True)):
        args = [*step_lists(shapes, F32, F32, device), *low_rank_precision(shapes, F32, 3, device), spread(shapes, F32, device, 4)]
        results.append([function(*args), *args[0], *args[1], *args[2], *args[4], *args[5], args[6]])
    assert all(identical(a, b) for a, b in zip(*results, strict=True))


def test_gradients_that_require_grad_are_constants(device):
    form = low_rank_precision([(9,)], F32, 2, device)
    p = torch.nn.Parameter(torch.ones(9, device=device))
    assert not ops.low_rank_quadratic([p], *form).requires_grad
    with torch.no_grad():
        ops.low_rank_step_([p], [torch.ones(9, device=device)], [], [], *form, 0.1, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"params\[0\] requires grad"):
        ops.low_rank_step_([p], [torch.ones(9, device=device)], [], [], *form, 0.1, 0.0, 0.0)


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), max_size=3),
    rank=st.integers(0, 6),
    dtypes=st.tuples(st.sampled_from(FLOATING), st.sampled_from(FLOATING), st.sampled_from([F32, F64])),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    numbers=st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.7]), st.sampled_from([None, 0.2])),
)
@hypothesis.settings(max_examples=15 if INTERPRETED else 80, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, shapes, rank, dtypes, layouts, numbers):
    form = low_rank_precision(shapes, dtypes[2], rank, device)
    params, grads = (
        [LAYOUTS[layout](t) for t in gradients(shapes, dtype, device, n)]
        for n, (layout, dtype) in enumerate(zip(layouts, dtypes, strict=False))
    )
    momenta, anchors = (gradients(shapes, dtypes[2], device, n) for n in (2, 3))
    exact = clone((params, grads, momenta, anchors, *form[:2]), F64)
    reference.low_rank_step_(*exact, form[2], 0.03, *numbers)
    ops.low_rank_step_(params, grads, momenta, anchors, *form, 0.03, *numbers)
    if params:
        size = 1 + max([float(e.abs().max()) for e in exact[0] if e.numel()], default=0)
        narrow = max(unit_roundoff(dtypes[0]), unit_roundoff(dtypes[2]))
        assert largest_error(params, exact[0]) <= (2 * unit_roundoff(dtypes[0]) + 64 * unit_roundoff(dtypes[2])) * size, narrow


# ---- bad input


def _bad_precision(change):
    def apply(a):
        a = list(a)
        a[4:7] = change(*a[4:7])
        return a

    return apply


BAD = {
    "params": (lambda a: [a[0][0], *a[1:]], TypeError, "params must be a list or tuple of tensors, got Parameter|Tensor"),
    "grads": (lambda a: [a[0], None, *a[2:]], TypeError, "grads must be a list or tuple of tensors, got NoneType"),
    "None inside": (lambda a: [*a[:3], [a[3][0], None], *a[4:]], TypeError, r"anchors\[1\] must be a tensor, got NoneType"),
    "length": (lambda a: [a[0], a[1], a[2][:1], *a[3:]], ValueError, "momenta has 1 tensors and params has 2"),
    "shape": (lambda a: [a[0], [a[1][0], a[1][1][:1]], *a[2:]], ValueError, r"grads\[1\] has shape \(1, 4\), params\[1\]"),
    "dtype": (lambda a: [a[0], [a[1][0].int(), a[1][1]], *a[2:]], TypeError, r"grads\[0\] has dtype int32; accepted are"),
    "narrow diagonal": (
        _bad_precision(lambda d, b, s: ([t.half() for t in d], [t.half() for t in b], s)),
        TypeError,
        r"diagonal\[0\] has dtype float16; accepted are float64, float32",
    ),
    "mixed diagonal": (_bad_precision(lambda d, b, s: ([d[0], d[1].double()], b, s)), TypeError, r"diagonal\[1\] has dtype torch.float64"),
    "basis dtype": (_bad_precision(lambda d, b, s: (d, [t.double() for t in b], s)), TypeError, r"basis\[0\] has dtype torch.float64"),
    "basis rows": (
        _bad_precision(lambda d, b, s: (d, b, s[:1].clone())),
        ValueError,
        r"basis\[0\] has shape \(2, 5\); for the 1 values of sigma and diagonal\[0\] of shape \(5,\) it is \(1, 5\)",
    ),
    "basis of one": (_bad_precision(lambda d, b, s: (d, [b[0], b[1][:1]], s)), ValueError, r"basis\[1\] has shape \(1, 3, 4\)"),
    "basis missing": (_bad_precision(lambda d, b, s: (d, b[:1], s)), ValueError, "basis has 1 tensors and diagonal has 2"),
    "strided basis": (
        _bad_precision(lambda d, b, s: (d, [torch.stack([b[0], b[0]], -1)[..., 0], b[1]], s)),
        ValueError,
        r"basis\[0\] is not contiguous",
    ),
    "strided diagonal": (
        _bad_precision(lambda d, b, s: ([d[0], d[1].t().contiguous().t()], b, s)),
        ValueError,
        r"diagonal\[1\] is not con",
    ),
    "sigma": (_bad_precision(lambda d, b, s: (d, b, None)), TypeError, "sigma must be a tensor, got NoneType"),
    "sigma dtype": (_bad_precision(lambda d, b, s: (d, b, s.float())), TypeError, r"sigma\[0\] has dtype float32; accepted are float64"),
    "sigma shape": (_bad_precision(lambda d, b, s: (d, b, s[None])), ValueError, r"sigma has shape \(1, 2\)"),
    "momenta dtype": (lambda a: [*a[:2], [t.double() for t in a[2]], *a[3:]], TypeError, r"momenta\[0\] has dtype torch.float64"),
    "strided momenta": (lambda a: [*a[:2], [a[2][0], a[2][1].t().contiguous().t()], *a[3:]], ValueError, r"momenta\[1\] is not contiguous"),
    "lr": (lambda a: [*a[:7], -0.1, *a[8:]], ValueError, "lr must be a finite number >= 0, got -0.1"),
    "lr type": (lambda a: [*a[:7], "0.1", *a[8:]], TypeError, "lr must be a number >= 0, got str"),
    "lr shape": (lambda a: [*a[:7], torch.ones(2), *a[8:]], ValueError, r"lr has shape \(2,\); a tensor lr is 0-d"),
    "momentum": (lambda a: [*a[:8], math.nan, *a[9:]], ValueError, "momentum must be a finite number >= 0, got nan"),
    "strength": (lambda a: [*a[:9], math.inf, a[10]], ValueError, "strength must be a finite number >= 0, got inf"),
    "radius": (lambda a: [*a[:10], 0.0], ValueError, "radius must be a finite number > 0, got 0.0"),
    "radius type": (lambda a: [*a[:10], "x"], TypeError, "radius must be a number > 0, got str"),
    "the same twice": (
        lambda a: [[a[0][1]] * 2, [a[1][1]] * 2, [a[2][1]] * 2, [a[3][1]] * 2, *[[x[1]] * 2 for x in a[4:6]], *a[6:]],
        ValueError,
        r"(params|momenta)\[1\] and (params|momenta)\[0\] share",
    ),
    "momenta in params": (lambda a: [a[0], a[1], a[0], *a[3:]], ValueError, r"momenta\[.\] and params\[.\] share"),
    "a gradient is a momentum": (lambda a: [a[0], a[2], a[2], *a[3:]], ValueError, r"share memory"),
    "records": (lambda a: [[a[0][0].clone().requires_grad_(), a[0][1]], *a[1:]], ValueError, r"params\[0\] requires grad"),
    "meta": (lambda a: [a[0], [a[1][0], a[1][1].to("meta")], *a[2:]], ValueError, r"grads\[1\] is on meta and params\[1\] is on"),
}


@NO_KERNEL
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    change, error, message = BAD[kind]
    shapes = [(5,), (3, 4)]
    args = [*step_lists(shapes, F32, F32, device), *low_rank_precision(shapes, F32, 2, device), 0.1, 0.9, 1.0, 0.5]
    before = clone(args)
    with pytest.raises(error, match=message):
        ops.low_rank_step_(*change(args))
    for new, old in zip(args[:6], before[:6], strict=True):
        assert all(identical(a, b) for a, b in zip(new, old, strict=True))


BAD_VECTORS = {
    "none": (lambda v: [], ValueError, "vectors has 0 lists; accepted are 1 to 256"),
    "no list": (lambda v: v[0][0], TypeError, "vectors must be a list of lists of tensors, got Tensor"),
    "flat": (lambda v: v[0], TypeError, r"vectors\[0\] must be a list or tuple of tensors, got Tensor"),
    "length": (lambda v: [v[0], v[1][:1]], ValueError, r"vectors\[1\] has 1 tensors and diagonal has 2"),
    "shape": (lambda v: [v[0], [v[1][0], v[1][1][:1]]], ValueError, r"vectors\[1\]\[1\] has shape"),
    "dtype": (lambda v: [[t.int() for t in v[0]]], TypeError, r"vectors\[0\]\[0\] has dtype int32"),
    "too many": (lambda v: v[:1] * 255, ValueError, "vectors has 255 lists and sigma 2 values; their sum is at most 256"),
}


@NO_KERNEL
@pytest.mark.parametrize("kind", BAD_VECTORS)
def test_bad_vectors(device, kind):
    change, error, message = BAD_VECTORS[kind]
    form = low_rank_precision([(5,), (3, 4)], F32, 2, device)
    before = clone(form)
    with pytest.raises(error, match=message):
        ops.low_rank_append_(*form, change(spread([(5,), (3, 4)], F32, device, 0)))
    with pytest.raises(ValueError, match=r"weight must be a finite number >= 0, got -1\.0"):
        ops.low_rank_append_(*form, spread([(5,), (3, 4)], F32, device, 0), -1.0)
    with pytest.raises(ValueError, match="share memory"):
        ops.low_rank_append_(*form, [form[0]])
    for new, old in zip((*form[0], *form[1], form[2]), (*before[0], *before[1], before[2]), strict=True):
        assert identical(new, old)
