"""KroneckerPrecision and DiagonalPrecision against dense matrices, what they refuse, and what they keep."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastcl
from fastcl import DiagonalPrecision, KroneckerPrecision
from fastcl.precision._factorise import decompose, factorise

F64 = torch.float64


class Net(nn.Module):
    """Layers with and without bias, one without factors, one that is frozen, a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)
        self.frozen = nn.Linear(3, 3)
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x))).mean((2, 3))
        return self.last(torch.tanh(self.first(self.frozen(x))))


def net(dtype=F64):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def data(n=16, dtype=F64, seed=1):
    return torch.randn(n, 2, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def learn(precision, x, **words):
    with precision.collect("exact", **words) as collection:
        collection.backward(precision.model(x))
    precision.merge_()


def spd(n, condition=100.0):
    q = torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]
    f = (q * torch.logspace(0, np.log10(condition), n, dtype=F64)) @ q.T
    return (f + f.T) / 2


def factored(model, condition=100.0):
    """Factors as a mapping, and the precision that has them."""
    factors = {"conv": (spd(9, condition), spd(3)), "first": (spd(3), spd(4, condition)), "last": (spd(5), spd(5))}
    return factors, KroneckerPrecision.from_factors(model, factors, n_data=10)


def vectors(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}


def dense(factors, diagonal, v):
    """Lambda v by numpy.kron, by layer."""
    result = {}
    for name, (A, G) in factors.items():
        weight, bias = v[f"{name}.weight"], v.get(f"{name}.bias")
        X = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        Y = torch.from_numpy(np.kron(G.numpy(), A.numpy()) @ X.flatten().numpy()).view(X.shape)
        result[f"{name}.weight"] = Y[:, : weight[0].numel()].reshape(weight.shape)
        if bias is not None:
            result[f"{name}.bias"] = Y[:, -1]
    return result | {name: d * v[name] for name, d in diagonal.items()}


def test_the_prior_is_the_identity_over_the_number_of_data():
    model = net()
    for precision in (KroneckerPrecision(model, 40), DiagonalPrecision(model, 40)):
        v = vectors(model)
        product = precision.multiply(v)
        for name, t in v.items():
            torch.testing.assert_close(product[name], t / 40, rtol=1e-14, atol=0)
            torch.testing.assert_close(precision.solve(v)[name], t * 40, rtol=1e-14, atol=0)
            assert not precision.anchor[name].any()
        assert precision.n_data == 40
        assert precision.version == 0
        names = [name for block in precision.blocks for name in block.names]
        assert sorted(names) == sorted(v)
        assert not any("frozen" in name for name in names)


@pytest.mark.usefixtures("cpu_backend")
def test_products_are_those_of_the_dense_matrix():
    model = net()
    factors, precision = factored(model)
    v = vectors(model)
    diagonal = {name: torch.full_like(v[name], 0.1) for name in ("norm.weight", "norm.bias")}
    wanted = dense(factors, diagonal, v)
    inverse = {name: tuple(torch.linalg.inv(f) for f in pair) for name, pair in factors.items()}
    solved = dense(inverse, {name: 1 / d for name, d in diagonal.items()}, v)
    for name in v:
        torch.testing.assert_close(precision.multiply(v)[name], wanted[name], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(precision.solve(v)[name], solved[name], rtol=1e-10, atol=1e-12)
    square = sum((v[name] * wanted[name]).sum() for name in v)
    torch.testing.assert_close(precision.quadratic(v), square, rtol=1e-12, atol=0)
    # <g, Lambda^-1 g> is the square of the natural gradient's norm.
    natural = precision.solve(v)
    torch.testing.assert_close(precision.quadratic(natural), sum((v[n] * natural[n]).sum() for n in v), rtol=1e-11, atol=0)
    as_list = [v[name] for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(precision.solve(as_list), precision.solve(v).values(), strict=True))
    as_list[1] = None
    found = precision.solve(as_list)
    assert found[1] is None
    part = {name: v[name] for name in ("conv.weight", "norm.bias")}
    assert list(precision.solve(part)) == list(part)
    zeros = {"conv.weight": v["conv.weight"], "conv.bias": torch.zeros(3, dtype=F64), "norm.bias": v["norm.bias"]}
    assert torch.equal(precision.solve(part)["conv.weight"], precision.solve(zeros)["conv.weight"])
    torch.testing.assert_close(precision.quadratic(part), precision.quadratic(zeros), rtol=1e-14, atol=0)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_exact_damping_adds_a_multiple_of_the_identity(alpha):
    model = net()
    factors, precision = factored(model)
    precision.damping = ("exact", alpha)
    assert precision.damping == ("exact", alpha)
    v = vectors(model)
    product, solved = precision.multiply(v), precision.solve(v)
    diagonal = {name: torch.full_like(v[name], 0.1) for name in ("norm.weight", "norm.bias")}
    for name, t in dense(factors, diagonal, v).items():
        torch.testing.assert_close(product[name], t + alpha * v[name], rtol=1e-11, atol=1e-12)
    for name, t in precision.multiply(solved).items():
        torch.testing.assert_close(t, v[name], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(precision.quadratic(v), sum((v[n] * product[n]).sum() for n in v), rtol=1e-12, atol=0)
    precision.damping = None
    torch.testing.assert_close(precision.multiply(v), dense(factors, diagonal, v), rtol=1e-11, atol=1e-12, check_device=False)


def test_pi_damping_splits_it_over_the_factors():
    model = net()
    factors, precision = factored(model)
    alpha = 0.3
    precision.damping = ("pi", alpha)
    damped = {}
    for name, (A, G) in factors.items():
        pi = float(((A.trace() / len(A)) / (G.trace() / len(G))).sqrt())
        damped[name] = A + alpha * pi * torch.eye(len(A), dtype=F64), G + alpha / pi * torch.eye(len(G), dtype=F64)
    v = vectors(model)
    wanted = dense(damped, {name: torch.full_like(v[name], 0.1 + alpha) for name in ("norm.weight", "norm.bias")}, v)
    for name, t in precision.multiply(v).items():
        torch.testing.assert_close(t, wanted[name], rtol=1e-11, atol=1e-12)
    for name, t in precision.solve(wanted).items():
        torch.testing.assert_close(t, v[name], rtol=1e-9, atol=1e-11)
    assert torch.equal(precision.factors["last"][0], factors["last"][0])  # merging starts from the undamped ones


def test_merging_adds_the_fisher_information():
    model, x = net(), data()
    precision = KroneckerPrecision(model, 100)
    with precision.collect("exact") as collection:
        collection.backward(model(x))
    (A, G), diagonals = precision.fisher()[0]["last"], precision.fisher()[1]
    before = precision.factors["last"]
    precision.merge_(weight=2.0)
    L, R = fastcl.ops.kron_merge(before[1], before[0], 2 * G, A, "kl")
    torch.testing.assert_close(precision.factors["last"][0], R, rtol=1e-12, atol=0)
    torch.testing.assert_close(precision.factors["last"][1], L, rtol=1e-12, atol=0)
    torch.testing.assert_close(precision.diagonal["norm.weight"], 0.01 + 2 * diagonals["norm.weight"], rtol=1e-13, atol=0)
    assert precision.version == 1
    precision.anchor_()
    assert precision.version == 2
    assert torch.equal(precision.anchor["conv.weight"], model.conv.weight)
    with pytest.raises(RuntimeError, match="nothing was collected"):
        precision.merge_()


def test_identical_tasks_give_multiples():
    """The prior is negligible here, and the layer's G, unlike the last layer's, has full rank; k tasks give k F."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 5)).to(F64)
    precision = KroneckerPrecision(model, 1e15)
    x = torch.randn(500, 2, dtype=F64)
    learn(precision, x)
    v = {"0.weight": torch.randn(3, 2, dtype=F64)}
    once = precision.quadratic(v)
    for _ in range(3):
        learn(precision, x)
    torch.testing.assert_close(precision.quadratic(v), 4 * once, rtol=1e-9, atol=0)


def test_factors_in_float32_and_half_precision_models():
    for dtype in (torch.float32, torch.bfloat16):
        model, x = net(dtype), data(dtype=dtype)
        precision = KroneckerPrecision(model, 100)
        with precision.collect() as collection:
            collection.backward(model(x))
        precision.merge_()
        v = vectors(model)
        solved = precision.solve(v)
        assert {t.dtype for t in solved.values()} == {dtype}
        assert {t.dtype for pair in precision.factors.values() for t in pair} == {torch.float32}
        wide = {name: t.float() for name, t in v.items()}
        for name, t in precision.multiply(precision.solve(wide)).items():
            torch.testing.assert_close(t, wide[name], rtol=2e-3, atol=2e-3)


class TestLadder:
    def test_definite(self):
        factors = [spd(5, 1e6), torch.rand(4, dtype=F64) + 0.1, spd(1)]
        for found, f in zip(factorise(factors), factors, strict=True):
            assert torch.equal(found.factor, f if f.dim() == 1 else (f + f.T) / 2)
            inverse = 1 / f if f.dim() == 1 else torch.linalg.inv(f)
            torch.testing.assert_close(found.inverse, inverse, rtol=1e-9, atol=1e-12)

    def test_rank_one_gets_the_least_jitter_that_helps(self):
        v = torch.randn(6, 1, dtype=F64)
        (found,) = factorise([v @ v.T])
        added = found.factor - v @ v.T
        jitter = float(added.diagonal().mean())
        assert 0 < jitter <= 1e-5 * float(v.square().sum()) / 6 * 1.01
        torch.testing.assert_close(added, jitter * torch.eye(6, dtype=F64), rtol=1e-6, atol=1e-15)
        torch.testing.assert_close(found.inverse @ found.factor, torch.eye(6, dtype=F64), rtol=0, atol=1e-6)

    def test_slightly_indefinite_is_floored(self):
        q = torch.linalg.qr(torch.randn(4, 4, dtype=F64))[0]
        values = torch.tensor([-5e-5, 0.3, 0.7, 1.0], dtype=F64)
        (found,) = factorise([(q * values) @ q.T])
        floored = torch.linalg.eigvalsh(found.factor)
        torch.testing.assert_close(floored, torch.tensor([1e-8, 0.3, 0.7, 1.0], dtype=F64), rtol=1e-6, atol=1e-14)
        torch.testing.assert_close(found.inverse @ found.factor, torch.eye(4, dtype=F64), rtol=0, atol=1e-6)

    def test_beyond_repair(self):
        nan, inf = torch.eye(3, dtype=F64), torch.eye(3, dtype=F64)
        nan[0, 2], inf[1, 1] = torch.nan, torch.inf
        indefinite, zero = torch.diag(torch.tensor([1.0, -0.01], dtype=F64)), torch.zeros(2, 2, dtype=F64)
        sound = torch.eye(2, dtype=F64)
        negative = torch.tensor([1.0, -1.0], dtype=F64)
        for function in (factorise, decompose):
            found = function([nan, sound, inf, indefinite, zero, negative, torch.zeros(3, dtype=F64)])
            assert [f is None for f in found] == [True, False, True, True, True, True, True]
        assert factorise([]) == []
        assert decompose([]) == []

    def test_one_host_read_while_all_is_well(self, monkeypatch):
        reads = []
        original = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or original(t))
        factorise([spd(4) for _ in range(7)])
        assert len(reads) == 1


def test_a_failing_layer_keeps_what_it_has_and_is_named(monkeypatch):
    model, x = net(), data()
    precision = KroneckerPrecision(model, 100)
    learn(precision, x)
    v = vectors(model)
    kept, first = precision.multiply(v), precision.factors["first"]
    original = fastcl.ops.kron_merge

    def broken(B_L, B_R, C_L, C_R, rule):
        L, R = original(B_L, B_R, C_L, C_R, rule)
        return (L, torch.full_like(R, torch.nan)) if len(B_R) == 3 else (L, R)  # A of the layer "first"

    monkeypatch.setattr(fastcl.ops, "kron_merge", broken)
    for _ in range(2):
        with pytest.warns(UserWarning, match="the factors of 'first' are not finite"):
            learn(precision, x)
    assert all(torch.equal(a, b) for a, b in zip(first, precision.factors["first"], strict=True))
    now = precision.multiply(v)
    assert torch.equal(now["first.weight"], kept["first.weight"])
    assert not torch.equal(now["last.weight"], kept["last.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="the factors of 'first' could not be inverted, 3 times in a row"):
            learn(precision, x)
    assert torch.equal(precision.multiply(v)["last.weight"], now["last.weight"])
    monkeypatch.setattr(fastcl.ops, "kron_merge", original)
    version = precision.version
    precision.merge_()  # what was collected is still there
    assert precision.version == version + 1
    monkeypatch.setattr(fastcl.ops, "kron_merge", broken)
    with pytest.warns(UserWarning, match="'first'"):  # a success in between: counted anew
        learn(precision, x)


def test_from_factors_takes_an_anchor():
    model = net()
    factors, precision = factored(model)
    assert torch.equal(precision.anchor["last.weight"], model.last.weight)
    anchor = {name: torch.randn(len(G), len(A), dtype=F64) for name, (A, G) in factors.items()}
    precision = KroneckerPrecision.from_factors(model, factors, anchor=anchor, n_data=10)
    assert torch.equal(precision.anchor["last.weight"], anchor["last"][:, :-1])
    assert torch.equal(precision.anchor["last.bias"], anchor["last"][:, -1])
    assert torch.equal(precision.anchor["conv.weight"], anchor["conv"][:, :-1].view(3, 2, 2, 2))
    assert torch.equal(precision.anchor["norm.weight"], model.norm.weight)
    part = KroneckerPrecision.from_factors(model, {"last": factors["last"]}, n_data=10)
    assert set(part.factors) == {"last"}
    assert "first.weight" in part.diagonal


def asymmetric(n):
    f = spd(n)
    f[0, 1] += 1e-2
    return f


@pytest.mark.parametrize(
    ("name", "pair", "error", "message"),
    [
        ("last", (spd(5)[:4], spd(5)), ValueError, r"A of layer 'last' has shape \(4, 5\), which is not square"),
        ("last", (asymmetric(5), spd(5)), ValueError, "A of layer 'last' is not symmetric"),
        ("last", (spd(5), asymmetric(5)), ValueError, "G of layer 'last' is not symmetric"),
        (
            "last",
            (spd(4), spd(5)),
            ValueError,
            r"A of layer 'last' has shape \(4, 4\); that of its 4 inputs and one for the bias is \(5, 5\)",
        ),
        ("first", (spd(4), spd(4)), ValueError, r"A of layer 'first' has shape \(4, 4\); that of its 3 inputs is \(3, 3\)"),
        ("first", (spd(3), spd(3)), ValueError, r"G of layer 'first' has shape \(3, 3\); that of its 4 outputs is \(4, 4\)"),
        ("last", (-spd(5), spd(5)), ValueError, "the factors of 'last' are not finite or not positive definite"),
        ("last", (spd(5), torch.diag(torch.tensor([1.0, 1, 1, 1, -1]))), ValueError, "the factors of 'last' are not finite or not"),
        ("last", (torch.zeros(5, 5), spd(5)), ValueError, "the factors of 'last' are not finite or not positive definite"),
        ("last", (torch.full((5, 5), torch.nan), spd(5)), ValueError, "A of layer 'last' has a NaN or an Inf"),
        ("last", (spd(5).int(), spd(5)), TypeError, "A of layer 'last' must be a floating-point tensor, got a tensor of torch.int32"),
        ("last", (spd(5), [1.0]), TypeError, "G of layer 'last' must be a floating-point tensor, got list"),
        ("last", spd(5), TypeError, r"the factors of layer 'last' must be a pair \(A, G\), got Tensor"),
        (
            "middle",
            (spd(5), spd(5)),
            ValueError,
            "'middle', which names no module that can have Kronecker factors; those are 'conv', 'first'",
        ),
        ("norm", (spd(5), spd(5)), ValueError, "'norm', which names no module that can have Kronecker factors"),
        ("frozen", (spd(4), spd(3)), ValueError, "'frozen', which names no module that can have Kronecker factors"),
    ],
)
def test_factors_that_do_not_fit_name_the_layer(name, pair, error, message):
    with pytest.raises(error, match=message):
        KroneckerPrecision.from_factors(net(), {name: pair}, n_data=10)


def test_arguments():
    model = net()
    for n_data, error in ((0, ValueError), (-3, ValueError), (float("nan"), ValueError), ("10", TypeError), (float("inf"), ValueError)):
        with pytest.raises(error, match="n_data must be"):
            KroneckerPrecision(model, n_data)
        with pytest.raises(error, match="n_data must be"):
            DiagonalPrecision(model, n_data)
    with pytest.raises(ValueError, match="layers has 'fc'"):
        KroneckerPrecision(model, 10, layers=["fc"])
    with pytest.raises(TypeError, match="layers must be a list of module names, got str"):
        KroneckerPrecision(model, 10, layers="last")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        KroneckerPrecision(3, 10)
    with pytest.raises(ValueError, match="the embedding '0' has sparse=True"):
        KroneckerPrecision(nn.Sequential(nn.Embedding(3, 2, sparse=True)), 10)
    with pytest.raises(TypeError, match="anchor must be a mapping"):
        KroneckerPrecision.from_factors(model, {"last": (spd(5), spd(5))}, anchor=3, n_data=10)
    with pytest.raises(ValueError, match="anchor lacks 'last'"):
        KroneckerPrecision.from_factors(model, {"last": (spd(5), spd(5))}, anchor={}, n_data=10)
    with pytest.raises(ValueError, match=r"the anchor of layer 'last' has shape \(5, 4\); that of \[W \| b\] is \(5, 5\)"):
        KroneckerPrecision.from_factors(model, {"last": (spd(5), spd(5))}, anchor={"last": torch.zeros(5, 4)}, n_data=10)
    precision = KroneckerPrecision(model, 10)
    for value, error in ((0.1, TypeError), (("sum", 0.1), ValueError), (("pi", -1.0), ValueError), (("exact", "a"), TypeError)):
        with pytest.raises(error, match="damping must be"):
            precision.damping = value
    assert precision.version == 0
    with pytest.raises(ValueError, match="rule must be"):
        precision.merge_("mean")
    for weight, error in ((0, ValueError), (-1, ValueError), (None, TypeError)):
        with pytest.raises(error, match="weight must be"):
            precision.merge_(weight=weight)
    with pytest.raises(ValueError, match=r"grads has 'fc\.weight', which the model's trainable parameters are not"):
        precision.solve({"fc.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="grads has 1 tensors; the model has 7 trainable"):
        precision.solve([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"deltas\['last.bias'\] has shape \(4,\); the parameter has \(5,\)"):
        precision.multiply({"last.bias": torch.zeros(4)})
    with pytest.raises(TypeError, match=r"deltas\['last.bias'\] must be a tensor, got float"):
        precision.quadratic({"last.bias": 1.0})
    with pytest.raises(TypeError, match="grads must be a mapping"):
        precision.solve(torch.zeros(3))
    model.first = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="the model has changed"), precision.collect():
        pass


def trained(kind, damping):
    model = net()
    precision = kind(model, 100)
    learn(precision, data())
    precision.anchor_()
    precision.damping = damping
    return precision


@pytest.mark.parametrize("damping", [None, ("pi", 0.1), ("exact", 0.1)])
@pytest.mark.parametrize("kind", [KroneckerPrecision, DiagonalPrecision])
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_state_comes_back(kind, damping, way, tmp_path):
    precision = trained(kind, damping)
    v = vectors(precision.model)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(precision))
    elif way == "deepcopy":
        other = copy.deepcopy(precision)
    else:
        other = kind(net(), 7)
        learn(other, data(seed=9))
        version = other.version
        if way == "file":
            precision.save(tmp_path / "precision.safetensors")
            other.load(tmp_path / "precision.safetensors")
        else:
            state = precision.state_dict()
            other.load_state_dict(state)
            for pair in state.get("factors", {}).values():
                pair[0].zero_()  # copied
        assert other.version > max(version, precision.version)
    assert other.n_data == 100
    assert other.damping == damping
    for function in ("solve", "multiply"):
        for name, t in getattr(other, function)(v).items():
            assert torch.equal(t, getattr(precision, function)(v)[name]), name
    for name, t in other.anchor.items():
        assert torch.equal(t, precision.anchor[name])
    with pytest.raises(RuntimeError, match="nothing was collected"):
        other.merge_()
    # What follows is the same, too.
    for own in (precision, other):
        learn(own, data(seed=3))
    assert torch.equal(other.quadratic(v), precision.quadratic(v))


def test_states_that_do_not_fit_change_nothing(tmp_path):
    precision = trained(KroneckerPrecision, None)
    v = vectors(precision.model)
    before, version = precision.solve(v), precision.version
    good = precision.state_dict()

    def changed(**parts):
        return {**precision.state_dict(), **parts}

    other = {**good["factors"], "last": [spd(4), spd(5)]}
    negative = {**good["factors"], "last": [-spd(5), spd(5)]}
    for state, error, message in (
        (3, TypeError, "must be a mapping"),
        (changed(format="fastcl.ewc"), ValueError, "format 'fastcl.ewc'"),
        (changed(factors={}), ValueError, r"state\['factors'\] lacks 'conv'"),
        (changed(factors={**good["factors"], "x": 1}), ValueError, r"state\['factors'\] has 'x'"),
        (changed(factors=other), ValueError, "A of layer 'last' has shape"),
        (changed(factors=negative), ValueError, "the factors of 'last' are not finite or not positive"),
        (changed(anchor=None), TypeError, r"state\['anchor'\] must be a mapping"),
        (changed(anchor={**good["anchor"], "last.bias": torch.full((5,), torch.nan)}), ValueError, r"anchor\['last.bias'\] has a NaN"),
        (
            changed(diagonal={**good["diagonal"], "norm.bias": torch.zeros(3)}),
            ValueError,
            r"diagonal\['norm.bias'\] has values that are not > 0",
        ),
        (changed(n_data=0), ValueError, "n_data"),
        (changed(changes=-1), ValueError, "changes is -1"),
        (changed(damping=["x", 1]), ValueError, "damping must be"),
    ):
        with pytest.raises(error, match=message):
            precision.load_state_dict(state)
        assert precision.version == version
        for name, t in precision.solve(v).items():
            assert torch.equal(t, before[name])
    trained(DiagonalPrecision, None).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"fastcl\.diagonal-precision"):
        precision.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        precision.load(tmp_path / "none.safetensors")


def test_saved_factors_are_the_users_own(tmp_path):
    precision = trained(KroneckerPrecision, None)
    state = precision.state_dict()
    before = precision.quadratic(v := vectors(precision.model))
    for t in (*state["anchor"].values(), *state["diagonal"].values(), *(f for pair in state["factors"].values() for f in pair)):
        t.fill_(3)
    assert torch.equal(precision.quadratic(v), before)
    assert precision.anchor["last.bias"].ne(3).all()


def test_report_and_package():
    precision = KroneckerPrecision(net(), 10)
    assert precision.report == {
        "conv.weight": "Kronecker factors of convolution 'conv'",
        "conv.bias": "Kronecker factors of convolution 'conv'",
        "norm.weight": "diagonal: affine weight of BatchNorm2d 'norm'",
        "norm.bias": "diagonal: affine bias of BatchNorm2d 'norm'",
        "first.weight": "Kronecker factors of linear 'first'",
        "last.weight": "Kronecker factors of linear 'last'",
        "last.bias": "Kronecker factors of linear 'last'",
    }
    tomllib = pytest.importorskip("tomllib")
    with open(__file__.replace("tests/test_precision_kronecker.py", "pyproject.toml"), "rb") as file:
        assert "fastcl.precision" in tomllib.load(file)["tool"]["setuptools"]["packages"]
