"""Low-rank Kronecker factors, their sketches, merges and forms, against dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fastcl.precision._low_rank_factor import LowRankFactor, Sketch, fitted, identity, truncated
from fastcl.precision._low_rank_form import Products, Rows, form
from fastcl.precision._low_rank_merge import RULES, merge

F64 = torch.float64


def factor(n, rank, scale=0.7, spread=3.0, dtype=F64):
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64))[0][:, :rank].T.contiguous().to(dtype)
    values = (torch.rand(rank, dtype=F64) * spread).sort(descending=True).values
    return LowRankFactor(scale, values, basis)


def kron(g, a):
    """The matrix of X -> G X A on row-major vec(X)."""
    return torch.from_numpy(np.kron(g.numpy(), a.numpy()))


def dense(f):
    return f.dense() if isinstance(f, LowRankFactor) else torch.diag(f.double())


# ---- sketches


@pytest.mark.parametrize("size", [6, 20])
def test_a_sketch_with_enough_rows_is_the_covariance(size):
    rows = torch.randn(150, 3, dtype=F64) @ torch.randn(3, 20, dtype=F64)
    sketch = Sketch(20, size, torch.device("cpu"))
    for part in rows.split(40):
        sketch.add(part)
    exact = rows.T @ rows / 150
    f = sketch.factor(150, 5, F64)
    torch.testing.assert_close(f.dense(), exact, rtol=1e-9, atol=1e-10)
    assert int((f.values > 0).sum()) == 3
    torch.testing.assert_close((f.basis @ f.basis.T)[:3, :3], torch.eye(3, dtype=F64), rtol=0, atol=1e-12)


def test_rank_n_minus_1_is_any_matrix():
    rows = torch.randn(100, 7, dtype=F64)
    sketch = Sketch(8, 16, torch.device("cpu"))
    sketch.add(rows)  # with the bias' ones
    whole = torch.cat([rows, torch.ones(100, 1, dtype=F64)], 1)
    torch.testing.assert_close(sketch.factor(100, 7, F64).dense(), whole.T @ whole / 100, rtol=1e-10, atol=1e-12)


def test_what_a_sketch_drops_stays_in_the_trace():
    rows = torch.randn(3000, 30, dtype=F64) * torch.logspace(0, -1.5, 30, dtype=F64)
    sketch = Sketch(30, 8, torch.device("cpu"))
    for part in rows.split(100):
        sketch.add(part, weight=2.0)
    f = sketch.factor(3000, 4, torch.float32)
    exact = 2 * rows.T @ rows / 3000
    assert f.basis.dtype == torch.float32
    assert f.trace() == pytest.approx(float(exact.trace()), rel=1e-10)
    best = torch.linalg.eigvalsh(exact).flip(0)
    assert f.values[0] + f.scale == pytest.approx(float(best[0]), rel=0.01)
    # The leading directions come out as of the whole matrix, as far as what is dropped allows.
    assert float(f.basis[0].double() @ exact @ f.basis[0].double()) > 0.99 * float(best[0])
    gram = f.basis.double() @ f.basis.double().T
    assert float((gram - torch.eye(4)).abs().max()) < 1e-6


def test_sketches_of_two_ranks_are_one_sketch():
    rows = torch.randn(64, 5, dtype=F64) @ torch.randn(5, 40, dtype=F64)
    parts = [Sketch(40, 8, torch.device("cpu")) for _ in range(2)]
    for sketch, part in zip(parts, rows.split(32), strict=True):
        sketch.add(part)
    torch.testing.assert_close(parts[0].plus(parts[1]).factor(64, 6, F64).dense(), rows.T @ rows / 64, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sketch_says_that_a_row_was_not_finite(bad):
    sketch = Sketch(5, 3, torch.device("cpu"))
    sketch.add(torch.randn(10, 5))
    rows = torch.randn(10, 5)
    rows[3, 2] = bad
    sketch.add(rows)
    assert not bool(sketch.finite)
    assert bool(sketch.rows.isfinite().all())
    with pytest.raises(ValueError, match="NaN or an Inf"):
        sketch.factor(20, 2, F64)


def test_rows_of_zeros_make_the_factor_zero():
    sketch = Sketch(5, 3, torch.device("cpu"))
    sketch.add(torch.zeros(10, 5))
    f = sketch.factor(10, 2, F64)
    assert f.scale == 0
    assert not f.dense().any()


def test_directions_below_the_mean_of_the_others_are_not_kept():
    scale, values = truncated(torch.tensor([4.0, 0.5], dtype=F64), total=4.0 + 0.5 + 8 * 1.0, size=10, rank=2)
    assert scale == pytest.approx(8.5 / 9)
    assert values.tolist() == pytest.approx([4 - 8.5 / 9, 0])


# ---- merges


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["low-rank", "diagonal"])
def test_merges_with_full_rank_are_those_of_dense_factors(rule, kind):
    n, m = 7, 5
    b_left, c_left = factor(n, 3), factor(n, 4, 0.0)
    if kind == "diagonal":
        b_right, c_right = torch.rand(m, dtype=F64) + 0.1, torch.tensor([0.0, 1, 2, 0, 3], dtype=F64)
    else:
        b_right, c_right = factor(m, 2, 0.3), factor(m, 1, 0.2)
    left, right = merge((b_left, c_left), (b_right, c_right), rule, (n - 1, m - 1))
    found = torch.kron(dense(left), dense(right))
    target = torch.kron(dense(b_left), dense(b_right)) + torch.kron(dense(c_left), dense(c_right))
    torch.testing.assert_close(found, _oracle(rule, target, [dense(f) for f in (b_left, b_right, c_left, c_right)]), rtol=1e-8, atol=1e-9)


def _oracle(rule, target, parts):
    """The rules by other means: matrices iterated to the stationary point, traces, a singular value decomposition."""
    b_left, b_right, c_left, c_right = parts
    n, m = len(b_left), len(b_right)
    if rule == "pi":
        pi = (b_left.trace() * c_right.trace() / (c_left.trace() * b_right.trace())).sqrt()
        return torch.kron(b_left + pi * c_left, b_right + c_right / pi)
    if rule == "frobenius":
        u, s, v = torch.linalg.svd(target.reshape(n, m, n, m).permute(0, 2, 1, 3).reshape(n * n, m * m), full_matrices=False)
        return torch.kron((u[:, 0] * s[0]).reshape(n, n), v[0].reshape(m, m))
    left, right = b_left.clone(), b_right.clone()
    for _ in range(3000):
        # The stationary point of the divergence: L = sum_i L_i tr(R^-1 R_i) / m and the other way round.
        left = (b_left * torch.linalg.solve(right, b_right).trace() + c_left * torch.linalg.solve(right, c_right).trace()) / m
        right = (b_right * torch.linalg.solve(left, b_left).trace() + c_right * torch.linalg.solve(left, c_left).trace()) / n
    return torch.kron(left, right)


@pytest.mark.parametrize("rule", ["kl", "frobenius"])
def test_identical_tasks_add_up(rule):
    left, right = b = factor(30, 4), factor(20, 3)
    for _ in range(3):
        left, right = merge((left, b[0]), (right, b[1]), rule, (4, 3))
    probe = torch.randn(20, 30, dtype=F64)
    torch.testing.assert_close(right.dense() @ probe @ left.dense(), 4 * b[1].dense() @ probe @ b[0].dense(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_task_without_information_changes_nothing(rule):
    b = factor(9, 2), factor(6, 2)
    nothing = identity(0.0, 9, 2, b[0].basis, F64)
    left, right = merge((b[0], nothing), (b[1], factor(6, 1)), rule, (2, 2))
    assert left is b[0]
    assert right is b[1]


def test_a_merge_keeps_trace_and_leading_directions():
    b, c = factor(40, 4), factor(40, 4, 0.1, 30.0)
    left, _ = merge((b, c), (torch.ones(1, dtype=F64), torch.ones(1, dtype=F64)), "pi", (4, 0))
    pi = ((40 * 0.7 + float(b.values.sum())) / (40 * 0.1 + float(c.values.sum()))) ** 0.5
    exact = b.dense() + pi * c.dense()
    assert left.trace() == pytest.approx(float(exact.trace()), rel=1e-12)
    kept = torch.linalg.eigvalsh(left.dense()).flip(0)
    torch.testing.assert_close(kept[:4], torch.linalg.eigvalsh(exact).flip(0)[:4], rtol=1e-9, atol=0)


def test_merge_errors():
    b, c = factor(5, 2), factor(5, 2)
    with pytest.raises(ValueError, match="rule must be one of 'kl', 'pi', 'frobenius', got 'mean'"):
        merge((b, c), (b, c), "mean", (2, 2))
    with pytest.raises(ValueError, match="not positive definite"):
        merge((b._replace(scale=0.0), c), (b, c), "kl", (2, 2))
    with pytest.raises(TypeError, match="of one kind"):
        merge((b, torch.ones(5)), (b, c), "kl", (2, 2))


def test_fitted_outside_of_the_frame():
    frame = torch.linalg.qr(torch.randn(12, 3, dtype=F64))[0]
    small = torch.diag(torch.tensor([5.0, 3.0, 1.0], dtype=F64))
    whole = frame @ small @ frame.T + 0.5 * (torch.eye(12, dtype=F64) - frame @ frame.T)
    torch.testing.assert_close(fitted(small, frame, 0.5, 4, F64).dense(), whole)
    cut = fitted(small, frame, 0.5, 1, F64)
    assert cut.scale == pytest.approx((3 + 1 + 9 * 0.5) / 11)


# ---- forms

FUNCTIONS = {
    "product": lambda x: x,
    "inverse": lambda x: 1 / x,
    "damped": lambda x: 1 / (x + 0.3),
    "root": lambda x: x**-0.5,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("ranks", [(0, 0), (3, 0), (0, 2), (3, 2), (12, 6), "diagonal"])
def test_forms_are_functions_of_the_kronecker_product(name, ranks, monkeypatch):
    monkeypatch.setattr("fastcl.precision._low_rank_form.SCRATCH", 30)  # several blocks of rows
    m, n = 7, 13
    k, l = (3, 0) if ranks == "diagonal" else ranks  # noqa: E741
    a, g = factor(n, k), (torch.rand(m, dtype=F64) + 0.2 if ranks == "diagonal" else factor(m, l, 0.4))
    whole = kron(dense(g), dense(a))
    values, vectors = torch.linalg.eigh(whole)
    matrix = (vectors * FUNCTIONS[name](values)) @ vectors.T
    if name == "root":
        torch.testing.assert_close(matrix, torch.linalg.inv(torch.from_numpy(sqrtm(whole.numpy()).real)), rtol=1e-8, atol=1e-9)
    x = torch.randn(m, n, dtype=F64)
    rows = Rows(m, n)
    assert len(rows.slices) > 1
    products = Products(form(a, g, FUNCTIONS[name]), m)
    for s in rows.slices:
        products.feed(s, x[s])
    square = products.finish()
    y, scratch = torch.empty_like(x), rows.scratch(x)
    for s in rows.slices:
        y[s] = products.result(s, x[s], scratch)
    torch.testing.assert_close(y.flatten(), matrix @ x.flatten(), rtol=1e-10, atol=1e-12)
    assert float(square) == pytest.approx(float(x.flatten() @ matrix @ x.flatten()), rel=1e-10)


def test_a_form_in_float32_with_a_large_condition_number():
    m, n = 40, 60
    a, g = factor(n, 8, 1e-3, 1.0), factor(m, 8, 1e-3, 1.0)
    whole = kron(dense(g), dense(a))
    lows = [f._replace(basis=f.basis.float()) for f in (a, g)]
    x = g.dense() @ torch.randn(m, n, dtype=F64) @ a.dense()
    products = Products(form(*lows, lambda v: 1 / v), m)
    products.feed(slice(0, m), x.float())
    square = float(products.finish())
    exact = torch.linalg.solve(whole, x.flatten())
    y = products.result(slice(0, m), x.float(), torch.empty(m, n))
    # Condition number 1e6, in products that cancel: the error counts in the norm of the largest eigenvalue of the inverse.
    error = float((y.flatten().double() - exact).norm())
    assert error <= 20 * 2**-24 * float(x.norm()) / 1e-6
    assert square >= float(x.square().sum()) * products.form.bound * 0.999
