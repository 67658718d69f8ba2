"""The steps that optimizers drive: against the formulas in dense matrices, and what happens to their state."""

import copy

import pytest
import torch
from torch import nn

from fastcl import DiagonalPrecision, KroneckerPrecision

F64 = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.conv = nn.Embedding(6, 4), nn.Conv1d(4, 3, 2)
        self.norm, self.last = nn.LayerNorm(3), nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.conv(self.tokens(x).transpose(1, 2))).mean(2)))


def build(kind=KroneckerPrecision, damping=None, dtype=F64):
    torch.manual_seed(0)
    model = Net().to(dtype)
    precision = kind(model, 50)
    with precision.collect("exact") as collection:
        collection.backward(model(torch.randint(6, (20, 5))))
    precision.merge_()
    precision.anchor_()
    precision.damping = damping
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, precision


def started(precision):
    """For every block its states."""
    states = [[{} for _ in block.params] for block in precision.blocks]
    for block, own in zip(precision.blocks, states, strict=True):
        block.begin(own)
        block.reset(own)
    return states


def gradients(model, seed):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=gen, dtype=F64).to(p.dtype) for name, p in model.named_parameters()}


def named(block, values):
    return [values[name] for name in block.names]


class Plain:
    """M <- rho M + g + lambda Lambda (W - mu); V = Lambda^-1 M; W <- W - s V, by the precision's products."""

    def __init__(self, model, precision):
        self.precision = precision
        self.W = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.M = {name: torch.zeros_like(p) for name, p in self.W.items()}

    def step(self, grads, lr, momentum, strength, radius=None):
        pull = self.precision.multiply({name: w - self.precision.anchor[name] for name, w in self.W.items()})
        for name, g in grads.items():
            self.M[name] = momentum * self.M[name] + g + strength * pull[name]
        V = self.precision.solve(self.M)
        q = sum(float((self.M[name] * V[name]).sum()) for name in V)
        s = lr if radius is None else min(lr, radius / q**0.5)
        for name, v in V.items():
            self.W[name] = self.W[name] - s * v
        return q


DAMPINGS = [None, ("pi", 0.05), ("exact", 0.05)]


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", [KroneckerPrecision, DiagonalPrecision])
def test_steps_are_the_formulas(kind, damping, radius):
    model, precision = build(kind, damping)
    states, plain = started(precision), Plain(model, precision)
    for n in range(6):
        grads = gradients(model, n)
        q = plain.step(grads, 0.02, 0.9, 0.7, radius)
        if radius is None:
            for block, own in zip(precision.blocks, states, strict=True):
                block.step(named(block, grads), own, 0.02, 0.9, 0.7)
        else:
            found = sum(block.direction(named(block, grads), own, 0.9, 0.7) for block, own in zip(precision.blocks, states, strict=True))
            assert found.dtype == F64
            assert found.shape == ()
            torch.testing.assert_close(float(found), q, rtol=1e-9, atol=0)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            step = torch.minimum(torch.tensor(0.02, dtype=F64), radius / found.sqrt())
            for block, own in zip(precision.blocks, states, strict=True):
                block.apply(own, step)
            moved = precision.quadratic({name: p.detach() - before[name] for name, p in model.named_parameters()})
            assert moved.sqrt() <= radius * (1 + 1e-9)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), plain.W[name], rtol=1e-9, atol=1e-11, msg=name)
    # The pull has followed Lambda (W - mu).
    exact = precision.multiply({name: w - precision.anchor[name] for name, w in plain.W.items()})
    for block, own in zip(precision.blocks, states, strict=True):
        for name, state in zip(block.names, own, strict=True):
            if "pull" in state:
                torch.testing.assert_close(state["pull"], exact[name], rtol=1e-8, atol=1e-11)


def test_the_first_task_is_sgd_with_momentum_and_weight_decay():
    model = Net().to(F64)
    other = copy.deepcopy(model)
    n_data, lr, strength = 50, 0.3, 0.4
    precision = KroneckerPrecision(model, n_data)
    states = started(precision)
    sgd = torch.optim.SGD(other.parameters(), lr, momentum=0.9, weight_decay=strength / n_data)
    for n in range(5):
        grads = gradients(model, n)
        for name, p in other.named_parameters():
            p.grad = grads[name].clone()
        sgd.step()
        for block, own in zip(precision.blocks, states, strict=True):
            block.step(named(block, grads), own, lr / n_data, 0.9, strength)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("damping", DAMPINGS)
def test_missing_gradients(damping):
    model, precision = build(damping=damping)
    other, twin = build(damping=damping)
    states, of_twin = started(precision), started(twin)
    grads = gradients(model, 1)
    zero_bias = {**grads, "conv.bias": torch.zeros(3, dtype=F64)}
    for block, own, mine, its in zip(precision.blocks, twin.blocks, states, of_twin, strict=True):
        given = [None if n in ("conv.bias", "tokens.weight", "norm.bias") else grads[n] for n in block.names]
        before = {n: p.detach().clone() for n, p in zip(block.names, block.params, strict=True)}
        block.step(given, mine, 0.1, 0.9, 1.0)
        own.step([None if n in ("tokens.weight", "norm.bias") else zero_bias[n] for n in own.names], its, 0.1, 0.9, 1.0)
        for n, p in zip(block.names, block.params, strict=True):
            assert torch.equal(p.detach(), before[n]) == (n in ("tokens.weight", "norm.bias")), n
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for block, own in zip(precision.blocks, states, strict=True):
        nothing = [None] * len(own)
        before = [p.detach().clone() for p in block.params]
        block.step(nothing, own, 0.1, 0.9, 1.0)
        assert block.direction(nothing, own, 0.9, 1.0) == 0
        block.apply(own, torch.tensor(0.1, dtype=F64))
        assert all(torch.equal(p.detach(), b) for p, b in zip(block.params, before, strict=True))


def test_state_lies_in_padded_rows_and_may_be_replaced():
    model, precision = build()
    states = started(precision)
    block, own = precision.blocks[0], states[0]
    assert block.names == ("tokens.weight", "conv.weight", "conv.bias", "last.weight")
    weight, bias = own[1]["dual_momentum"], own[2]["dual_momentum"]
    assert weight.shape == (3, 4, 2)
    assert weight.stride() == (16, 2, 1)
    assert bias.data_ptr() == weight.data_ptr() + 8 * weight.element_size()
    assert bias.stride() == (16,)
    block.step(named(block, gradients(model, 0)), own, 0.1, 0.9, 1.0)
    assert own[1]["dual_momentum"] is weight
    assert weight.ne(0).all()
    # Loaded state is contiguous and lies anywhere; the step goes on as if it had not been replaced.
    other, twin = copy.deepcopy((model, precision))
    loaded = [{key: t.clone(memory_format=torch.contiguous_format) for key, t in s.items()} for s in own]
    for n in (1, 2):
        block.step(named(block, gradients(model, n)), own, 0.1, 0.9, 1.0)
        twin.blocks[0].step(named(twin.blocks[0], gradients(model, n)), loaded, 0.1, 0.9, 1.0)
    assert loaded[1]["dual_momentum"].stride() == (16, 2, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(own, loaded, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("dual_momentum", "pull"))
    # deepcopy keeps the views together; copies are no views of the original.
    copied = copy.deepcopy(own)
    block.step(named(block, gradients(model, 3)), copied, 0.0, 0.9, 1.0)
    assert not torch.equal(copied[1]["dual_momentum"], own[1]["dual_momentum"])


def test_begin_leaves_what_is_there_and_reset_starts_anew():
    model, precision = build()
    states = started(precision)
    block, own = precision.blocks[0], states[0]
    block.step(named(block, gradients(model, 0)), own, 0.1, 0.9, 1.0)
    kept = own[1]["dual_momentum"].clone()
    block.begin(own)
    assert torch.equal(own[1]["dual_momentum"], kept)
    deltas = {name: p.detach() - precision.anchor[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        model.last.weight.add_(1)
    deltas["last.weight"] += 1
    block.refresh(own)
    exact = precision.multiply(deltas)
    for name, state in zip(block.names, own, strict=True):
        torch.testing.assert_close(state["pull"], exact[name], rtol=1e-12, atol=1e-14)
    assert torch.equal(own[1]["dual_momentum"], kept)
    block.reset(own)
    assert not own[1]["dual_momentum"].any()
    precision.anchor_()
    block.reset(own)
    assert not any(state["pull"].any() for state in own)


def test_the_pull_does_not_drift_in_float32():
    """5,000 noisy steps down a parabola, with an exact pull every 1,000, as the optimizer does; the last is 1,000 steps ago."""
    model, precision = build(dtype=torch.float32)
    states, targets = started(precision), gradients(model, 0)
    for n in range(5000):
        noise = gradients(model, n)
        for block, own in zip(precision.blocks, states, strict=True):
            if n % 1000 == 0:
                block.refresh(own)
            grads = [(p.detach() - targets[name] + 0.1 * noise[name]).float() for name, p in zip(block.names, block.params, strict=True)]
            block.step(grads, own, 1e-4, 0.9, 1.0)
    exact = precision.multiply({name: p.detach() - precision.anchor[name] for name, p in model.named_parameters()})
    for name, state in zip(precision.blocks[0].names, states[0], strict=True):
        error = (state["pull"] - exact[name]).norm() / exact[name].norm()
        assert error < 1e-5, (name, float(error))
        assert (model.get_parameter(name) - precision.anchor[name]).norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_have_the_factors_dtype(dtype):
    model, precision = build(dtype=dtype)
    states = started(precision)
    for block, own in zip(precision.blocks, states, strict=True):
        block.step(named(block, gradients(model, 0)), own, 0.1, 0.9, 1.0)
        square = block.direction(named(block, gradients(model, 1)), own, 0.9, 1.0)
        assert square > 0
        block.apply(own, torch.tensor(0.1, dtype=F64))
        assert all(t.dtype == torch.float32 for state in own for t in state.values())
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_nan_gradients_stay_in_their_layer_without_a_radius():
    model, precision = build()
    states = started(precision)
    grads = gradients(model, 0)
    grads["conv.weight"][0, 0, 0] = torch.nan
    for block, own in zip(precision.blocks, states, strict=True):
        block.step(named(block, grads), own, 0.1, 0.9, 1.0)
    assert model.conv.weight.isnan().any()
    assert all(p.isfinite().all() for name, p in model.named_parameters() if not name.startswith("conv"))
    # What Lambda knows is untouched.
    assert all(t.isfinite().all() for pair in precision.factors.values() for t in pair)


def test_moving_the_model_is_followed():
    model, precision = build()
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    wanted = precision.solve(v)
    replaced = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    for name, p in replaced.items():
        owner, key = name.rsplit(".", 1)
        model.get_submodule(owner)._parameters[key] = p
    for name, t in precision.solve(v).items():
        assert torch.equal(t, wanted[name])
    assert {id(p) for block in precision.blocks for p in block.params} == {id(p) for p in replaced.values()}


def test_begin_alone_makes_the_pull():
    model, precision = build()
    exact = precision.multiply({name: p.detach() - precision.anchor[name] for name, p in model.named_parameters()})
    block = precision.blocks[0]
    own = [{} for _ in block.params]
    block.begin(own)
    for name, state in zip(block.names, own, strict=True):
        torch.testing.assert_close(state["pull"], exact[name], rtol=1e-12, atol=1e-14)
        assert not state["dual_momentum"].any()


def test_state_that_is_exchanged_under_the_same_block():
    model, precision = build()
    block, own = precision.blocks[0], started(precision)[0]
    block.step(named(block, gradients(model, 0)), own, 0.1, 0.9, 1.0)
    # The bias's part alone is replaced: its matrix must be put together anew, with the weight's part as it is.
    weight = own[1]["dual_momentum"].clone()
    bias = own[2]["dual_momentum"] = torch.full((3,), 5.0, dtype=F64)
    block.step([torch.zeros_like(p) for p in block.params], own, 0.0, 1.0, 0.0)
    torch.testing.assert_close(own[1]["dual_momentum"], weight, rtol=0, atol=0)
    torch.testing.assert_close(own[2]["dual_momentum"], bias, rtol=0, atol=0)
    assert own[2]["dual_momentum"].stride() == (16,)
    # Another optimizer's state: the first one's stays as it is.
    kept, other = own[1]["dual_momentum"].clone(), started(precision)[0]
    block.step(named(block, gradients(model, 1)), other, 0.1, 0.9, 1.0)
    assert torch.equal(own[1]["dual_momentum"], kept)
    assert other[1]["dual_momentum"].any()


@pytest.mark.parametrize("damping", [("pi", 0.05), ("exact", 0.05)])
def test_merging_under_damping(damping):
    model, precision = build(damping=damping)
    other = build()[1]
    x = torch.randint(6, (20, 5), generator=torch.Generator().manual_seed(1))
    for own in (precision, other):
        own.model.load_state_dict(model.state_dict())
        with own.collect("exact") as collection:
            collection.backward(own.model(x))
        own.merge_()
    other.damping = damping
    v = gradients(model, 3)
    for name, t in precision.multiply(v).items():
        torch.testing.assert_close(t, other.multiply(v)[name], rtol=1e-10, atol=1e-12)
