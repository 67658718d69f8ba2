"""What Naive, Replay, A-GEM and GEM share: calls, errors, state, files, other trainers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastcl.data import ReservoirBuffer
from fastcl.methods import AGEM, GEM, Joint, Naive, Replay
from learners import Heads, batches, fill, grads, loss_fn, make, memory, train, trained, with_head

MEMORY = [Replay, AGEM, GEM]


def build(kind, model, **options):
    return kind(model, memory(), loss_fn, **options)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def snapshot(model, method):
    """All that a failing call may not change."""
    return copy.deepcopy({"model": dict(model.state_dict()), "grads": grads(model), "method": method.state_dict()})


@pytest.mark.parametrize("kind", [Naive, Joint])
def test_the_baselines_leave_gradients_alone(kind):
    model = make()
    method = kind(model)
    method.end_task()
    method.end_task(batches(0))
    loss_fn(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    before = grads(model)
    assert method.after_backward() is None
    assert torch.equal(grads(model), before)
    assert method.tasks_seen == 2
    assert method.state_dict()["tasks_seen"] == 2


@pytest.mark.parametrize("kind", MEMORY)
def test_an_iterator_serves_as_loader(kind):
    one, other = build(kind, make()), build(kind, make())
    one.end_task(iter(batches(0)))
    other.end_task(batches(0))
    assert same(one.state_dict(), other.state_dict())
    assert len(one.buffer) > 0
    assert one.buffer.tasks == [0]


@pytest.mark.parametrize("kind", MEMORY)
def test_only_the_buffers_generator_is_used(kind):
    model = make()
    method = build(kind, model, batch_size=3)
    before = torch.get_rng_state()
    fill(method, 2)
    loss_fn(model(batches(2)[0][0]), batches(2)[0][1]).backward()
    generator = method.buffer.state_dict()["generator"]
    method.after_backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(method.buffer.state_dict()["generator"], generator)


@pytest.mark.parametrize("kind", MEMORY)
def test_a_run_that_is_saved_and_loaded_anywhere_goes_on_the_same(kind, tmp_path):
    def run(stop_after):
        model, step = make(Heads), 0
        method = build(kind, model, forward=with_head, batch_size=3)
        for task in range(3):
            for batch in batches(task) * 2:
                train(model, method, [batch], task)
                step += 1
                if step == stop_after:
                    method.save(tmp_path / "method")
                    weights = copy.deepcopy(model.state_dict())
                    torch.manual_seed(1)
                    model = Heads().double()
                    model.load_state_dict(weights)
                    method = kind(model, memory(seed=77), loss_fn, forward=with_head, batch_size=3)
                    method.load(tmp_path / "method")
            method.end_task(batches(task))
        return {"model": dict(model.state_dict()), "method": method.state_dict()}

    whole = run(None)
    assert whole["method"]["tasks_seen"] == 3
    for stop_after in (3, 7, 12, 16):
        assert same(run(stop_after), whole)


@pytest.mark.parametrize("kind", MEMORY)
def test_state_dict_is_a_copy_and_round_trips(kind):
    model = make()
    method = build(kind, model)
    fill(method, 2)
    state = method.state_dict()
    kept = copy.deepcopy(state)
    again = build(kind, model)
    again.load_state_dict(state)
    for value in state["buffer"].values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert same(method.state_dict(), kept)
    assert same(again.state_dict(), kept)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: [], TypeError, "mapping"),
        (lambda s: {**s, "format": "fastcl.spg"}, ValueError, r"format 'fastcl\.spg'"),
        (lambda s: {**s, "version": 2}, ValueError, "version 2"),
        (lambda s: {**s, "tasks_seen": -1}, ValueError, "tasks_seen is -1"),
        (lambda s: {**s, "tasks_seen": True}, ValueError, "tasks_seen is True"),
        (lambda s: {k: v for k, v in s.items() if k != "buffer"}, TypeError, r"state\['buffer'\] must be a mapping"),
        (lambda s: {**s, "tasks_seen": 9, "buffer": {**s["buffer"], "capacity": 99}}, ValueError, "capacity"),
    ],
)
@pytest.mark.parametrize("kind", MEMORY)
def test_a_bad_state_changes_nothing(kind, spoil, error, message):
    model = make()
    method = build(kind, model)
    fill(method, 2)
    before = snapshot(model, method)
    with pytest.raises(error, match=message):
        method.load_state_dict(spoil(method.state_dict()))
    assert same(snapshot(model, method), before)


@pytest.mark.parametrize("kind", MEMORY)
def test_damaged_and_foreign_files_change_nothing(kind, tmp_path):
    model, path = make(), tmp_path / "method"
    method = build(kind, model)
    fill(method, 2)
    method.save(path)
    whole = path.read_bytes()
    before = snapshot(model, method)
    damaged = [
        whole[:50],
        whole[:-1],
        whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        whole.replace(b'\\"tasks_seen\\"', b'\\"tasks_sEen\\"'),
    ]
    Naive(model).save(path)
    damaged.append(path.read_bytes())
    kind(model, memory(capacity=20), loss_fn).save(path)
    damaged.append(path.read_bytes())
    for content in damaged:
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match="method"):
            method.load(path)
        assert same(snapshot(model, method), before)
    with pytest.raises(FileNotFoundError):
        method.load(tmp_path / "absent")
    path.write_bytes(whole)
    method.load(path)
    assert same(snapshot(model, method), before)


def failing(batches_before):
    yield from batches(2)[:batches_before]
    raise OSError("disk")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: 3, TypeError, "loader must be an iterable"),
        (list, ValueError, "loader gave no batch"),
        (lambda: [*batches(2), batches(2)[0][0]], TypeError, "pairs"),
        (lambda: [*batches(2), (torch.zeros(2, 6).double(), torch.zeros(2).long())], ValueError, "shape"),
        (lambda: failing(2), OSError, "disk"),
    ],
)
@pytest.mark.parametrize("kind", MEMORY)
def test_a_failing_end_task_changes_nothing(kind, loader, error, message):
    model = make()
    for tasks in (0, 2):
        method = build(kind, model)
        fill(method, tasks)
        before = snapshot(model, method)
        with pytest.raises(error, match=message):
            method.end_task(loader())
        assert same(snapshot(model, method), before)
        method.end_task(batches(2))
        assert method.tasks_seen == tasks + 1


@pytest.mark.parametrize("kind", MEMORY)
def test_end_task_without_a_loader(kind):
    method = build(kind, make())
    with pytest.raises(ValueError, match="loader is None and the buffer is empty"):
        method.end_task()
    assert method.tasks_seen == 0
    method.buffer.add(*batches(0)[0], 0)
    seen = method.buffer.seen
    method.end_task()
    assert (method.tasks_seen, method.buffer.seen) == (1, seen)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"_loss_fn": lambda logits, y: 3.0}, TypeError, "loss_fn must return a tensor"),
        ({"_loss_fn": lambda logits, y: logits}, ValueError, "one element"),
        ({"_loss_fn": lambda logits, y: loss_fn(logits.detach(), y)}, ValueError, "carries no gradient"),
        ({"_forward": lambda model, x, task: None}, TypeError, "forward must return the logits"),
        ({"_forward": lambda model, x, task: model(x, task)}, TypeError, "positional"),
    ],
)
@pytest.mark.parametrize("kind", MEMORY)
def test_a_failing_memory_pass_changes_no_gradient(kind, change, error, message):
    model = make()
    method = build(kind, model)
    fill(method, 2)
    loss_fn(model(batches(2)[0][0]), batches(2)[0][1]).backward()
    before = snapshot(model, method)
    own = [p.grad for p in model.parameters()]
    for name, value in change.items():
        setattr(method, name, value)
    with pytest.raises(error, match=message):
        method.after_backward()
    after = snapshot(model, method)
    assert same(after["model"], before["model"])
    assert same(after["grads"], before["grads"])
    assert all(p.grad is g for p, g in zip(model.parameters(), own, strict=True))
    assert method.tasks_seen == 2
    with pytest.raises(TypeError, match="scaler must be"):
        method.after_backward(scaler=2.0)
    assert torch.equal(grads(model), before["grads"])


@pytest.mark.parametrize("kind", MEMORY)
def test_a_state_without_its_buffer(kind):
    model = make()
    method = build(kind, model)
    method.load_state_dict({"format": method._format, "version": 1, "tasks_seen": 2, "buffer": memory().state_dict()})
    with pytest.raises(RuntimeError, match="2 tasks have ended and the buffer is empty"):
        method.after_backward()


@pytest.mark.parametrize("kind", MEMORY)
def test_construction_is_checked(kind):
    model, buffer = make(), memory()
    for args, options, error, message in [
        (("model", buffer, loss_fn), {}, TypeError, "model must be"),
        ((model, [], loss_fn), {}, TypeError, "buffer must be"),
        ((model, buffer, 3), {}, TypeError, "loss_fn must be"),
        ((model, buffer, loss_fn), {"forward": 3}, TypeError, "forward must be"),
        ((model, buffer, loss_fn), {"batch_size": 2.0}, TypeError, "batch_size must be a whole number"),
        ((model, buffer, loss_fn), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ]:
        with pytest.raises(error, match=message):
            kind(*args, **options)
    for name in ("margin", "ridge"):
        with pytest.raises(ValueError, match=name):
            GEM(model, buffer, loss_fn, **{name: -1.0})
    with pytest.raises(TypeError, match="model must be"):
        Naive("model")


@pytest.mark.parametrize("kind", MEMORY)
def test_works_without_autograd_around_it_and_with_inference_tensors(kind):
    def run(context, made_in):
        model = make()
        method = build(kind, model)
        for task in range(2):
            with made_in():
                method.end_task(batches(task))
        loss_fn(model(batches(2)[0][0]), batches(2)[0][1]).backward()
        with context():
            method.after_backward()
        return grads(model)

    expected = run(torch.enable_grad, torch.enable_grad)
    assert torch.equal(run(torch.no_grad, torch.enable_grad), expected)
    assert torch.equal(run(torch.enable_grad, torch.inference_mode), expected)


@pytest.mark.parametrize("kind", MEMORY)
def test_a_reservoir_and_the_models_mode(kind):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    method = kind(model, ReservoirBuffer(10, generator=torch.Generator().manual_seed(3)), loss_fn)
    fill(method, 2)
    loss_fn(model(batches(2)[0][0]), batches(2)[0][1]).backward()
    moved = model[1].num_batches_tracked.clone()
    method.after_backward()
    assert int(model[1].num_batches_tracked - moved) == (len(method.buffer.tasks) if kind is GEM else 1)
    model.eval()
    moved = model[1].running_mean.clone()
    method.after_backward()
    assert not model.training
    assert torch.equal(model[1].running_mean, moved)


@pytest.mark.parametrize("kind", MEMORY)
def test_a_scaler_changes_nothing_but_the_scale(kind):
    def run(scaled):
        model = make(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, enabled=scaled)
        method, optimizer = build(kind, model), torch.optim.SGD(model.parameters(), lr=0.2)
        for task in range(3):
            for x, y in batches(task, torch.float32) * 3:
                optimizer.zero_grad()
                scaler.scale(loss_fn(model(x), y)).backward()
                method.after_backward(scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
            method.end_task(batches(task, torch.float32))
        assert scaler.get_scale() == (2.0**13 if scaled else 1.0)
        return torch.cat([p.flatten() for p in trained(model)]).detach()

    with_scale, without = run(True), run(False)
    if kind is GEM:  # scaled by a power of two, up to the rounding of the quadratic programme
        torch.testing.assert_close(with_scale, without, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(with_scale, without)


def test_gems_ridge_is_that_of_gradients_without_a_scale():
    def coefficients(scaler):
        model = make(dtype=torch.float32)
        gem = build(GEM, model, margin=0.0, ridge=3.0)
        fill(gem, 2)
        x, y = gem.buffer.of_task(0)
        scaler.scale(-loss_fn(model(x), y)).backward()
        info = gem.after_backward(scaler=scaler)
        assert bool(info.violated)
        return info.coefficients

    with_scale, without = (coefficients(torch.amp.GradScaler("cpu", init_scale=2.0**13, enabled=enabled)) for enabled in (True, False))
    assert 0 < float(without.max()) < 0.9  # ridge 0 would give 1: the ridge counts
    torch.testing.assert_close(with_scale, without, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", MEMORY)
def test_a_scaler_skips_a_step_whose_memory_gradient_overflows(kind):
    model = make(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    method, optimizer = build(kind, model), torch.optim.SGD(model.parameters(), lr=0.2)
    fill(method, 2)
    method._loss_fn = lambda logits, y: loss_fn(logits, y) * 1e32
    x, y = batches(2, torch.float32)[0]
    scaler.scale(loss_fn(model(x), y)).backward()
    assert grads(model).isfinite().all()
    before = copy.deepcopy(model.state_dict())
    method.after_backward(scaler=scaler)
    assert not grads(model).isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert same(dict(model.state_dict()), dict(before))
    assert scaler.get_scale() == 2.0**29


@pytest.mark.parametrize("kind", MEMORY)
def test_autocast_is_for_the_forward_pass_only(kind):
    model, seen = make(dtype=torch.float32), []
    method = build(kind, model)
    fill(method, 2)
    x, y = batches(2, torch.float32)[0]
    loss_fn(model(x), y).backward()

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            seen.append(("forward", torch.is_autocast_enabled("cpu"), t.dtype))
            return t.clone()

        @staticmethod
        def backward(ctx, t):
            seen.append(("backward", torch.is_autocast_enabled("cpu"), t.dtype))
            return t

    method._loss_fn = lambda logits, y: loss_fn(Watch.apply(logits), y)
    with torch.autocast("cpu", torch.bfloat16):
        method.after_backward()
    assert set(seen) == {("forward", True, torch.bfloat16), ("backward", False, torch.bfloat16)}
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", [Naive, *MEMORY])
def test_pickles(kind):
    model = make()
    method = Naive(model) if kind is Naive else build(kind, model)
    method.end_task(batches(0))
    again = pickle.loads(pickle.dumps(method))
    assert same(again.state_dict(), method.state_dict())


@pytest.mark.parametrize("kind", MEMORY)
def test_new_parameter_objects_in_the_same_place_are_followed(kind):
    model = make()
    method = build(kind, model)
    fill(method, 2)
    method.after_backward()
    model.zero_grad()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    loss_fn(model(batches(2)[0][0]), batches(2)[0][1]).backward()
    (-10 * loss_fn(model(method.buffer.sample(8)[0]), method.buffer.sample(8)[1])).backward()
    before = grads(model)
    method.after_backward()
    assert not torch.equal(grads(model), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MEMORY)
def test_memory_goes_to_the_models_device(kind, tmp_path):
    model = make(dtype=torch.float32).cuda()
    for where in ("cpu", "cuda"):
        method = build(kind, model)
        for task in range(2):
            method.end_task([(x.to(where), y.to(where)) for x, y in batches(task, torch.float32)])
        model.zero_grad()
        x, y = (t.cuda() for t in batches(2, torch.float32)[0])
        loss_fn(model(x), y).backward()
        method.after_backward()
        method.save(tmp_path / "method")
        again = build(kind, model)
        again.load(tmp_path / "method")
        assert again.buffer.of_task(0)[0].device.type == where
        again.end_task([(x.to(where), y.to(where)) for x, y in batches(2, torch.float32)])
