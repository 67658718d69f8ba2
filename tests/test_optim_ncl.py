"""optim.NCL against its dense definition and torch.optim.SGD, and as what users of torch.optim expect of an optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import lr_scheduler
from torch.testing._internal.two_tensor import TwoTensor

from fastcl import DiagonalPrecision, KroneckerPrecision, LowRankKroneckerPrecision, LowRankPrecision
from fastcl.optim import NCL
from layouts import identical
from precisions import F64, Dense, anchors, factors, give, layer_grads, linear, mlp, precision, weights


class Mixed(nn.Module):
    """Layers of every kind of block: convolution, linear, normalisation, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 3, 2), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x):
        return self.linear(self.norm(torch.tanh(self.conv(x)).flatten(1)))


def mixed(dtype=F64):
    torch.manual_seed(0)
    return Mixed().to(dtype)


def same_parameters(a, b):
    return all(identical(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def apart(a, b):
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def tensors(optimizer):
    return [(n, t) for p in optimizer.param_groups[0]["params"] for n, t in sorted(optimizer.state[p].items())]


def run(model, optimizer, steps, **options):
    for step in steps:
        give(model, step, **options)
        optimizer.step()


@pytest.mark.parametrize("make", [mlp, mixed])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_first_task_is_sgd(device, make, momentum):
    model, peer = make(), make()
    optimizer = NCL(model, KroneckerPrecision(model, n_data=50), lr=0.1, momentum=momentum, strength=3.0)
    official = torch.optim.SGD(peer.parameters(), lr=0.1, momentum=momentum, weight_decay=3.0 / 50)
    for step in range(40):
        give(model, step)
        give(peer, step)
        optimizer.step()
        official.step()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    # The decay counts.
    without = make()
    plain = torch.optim.SGD(without.parameters(), lr=0.1, momentum=momentum)
    run(without, plain, range(40))
    assert apart(model, without) > 1e-3


@pytest.mark.parametrize("radius", [None, 0.05, 1e6])
@pytest.mark.parametrize(("momentum", "strength"), [(0.9, 1.0), (0.0, 0.7), (0.5, 0.0)])
def test_the_definition(device, momentum, strength, radius):
    model = mlp()
    dense = Dense(model, factors(model), anchors(model), 0.4 / 20, momentum, strength)
    optimizer = NCL(model, precision(model), 0.4, momentum, strength, radius)
    for step in range(25):
        give(model, step)
        optimizer.step()
        dense.step(layer_grads(model), radius)
    for name, w in weights(model).items():
        torch.testing.assert_close(w, dense.w[name], rtol=1e-10, atol=1e-11)
    if radius is not None:  # what it does it does differently from no radius, or not, as it is small or large
        other = mlp()
        run(other, NCL(other, precision(other), 0.4, momentum, strength), range(25))
        assert (apart(model, other) > 1e-2) == (radius < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(device, dtype):
    model = mlp(dtype)
    dense = Dense(model, factors(model), anchors(model), 0.4 / 20, 0.9, 1.0)
    optimizer = NCL(model, precision(model, dtype=torch.float32), lr=0.4)
    for step in range(25):
        give(model, step)
        optimizer.step()
        dense.step(layer_grads(model))
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for name, w in weights(model).items():
        assert float((w.double() - dense.w[name]).norm() / dense.w[name].norm()) < tolerance
    assert all(t.dtype == torch.float32 for _, t in tensors(optimizer))


def length(precision_, before, model):
    steps = {n: (p.detach().double() - before[n].double()) for n, p in model.named_parameters()}
    kind = next(iter(before.values())).dtype
    return math.sqrt(float(precision_.quadratic({n: t.to(torch.float32 if kind != F64 else F64) for n, t in steps.items()})))


@pytest.mark.parametrize("make", [mlp, mixed])
def test_no_step_is_longer_than_the_radius(device, make):
    model = make()
    metric = precision(model) if make is mlp else KroneckerPrecision(model, n_data=20)
    optimizer = NCL(model, metric, lr=5.0, radius=0.3)
    lengths = []
    for step in range(30):
        give(model, step, scale=10.0 ** -(step % 5))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        lengths.append(length(metric, before, model))
    assert max(lengths) <= 0.3 * (1 + 1e-9)
    assert max(lengths) > 0.3 * (1 - 1e-9), "the bound was never met"
    model, unbounded = make(), None
    metric = precision(model) if make is mlp else KroneckerPrecision(model, n_data=20)
    unbounded = NCL(model, metric, lr=5.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, unbounded, [0])
    assert length(metric, before, model) > 0.6


def test_a_direction_of_length_zero(device):
    model = mlp()
    optimizer = NCL(model, KroneckerPrecision(model, n_data=20), lr=0.1, strength=0.0, radius=0.5)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same_parameters(model, before)


def pulls(optimizer, model):
    """``H`` by layer."""
    found = {}
    for name, m in linear(model).items():
        weight = optimizer.state[m.weight]["pull"]
        found[name] = weight if m.bias is None else torch.cat([weight, optimizer.state[m.bias]["pull"][:, None]], 1)
    return found


@pytest.mark.parametrize("radius", [None, 0.02])
def test_the_pull_is_exact_after_many_steps(device, radius):
    """float32, whose sum of 5,000 updates drifts; the parameters are moved about all the time."""
    model = mlp(torch.float32)
    optimizer = NCL(model, precision(model, dtype=torch.float32), lr=0.4, radius=radius)
    by_name, mu = factors(model, torch.float32), anchors(model, torch.float32)
    for step in range(5000):
        give(model, step % 97)
        optimizer.step()
    for name, h in pulls(optimizer, model).items():
        A, G = (t.double() for t in by_name[name])
        exact = G @ (weights(model)[name].double() - mu[name].double()) @ A
        assert float((h.double() - exact).norm() / exact.norm()) < 1e-5


def counting(monkeypatch, optimizer, what):
    calls = []
    for block in optimizer.precision.blocks:
        kept = getattr(block, what)
        monkeypatch.setattr(block, what, lambda states, kept=kept: (calls.append(1), kept(states))[1])
    return calls


def test_the_pull_is_refreshed_on_time(device, monkeypatch):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4, refresh=5)
    run(model, optimizer, [0])
    calls, seen = counting(monkeypatch, optimizer, "refresh"), [0]
    for step in range(1, 17):
        run(model, optimizer, [step])
        seen.append(len(calls))
    assert seen == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2


@pytest.mark.parametrize("write", ["copy_", "add_", "load_state_dict", "index", "data"])
def test_the_pull_follows_a_write_from_outside(device, monkeypatch, write):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4, momentum=0.0)
    run(model, optimizer, range(3))
    calls = counting(monkeypatch, optimizer, "refresh")
    with torch.no_grad():
        if write == "copy_":
            model[0].weight.copy_(torch.ones_like(model[0].weight))
        elif write == "add_":
            model[0].bias.add_(1)
        elif write == "index":
            model[2].weight[0] = 2.0
        elif write == "data":
            vector_to_parameters(parameters_to_vector(model.parameters()) + 0.5, model.parameters())
        else:
            model.load_state_dict(mlp().state_dict())
    dense = Dense(model, factors(model), anchors(model), 0.4 / 20, 0.0, 1.0)
    run(model, optimizer, [3, 4])
    assert len(calls) == 1
    for step in (3, 4):
        give(model, step)
        dense.step(layer_grads(model))
    for name, w in weights(model).items():
        torch.testing.assert_close(w, dense.w[name], rtol=1e-10, atol=1e-11)


def test_a_new_precision_begins_anew(device):
    model = mlp()
    metric = precision(model)
    optimizer = NCL(model, metric, lr=0.4)
    run(model, optimizer, range(4))
    metric.anchor_()
    mu = weights(model)
    dense = Dense(model, factors(model), mu, 0.4 / 20, 0.9, 1.0)
    for step in range(4, 9):
        give(model, step)
        optimizer.step()
        dense.step(layer_grads(model))
    for name, w in weights(model).items():
        torch.testing.assert_close(w, dense.w[name], rtol=1e-10, atol=1e-11)


def test_schedulers(device):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4)
    dense = Dense(model, factors(model), anchors(model), 0.4 / 20, 0.9, 1.0)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    for step in range(6):
        give(model, step)
        optimizer.step()
        dense.lr = 0.4 / 20 / (step + 1)
        dense.step(layer_grads(model))
        schedule.step()
    for name, w in weights(model).items():
        torch.testing.assert_close(w, dense.w[name], rtol=1e-10, atol=1e-11)


def test_one_cycle_moves_momentum_too(device):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4)
    schedule, seen = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10), set()
    for step in range(8):
        run(model, optimizer, [step])
        schedule.step()
        seen.add(optimizer.param_groups[0]["momentum"])
    assert len(seen) > 5


@pytest.mark.parametrize("radius", [None, 0.05])
def test_a_learning_rate_on_the_device(device, radius):
    model, peer = mlp(), mlp()
    lr = torch.tensor(0.4, dtype=F64)
    a, b = NCL(model, precision(model), lr=lr, radius=radius), NCL(peer, precision(peer), lr=0.4, radius=radius)
    for step in range(6):
        run(model, a, [step])
        run(peer, b, [step])
        lr.mul_(0.5)
        b.param_groups[0]["lr"] *= 0.5
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["dict", "file", "before the model", "deepcopy", "pickle"])
@pytest.mark.parametrize("make", [mlp, mixed])
def test_a_run_that_is_saved_goes_on_with_the_same_bits(device, make, form, dtype):
    state_dtype = F64 if dtype == F64 else torch.float32

    def build(model):
        metric = precision(model, dtype=state_dtype) if make is mlp else KroneckerPrecision(model, n_data=20)
        return metric, NCL(model, metric, lr=0.4, refresh=7)

    model = make(dtype)
    metric, optimizer = build(model)
    run(model, optimizer, range(5))
    if form in ("deepcopy", "pickle"):
        pair = (model, optimizer)
        other, again = copy.deepcopy(pair) if form == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert again.param_groups[0]["params"][0] is next(other.parameters())
        assert again.precision.model is other
    else:
        other = make(dtype)
        other_metric, again = build(other)
        run(other, again, [77, 78])
        state, weights_ = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        if form == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other_metric.load_state_dict(copy.deepcopy(metric.state_dict()))
        if form == "before the model":
            again.load_state_dict(state)
            other.load_state_dict(weights_)
        else:
            other.load_state_dict(weights_)
            again.load_state_dict(state)
    for step in range(5, 20):  # beyond two refreshes, whose times have to be the same
        run(model, optimizer, [step])
        run(other, again, [step])
        assert same_parameters(model, other), step
    assert all(a == b and identical(s, t) for (a, s), (b, t) in zip(tensors(optimizer), tensors(again), strict=True))


def test_a_state_that_is_saved_at_a_tasks_end_begins_anew(device):
    model = mlp()
    metric = precision(model)
    optimizer = NCL(model, metric, lr=0.4)
    run(model, optimizer, range(3))
    metric.anchor_()
    other = mlp()
    other.load_state_dict(model.state_dict())
    other_metric = precision(other)
    other_metric.load_state_dict(metric.state_dict())
    again = NCL(other, other_metric, lr=0.4)
    again.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        run(model, optimizer, [step])
        run(other, again, [step])
        assert same_parameters(model, other)


def test_what_is_loaded_is_copied(device):
    model, other = mlp(), mlp()
    optimizer, again = NCL(model, precision(model), lr=0.4), NCL(other, precision(other), lr=0.4)
    run(model, optimizer, [0])
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    again.load_state_dict(saved)
    run(other, again, [1])
    assert all(identical(saved["state"][k][n], t) for k, s in kept["state"].items() for n, t in s.items())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: [], TypeError, "state_dict must be a mapping"),
        (lambda s: {k: v for k, v in s.items() if k != "state"}, ValueError, "no 'state'"),
        (lambda s: {**s, "param_groups": s["param_groups"] * 2}, ValueError, "2 parameter groups"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "radius": -1.0}]}, ValueError, "radius"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "since_refresh": -1}]}, ValueError, "since_refresh"),
        (lambda s: {**s, "state": {**s["state"], 0: {"pull": s["state"][0]["pull"]}}}, ValueError, r"'0\.weight' .* has \['pull'\]"),
        (lambda s: {**s, "state": {**s["state"], 0: {**s["state"][0], "exp_avg": 1}}}, ValueError, "exp_avg"),
        (lambda s: {**s, "state": {**s["state"], 0: {**s["state"][0], "pull": torch.zeros(2)}}}, ValueError, "shape"),
        (lambda s: {**s, "state": {**s["state"], 0: {**s["state"][0], "pull": None}}}, ValueError, "0.weight"),
        (lambda s: {**s, "state": {k: v for k, v in s["state"].items() if k != 1}}, ValueError, r"'0\.bias' .* has \[\]"),
    ],
)
def test_a_bad_state_changes_nothing(device, spoil, error, message):
    model, other = mlp(), mlp()
    optimizer, again = NCL(model, precision(model), lr=0.4), NCL(other, precision(other), lr=0.4)
    run(model, optimizer, [0])
    run(other, again, [0])
    with pytest.raises(error, match=message):
        again.load_state_dict(spoil(copy.deepcopy(optimizer.state_dict())))
    run(model, optimizer, [1])
    run(other, again, [1])
    assert same_parameters(model, other)


def test_sgds_state_is_refused(device):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4)
    official = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    run(model, official, [0])
    with pytest.raises(ValueError, match="has no 'strength': it is of another optimizer than NCL"):
        optimizer.load_state_dict(official.state_dict())


def test_closures_zero_grad_and_hooks(device):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4)
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5, dtype=F64)).square().sum()
        loss.backward()
        order.append("closure")
        return loss

    first, second = (float(optimizer.step(closure).detach()) for _ in range(2))
    assert second < first
    assert order == ["pre", "closure", "post"] * 2
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_scaler_unscales_and_skips(device):
    model, peer = mlp(torch.float32), mlp(torch.float32)
    a, b = (NCL(m, precision(m, dtype=torch.float32), lr=0.4) for m in (model, peer))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        for m, optimizer, scale in ((model, a, scaler), (peer, b, None)):
            optimizer.zero_grad()
            loss = m(x * (step + 1)).square().mean()
            (loss if scale is None else scale.scale(loss)).backward()
            if scale is None:
                optimizer.step()
            else:
                scale.step(optimizer)
                scale.update()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(model)
    model[0].weight.grad.fill_(math.inf)
    scaler.scale(torch.ones(()))
    scaler.step(a)
    scaler.update()
    assert same_parameters(model, before)
    assert scaler.get_scale() == 512.0


def test_gradients_that_are_missing(device):
    """A layer without a gradient rests, momentum and pull included; half a layer's counts as 0."""
    model = mlp()
    dense = Dense(model, factors(model), anchors(model), 0.4 / 20, 0.9, 1.0)
    optimizer = NCL(model, precision(model), lr=0.4)
    for step, missing in enumerate([(), ("2.weight",), ("0.bias",), ("0.weight", "0.bias"), ("0.weight",), ()]):
        give(model, step, missing)
        optimizer.step()
        dense.step(layer_grads(model))
    for name, w in weights(model).items():
        torch.testing.assert_close(w, dense.w[name], rtol=1e-10, atol=1e-11)
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    optimizer.step()
    assert same_parameters(model, before)


def test_a_frozen_parameter_rests(device):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4)
    run(model, optimizer, [0])
    model[2].weight.requires_grad_(False)
    before = model[2].weight.detach().clone()
    give(model, 1, missing=("2.weight",))
    optimizer.step()
    assert identical(model[2].weight.detach(), before)


def state_of(optimizer):
    return [t.clone() for _, t in tensors(optimizer)]


@pytest.mark.parametrize("form", [KroneckerPrecision, LowRankKroneckerPrecision])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_half_a_layer_cannot_be_frozen_afterwards(device, form, which):
    model = mlp()
    optimizer = NCL(model, form(model, n_data=20), lr=0.4)
    run(model, optimizer, [0])
    getattr(model[0], which).requires_grad_(False)
    kept, state = copy.deepcopy(model), state_of(optimizer)
    give(model, 1, missing=(f"0.{which}",))
    with pytest.raises(ValueError, match=f"'0.{which}' is frozen and the other parameter of layer '0' has a gradient"):
        optimizer.step()
    assert same_parameters(model, kept)
    assert all(map(identical, state, state_of(optimizer)))


def test_half_a_layer_that_is_frozen_from_the_beginning_rests(device):
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = NCL(model, KroneckerPrecision(model, n_data=20), lr=0.4)
    bias = model[0].bias.detach().clone()
    run(model, optimizer, range(3), missing=("0.weight",))
    assert identical(model[0].weight.detach(), before)
    assert not torch.equal(model[0].bias, bias)


def test_a_parameter_that_was_replaced_is_named(device):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4)
    run(model, optimizer, [0])
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    give(model, 1)
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*no longer what this optimizer was built with"):
        optimizer.step()


@pytest.mark.parametrize("radius", [None, 0.05])
@pytest.mark.parametrize("form", [DiagonalPrecision, KroneckerPrecision, LowRankPrecision])
def test_parameters_of_several_dtypes(device, form, radius):
    model = nn.ModuleList([nn.Linear(3, 4), nn.LayerNorm(4), nn.LayerNorm(4).double()])
    peer = copy.deepcopy(model)
    optimizer = NCL(model, form(model, n_data=20), lr=0.4, radius=radius)
    official = torch.optim.SGD(peer.parameters(), lr=0.4, momentum=0.9, weight_decay=1 / 20)
    lengths = []
    for step in range(3):
        give(model, step)
        give(peer, step)
        before = [p.detach().to(F64, copy=True) for p in model.parameters()]
        optimizer.step()
        official.step()
        moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
        lengths.append(math.sqrt(sum(float(m.square().sum()) for m in moved) / 20))
    if radius is None:
        assert apart(model, peer) < 1e-5
    else:
        assert max(lengths) == pytest.approx(radius, rel=1e-5)


@pytest.mark.parametrize("form", [DiagonalPrecision, KroneckerPrecision, LowRankPrecision, LowRankKroneckerPrecision])
@pytest.mark.parametrize("radius", [None, 0.1])
def test_a_refused_gradient_of_a_single_block_writes_nothing(device, form, radius):
    model = mlp()
    optimizer = NCL(model, form(model, n_data=20), lr=0.4, radius=radius)
    run(model, optimizer, [0])
    kept, state = copy.deepcopy(model), state_of(optimizer)
    for spoil, error in ((torch.Tensor.to_sparse, TypeError), (lambda g: TwoTensor(g, g.clone()), TypeError)):
        give(model, 1)
        model[2].weight.grad = spoil(model[2].weight.grad)
        with pytest.raises(error, match=r"grads\[|gradient of '2\.weight'"):
            optimizer.step()
        assert same_parameters(model, kept)
        assert all(map(identical, state, state_of(optimizer)))


@pytest.mark.parametrize("form", [DiagonalPrecision, KroneckerPrecision, LowRankPrecision, LowRankKroneckerPrecision])
@pytest.mark.parametrize("radius", [None, 0.1])
def test_gradients_of_a_subclass_with_memory_count_as_tensors(device, form, radius):
    class Named(torch.Tensor):
        pass

    model, peer = mlp(), mlp()
    for m, wrap in ((model, True), (peer, False)):
        optimizer = NCL(m, form(m, n_data=20), lr=0.4, radius=radius)
        give(m, 0)
        if wrap:
            m[2].weight.grad = m[2].weight.grad.as_subclass(Named)
        optimizer.step()
    assert same_parameters(model, peer)


@pytest.mark.parametrize("radius", [None, 0.1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_spreads_as_it_is_documented(device, radius, value):
    model = mlp()
    optimizer = NCL(model, precision(model), lr=0.4, radius=radius)
    give(model, 0)
    model[0].weight.grad[1, 2] = value
    optimizer.step()
    assert not model[0].weight.isfinite().any()
    if math.isnan(value):
        assert bool(model[2].weight.isnan().all()) == (radius is not None)


@pytest.mark.parametrize("make", [mlp, mixed])
def test_a_refused_gradient_writes_nothing(device, make):
    model = make()
    optimizer = NCL(model, KroneckerPrecision(model, n_data=20), lr=0.4)
    run(model, optimizer, [0])
    kept, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    give(model, 1)
    refused = model.norm.weight if make is mixed else model[2].weight  # of the block that comes last
    refused.grad = refused.grad.to_sparse()
    with pytest.raises(TypeError, match="grads"):
        optimizer.step()
    assert same_parameters(model, kept)
    assert all(identical(optimizer.state_dict()["state"][k][n], t) for k, s in state.items() for n, t in s.items())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": math.nan}, ValueError, "lr must be a finite number >= 0"),
        ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0"),
        ({"lr": math.inf}, ValueError, "lr must be a finite number >= 0"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be 1-element"),
        ({"momentum": -0.1}, ValueError, "momentum must be a finite number >= 0"),
        ({"momentum": math.nan}, ValueError, "momentum must be a finite number >= 0"),
        ({"momentum": None}, TypeError, "momentum must be a number"),
        ({"strength": -1}, ValueError, "strength must be a finite number >= 0"),
        ({"strength": math.nan}, ValueError, "strength must be a finite number >= 0"),
        ({"radius": 0.0}, ValueError, "radius must be"),
        ({"radius": -1.0}, ValueError, "radius must be"),
        ({"radius": math.nan}, ValueError, "radius must be"),
        ({"radius": "1"}, TypeError, "radius must be"),
        ({"radius": True}, TypeError, "radius must be a number, got bool"),
        ({"refresh": 0}, ValueError, "refresh must be a whole number >= 1, got 0"),
        ({"refresh": 2.5}, TypeError, "refresh must be a whole number, got float"),
        ({"refresh": True}, TypeError, "refresh must be a whole number, got bool"),
    ],
)
def test_bad_arguments(given, error, message):
    model = mlp()
    metric = precision(model)
    with pytest.raises(error, match=message):
        NCL(model, metric, **{"lr": 0.1, **given})
    optimizer = NCL(model, metric, 0.1)
    run(model, optimizer, [0])
    before = copy.deepcopy(model)
    optimizer.param_groups[0].update(given)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same_parameters(model, before)


def test_bad_models_and_precisions():
    model = mlp()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        NCL(list(model.parameters()), precision(model), lr=0.1)
    with pytest.raises(TypeError, match="precision must be one of fastcl's, such as KroneckerPrecision; got dict"):
        NCL(model, {}, lr=0.1)
    with pytest.raises(ValueError, match="precision is that of another model"):
        NCL(model, precision(mlp()), lr=0.1)
    optimizer = NCL(model, precision(model), lr=0.1)
    with pytest.raises(RuntimeError, match="NCL has the parameters of its precision"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("form", [DiagonalPrecision, KroneckerPrecision, LowRankPrecision, LowRankKroneckerPrecision])
@pytest.mark.parametrize("empty", [nn.Embedding(5, 0), nn.Embedding(0, 5)])
def test_a_parameter_without_elements_is_named(form, empty):
    model = nn.ModuleList([nn.Linear(3, 2), copy.deepcopy(empty)])
    with pytest.raises(ValueError, match=r"'1\.weight' of the model: no elements"):
        form(model, n_data=20)
    model[1].requires_grad_(False)
    assert len(form(model, n_data=20).blocks) >= 1


def test_every_trainable_parameter_is_stepped(device):
    for kind in (KroneckerPrecision, DiagonalPrecision):
        model = mixed()
        optimizer = NCL(model, kind(model, n_data=20), lr=0.4)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        before = copy.deepcopy(model)
        run(model, optimizer, [0])
        assert all(bool((p != q).any()) for p, q in zip(model.parameters(), before.parameters(), strict=True))
