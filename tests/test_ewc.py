"""EWC against sums over tasks written out with autograd, and its Fisher information against gradients of single samples."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastcl import optim
from fastcl.methods import EWC, Naive, _fisher
from learners import Heads, Net, batches, flat, grads, loss_fn, make, train, trained, with_head

F64 = torch.float64


def per_sample(model, x, y):
    """The gradients of the samples' losses: [samples, parameters]."""
    rows = [torch.autograd.grad(loss_fn(model(x[i : i + 1]), y[i : i + 1]), trained(model), allow_unused=True) for i in range(len(x))]
    return torch.stack([flat(row, trained(model)) for row in rows])


def joined(loader):
    return (torch.cat(parts) for parts in zip(*loader, strict=True))


def empirical(model, loader):
    """The mean of the squared gradients for the true labels."""
    return per_sample(model, *joined(loader)).square().mean(0)


def exact(model, loader):
    """The expectation over the model's own labels, in closed form: the sum over all classes, weighted by their probabilities."""
    x, _ = joined(loader)
    with torch.no_grad():
        probabilities = model(x).softmax(1)
    by_class = [probabilities[:, c, None] * per_sample(model, x, torch.full((len(x),), c)).square() for c in range(4)]
    return sum(by_class).mean(0)


def theta(model):
    return flat(trained(model), trained(model))


def vector(by_name, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return flat([by_name[names[id(p)]] for p in trained(model)], trained(model))


def run(tasks=3, **options):
    """A model trained on some tasks with EWC; with the Fisher information and the parameters at the end of each."""
    model, seen = make(), []
    ewc = EWC(model, labels="true", **options)
    for task in range(tasks):
        train(model, ewc, batches(task) * 3)
        seen.append((empirical(model, batches(task)), theta(model)))
        ewc.end_task(batches(task), loss_fn)
    return model, ewc, seen


def test_offline_is_the_sum_over_tasks():
    model, ewc, seen = run(strength=0.7)
    assert ewc.tasks_seen == 3
    precision = sum(f for f, _ in seen)
    torch.testing.assert_close(vector(ewc.precision, model), precision, rtol=1e-12, atol=0)
    anchor = torch.where(precision > 0, sum(f * t for f, t in seen) / precision, seen[-1][1])
    torch.testing.assert_close(vector(ewc.anchor, model), anchor, rtol=1e-11, atol=1e-13)
    # The gradient of the penalty as papers write it, one term per task, a lambda of twice the strength.
    p = [q.detach().clone().requires_grad_() for q in trained(model)]
    with torch.no_grad():
        for n, (mine, q) in enumerate(zip(p, trained(model), strict=True)):
            q.add_(0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(n), dtype=F64))
            mine.copy_(q)
    now = torch.cat([q.flatten() for q in p])
    penalty = torch.autograd.grad(sum(1.4 / 2 * (f * (now - t).square()).sum() for f, t in seen), p)
    x, y = batches(3)[0]
    model.zero_grad()
    loss_fn(model(x), y).backward()
    before = grads(model)
    assert model.unused.grad is None
    assert ewc.after_backward() is None
    assert model.unused.grad is None
    assert model.frozen.weight.grad is None
    torch.testing.assert_close(grads(model), before + flat(penalty, p), rtol=1e-10, atol=1e-14)
    assert float(flat(penalty, p).norm()) > 1e-3 * float(before.norm())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_online_forgets_the_past_by_gamma_and_pulls_to_the_latest(gamma):
    model, ewc, seen = run(gamma=gamma)
    precision = torch.zeros_like(seen[0][0])
    for f, _ in seen:
        precision = gamma * precision + f
    torch.testing.assert_close(vector(ewc.precision, model), precision, rtol=1e-12, atol=0)
    assert torch.equal(vector(ewc.anchor, model), seen[-1][1])


def test_memory_and_cost_do_not_grow_with_the_tasks():
    _, ewc, _ = run(tasks=1)
    first = {kind: {n: t.shape for n, t in value.items()} for kind, value in ewc._kept().items()}
    _, later, _ = run(tasks=5)
    assert {kind: {n: t.shape for n, t in value.items()} for kind, value in later._kept().items()} == first


def test_where_nothing_is_known_the_anchor_is_the_latest_theta():
    _, ewc, _ = run(tasks=2)
    assert torch.equal(ewc.precision["unused"], torch.zeros(3, dtype=F64))
    assert torch.equal(ewc.anchor["unused"], torch.ones(3, dtype=F64))


def test_the_first_task_is_plain():
    model = make()
    ewc = EWC(model, strength=1e6)
    loss_fn(model(batches(0)[0][0]), batches(0)[0][1]).backward()
    before = grads(model)
    ewc.after_backward()
    assert torch.equal(grads(model), before)
    assert ewc.tasks_seen == 0


@pytest.mark.parametrize("sizes", [(8, 8, 5), (21,), (1,) * 21])
def test_the_fisher_of_drawn_labels_is_unbiased_for_any_batches(sizes):
    """The mean of many estimates against the closed form, by each element's standard error."""
    model = make()
    train(model, Naive(model), batches(0) * 5)
    x, y = joined(batches(0))
    loader = list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
    wanted = exact(model, loader)
    slots = EWC(model)._slots
    drawn = torch.stack([flat(_fisher.of_drawn_labels(model, slots, loader, model, f"{k}"), trained(model)) for k in range(400)])
    error = drawn.std(0) / 400**0.5
    used = wanted > 0
    assert used.sum() == len(used) - 3  # all but the parameter that no pass uses
    z = ((drawn.mean(0) - wanted) / error)[used]
    assert float(z.abs().max()) < 4.5
    assert abs(float(z.square().mean().sqrt()) - 1) < 0.35
    # The claim needs the model's own labels: with the true ones the square of the sum is something else.
    assert float((empirical(model, loader) / wanted)[used].log().abs().max()) > 0.5


def test_one_sample_per_batch_is_the_squared_gradient_for_one_of_the_classes():
    model = make()
    slots, drawn = EWC(model)._slots, set()
    for k, x in enumerate(torch.cat([x for x, _ in batches(0)]).split(1)):
        found = flat(_fisher.of_drawn_labels(model, slots, [(x, None)], model, f"{k}"), trained(model))
        by_class = [per_sample(model, x, torch.tensor([c]))[0].square() for c in range(4)]
        fits = [c for c in range(4) if torch.allclose(found, by_class[c], rtol=1e-9, atol=1e-18)]
        assert len(fits) == 1
        drawn.update(fits)
    assert drawn == {0, 1, 2, 3}


def test_labels_are_drawn_anew_for_every_task_and_repeat_with_the_seed():
    def precision(seed, tasks):
        model = make()
        ewc, state = EWC(model, seed=seed), torch.get_rng_state()
        values = []
        for _ in range(tasks):
            before = vector(ewc.precision, model)
            ewc.end_task(batches(0))
            assert torch.equal(torch.get_rng_state(), state)  # no other generator is used
            values.append(vector(ewc.precision, model) - before)
        return values

    first, second = precision(3, 2)
    assert not torch.allclose(first, second)
    assert torch.equal(precision(3, 1)[0], first)
    assert not torch.allclose(precision(4, 1)[0], first)


def test_the_models_mode_and_buffers():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.out, self.modes = nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4), []

        def forward(self, x):
            self.modes.append(self.training)
            return self.out(self.drop(self.norm(x)))

    for train_mode in (False, True):
        model = Watched().double()
        model.drop.eval()
        before = copy.deepcopy(model.state_dict())
        EWC(model, train_mode=train_mode).end_task(batches(0))
        assert model.modes == [train_mode] * 3
        assert [m.training for m in (model, model.norm, model.drop)] == [True, True, False]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_heads():
    model = make(Heads)
    ewc = EWC(model, forward=with_head)
    for task in range(2):
        train(model, ewc, batches(task), task)
        ewc.end_task(batches(task))
    assert float(ewc.precision["heads.0.weight"].sum()) > 0
    assert float(ewc.precision["heads.1.weight"].sum()) > 0
    assert float(ewc.precision["heads.2.weight"].sum()) == 0
    assert ewc.precision.keys() == dict(model.named_parameters()).keys()


def test_less_is_forgotten_than_by_fine_tuning():
    def task(seed):
        gen = torch.Generator().manual_seed(seed)
        centres, y = torch.randn(10, 10, generator=gen), torch.arange(400) % 10
        return centres[y] + 0.3 * torch.randn(400, 10, generator=gen), y

    def accuracies(strength, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 10))
        ewc = EWC(model, strength=strength, **options)
        tasks = [task(1), task(2)]
        for x, y in tasks:
            loader = list(zip(x.split(20), y.split(20), strict=True))
            for _ in range(10):
                train(model, ewc, loader)
            ewc.end_task(loader, loss_fn)
        return [float((model(x).argmax(1) == y).float().mean()) for x, y in tasks]

    plain = accuracies(0.0)
    assert plain[0] < 0.6
    for options, strength in (({}, 30.0), ({"gamma": 1.0}, 30.0), ({"labels": "true"}, 100.0)):
        first, second = accuracies(strength, **options)
        assert first > plain[0] + 0.1
        assert second > 0.95


def test_half_precision_is_kept_in_float32():
    model = make(dtype=torch.bfloat16)
    ewc = EWC(model)
    ewc.end_task(batches(0, torch.bfloat16))
    assert {t.dtype for t in (*ewc.precision.values(), *ewc.anchor.values())} == {torch.float32}
    with torch.no_grad():
        model.first.weight += 1
    loss_fn(model(batches(1, torch.bfloat16)[0][0]), batches(1)[0][1]).backward()
    before = model.first.weight.grad.clone()
    ewc.after_backward()
    assert model.first.weight.grad.dtype == torch.bfloat16
    wanted = before.float() + 2 * ewc.precision["first.weight"] * (model.first.weight.float() - ewc.anchor["first.weight"])
    assert torch.equal(model.first.weight.grad, wanted.to(torch.bfloat16))


def test_a_scaler_scales_the_pull_too():
    def gradient(scale):
        model, ewc, _ = run(tasks=1)
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        x, y = batches(1)[0]
        loss = loss_fn(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        with torch.no_grad():
            model.first.weight += 1
        ewc.after_backward(scaler=scaler)
        return grads(model) / (scale or 1)

    torch.testing.assert_close(gradient(1024.0), gradient(None), rtol=1e-12, atol=0)


def test_a_run_that_is_saved_and_loaded_goes_on_the_same(tmp_path):
    def whole(stop):
        model = make()
        ewc = EWC(model, strength=0.5, gamma=0.9)
        for task in range(4):
            if task == stop:
                ewc.save(tmp_path / "ewc.safetensors")
                weights = copy.deepcopy(model.state_dict())
                torch.manual_seed(1)
                model = Net().double()
                model.load_state_dict(weights)
                ewc = EWC(model, strength=0.5, gamma=0.9)
                ewc.load(tmp_path / "ewc.safetensors")
                assert ewc.tasks_seen == stop
            train(model, ewc, batches(task))
            ewc.end_task(batches(task))
        return theta(model), vector(ewc.precision, model), vector(ewc.anchor, model)

    expected = whole(None)
    for stop in (0, 1, 3):
        assert all(torch.equal(a, b) for a, b in zip(whole(stop), expected, strict=True))


def test_state_dict_is_a_copy_and_pickles():
    model, ewc, _ = run(tasks=2)
    state = ewc.state_dict()
    again = EWC(model)
    again.load_state_dict(state)
    kept = copy.deepcopy(state)
    for t in (*state["precision"].values(), *state["anchor"].values()):
        t.fill_(7)
    for method in (ewc, again, pickle.loads(pickle.dumps(ewc))):
        found = method.state_dict()
        assert found["tasks_seen"] == 2
        for kind in ("precision", "anchor"):
            assert all(torch.equal(found[kind][n], t) for n, t in kept[kind].items())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: [], TypeError, "mapping"),
        (lambda s: {**s, "format": "fastcl.spg"}, ValueError, r"format 'fastcl\.spg'"),
        (lambda s: {**s, "tasks_seen": -1}, ValueError, "tasks_seen is -1"),
        (lambda s: {**s, "precision": 3}, TypeError, r"state\['precision'\] must be a mapping"),
        (lambda s: {**s, "anchor": {n: t for n, t in s["anchor"].items() if n != "unused"}}, ValueError, "lacks 'unused'"),
        (lambda s: {**s, "anchor": {**s["anchor"], "x": torch.ones(1)}}, ValueError, "has 'x'"),
        (lambda s: {**s, "anchor": {**s["anchor"], "unused": 1}}, TypeError, r"\['unused'\] must be a tensor"),
        (lambda s: {**s, "anchor": {**s["anchor"], "unused": torch.ones(2)}}, ValueError, r"'unused'.*shape \(2,\)"),
        (lambda s: {**s, "anchor": {**s["anchor"], "unused": torch.ones(3) * torch.nan}}, ValueError, r"'unused'.*finite"),
        (lambda s: {**s, "precision": {**s["precision"], "unused": -torch.ones(3)}}, ValueError, r"'unused'.*below 0"),
        (lambda s: {**s, "precision": {**s["precision"], "unused": torch.ones(3).long()}}, TypeError, r"'unused'.*int64"),
    ],
)
def test_a_bad_state_changes_nothing(spoil, error, message):
    _, ewc, _ = run(tasks=2)
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=message):
        ewc.load_state_dict(spoil(ewc.state_dict()))
    assert all(torch.equal(t, before[k][n]) for k in ("precision", "anchor") for n, t in ewc.state_dict()[k].items())


def failing():
    yield batches(2)[0]
    raise OSError("disk")


@pytest.mark.parametrize("labels", ["model", "true"])
@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (list, ValueError, "loader gave no batch"),
        (lambda: None, TypeError, "loader must be an iterable of batches .*, got NoneType"),
        (lambda: 5, TypeError, "loader must be an iterable of batches .*, got int"),
        (lambda: [*batches(2), batches(2)[0][0]], TypeError, "pairs"),
        (failing, OSError, "disk"),
        (lambda: [(torch.full((2, 5), torch.nan).double(), torch.zeros(2).long())], ValueError, "NaN or an Inf"),
    ],
)
def test_a_failing_end_task_changes_nothing(labels, loader, error, message):
    model, ewc, _ = run(tasks=1)
    ewc._labels = labels
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=message):
        ewc.end_task(loader(), loss_fn)
    assert ewc.tasks_seen == 1
    assert all(torch.equal(t, before[k][n]) for k in ("precision", "anchor") for n, t in ewc.state_dict()[k].items())
    assert model.training


def test_what_is_refused():
    model = make()
    for options, error, message in [
        ({"strength": -1}, ValueError, "strength must be a finite number >= 0, got -1"),
        ({"strength": float("nan")}, ValueError, "strength must be"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\]"),
        ({"labels": "drawn"}, ValueError, "labels must be 'model' or 'true', got 'drawn'"),
        ({"forward": 3}, TypeError, "forward must be a function"),
        ({"train_mode": 1}, TypeError, "train_mode must be True or False"),
        ({"seed": -1}, ValueError, r"seed must be a whole number from 0 that is below 2\*\*63, got -1"),
        ({"seed": 1.0}, TypeError, "seed must be a whole number"),
    ]:
        with pytest.raises(error, match=message):
            EWC(model, **options)
    with pytest.raises(TypeError, match="model must be"):
        EWC("model")
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        EWC(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(TypeError, match=r"loss_fn must be a function .*labels='true'"):
        EWC(model, labels="true").end_task(batches(0))
    with pytest.raises(TypeError, match="labels='true' takes batches apart"):
        EWC(model, labels="true").end_task([([1], [2])], loss_fn)
    with pytest.raises(ValueError, match=r"logits of shape \[samples, classes\]; forward gave \(8, 4, 1\)"):
        EWC(model, forward=lambda m, x, task: m(x)[..., None]).end_task(batches(0))
    ewc = EWC(model)
    model.last = nn.Linear(7, 4).double()
    model.extra = nn.Linear(7, 4).double()
    with pytest.raises(ValueError, match="the model has changed"):
        ewc.end_task(batches(0))


def test_new_parameter_objects_in_the_same_place_are_followed():
    model, ewc, _ = run(tasks=1)
    model.load_state_dict({k: v.clone() + 0.5 for k, v in model.state_dict().items()}, assign=True)
    loss_fn(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    before = grads(model)
    ewc.after_backward()
    torch.testing.assert_close(
        grads(model), before + 2 * vector(ewc.precision, model) * (theta(model) - vector(ewc.anchor, model)), rtol=1e-9, atol=1e-14
    )


def test_a_gradient_that_the_op_does_not_take():
    model, ewc, _ = run(tasks=1)
    model.zero_grad()
    model.first.weight.grad = torch.zeros(7, 5, dtype=F64).to_sparse()
    with pytest.raises((TypeError, ValueError), match="grads"):
        ewc.after_backward()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_transform_trains_as_after_backward_does_over_several_tasks(kind):
    def run(fused):
        model = make()
        ewc = EWC(model, strength=3.0)
        stepping = getattr(optim, kind)(model.parameters(), lr=0.02, transforms=ewc.transforms() if fused else ())
        for task in range(3):
            for x, y in batches(task) * 2:
                stepping.zero_grad()
                loss_fn(model(x), y).backward()
                if not fused:
                    ewc.after_backward()
                stepping.step()
            ewc.end_task(batches(task))  # the transform sees it
            if task == 1:
                ewc.load_state_dict(ewc.state_dict())  # and a loaded state
        return theta(model)

    fused = run(True)
    assert torch.equal(fused, run(False))
    model = make()
    train(model, Naive(model), batches(0) * 2, lr=0.02)
    assert not torch.equal(theta(model), fused)
