"""Real threads over all ops, short: what ThreadSanitizer watches."""

from __future__ import annotations

import _fastcl_numpy as native
import numpy as np
import pytest
from arrays import operand, random_values


@pytest.mark.parametrize("strided", [False, True])
def test_threads_share_no_element(strided: bool) -> None:
    native.set_pool(4, 5000)
    rng = np.random.default_rng(0)
    sizes = (1, 40_000, 7, 90_001, 64)
    grads = [random_values(rng, n, "f32")[:: 2 if strided else 1] for n in sizes]
    importance = [random_values(rng, n, "u8")[:: 2 if strided else 1] for n in sizes]
    native.soft_mask_([operand(g, "f32") for g in grads], [operand(i, "u8") for i in importance], 0.5)
    native.emax_([operand(i, "u8") for i in importance], [operand(g, "f32") for g in grads])
    mean = native.spg_importance_([operand(i, "u8") for i in importance], [[operand(g, "f32") for g in grads]] * 2)
    assert 0 < mean <= 1
    memories = [[operand(random_values(rng, len(g), "f32"), "f32") for g in grads] for _ in range(3)]
    own = [operand(g, "f32") for g in grads]
    assert native.project_(own, memories[0]).shape == (3,)
    assert native.gram([own, *memories]).shape == (4, 4)
    assert native.gem_project_(own, memories, 0.5, 1e-3).shape == (7,)
    native.child_mask_(own, 0.5, 1, 2)
    native.fisher_add_(own, memories[0], 0.5, 1.0)
    native.fisher_add_(own, memories[0], 0.5, None)
    assert native.fisher_squares(own).shape == (5,)
    native.ewc_pull_(own, *memories, 0.5)
    assert native.quantile(own, 0.0) <= native.quantile(own, 0.7) == native.quantile_by_counts(own, 0.7)
    bits = [operand(np.zeros(-(-len(g) // 8), np.uint8), "u8") for g in grads]
    native.threshold_bits_(bits, own, 0.0)
    native.bit_mask_(own, bits)
    assert native.quantile(own, 0.0) == 0


def test_threads_share_no_layer() -> None:
    native.set_pool(4, 3000)
    rng = np.random.default_rng(0)

    def matrices(sizes: list[tuple[int, int]]) -> list[native.Operand]:
        return [operand(random_values(rng, m * n, "f32").reshape(m, n), "f32") for m, n in sizes]

    sides = [(4, 9), (33, 17), (8, 8), (64, 65), (1, 2), (16, 40)] * 2
    weights, grads = (matrices([(m, n - 1) for m, n in sides]) for _ in range(2))
    biases, bias_grads = ([operand(random_values(rng, m, "f32"), "f32") for m, _ in sides] for _ in range(2))
    M, H, V = (matrices(sides) for _ in range(3))
    A, G = matrices([(n, n) for _, n in sides]), matrices([(m, m) for m, _ in sides])
    native.ncl_small_step_(weights, biases, grads, bias_grads, M, H, A, G, 1e-3, 0.9, 0.1)
    assert native.ncl_small_direction_(M, V, grads, bias_grads, H, A, G, 0.9, 0.1).shape == (len(sides),)
    native.ncl_momentum_(M, H, grads, bias_grads, 0.9, 0.1, 1e-3)
    native.ncl_apply_(weights, biases, H, V, M, 1e-3)
    assert native.kron_small_quadratic(weights, biases, A, G) == native.kron_small_quadratic(weights, biases, A, G)
    native.kron_small_(weights, biases, A, G)


def test_threads_share_no_row() -> None:
    native.set_pool(4, 3000)
    rng = np.random.default_rng(0)
    sizes, rank = (1, 40_000, 7, 90_001, 64), 5
    params, grads, momenta, anchors = ([operand(random_values(rng, n, "f32"), "f32") for n in sizes] for _ in range(4))
    diagonal = [operand(rng.random(n, np.float32) + 0.5, "f32") for n in sizes]
    basis = [operand(random_values(rng, rank * n, "f32").reshape(rank, n), "f32") for n in sizes]
    sigma, mix = list(np.linspace(2, 1, rank)), np.linalg.qr(rng.standard_normal((rank + 2, rank + 2)))[0]
    lists = [params, grads, momenta, anchors, diagonal, basis]
    along = list(native.low_rank_step_products(lists, 0.9, 0.7)[:rank])
    native.low_rank_step_update_(lists, along, 0.1, 0.9, 0.7)
    assert native.low_rank_products(grads, diagonal, basis, True).shape == (rank + 1,)
    native.low_rank_update_(grads, diagonal, basis, along)
    assert native.low_rank_gram(diagonal, basis, sigma, [params, grads]).shape == (rank + 2, rank + 2)
    native.low_rank_compress_(diagonal, basis, sigma, [params, grads], mix)
    native.low_rank_rotate_(basis, mix[:rank, :rank].copy())
