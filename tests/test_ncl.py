"""NCL, KFAC_EWC and OWM as methods: what they do to a step and at a task's end, their state, their errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fastcl import DiagonalPrecision, KroneckerPrecision
from fastcl.methods import KFAC_EWC, NCL, OWM
from layouts import identical
from learners import Heads, Net, batches, loss_fn, with_head
from precisions import F64, joined, linear, mlp, weights

MAKERS = {
    "ncl": lambda model, **o: NCL(model, KroneckerPrecision(model, n_data=21), **o),
    "kfac-ewc": lambda model, **o: KFAC_EWC(model, KroneckerPrecision(model, n_data=21), strength=2.0, **o),
    "owm": lambda model, **o: OWM(model, alpha=0.3, **o),
}
kinds = pytest.mark.parametrize("kind", MAKERS)
quiet = pytest.mark.filterwarnings("ignore:'unused'")


def heads():
    torch.manual_seed(0)
    return Heads().double()


def optimizer_of(method, model, lr=0.05, momentum=0.5):
    if isinstance(method, KFAC_EWC):
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return method.optimizer(lr, momentum)


def train(model, method, optimizer, task, rounds=3, head=None):
    for x, y in batches(task) * rounds:
        optimizer.zero_grad()
        loss_fn(model(x) if head is None else model(x, head), y).backward()
        method.after_backward()
        optimizer.step()


def grads_of(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def everything(model, method):
    return copy.deepcopy((dict(model.state_dict()), method.state_dict()))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return identical(a, b) if isinstance(a, torch.Tensor) else a == b


def inputs_and_gradients(model, x, labels):
    """Per layer the inputs with a last 1 and the gradients of the samples' own losses at the output, row by row, by autograd."""
    seen, hooks = {}, []
    for name, m in linear(model).items():
        hooks.append(m.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, (m, a[0], out))))
    logits = model(x)
    for hook in hooks:
        hook.remove()
    outputs = [out for _, _, out in seen.values()]
    per_sample = [torch.autograd.grad(loss_fn(logits[i : i + 1], labels[i : i + 1]), outputs, retain_graph=True) for i in range(len(x))]
    found = {}
    for k, (name, (m, a, _)) in enumerate(seen.items()):
        a = a.detach() if m.bias is None else torch.cat([a.detach(), torch.ones(len(a), 1, dtype=F64)], 1)
        found[name] = a, torch.stack([row[k][i] for i, row in enumerate(per_sample)])
    return found


def data(task):
    return (torch.cat(parts) for parts in zip(*batches(task), strict=True))


def test_ncl_takes_in_the_true_labels_fisher():
    """One task on the prior, "pi": (I / sqrt(N) + pi A) x (I / sqrt(N) + G / pi), checked against gradients of single samples."""
    model = mlp()
    ncl = NCL(model, KroneckerPrecision(model, n_data=21), fisher="empirical", rule="pi", weight=3.0)
    train(model, ncl, ncl.optimizer(0.05), 0)
    x, y = data(0)
    wanted = inputs_and_gradients(model, x, y)
    ncl.end_task(batches(0))
    for name, (a, g) in wanted.items():
        A, G = a.T @ a / 21, 3.0 * g.T @ g / 21
        prior = 21**-0.5
        # The prior's traces over those of the task; left is G, right is A.
        pi = math.sqrt(prior * len(G) * float(A.trace()) / (float(G.trace()) * prior * len(A)))
        own_A, own_G = ncl.precision.factors[name]
        eye_A, eye_G = (prior * torch.eye(len(t), dtype=F64) for t in (A, G))
        torch.testing.assert_close(torch.kron(own_G, own_A), torch.kron(eye_G + pi * G, eye_A + A / pi), rtol=1e-9, atol=1e-12)
    for name, t in ncl.precision.anchor.items():
        assert identical(t.contiguous(), model.get_parameter(name).detach())


@kinds
def test_the_first_task_is_plain(kind):
    model, peer = mlp(), mlp()
    method = MAKERS[kind](model)
    decay = 1 / 21 if kind == "ncl" else 0.0
    plain = torch.optim.SGD(peer.parameters(), lr=0.05, momentum=0.5, weight_decay=decay)
    train(model, method, optimizer_of(method, model), 0)
    for x, y in batches(0) * 3:
        plain.zero_grad()
        loss_fn(peer(x), y).backward()
        plain.step()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
    assert method.tasks_seen == 0


def test_kfac_ewc_adds_its_equation():
    model = mlp()
    kfac = KFAC_EWC(model, KroneckerPrecision(model, n_data=21), strength=2.5)
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.05), 0)
    kfac.end_task(batches(0))
    mu = weights(model)
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.05), 1)
    x, y = batches(2)[0]
    model.zero_grad()
    loss_fn(model(x), y).backward()
    model[2].weight.grad = None
    before = grads_of(model)
    kfac.after_backward()
    assert model[2].weight.grad is None
    A, G = kfac.precision.factors["0"]
    pull = 2.5 * G @ (weights(model)["0"] - mu["0"]) @ A
    found = joined(model[0].weight.grad - before["0.weight"], model[0].bias.grad - before["0.bias"])
    torch.testing.assert_close(found, pull, rtol=1e-10, atol=1e-13)
    assert float(pull.norm()) > 1e-3


def test_kfac_ewc_scales_its_pull_with_the_loss():
    model = mlp()
    kfac = MAKERS["kfac-ewc"](model)
    kfac.end_task(batches(0))
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.05), 1)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        loss = loss_fn(model(batches(2)[0][0]), batches(2)[0][1])
        model.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        kfac.after_backward(scaler=scaler)
        found.append(model[0].weight.grad / (1 if scaler is None else 1024))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_kfac_ewcs_penalty_is_ncls():
    """The pull is the gradient of strength / 2 times the quadratic form."""
    model = mlp()
    kfac = MAKERS["kfac-ewc"](model)
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.05), 0)
    kfac.end_task(batches(0))
    anchor = {n: t.clone() for n, t in kfac.precision.anchor.items()}
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.05), 1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    kfac.after_backward()
    generator, h = torch.Generator().manual_seed(5), 1e-5
    direction = {n: torch.randn(p.shape, generator=generator, dtype=F64) for n, p in model.named_parameters()}

    def penalty(t):
        return kfac.precision.quadratic({n: p.detach() + t * direction[n] - anchor[n] for n, p in model.named_parameters()})  # times 2 / 2

    slope = sum(float((p.grad * direction[n]).sum()) for n, p in model.named_parameters())
    assert slope == pytest.approx(float((penalty(h) - penalty(-h)) / (2 * h)), rel=1e-7)


def test_owms_projector_is_its_equation():
    model = mlp()
    owm = OWM(model, alpha=0.3)
    moments = {name: torch.zeros(m.in_features + (m.bias is not None), dtype=F64).diag() for name, m in linear(model).items()}
    for task in range(2):
        train(model, owm, owm.optimizer(0.05), task)
        x, y = data(task)
        for name, (a, _) in inputs_and_gradients(model, x, y).items():
            moments[name] += a.T @ a / len(a)
        owm.end_task(batches(task))
    for name, moment in moments.items():
        eye = torch.eye(len(moment), dtype=F64)
        torch.testing.assert_close(owm.projector(name), 0.3 * torch.linalg.inv(0.3 * eye + moment), rtol=1e-9, atol=1e-12)
    before = weights(model)
    optimizer = owm.optimizer(0.05)
    x, y = batches(2)[0]
    loss_fn(model(x), y).backward()
    gradient = {name: joined(m.weight.grad, None if m.bias is None else m.bias.grad) for name, m in linear(model).items()}
    optimizer.step()
    for name, w in weights(model).items():
        torch.testing.assert_close(w, before[name] - 0.05 * gradient[name] @ owm.projector(name), rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="name must be one of 0, 2; got '1'"):
        owm.projector("1")


def test_owm_keeps_the_outputs_of_earlier_tasks():
    """A linear layer: what earlier inputs gave stays, up to alpha over their second moments; other inputs learn."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q
    first = torch.randn(40, 3, dtype=F64) @ basis[:3]
    second = torch.randn(40, 8, dtype=F64)
    moved = {}
    for alpha in (1e-6, 1e6):
        torch.manual_seed(1)
        model = nn.Linear(8, 4, bias=False).double()
        owm = OWM(model, alpha=alpha)
        owm.end_task([(first, torch.zeros(40, dtype=torch.long))])
        before = model(first).detach(), model(second).detach()
        optimizer = owm.optimizer(0.5)
        for _ in range(20):
            optimizer.zero_grad()
            loss_fn(model(second), torch.arange(40) % 4).backward()
            optimizer.step()
        moved[alpha] = [float((model(x) - y).detach().norm()) for x, y in zip((first, second), before, strict=True)]
    assert moved[1e-6][0] < 1e-4 < 0.1 < moved[1e-6][1]
    assert moved[1e6][0] > 0.1


def test_owm_of_convolutions_and_embeddings():
    """The windows of a convolution, a last 1 for the bias; how often tokens occur."""
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 4)).double()
    owm = OWM(convolution, alpha=0.5)
    x = torch.randn(6, 2, 4, 4, dtype=F64)
    owm.end_task([(x, torch.zeros(6, dtype=torch.long))])
    rows = nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)
    wanted = 0.5 * torch.linalg.inv(0.5 * torch.eye(9, dtype=F64) + rows.T @ rows / 6)
    torch.testing.assert_close(owm.projector("0"), wanted, rtol=1e-9, atol=1e-12)
    text = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4)).double()
    owm = OWM(text, alpha=0.5)
    tokens = torch.tensor([[0, 1], [1, 1], [4, 0]])
    owm.end_task([(tokens, torch.zeros(3, dtype=torch.long))])
    counts = torch.tensor([2.0, 3.0, 0.0, 0.0, 1.0], dtype=F64)
    torch.testing.assert_close(owm.projector("0"), 0.5 / (0.5 + counts / 3), rtol=1e-12, atol=0)
    optimizer = owm.optimizer(1.0)
    before = text[0].weight.detach().clone()
    loss_fn(text(torch.tensor([[2, 1]])), torch.tensor([0])).backward()
    gradient = text[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(text[0].weight.detach(), before - owm.projector("0")[:, None] * gradient, rtol=1e-11, atol=1e-13)


@kinds
def test_the_tasks_end_leaves_the_model_as_it_was(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)).double()
    method = MAKERS[kind](model, seed=3)
    loss_fn(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    before, grads = copy.deepcopy(dict(model.state_dict())), grads_of(model)
    random = torch.get_rng_state()
    method.end_task(batches(0))
    assert torch.equal(torch.get_rng_state(), random)
    assert same(dict(model.state_dict()), before)
    assert same(grads_of(model), grads)
    assert model.training
    assert method.tasks_seen == 1


@kinds
def test_labels_depend_on_the_seed_and_the_task_alone(kind):
    def factors(seed, tasks):
        model = mlp()
        method = MAKERS[kind](model, seed=seed)
        for _ in range(tasks):
            method.end_task(batches(0))
        return method.precision.factors["2"][1]

    assert identical(factors(1, 2), factors(1, 2))
    assert identical(factors(1, 1), factors(2, 1)) == (kind == "owm")  # for which labels do not count


@kinds
def test_a_run_that_is_saved_and_loaded_goes_on_the_same(kind, tmp_path):
    def run(stop_after):
        model, step = heads(), 0
        method = MAKERS[kind](model, forward=with_head, seed=4)
        optimizer = optimizer_of(method, model)
        for task in range(3):
            for batch in batches(task) * 2:
                optimizer.zero_grad()
                loss_fn(model(batch[0], task), batch[1]).backward()
                method.after_backward()
                optimizer.step()
                step += 1
                if step == stop_after:
                    method.save(tmp_path / "method")
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "rest")
                    torch.manual_seed(1)
                    model = Heads().double()
                    method = MAKERS[kind](model, forward=with_head, seed=4)
                    optimizer = optimizer_of(method, model)
                    rest = torch.load(tmp_path / "rest", weights_only=True)
                    model.load_state_dict(rest["model"])
                    method.load(tmp_path / "method")
                    optimizer.load_state_dict(rest["optimizer"])
            method.end_task(batches(task))
        return everything(model, method)

    whole = run(None)
    assert whole[1]["tasks_seen"] == 3
    for stop_after in (3, 6, 8, 12, 17):
        found = run(stop_after)
        assert same(found[0], whole[0]), stop_after
        assert same(found[1], whole[1]), stop_after


@kinds
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_apart(kind, how):
    model = mlp()
    method = MAKERS[kind](model)
    method.end_task(batches(0))
    other, again = copy.deepcopy((model, method)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, method)))
    assert again.precision.model is other
    assert same(again.state_dict(), method.state_dict())
    kept = copy.deepcopy(method.state_dict())
    train(other, again, optimizer_of(again, other), 1)
    again.end_task(batches(1))
    assert same(method.state_dict(), kept)


def failing():
    yield from batches(2)[:2]
    raise OSError("disk")


def with_nan():
    (x, y), *rest = batches(2)
    x[2, 1] = math.nan
    return [(x, y), *rest]


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: 3, TypeError, "loader must be an iterable"),
        (list, ValueError, "loader gave no batch"),
        (lambda: [*batches(2), batches(2)[0][0]], TypeError, "pairs"),
        (lambda: [*batches(2), (torch.zeros(2, 6).double(), torch.zeros(2).long())], RuntimeError, "shapes"),
        (failing, OSError, "disk"),
        (with_nan, ValueError, "NaN or an Inf"),
    ],
)
@kinds
def test_a_failing_end_task_changes_nothing(kind, loader, error, message):
    model = mlp()
    method = MAKERS[kind](model)
    method.end_task(batches(0))
    before = everything(model, method)
    with pytest.raises(error, match=message):
        method.end_task(loader())
    assert same(everything(model, method), before)
    again = MAKERS[kind](other := mlp())
    again.end_task(batches(0))
    for m in (method, again):
        m.end_task(batches(1))
    assert same(method.state_dict(), again.state_dict()), "something of the failed task was kept"
    assert other is not model


@kinds
def test_heads_that_a_task_does_not_use_rest(kind):
    model = heads()
    method = MAKERS[kind](model, forward=with_head)
    optimizer = optimizer_of(method, model)
    train(model, method, optimizer, 0, head=0)
    method.end_task(batches(0))
    before = copy.deepcopy(dict(model.heads.state_dict()))
    train(model, method, optimizer, 1, head=1)
    after = dict(model.heads.state_dict())
    assert {n for n in before if not identical(before[n], after[n])} == {"1.weight", "1.bias"}


@quiet
@pytest.mark.parametrize("kind", ["ncl", "kfac-ewc"])
@pytest.mark.parametrize("form", [KroneckerPrecision, DiagonalPrecision])
def test_frozen_and_unused_parameters(kind, form):
    torch.manual_seed(0)
    model = Net().double()
    method = {"ncl": NCL, "kfac-ewc": KFAC_EWC}[kind](model, form(model, n_data=21))
    optimizer = optimizer_of(method, model)
    frozen = copy.deepcopy(dict(model.frozen.state_dict()))
    for task in range(2):
        train(model, method, optimizer, task)
        method.end_task(batches(task))
    assert same(dict(model.frozen.state_dict()), frozen)
    assert bool((model.unused == 1).all())


def test_it_remembers():
    """Two tasks with other centres for the same labels: the first is forgotten without a method, and less with each."""
    x, y = (torch.cat(parts) for parts in zip(*batches(0, sizes=(64,)), strict=True))

    def loss_after(kind):
        model = mlp()
        method = MAKERS[kind](model) if kind else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if method is None else optimizer_of(method, model, 0.1, 0.0)
        for task in range(2):
            for x_, y_ in batches(task, sizes=(32, 32)) * 60:
                optimizer.zero_grad()
                loss_fn(model(x_), y_).backward()
                if method is not None:
                    method.after_backward()
                optimizer.step()
            if method is not None:
                method.end_task(batches(task, sizes=(32, 32)))
        with torch.no_grad():
            return float(loss_fn(model(x), y))

    without = loss_after(None)
    for kind in MAKERS:
        assert loss_after(kind) < 0.8 * without, kind


def test_arguments():
    model = mlp()
    metric = KroneckerPrecision(model, n_data=21)
    for kind in (NCL, KFAC_EWC):
        for args, options, error, message in [
            (("model", metric), {}, TypeError, r"model must be a torch\.nn\.Module, got str"),
            ((model, {}), {}, TypeError, "precision must be one of fastcl's"),
            ((mlp(), metric), {}, ValueError, "precision is that of another model"),
            ((model, metric), {"fisher": "true"}, ValueError, "fisher must be one of 'sample', 'exact', 'empirical'; got 'true'"),
            ((model, metric), {"rule": "sum"}, ValueError, "rule must be one of 'kl', 'pi', 'frobenius'; got 'sum'"),
            ((model, metric), {"weight": 0.0}, ValueError, "weight must be"),
            ((model, metric), {"forward": 3}, TypeError, "forward must be a function"),
            ((model, metric), {"train_mode": 1}, TypeError, "train_mode must be True or False"),
            ((model, metric), {"seed": -1}, ValueError, "seed must be a whole number"),
        ]:
            with pytest.raises(error, match=message):
                kind(*args, **options)
    with pytest.raises(ValueError, match="strength must be"):
        KFAC_EWC(model, metric, strength=-1.0)
    with pytest.raises(ValueError, match="strength must be"):
        KFAC_EWC(model, metric, strength=math.nan)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha must be"):
            OWM(model, alpha=alpha)
    with pytest.raises(TypeError, match="model must be"):
        OWM([model])


@kinds
def test_bad_states_change_nothing(kind):
    model = mlp()
    method = MAKERS[kind](model)
    method.end_task(batches(0))
    before = everything(model, method)
    state = method.state_dict()
    spoilt = [
        ({**state, "format": "fastcl.ewc"}, ValueError, "format"),
        ({**state, "tasks_seen": -1}, ValueError, "tasks_seen"),
        ({**state, "precision": 3}, TypeError, "precision"),
        ({**state, "precision": {**state["precision"], "format": "other"}}, ValueError, "format"),
        ({**state, "precision": {**state["precision"], "factors": {}}}, ValueError, "factors"),
    ]
    for bad, error, message in spoilt:
        with pytest.raises(error, match=message):
            method.load_state_dict(bad)
        assert same(everything(model, method), before)
    if kind == "owm":
        with pytest.raises(ValueError, match="alpha=0.3, this object has 0.2"):
            OWM(mlp(), alpha=0.2).load_state_dict(state)
