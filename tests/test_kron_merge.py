from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from fastcl import ops
from fastcl.reference import kronecker_merge as definition
from fastcl.testing import kronecker as cases
from layouts import identical

DOUBLE = torch.float64


def random_spd(size, seed, condition=50.0, dtype=DOUBLE):
    return cases.spd(size, dtype, torch.Generator().manual_seed(seed), condition)


def random_psd(size, rank, seed):
    x = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return x @ x.mT / size


def four(n=4, m=3, seed=0):
    return random_spd(n, seed), random_spd(m, seed + 1) * 3, random_spd(n, seed + 2) * 2, random_spd(m, seed + 3)


def dense(matrices):
    b_l, b_r, c_l, c_r = (x.numpy() for x in matrices)
    return np.kron(b_l, b_r) + np.kron(c_l, c_r)


def divergence(left, right, total):
    """What "kl" minimises, of dense matrices."""
    product = np.kron(left, right)
    return np.linalg.slogdet(product)[1] + np.trace(np.linalg.solve(product, total))


def close(pair, expected, rtol=1e-12):
    product = np.kron(pair[0].numpy(), pair[1].numpy())
    np.testing.assert_allclose(product, expected, rtol=0, atol=rtol * np.abs(expected).max())


class TestKl:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 2), (1, 3), (2, 2)])
    def test_it_is_the_optimum_that_scipy_finds(self, n, m, seed):
        matrices = four(n, m, 10 * seed)
        total = dense(matrices)
        left, right = ops.kron_merge(*matrices)
        ours = divergence(left.numpy(), right.numpy(), total)

        def objective(x):
            """Over Cholesky factors of any E and F, not only of the family that the rule knows."""
            e, f = np.zeros((n, n)), np.zeros((m, m))
            e[np.tril_indices(n)], f[np.tril_indices(m)] = x[: n * (n + 1) // 2], x[n * (n + 1) // 2 :]
            np.fill_diagonal(e, np.exp(np.diag(e)))
            np.fill_diagonal(f, np.exp(np.diag(f)))
            return divergence(e @ e.T, f @ f.T, total)

        size = n * (n + 1) // 2 + m * (m + 1) // 2
        found = min(
            scipy.optimize.minimize(objective, 0.3 * np.random.default_rng(k).standard_normal(size), method="BFGS").fun for k in range(3)
        )
        assert ours <= found + 1e-9 * abs(found)
        assert found <= ours + 1e-6 * abs(ours), "and it is one that can be reached"

    def test_the_gradient_vanishes_there(self):
        matrices = four(20, 15)
        left, right = ops.kron_merge(*matrices)
        inverse = torch.linalg.inv(left)
        b_l, b_r, c_l, c_r = matrices
        expected = ((inverse * b_l).sum() * b_r + (inverse * c_l).sum() * c_r) / len(left)
        torch.testing.assert_close(right, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("k", [2, 3, 7])
    def test_k_identical_tasks_are_k_times_one(self, k):
        one = random_spd(5, 1), random_spd(4, 2)
        merged = one
        for _ in range(k - 1):
            merged = ops.kron_merge(*merged, *one)
        close(merged, k * np.kron(*(x.numpy() for x in one)))

    def test_nothing_new_changes_nothing(self):
        b_l, b_r, c_l, _ = four()
        for new in ((c_l, torch.zeros_like(b_r)), (torch.zeros_like(b_l), torch.zeros_like(b_r))):
            close(ops.kron_merge(b_l, b_r, *new), np.kron(b_l.numpy(), b_r.numpy()))

    @pytest.mark.parametrize("rank", [1, 2])
    def test_new_factors_may_be_singular(self, rank):
        b_l, b_r = random_spd(5, 1), random_spd(4, 2)
        c_l, c_r = random_psd(5, rank, 3), random_psd(4, rank, 4)
        left, right = ops.kron_merge(b_l, b_r, c_l, c_r)
        inverse = torch.linalg.inv(left)
        torch.testing.assert_close(right, ((inverse * b_l).sum() * b_r + (inverse * c_l).sum() * c_r) / 5, rtol=1e-11, atol=1e-13)

    def test_generalised_eigenvalues_are_scipys(self):
        b, _, c, _ = four(30)
        found = definition._relative("B", b, "C", c).numpy()
        np.testing.assert_allclose(found, scipy.linalg.eigh(c.numpy(), b.numpy(), eigvals_only=True), rtol=1e-10)

    def test_a_weak_prior_of_many_data(self):
        """Lambda_0 = I / N with N = 60,000 and a singular Fisher: condition numbers of a first task."""
        n, m = 40, 30
        b_l, b_r = torch.eye(n, dtype=DOUBLE) / 60_000**0.5, torch.eye(m, dtype=DOUBLE) / 60_000**0.5
        c_l, c_r = random_psd(n, 10, 1), random_psd(m, 10, 2)
        left, right = ops.kron_merge(b_l, b_r, c_l, c_r)
        for own, other, (b_own, c_own), (b, c) in (
            (right, left, (b_r, c_r), (b_l, c_l)),
            (left, right, (b_l, c_l), (b_r, c_r)),
        ):
            inverse = torch.linalg.inv(other)
            expected = ((inverse * b).sum() * b_own + (inverse * c).sum() * c_own) / len(other)
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))

    def test_the_rival_on_matrices_agrees(self):
        """As far as it goes: it stops at a relative change of 3e-4, of which it made 0.3."""
        matrices = four(30, 20)
        close(ops.kron_merge(*matrices), np.kron(*(x.numpy() for x in cases.merge_official(*matrices))), 1e-2)

    @pytest.mark.parametrize("d", [1e-6, 1.0, 1e3, 1e6])
    def test_few_rounds_suffice(self, d, monkeypatch):
        """The plain iteration takes millions of rounds where a few directions are much better known than the rest."""
        calls = []
        means = definition._means
        monkeypatch.setattr(definition, "_means", lambda *args: calls.append(0) or means(*args))
        d_L, d_R = torch.zeros(400, dtype=DOUBLE), torch.zeros(400, dtype=DOUBLE)
        d_L[:10], d_R[:10] = d * torch.arange(1, 11), 3 * d * torch.arange(1, 11)
        e, f = definition._fixed_point(d_L, d_R)
        assert len(calls) < 150
        for x, y, z in ((e, f, d_L), (f, e, d_R)):
            np.testing.assert_allclose(y, means(*x, z), rtol=1e-12)


class TestPi:
    def test_formula(self):
        b_l, b_r, c_l, c_r = four()
        pi = float((b_l.trace() * c_r.trace() / (c_l.trace() * b_r.trace())).sqrt())
        left, right = ops.kron_merge(b_l, b_r, c_l, c_r, "pi")
        torch.testing.assert_close(left, b_l + pi * c_l, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(right, b_r + c_r / pi, rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("k", [2, 3, 7])
    def test_k_identical_tasks_are_k_squared_times_one(self, k):
        one = random_spd(5, 1), random_spd(4, 2)
        merged = one
        for _ in range(k - 1):
            merged = ops.kron_merge(*merged, *one, "pi")
        close(merged, k**2 * np.kron(*(x.numpy() for x in one)))

    def test_zeros(self):
        b_l, b_r, c_l, c_r = four()
        zero = torch.zeros_like
        for left, right in ((zero(c_l), c_r), (c_l, zero(c_r)), (zero(c_l), zero(c_r))):
            close(ops.kron_merge(b_l, b_r, left, right, "pi"), np.kron(b_l.numpy(), b_r.numpy()))
        close(ops.kron_merge(zero(b_l), b_r, c_l, c_r, "pi"), np.kron(c_l.numpy(), c_r.numpy()))


class TestFrobenius:
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_the_leading_singular_pair_of_the_rearranged_sum(self, seed):
        matrices = four(4, 3, seed)
        b_l, b_r, c_l, c_r = (x.numpy() for x in matrices)
        rearranged = np.outer(b_l.ravel(), b_r.ravel()) + np.outer(c_l.ravel(), c_r.ravel())
        u, s, v = np.linalg.svd(rearranged)
        best = np.kron(s[0] * u[:, 0].reshape(4, 4), v[0].reshape(3, 3))
        close(ops.kron_merge(*matrices, "frobenius"), best)

    def test_either_order_of_sizes(self):
        """Both branches of the closed form."""
        b_l, b_r, c_l, c_r = four()
        for scale in (1e-3, 1e3):
            matrices = b_l * scale, b_r, c_l, c_r
            rearranged = np.outer(matrices[0].numpy().ravel(), b_r.numpy().ravel()) + np.outer(c_l.numpy().ravel(), c_r.numpy().ravel())
            u, s, v = np.linalg.svd(rearranged)
            close(ops.kron_merge(*matrices, "frobenius"), np.kron(s[0] * u[:, 0].reshape(4, 4), v[0].reshape(3, 3)))

    def test_identical_tasks_and_zeros(self):
        one = random_spd(5, 1), random_spd(4, 2)
        exact = np.kron(*(x.numpy() for x in one))
        close(ops.kron_merge(*one, *one, "frobenius"), 2 * exact)
        zeros = [torch.zeros_like(x) for x in one]
        close(ops.kron_merge(*one, *zeros, "frobenius"), exact)
        close(ops.kron_merge(*zeros, *one, "frobenius"), exact)
        assert all(not x.any() for x in ops.kron_merge(*zeros, *zeros, "frobenius"))


@pytest.mark.parametrize("rule", ["kl", "pi", "frobenius"])
class TestEveryRule:
    def test_diagonal_factors_are_diagonal_matrices(self, rule):
        b_l, b_r, c_l, c_r = four()
        b, c = (torch.rand(4, generator=torch.Generator().manual_seed(k), dtype=DOUBLE) + 0.1 for k in (1, 2))
        left, right = ops.kron_merge(b, b_r, c, c_r, rule)
        whole = ops.kron_merge(b.diag(), b_r, c.diag(), c_r, rule)
        torch.testing.assert_close(left.diag(), whole[0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(right, whole[1], rtol=1e-12, atol=1e-15)
        left, right = ops.kron_merge(b_l, b, c_l, c, rule)
        whole = ops.kron_merge(b_l, b.diag(), c_l, c.diag(), rule)
        torch.testing.assert_close(right.diag(), whole[1], rtol=1e-12, atol=1e-15)

    def test_results_are_symmetric_of_the_promoted_dtype_and_own_their_memory(self, rule):
        matrices = four()
        for dtypes, expected in (
            ((torch.float32,) * 4, torch.float32),
            ((torch.bfloat16,) * 4, torch.float32),
            ((torch.float16, torch.bfloat16, torch.float16, torch.float32), torch.float32),
            ((torch.float32, torch.float64, torch.float32, torch.float32), torch.float64),
        ):
            args = [x.to(d) for x, d in zip(matrices, dtypes, strict=True)]
            before = [x.clone() for x in args]
            out = ops.kron_merge(*args, rule)
            assert [x.dtype for x in out] == [expected] * 2
            assert all(identical(x, x.mT) for x in out)
            assert not {x.data_ptr() for x in out} & {x.data_ptr() for x in args}
            assert all(identical(a, b) for a, b in zip(args, before, strict=True))

    def test_roundings_of_float32_are_no_asymmetry(self, rule):
        matrices = list(four())
        matrices[2] = matrices[2] * (1 + 1e-7 * torch.randn(4, 4, dtype=DOUBLE))
        close(ops.kron_merge(*matrices, rule), np.kron(*(x.numpy() for x in ops.kron_merge(*four(), rule))), 1e-5)

    def test_gradients_are_not_recorded(self, rule):
        matrices = [x.requires_grad_() for x in four()]
        assert not any(x.requires_grad for x in ops.kron_merge(*matrices, rule))


def changed(k, value):
    matrices = list(four())
    matrices[k] = value(matrices[k])
    return matrices


def with_element(i, j, x):
    def value(t):
        t = t.clone()
        t[i, j] = x
        return t

    return value


BAD = {
    "NaN": (changed(2, with_element(1, 1, torch.nan)), "kl", ValueError, "C_L has NaN or Inf among its 16 elements"),
    "Inf": (changed(1, with_element(0, 1, torch.inf)), "pi", ValueError, "B_R has NaN or Inf"),
    "not symmetric": (changed(0, with_element(0, 1, 5.0)), "frobenius", ValueError, "B_L is not symmetric: elements differ .* up to"),
    "not square": (changed(3, lambda t: t[:, :2]), "kl", ValueError, r"C_R has shape \(3, 2\); accepted are a square matrix"),
    "another size": (changed(2, lambda t: t[:2, :2]), "kl", ValueError, r"C_L has shape \(2, 2\) and B_L has \(4, 4\)"),
    "diagonal beside a matrix": (changed(2, lambda t: t[0]), "kl", ValueError, r"C_L has shape \(4,\) and B_L has \(4, 4\)"),
    "B singular": (
        changed(1, lambda t: torch.ones_like(t)),
        "kl",
        ValueError,
        r"B_R must be positive definite: .* at row \d of 3",
    ),
    "B zero": (changed(0, torch.zeros_like), "kl", ValueError, "B_L must be positive definite"),
    "C indefinite": (
        changed(2, lambda t: t - torch.eye(4)),
        "kl",
        ValueError,
        "C_L must be positive semi-definite, and has the",
    ),
    "negative diagonal": ([torch.ones(4), torch.eye(3), -torch.ones(4), torch.eye(3)], "kl", ValueError, "C_L is a diagonal and has"),
    "zero on the diagonal": (
        [torch.zeros(4), torch.eye(3), torch.ones(4), torch.eye(3)],
        "kl",
        ValueError,
        "B_L must be positive definite",
    ),
    "rule": (four(), "KL", ValueError, "rule must be one of kl, pi, frobenius, got 'KL'"),
    "no rule": (four(), None, TypeError, "rule must be one of kl, pi, frobenius, got NoneType"),
    "no tensor": (changed(0, lambda t: t.tolist()), "kl", TypeError, "B_L must be a tensor, got list"),
    "integers": (changed(3, lambda t: t.int()), "kl", TypeError, "C_R is torch.strided with dtype torch.int32; accepted are dense"),
    "sparse": (changed(3, lambda t: t.to_sparse()), "kl", TypeError, "C_R is torch.sparse_coo"),
    "device": (changed(3, lambda t: t.to("meta")), "kl", ValueError, "C_R is on meta and B_L on cpu"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument(kind):
    matrices, rule, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        ops.kron_merge(*matrices, rule)
