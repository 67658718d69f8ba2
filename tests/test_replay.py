"""Experience replay: what is added to the gradient."""

import pytest
import torch

from fastcl.methods import Replay
from learners import Heads, batches, fill, gradient, grads, loss_fn, make, memory, with_head


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_weighted_memory_gradient_is_added(weight):
    model, buffer = make(), memory()
    replay = Replay(model, buffer, loss_fn, batch_size=1000, weight=weight)
    fill(replay, 2)
    mx, my, _ = buffer.sample(len(buffer))
    for x, y in batches(2):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        before = grads(model)
        assert replay.after_backward() is None
        torch.testing.assert_close(grads(model), before + weight * gradient(model, loss_fn(model(mx), my)), rtol=1e-12, atol=1e-15)
    assert model.unused.grad is None


def test_weight_of_the_concatenated_batch():
    model, buffer = make(), memory(12)
    x, y = batches(1)[0]
    replay = Replay(model, buffer, loss_fn, batch_size=1000)
    fill(replay, 1)
    mx, my, _ = buffer.sample(len(buffer))
    b, m = len(x), len(mx)
    replay = Replay(model, buffer, loss_fn, batch_size=1000, weight=m / b)
    replay.load_state_dict({"format": "fastcl.replay", "version": 1, "tasks_seen": 1, "buffer": buffer.state_dict()})
    loss_fn(model(x), y).backward()
    replay.after_backward()
    together = gradient(model, loss_fn(model(torch.cat([x, mx])), torch.cat([y, my])))
    torch.testing.assert_close(grads(model) * b / (b + m), together, rtol=1e-12, atol=1e-15)


def test_heads_are_grouped_by_task():
    model, buffer = make(Heads), memory()
    replay = Replay(model, buffer, loss_fn, forward=with_head, batch_size=1000)
    fill(replay, 2)
    x, y = batches(2)[0]
    loss_fn(model(x, 2), y).backward()
    before = grads(model)
    replay.after_backward()
    mx, my, mt = buffer.sample(len(buffer))
    assert set(mt.tolist()) == {0, 1}
    logits = torch.stack([model(mx[i : i + 1], int(mt[i]))[0] for i in range(len(mx))])
    torch.testing.assert_close(grads(model), before + gradient(model, loss_fn(logits, my)), rtol=1e-12, atol=1e-15)


def test_a_buffer_filled_while_training_is_replayed_in_the_first_task():
    model, buffer = make(), memory()
    replay = Replay(model, buffer, loss_fn)
    x, y = batches(0)[0]
    loss_fn(model(x), y).backward()
    before = grads(model)
    replay.after_backward()
    assert torch.equal(grads(model), before)
    buffer.add(x, y, 0)
    replay.after_backward()
    assert not torch.equal(grads(model), before)
    replay.end_task()
    assert replay.tasks_seen == 1


@pytest.mark.parametrize(
    ("weight", "error"), [("1", TypeError), (True, TypeError), (0.0, ValueError), (-1, ValueError), (float("nan"), ValueError)]
)
def test_weight_is_checked(weight, error):
    with pytest.raises(error, match="weight must be"):
        Replay(make(), memory(), loss_fn, weight=weight)
