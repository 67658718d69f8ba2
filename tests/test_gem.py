"""GEM against scipy's non-negative least squares."""

import numpy as np
import pytest
import torch

from fastcl.methods import GEM
from learners import Heads, Net, batches, fill, gradient, grads, loss_fn, make, memory, train, with_head

optimize = pytest.importorskip("scipy.optimize")


def expected(g, rows, margin, ridge):
    """``g + G^T v`` with v from ``min |L^T u + L^-1 p|, u >= 0``, where ``L L^T = G G^T + ridge I`` and ``v = u + margin``."""
    G = torch.stack(rows).numpy()
    g = g.numpy()
    if (G @ g >= 0).all():
        return torch.from_numpy(g), np.zeros(len(G))
    Q = G @ G.T + ridge * np.eye(len(G))
    L = np.linalg.cholesky(Q)
    u, _ = optimize.nnls(L.T, -np.linalg.solve(L, G @ g + Q @ np.full(len(G), margin)))
    return torch.from_numpy(g + G.T @ (u + margin)), u + margin


@pytest.mark.parametrize(("margin", "ridge"), [(0.5, 1e-3), (0.0, 1e-6), (2.0, 0.1)])
@pytest.mark.parametrize("heads", [False, True])
def test_projects_as_scipy_does(margin, ridge, heads):
    model, buffer = make(Heads if heads else Net), memory()
    gem = GEM(model, buffer, loss_fn, forward=with_head if heads else None, margin=margin, ridge=ridge)
    run = (lambda x, t: model(x, t)) if heads else (lambda x, t: model(x))
    seen = set()
    for task in range(3):
        for step, (x, y) in enumerate(batches(task) * 6):
            model.zero_grad()
            sign = (-1) ** step
            (loss_fn(run(x, task), y) * sign).backward()
            before = grads(model)
            rows = [gradient(model, loss_fn(run(mx, k), my)) for k, (mx, my) in ((k, buffer.of_task(k)) for k in buffer.tasks)]
            info = gem.after_backward()
            if task == 0:
                assert info is None
                assert torch.equal(grads(model), before)
            else:
                assert len(rows) == task
                z, v = expected(before, rows, margin, ridge)
                torch.testing.assert_close(grads(model), z, rtol=1e-7, atol=1e-10)
                np.testing.assert_allclose(info.coefficients, v, rtol=1e-6, atol=1e-9)
                torch.testing.assert_close(info.dots, torch.stack(rows) @ before, rtol=1e-10, atol=1e-14)
                assert bool(info.violated) == bool((info.dots < 0).any())
                seen.add((bool(info.violated), len(rows)))
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.3 * p.grad * sign
        gem.end_task(batches(task))
    assert {(True, 1), (True, 2)} <= seen


def test_a_draw_of_each_task():
    model, buffer = make(), memory(24)
    gem = GEM(model, buffer, loss_fn, batch_size=3)
    fill(gem, 2)
    drawn = []

    def watch(logits, y):
        drawn.append(y)
        return loss_fn(logits, y)

    gem._loss_fn = watch
    state = buffer.state_dict()
    loss_fn(model(batches(2)[0][0]), batches(2)[0][1]).backward()
    torch.manual_seed(1)
    gem.after_backward()
    first = list(drawn)
    assert [len(y) for y in drawn] == [3, 3]
    gem.after_backward()
    assert not all(torch.equal(a, b) for a, b in zip(drawn[:2], drawn[2:], strict=True))
    buffer.load_state_dict(state)  # the same draws again, whatever the global generator says
    drawn.clear()
    torch.manual_seed(2)
    gem.after_backward()
    assert all(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))


def test_the_memory_of_the_present_task_puts_no_constraint():
    model, buffer = make(), memory(24)
    gem = GEM(model, buffer, loss_fn)
    buffer.add(*batches(0)[0], 0)
    assert gem.after_backward() is None
    gem.end_task()
    buffer.add(*batches(1)[0], 1)
    loss_fn(model(batches(1)[1][0]), batches(1)[1][1]).backward()
    assert gem.after_backward().dots.shape == (1,)


def test_every_past_task_is_protected_to_first_order():
    model, buffer = make(), memory(24)
    gem = GEM(model, buffer, loss_fn, margin=0.0, ridge=0.0)
    for task in range(2):
        train(model, gem, batches(task) * 10)
        gem.end_task(batches(task))
    x, y = batches(2)[0]
    (-loss_fn(model(x), y) - sum(loss_fn(model(a), b) for a, b in (buffer.of_task(0), buffer.of_task(1)))).backward()
    info = gem.after_backward()
    assert bool(info.violated)
    z = grads(model)
    for k in range(2):
        row = gradient(model, loss_fn(model(buffer.of_task(k)[0]), buffer.of_task(k)[1]))
        assert float(row @ z) >= -1e-10 * float(row.norm() * z.norm()) - 1e-14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync():
    model = make(dtype=torch.float32).cuda()
    gem = GEM(model, memory(), loss_fn, batch_size=2)
    fill(gem, 2)
    x, y = (t.cuda() for t in batches(2, torch.float32)[0])
    loss_fn(model(x), y).backward()
    gem.after_backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        info = gem.after_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert info.coefficients.is_cuda
