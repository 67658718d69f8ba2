"""Low-rank Kronecker factors: against dense matrices in float64, and against dense Kronecker factors where the rank is full."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from dense_fisher import F64, dense_of, flat
from fastcl import KroneckerPrecision, LowRankKroneckerPrecision
from fastcl.precision._low_rank_factor import LowRankFactor

pytestmark = pytest.mark.filterwarnings("error")


class Everything(nn.Module):
    """An embedding, a convolution, linear layers with and without bias, a normalisation."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.convolution = nn.Conv1d(4, 3, 2)
        self.norm = nn.LayerNorm(3)
        self.hidden = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.convolution(self.tokens(x).transpose(1, 2)).transpose(1, 2))
        return self.head(torch.tanh(self.hidden(self.norm(x))).mean(1))


def network(kind="mlp"):
    torch.manual_seed(3)
    if kind == "everything":
        return Everything().double()
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(kind="mlp", count=12):
    return torch.randint(5, (count, 4)) if kind == "everything" else torch.randn(count, 6, dtype=F64)


def collect(precision, x, seed=0, **options):
    with precision.collect(seed=seed, **options) as collection:
        for part in x.split(5):
            collection.backward(precision.model(part))


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def factor_of(f):
    return f.dense() if isinstance(f, LowRankFactor) else torch.diag(f)


# ---- full rank: the dense precision


@pytest.mark.parametrize("kind", ["mlp", "everything"])
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("rule", ["kl", "pi", "frobenius"])
def test_full_rank_is_the_dense_precision(kind, sequence, rule):
    model = network(kind)
    dense, low = KroneckerPrecision(model, 30), LowRankKroneckerPrecision(model, 30, rank=100)
    for task in range(3):
        x = data(kind)
        for precision in (dense, low):
            collect(precision, x, task, sequence=sequence)
            precision.merge_(rule, weight=1.5)
    close(dense_of(low), dense_of(dense), 1e-7)
    for name, (A, G) in dense.factors.items():
        a, g = low.factors[name]
        # The scale of the two factors of a product is free.
        full = torch.diag(G) if G.dim() == 1 else G
        close(torch.kron(factor_of(g), factor_of(a)), torch.kron(full, A), 1e-7)
    assert {n: torch.equal(d, low.diagonal[n]) for n, d in dense.diagonal.items()} == dict.fromkeys(dense.diagonal, True)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_other_labels(fisher):
    model, x, y = network(), data(), torch.randint(3, (12,))
    dense, low = KroneckerPrecision(model, 30), LowRankKroneckerPrecision(model, 30, rank=100)
    for precision in (dense, low):
        with precision.collect(fisher) as collection:
            collection.backward(model(x), y if fisher == "empirical" else None)
        precision.merge_()
    close(dense_of(low), dense_of(dense), 1e-8)


# ---- low rank


def prepared(kind="mlp", rank=2, tasks=2, damping=None):
    precision = LowRankKroneckerPrecision(network(kind), 30, rank=rank)
    for task in range(tasks):
        collect(precision, data(kind), task)
        precision.merge_()
    precision.damping = damping
    return precision


def matrix_of(precision, alpha=0.0):
    """Lambda from the factors, dense, in the order of the parameters."""
    model = precision.model
    params = dict(model.named_parameters())
    start, place = 0, {}
    for name, p in params.items():
        place[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    whole = torch.zeros(start, start, dtype=F64)
    for name, (A, G) in precision.factors.items():
        m = params[f"{name}.weight"].shape[0]
        columns = place[f"{name}.weight"].view(m, -1)
        if f"{name}.bias" in params and f"{name}.bias" not in precision.diagonal:
            columns = torch.cat([columns, place[f"{name}.bias"][:, None]], 1)
        at = columns.flatten()
        whole[at[:, None], at] = torch.kron(factor_of(G), factor_of(A))
    for name, d in precision.diagonal.items():
        whole[place[name], place[name]] = d.flatten()
    return whole + alpha * torch.eye(start, dtype=F64)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("kind", ["mlp", "everything"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_products(kind, rank):
    precision = prepared(kind, rank)
    matrix = matrix_of(precision)
    close(dense_of(precision), matrix)
    x = [torch.randn_like(p) for p in precision.model.parameters()]
    close(flat(precision.solve(x)), torch.linalg.solve(matrix, flat(x)))
    assert float(precision.quadratic(x)) == pytest.approx(float(flat(x) @ matrix @ flat(x)), rel=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "everything"])
def test_damping(kind):
    precision, plain = prepared(kind, damping=("exact", 0.2)), prepared(kind)
    matrix = matrix_of(precision, 0.2)
    close(dense_of(precision), matrix)
    x = [torch.randn_like(p) for p in precision.model.parameters()]
    close(flat(precision.solve(x)), torch.linalg.solve(matrix, flat(x)))
    assert float(precision.quadratic(x)) == pytest.approx(float(flat(x) @ matrix @ flat(x)), rel=1e-10)
    precision.damping = ("pi", 0.2)
    name = "0" if kind == "mlp" else "hidden"
    A, G = (factor_of(f) for f in precision.factors[name])
    pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
    weight = torch.randn(len(G), A.shape[1] - (kind == "mlp"), dtype=F64)
    bias = torch.zeros(len(G), 1, dtype=F64) if kind == "mlp" else torch.zeros(len(G), 0, dtype=F64)
    expected = (G + 0.2 / pi * torch.eye(len(G), dtype=F64)) @ torch.cat([weight, bias], 1) @ (A + 0.2 * pi * torch.eye(len(A), dtype=F64))
    close(precision.multiply({f"{name}.weight": weight})[f"{name}.weight"], expected[:, : weight.shape[1]])
    precision.damping = None
    close(dense_of(precision), dense_of(plain))


@pytest.mark.parametrize("rank", [0, 2])
def test_traces_are_kept_and_leading_directions_are_those_of_the_data(rank):
    x = data(count=300) * torch.logspace(0, -1, 6, dtype=F64)
    model = network()
    precision = LowRankKroneckerPrecision(model, 1e12, rank=rank)  # hardly a prior
    dense = KroneckerPrecision(model, 1e12)
    for each in (precision, dense):
        collect(each, x)
        each.merge_()
    for name, (A, G) in dense.factors.items():
        for low, full in zip(precision.factors[name], (A, G), strict=True):
            share = float(full.double().trace()) / low.trace()  # the scale of the two factors of a product is free
            exact = torch.linalg.eigvalsh(full.double()).flip(0) / share
            k = min(rank, len(full) - 1)
            kept = torch.linalg.eigvalsh(low.dense()).flip(0)
            assert low.trace() == pytest.approx(float(exact.sum()), rel=1e-9)
            best = torch.cat([exact[:k], exact[k:].mean().expand(len(full) - k)])
            torch.testing.assert_close(kept, best, rtol=0, atol=0.03 * float(exact.sum()))


def test_identical_tasks_add_up():
    model, x = network(), data()
    found = []
    for tasks in (1, 4):
        precision = LowRankKroneckerPrecision(model, 1e14, rank=2)  # hardly a prior
        for _ in range(tasks):
            with precision.collect():
                model(x).square().sum().backward()  # whose G has no direction that is zero, as that of logits has
            precision.merge_("kl")
        found.append(dense_of(precision))
    close(found[1], 4 * found[0], 1e-5)


def test_condition_numbers_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(80, 60)
    precision = LowRankKroneckerPrecision(model, 1e4, rank=8)
    wide = LowRankKroneckerPrecision(copy.deepcopy(model).double(), 1e4, rank=8)
    x = torch.randn(500, 10) @ torch.randn(10, 80)
    for each in (precision, wide):
        with each.collect():
            (each.model(x.to(each.model.weight.dtype)).tanh() * 3).sum().backward()
        each.merge_()
    g = [torch.randn_like(p) for p in model.parameters()]
    exact = flat(wide.solve([t.double() for t in g]))
    assert float((flat(precision.solve(g)) - exact).norm() / exact.norm()) < 1e-5


# ---- steps


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("kind", ["mlp", "everything"])
@pytest.mark.parametrize("damping", [None, ("exact", 0.2)])
@pytest.mark.parametrize(("momentum", "strength"), [(0.9, 0.7), (0.0, 1.0), (0.5, 0.0)])
def test_steps(kind, damping, momentum, strength, monkeypatch):
    monkeypatch.setattr("fastcl.precision._low_rank_form.SCRATCH", 8)  # several blocks of rows
    precision = prepared(kind, 2, damping=damping)
    precision.anchor_()
    matrix = matrix_of(precision, 0.2 if damping else 0.0)
    params = list(precision.model.parameters())
    names = [name for name, _ in precision.model.named_parameters()]
    states = {}
    for block in precision.blocks:
        own = [states.setdefault(name, {}) for name in block.names]
        block.begin(own)
        block.reset(own)
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn_like(p))
    for block in precision.blocks:
        block.refresh([states[name] for name in block.names])
    mu = flat([precision.anchor[name] for name in names])
    W, M = flat(params), torch.zeros(len(mu), dtype=F64)
    for turn in range(4):
        grads = {name: torch.randn_like(p) for name, p in zip(names, params, strict=True)}
        M = momentum * M + flat(grads.values()) + strength * matrix @ (W - mu)
        V = torch.linalg.solve(matrix, M)
        total = 0.0
        for block in precision.blocks:
            args = [grads[name] for name in block.names], [states[name] for name in block.names]
            if turn % 2:
                total += float(block.direction(*args, momentum, strength))
            else:
                block.step(*args, 0.02, momentum, strength)
        if turn % 2:
            assert total == pytest.approx(float(V @ matrix @ V), rel=1e-8)
            for block in precision.blocks:
                block.apply([states[name] for name in block.names], torch.tensor(0.02, dtype=F64))
        W = W - 0.02 * V
        close(flat(params), W, 1e-8)
    for block in precision.blocks:  # what followed the parameters is what is computed anew
        kept = [states[name]["pull"].clone() for name in block.names if "pull" in states[name]]
        block.refresh([states[name] for name in block.names])
        fresh = [states[name]["pull"] for name in block.names if "pull" in states[name]]
        if kept:
            close(flat(kept), flat(fresh), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_steps_of_other_dtypes_and_layouts(dtype, layout):
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3).to(dtype)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).double()
    found = []
    for each in (model, twin):
        precision = LowRankKroneckerPrecision(each, 30, rank=4)
        with precision.collect():
            torch.manual_seed(1)
            (each(torch.randn(8, 4, 5, 5).to(dtype).to(each.weight.dtype)) ** 2).sum().backward()
        precision.merge_()
        (block,) = precision.blocks
        states = [{}, {}]
        block.begin(states)
        torch.manual_seed(2)
        for turn in range(3):
            grads = [torch.randn(p.shape).to(dtype).to(p.dtype) for p in each.parameters()]
            if turn:
                block.step(grads, states, 1e-3, 0.9, 1.0)
            else:
                block.direction(grads, states, 0.9, 1.0)
                block.apply(states, torch.tensor(1e-3, dtype=F64))
        found.append(flat(each.parameters()))
    error = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert error < (0.02 if dtype == torch.bfloat16 else 1e-4)


def test_layers_without_gradients_stay():
    precision = prepared()
    (block,) = precision.blocks
    states = [{} for _ in block.params]
    block.begin(states)
    before = [p.clone() for p in block.params]
    grads = [torch.ones_like(p) for p in block.params]
    grads[0] = grads[1] = None
    block.step(grads, states, 0.1, 0.9, 1.0)
    assert torch.equal(block.params[0], before[0])
    assert not torch.equal(block.params[2], before[2])
    grads[3] = None  # one of weight and bias counts as 0
    block.direction(grads, states, 0.9, 1.0)
    block.apply(states, torch.tensor(0.1, dtype=F64))
    assert torch.equal(block.params[1], before[1])


# ---- bad input


def test_gradients_of_zero_and_layers_that_no_pass_uses():
    model = network()
    precision = LowRankKroneckerPrecision(model, 30, rank=2)
    before = dense_of(precision)
    with precision.collect():
        (0 * model(data())).sum().backward()
    precision.merge_()
    assert torch.equal(dense_of(precision), before)
    with precision.collect() as collection:
        collection.backward(model[2](torch.randn(4, 5, dtype=F64)))
    precision.merge_()
    assert precision.factors["0"][0].values.sum() == 0
    assert precision.factors["2"][0].values.sum() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_is_an_error_that_names_the_layer(bad):
    precision = prepared()
    model, before, x = precision.model, dense_of(precision), data()
    x[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or an Inf in the activations or gradients of '0'"), precision.collect():
        cross_entropy(model(x), torch.zeros(12, dtype=torch.long), reduction="sum").backward()
    assert torch.equal(dense_of(precision), before)
    with pytest.raises(RuntimeError, match="nothing was collected"):
        precision.merge_()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_data": -1}, ValueError, "n_data"),
        ({"rank": -1}, ValueError, "rank must be a whole number from 0"),
        ({"rank": "4"}, TypeError, "rank must be a whole number, got str"),
        ({"layers": ["1"]}, ValueError, "'1'"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        LowRankKroneckerPrecision(network(), **{"n_data": 10, **options})


# ---- state


@pytest.mark.parametrize("through", ["memory", "file", "deepcopy"])
def test_state(through, tmp_path):
    precision = prepared("everything", damping=("pi", 0.1))
    precision.anchor_()
    if through == "deepcopy":
        other = copy.deepcopy(precision)
    else:
        other = LowRankKroneckerPrecision(network("everything"), 5, rank=2)
        if through == "memory":
            other.load_state_dict(precision.state_dict())
        else:
            precision.save(tmp_path / "state")
            other.load(tmp_path / "state")
    assert (other.n_data, other.damping) == (30, ("pi", 0.1))
    x = [torch.randn_like(p) for p in precision.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(other.solve(x), precision.solve(x), strict=True))
    tokens = data("everything")
    for each in (precision, other):
        collect(each, tokens, seed=3)
        each.merge_()
    assert torch.equal(dense_of(other), dense_of(precision))
    assert torch.equal(flat(other.anchor.values()), flat(precision.anchor.values()))


def test_states_that_do_not_fit():
    precision = prepared("everything")
    good = precision.state_dict()
    before = dense_of(precision)
    A, G = good["factors"]["hidden"]
    for change, message in [
        ([{**A, "scale": -1.0}, G], "scale of A of layer 'hidden' is -1.0"),
        ([A, {**G, "basis": 2 * G["basis"]}], "G of layer 'hidden'.*not orthonormal"),
        ([A, {**G, "values": G["values"][:1]}], "values of G of layer 'hidden' has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            precision.load_state_dict({**good, "factors": {**good["factors"], "hidden": change}})
    with pytest.raises(ValueError, match="the state has rank 2, this precision 3"):
        LowRankKroneckerPrecision(network("everything"), 5, rank=3).load_state_dict(good)
    with pytest.raises(ValueError, match="lacks 'hidden'"):
        precision.load_state_dict({**good, "factors": {k: v for k, v in good["factors"].items() if k != "hidden"}})
    assert torch.equal(dense_of(precision), before)


def test_sharded_parameters_are_refused_at_once():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Sequential(nn.Linear(3, 2)))
        with pytest.raises(TypeError, match="LowRankKroneckerPrecision takes no DTensor parameters"):
            LowRankKroneckerPrecision(model, 10)
    finally:
        dist.destroy_process_group()
