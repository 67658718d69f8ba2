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
