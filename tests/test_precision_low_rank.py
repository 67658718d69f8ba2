"""Low rank plus a diagonal over all parameters: against dense matrices in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dense_fisher import F64, dense_low_rank, dense_of, fisher, flat, split
from fastcl import LowRankPrecision, ops
from fastcl.precision._forms import Form

pytestmark = pytest.mark.filterwarnings("error")


def network(dtype=F64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)


def collect(precision, batches, **options):
    with precision.collect(**options) as collection:
        for x in batches:
            collection.backward(precision.model(x))


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def dense(precision):
    return dense_low_rank(precision.diagonal.values(), precision.basis.values(), precision.sigma)


def filled(model, rank, columns=6, dtype=F64):
    """A precision that has merged random columns; and Lambda, dense."""
    precision = LowRankPrecision(model, 20.0, rank=rank)
    vectors = [[torch.randn_like(p) for p in model.parameters()] for _ in range(columns)]
    own = precision._block.own
    ops.low_rank_append_(*own, vectors, 0.5)
    precision._block.take(Form(*own))
    return precision, dense(precision)


# ---- the Fisher information


def test_the_expectation_over_drawn_labels_is_the_fisher_information(device):
    """Every outcome of the draws is fed, scaled by the root of its probability: the sum is the expectation, exactly."""
    model, x = network(), torch.randn(2, 4, dtype=F64)
    size = sum(p.numel() for p in model.parameters())
    precision = LowRankPrecision(model, 50, rank=size)
    outcomes = list(itertools.product(range(3), repeat=2))
    with precision.collect() as _:
        for labels in outcomes:
            logits = model(x)
            chance = logits.detach().softmax(1)[torch.arange(2), torch.tensor(labels)].prod()
            (chance.sqrt() * cross_entropy(logits, torch.tensor(labels), reduction="sum")).backward()
    model.zero_grad()
    precision.merge_(weight=len(outcomes))  # each outcome counted as a batch of its own
    close(dense(precision), torch.eye(size, dtype=F64) / 50 + fisher(model, x))


def test_drawn_labels_come_near_it():
    model, x = network(), torch.randn(8, 4, dtype=F64)
    size = sum(p.numel() for p in model.parameters())
    precision = LowRankPrecision(model, 1e6, rank=size, gather=64)
    collect(precision, [x] * 600, seed=1)
    precision.merge_()
    exact = fisher(model, x)
    assert float((dense(precision) - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_batches_of_one_need_no_draws(kind, device):
    model, x, y = network(), torch.randn(5, 4, dtype=F64), torch.tensor([0, 2, 1, 1, 0])
    precision = LowRankPrecision(model, 50, rank=27)
    with precision.collect(kind) as collection:
        for n in range(5):
            collection.backward(model(x[n : n + 1]), y[n : n + 1] if kind == "empirical" else None)
    precision.merge_()
    size = sum(p.numel() for p in model.parameters())
    close(dense(precision), torch.eye(size, dtype=F64) / 50 + fisher(model, x, y if kind == "empirical" else None))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_random_signs_take_the_place_of_drawn_labels(kind):
    """Without them the gradients of samples, whose mean is not zero, would add up within a batch."""
    model, x, y = network(), torch.randn(6, 4, dtype=F64), torch.tensor([0, 2, 1, 1, 0, 0])
    precision = LowRankPrecision(model, 1e6, rank=27, gather=64)
    with precision.collect(kind, seed=5) as collection:
        for _ in range(400):
            collection.backward(model(x), y if kind == "empirical" else None)
    precision.merge_()
    exact = fisher(model, x, y if kind == "empirical" else None)
    assert float((dense(precision) - exact).norm() / exact.norm()) < 0.2
    with pytest.raises(ValueError, match="needs a sign for each sample's loss"), precision.collect(kind):
        cross_entropy(model(x), y).backward()


def test_a_mean_loss_by_hand_is_a_sum():
    x, y = torch.randn(7, 4, dtype=F64), torch.randint(3, (7,))
    found = []
    for reduction in ("sum", "mean"):
        precision = LowRankPrecision(network(), 10, rank=2)
        with precision.collect(reduction=reduction):
            cross_entropy(precision.model(x), y, reduction=reduction).backward()
        precision.merge_()
        found.append(dense(precision))
    close(found[0], found[1])


def test_gradients_and_parameters_are_left_alone():
    model = network()
    before = [p.clone() for p in model.parameters()]
    precision = LowRankPrecision(model, 10, rank=2)
    collect(precision, [torch.randn(3, 4, dtype=F64)] * 3)
    precision.merge_()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- what is dropped


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_diagonal_is_that_of_the_sum_whatever_is_dropped(rank, device):
    model, batches = network(), torch.randn(10, 4, 4, dtype=F64)
    full, cut = LowRankPrecision(model, 10, rank=27), LowRankPrecision(model, 10, rank=rank, gather=2)
    for precision in (full, cut):
        for task in range(2):
            collect(precision, batches[task * 5 : task * 5 + 5], seed=task)
            precision.merge_(weight=1.5)
    close(dense(cut).diagonal(), dense(full).diagonal())
    assert (dense(cut) - dense(full)).abs().max() > 1e-3
    if not rank:
        assert not dense(cut).triu(1).any()


def test_a_rank_above_that_of_the_data_is_exact():
    model, batches = network(), torch.randn(3, 4, 4, dtype=F64)
    precision = LowRankPrecision(model, 10, rank=12)
    collect(precision, batches)
    precision.merge_()
    assert int((precision.sigma > 0).sum()) == 3
    gram = precision._block.rows_of(precision._block.own)
    assert (gram[:3, :3] - torch.eye(3)).abs().max() < 1e-10


def test_identical_tasks_add_up(device):
    model = network()
    precision = LowRankPrecision(model, 10, rank=4)
    prior = torch.eye(27, dtype=F64) / 10
    found = []
    for _ in range(3):
        with precision.collect():
            for x in torch.randn(4, 6, 4, dtype=F64, generator=torch.Generator().manual_seed(0)):
                cross_entropy(model(x), x.argmax(1) % 3, reduction="sum").backward()
        precision.merge_()
        found.append(dense(precision) - prior)
    close(found[2], 3 * found[0])
    assert precision.version == 3


def test_rows_are_orthonormal_after_many_tasks_in_float32():
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))
    precision = LowRankPrecision(model, 100, rank=6, gather=3)
    for task in range(8):
        collect(precision, torch.randn(10, 16, 40), seed=task)
        precision.merge_()
    gram = precision._block.rows_of(precision._block.own)
    assert float((gram - torch.eye(6)).abs().max()) <= 1e-5
    assert precision.sigma.diff().max() <= 0


def test_two_collections_before_a_merge_are_one():
    batches = torch.randn(4, 5, 4, dtype=F64)
    found = []
    for cuts in ([4], [2, 2]):
        precision = LowRankPrecision(network(), 10, rank=6)
        labels = iter(torch.arange(20).reshape(4, 5) % 3)
        for part in batches.split(cuts):
            with precision.collect():
                for x in part:
                    cross_entropy(precision.model(x), next(labels), reduction="sum").backward()
        precision.merge_()
        found.append(dense(precision))
    close(found[0], found[1])


# ---- products


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("damping", [None, ("exact", 0.3), ("pi", 0.3)])
def test_products(rank, damping, device):
    model = network()
    precision, matrix = filled(model, rank)
    precision.damping = damping
    if damping is not None:
        matrix = matrix + 0.3 * torch.eye(27, dtype=F64)
    x = [torch.randn_like(p) for p in model.parameters()]
    close(flat(precision.solve(x)), torch.linalg.solve(matrix, flat(x)))
    close(flat(precision.multiply(x)), matrix @ flat(x))
    close(dense_of(precision), matrix)
    assert float(precision.quadratic(x)) == pytest.approx(float(flat(x) @ matrix @ flat(x)), rel=1e-10)
    names = [name for name, _ in model.named_parameters()]
    by_name = precision.solve(dict(zip(names, x, strict=True)))
    assert all(torch.equal(by_name[name], t) for name, t in zip(names, precision.solve(x), strict=True))
    # A tensor that is missing counts as 0.
    x[2] = None
    filled_up = [torch.zeros_like(p) if t is None else t for t, p in zip(x, model.parameters(), strict=True)]
    found = precision.solve(x)
    assert found[2] is None
    exact = split(torch.linalg.solve(matrix, flat(filled_up)), filled_up)
    close(found[0], exact[0])


def test_merging_starts_from_the_undamped_form():
    model, x = network(), torch.randn(3, 4, dtype=F64)
    plain, damped = LowRankPrecision(model, 10, rank=3), LowRankPrecision(model, 10, rank=3)
    damped.damping = ("exact", 0.7)
    for precision in (plain, damped):
        collect(precision, [x], seed=2)
        precision.merge_()
    close(dense_of(damped), dense_of(plain) + 0.7 * torch.eye(27, dtype=F64))
    damped.damping = None
    close(dense_of(damped), dense_of(plain))


# ---- steps


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 1), (1, 3)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_steps(rank, present, momentum, strength, device):
    """Against the dual form, dense: parameters without a gradient stay, the others step by the inverse of their part of Lambda."""
    model = network()
    precision, matrix = filled(model, rank)
    precision.anchor_()
    (block,) = precision.blocks
    params = list(block.params)
    states = [{} for _ in params]
    block.begin(states)
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn_like(p))
    mu = flat(precision.anchor.values())
    at = torch.cat([torch.full((p.numel(),), i in present) for i, p in enumerate(params)])
    part, W, M = matrix[at][:, at], flat(params), torch.zeros(27, dtype=F64)
    for turn in range(4):
        grads = [torch.randn_like(p) if i in present else None for i, p in enumerate(params)]
        M[at] = momentum * M[at] + flat([g for g in grads if g is not None]) + strength * part @ (W - mu)[at]
        V = torch.linalg.solve(part, M[at])
        if turn % 2:
            square = block.direction(grads, states, momentum, strength)
            assert float(square) == pytest.approx(float(V @ part @ V), rel=1e-8)
            block.apply(states, torch.tensor(0.02, dtype=F64))
        else:
            block.step(grads, states, 0.02, momentum, strength)
        W[at] -= 0.02 * V
        close(flat(params), W)


def test_a_step_without_gradients_is_none():
    model = network()
    precision, _ = filled(model, 2)
    (block,) = precision.blocks
    states = [{} for _ in block.params]
    block.begin(states)
    before = flat(block.params)
    nothing = [None] * 4
    block.step(nothing, states, 0.1, 0.9, 1.0)
    assert float(block.direction(nothing, states, 0.9, 1.0)) == 0
    block.apply(states, torch.tensor(0.1, dtype=F64))
    assert torch.equal(flat(block.params), before)


def test_parameters_of_two_dtypes():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double(), nn.Linear(3, 2).bfloat16())
    precision = LowRankPrecision(model, 10, rank=2)
    assert {d.dtype for d in precision.diagonal.values()} == {F64}
    (block,) = precision.blocks
    states = [{} for _ in block.params]
    block.begin(states)
    block.step([torch.ones_like(p) for p in block.params], states, 0.1, 0.9, 1.0)
    x = [torch.randn_like(p) for p in model.parameters()]
    assert [t.dtype for t in precision.solve(x)] == [p.dtype for p in model.parameters()]
    close(flat(precision.multiply(precision.solve(x))), flat(x), 0.02)


# ---- bad input


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_in_a_gradient_is_an_error_that_names_the_parameter(bad):
    model = network()
    precision = LowRankPrecision(model, 10, rank=2)
    collect(precision, [torch.randn(3, 4, dtype=F64)])
    x = torch.randn(3, 4, dtype=F64)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or an Inf.*'0\.weight'"), precision.collect():
        cross_entropy(model(x), torch.tensor([0, 1, 2]), reduction="sum").backward()
    precision.merge_()  # the first block's gradients are still there
    assert int((precision.sigma > 0).sum()) == 1
    assert all(t.isfinite().all() for t in precision.solve([torch.ones_like(p) for p in model.parameters()]))


def test_gradients_of_zero_change_nothing():
    model = network()
    precision = LowRankPrecision(model, 10, rank=2)
    with precision.collect():
        (0 * model(torch.randn(3, 4, dtype=F64)).sum()).backward()
    precision.merge_()
    close(dense(precision), torch.eye(27, dtype=F64) / 10)
    assert not precision.sigma.any()


def test_parameters_that_no_pass_uses():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
    model.forward = lambda x: model["a"](x)
    precision = LowRankPrecision(model, 10, rank=2)
    collect(precision, [torch.randn(3, 3, dtype=F64)])
    precision.merge_()
    assert torch.equal(precision.diagonal["b.weight"], torch.full((2, 3), 0.1, dtype=F64))
    assert not precision.basis["b.weight"].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_data": 0}, ValueError, "n_data"),
        ({"rank": -1}, ValueError, "rank must be a whole number from 0 to 255, got -1"),
        ({"rank": 256}, ValueError, "from 0 to 255"),
        ({"rank": 2.0}, TypeError, "rank must be a whole number, got float"),
        ({"rank": 250, "gather": 8}, ValueError, "gather must be a whole number from 1 to 6, got 8"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        LowRankPrecision(network(), **{"n_data": 10, **options})


def test_merging_nothing():
    precision = LowRankPrecision(network(), 10)
    with pytest.raises(RuntimeError, match="nothing was collected"):
        precision.merge_()
    with pytest.raises(ValueError, match="how many samples"), precision.collect():
        precision.model[2](precision.model[0](torch.randn(2, 4, dtype=F64))).sum().backward()


# ---- state


@pytest.mark.parametrize("through", ["memory", "file", "deepcopy"])
def test_state(through, tmp_path):
    model = network()
    precision, _ = filled(model, 3)
    precision.anchor_()
    precision.damping = ("exact", 0.1)
    if through == "deepcopy":
        other = copy.deepcopy(precision)
    else:
        other = LowRankPrecision(network(), 5, rank=3)
        if through == "memory":
            other.load_state_dict(precision.state_dict())
        else:
            precision.save(tmp_path / "state")
            other.load(tmp_path / "state")
    assert other.n_data == 20
    assert other.damping == ("exact", 0.1)
    x = [torch.randn_like(p) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(other.solve(x), precision.solve(x), strict=True))
    assert torch.equal(flat(other.anchor.values()), flat(precision.anchor.values()))
    for each in (precision, other):  # and goes on alike
        collect(each, [torch.ones(2, 4, dtype=F64)], seed=3)
        each.merge_()
    assert torch.equal(dense(other), dense(precision))


def test_states_that_do_not_fit():
    precision, _ = filled(network(), 3)
    good = precision.state_dict()
    other = LowRankPrecision(network(), 5, rank=2)
    before = dense(other)
    with pytest.raises(ValueError, match="the state has rank 3, this precision 2; make it with rank=3"):
        other.load_state_dict(good)
    assert torch.equal(dense(other), before)
    for change, message in [
        ({"basis": {k: 2 * v for k, v in good["basis"].items()}}, "not orthonormal"),
        ({"sigma": -good["sigma"]}, "sigma has values below 0"),
        ({"diagonal": {k: -v for k, v in good["diagonal"].items()}}, "not > 0"),
        ({"sigma": good["sigma"] * torch.nan}, "NaN"),
        ({"basis": {}}, "lacks"),
    ]:
        bad = {**good, **change}
        matrix = dense(precision)
        with pytest.raises(ValueError, match=message):
            precision.load_state_dict(bad)
        assert torch.equal(dense(precision), matrix)
