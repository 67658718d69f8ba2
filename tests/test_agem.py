"""A-GEM against a dense computation in float64."""

import pytest
import torch
from torch import nn

from fastcl.methods import AGEM, Naive
from learners import Heads, Net, batches, fill, flat, gradient, grads, loss_fn, make, memory, train, trained, with_head


def expected(g, r):
    """The paper's equation 11 on flat vectors."""
    return g if g @ r >= 0 else g - (g @ r) / (r @ r) * r


def twin(buffer):
    """A buffer that draws what the given one draws next."""
    again = memory(buffer.capacity, seed=99)
    again.load_state_dict(buffer.state_dict())
    return again


@pytest.mark.parametrize("batch_size", [5, 1000])
def test_projects_as_the_dense_computation(batch_size):
    model, buffer = make(), memory()
    agem = AGEM(model, buffer, loss_fn, batch_size=batch_size)
    seen = set()
    for task in range(3):
        for step, (x, y) in enumerate(batches(task) * 6):
            model.zero_grad()
            # Every second step climbs, which the memory of a task learned before is bound to object to.
            (loss_fn(model(x), y) * (-1) ** step).backward()
            before = grads(model)
            if task == 0:
                assert agem.after_backward() is None
                assert torch.equal(grads(model), before)
            else:
                mx, my, _ = twin(buffer).sample(min(batch_size, len(buffer)))
                r = gradient(model, loss_fn(model(mx), my))
                info = agem.after_backward()
                torch.testing.assert_close(grads(model), expected(before, r), rtol=1e-12, atol=1e-15)
                torch.testing.assert_close(info.dot, before @ r, rtol=1e-10, atol=1e-14)
                torch.testing.assert_close(info.reference_sq, r @ r, rtol=1e-10, atol=0)
                assert bool(info.violated) == (float(before @ r) < 0)
                seen.add(bool(info.violated))
            with torch.no_grad():
                for p in trained(model):
                    if p.grad is not None:
                        p -= 0.3 * p.grad * (-1) ** step
        agem.end_task(batches(task))
    assert seen == {True, False}
    assert agem.tasks_seen == 3
    assert model.unused.grad is None
    assert model.frozen.weight.grad is None


def test_heads_are_grouped_by_task():
    model, buffer = make(Heads), memory()
    agem = AGEM(model, buffer, loss_fn, forward=with_head, batch_size=11)
    fill(agem, 2)
    x, y = batches(2)[0]
    (-loss_fn(model(x, 2), y)).backward()
    before = grads(model)
    assert model.heads[0].weight.grad is None
    mx, my, mt = twin(buffer).sample(11)
    logits = torch.stack([model(mx[i : i + 1], int(mt[i]))[0] for i in range(11)])
    r = gradient(model, loss_fn(logits, my))
    if before @ r >= 0:
        model.zero_grad()
        loss_fn(model(x, 2), y).backward()
        before = -before
    info = agem.after_backward()
    assert bool(info.violated)
    assert set(mt.tolist()) == {0, 1}
    torch.testing.assert_close(grads(model), expected(before, r), rtol=1e-12, atol=1e-15)
    assert model.heads[0].weight.grad is not None  # made: the projection points there
    assert model.heads[2].bias.grad is not None


def test_a_parameter_frozen_or_unfrozen_later_is_noticed():
    model, buffer = make(), memory()
    agem = AGEM(model, buffer, loss_fn, batch_size=1000)
    fill(agem, 1)
    agem.after_backward()
    model.zero_grad()
    model.first.requires_grad_(False)
    model.frozen.requires_grad_(True)
    x, y = batches(1)[0]
    mx, my, _ = buffer.sample(len(buffer))
    r = gradient(model, loss_fn(model(mx), my))
    (-loss_fn(model(mx), my) + 1e-3 * loss_fn(model(x), y)).backward()
    before = grads(model)
    assert bool(agem.after_backward().violated)
    assert model.first.weight.grad is None
    torch.testing.assert_close(grads(model), expected(before, r), rtol=1e-10, atol=1e-14)


def test_micro_batches_are_projected_once_together():
    model, buffer = make(), memory()
    agem = AGEM(model, buffer, loss_fn, batch_size=1000)
    fill(agem, 1)
    mx, my, _ = buffer.sample(len(buffer))
    total = torch.zeros_like(grads(model))
    for x, y in batches(1)[:2]:
        for take in (lambda loss: total.add_(gradient(model, loss)), torch.Tensor.backward):
            take(loss_fn(model(x), y) / 2 - loss_fn(model(mx), my))
    info = agem.after_backward()
    assert bool(info.violated)
    r = gradient(model, loss_fn(model(mx), my))
    torch.testing.assert_close(grads(model), expected(total, r), rtol=1e-12, atol=1e-15)


def test_less_is_forgotten_than_by_fine_tuning():
    def task(seed):
        gen = torch.Generator().manual_seed(seed)
        centres = torch.randn(10, 10, generator=gen)
        y = torch.arange(400) % 10
        return centres[y] + 0.5 * torch.randn(400, 10, generator=gen), y

    def run(kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 10))
        method = Naive(model) if kind is Naive else AGEM(model, memory(100), loss_fn)
        tasks = [task(1), task(2)]
        for x, y in tasks:
            loader = list(zip(x.split(20), y.split(20), strict=True))
            for _ in range(10):
                train(model, method, loader)
            method.end_task(loader)
        return [float((model(x).argmax(1) == y).float().mean()) for x, y in tasks]

    naive, agem = run(Naive), run(AGEM)
    assert naive[1] > 0.95
    assert agem[1] > 0.95
    assert naive[0] < 0.5
    assert agem[0] > naive[0] + 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [False, True])
def test_no_host_sync(heads):
    model = make(Heads if heads else Net, torch.float32).cuda()
    agem = AGEM(model, memory(), loss_fn, forward=with_head if heads else None)
    fill(agem, 2)
    x, y = (t.cuda() for t in batches(2, torch.float32)[0])
    loss_fn(model(x, 2) if heads else model(x), y).backward()
    agem.after_backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        info = agem.after_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert info.dot.is_cuda


def test_the_projected_gradient_is_of_the_parameters_dtype():
    model, buffer = make(dtype=torch.bfloat16), memory()
    agem = AGEM(model, buffer, loss_fn, batch_size=1000)
    fill(agem, 1)
    mx, my, _ = buffer.sample(len(buffer))
    (-loss_fn(model(mx), my)).backward()
    before = grads(model)
    assert bool(agem.after_backward().violated)
    assert model.first.weight.grad.dtype == torch.bfloat16
    assert grads(model).norm() < 0.02 * before.norm()
    assert flat([model.first.weight.grad], [model.first.weight]).isfinite().all()
