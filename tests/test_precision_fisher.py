"""What collect() gathers, against its definition written out with autograd, sample by sample, class by class, position by position."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.functional import cross_entropy

from fastcl import DiagonalPrecision, KroneckerPrecision, LowRankKroneckerPrecision, LowRankPrecision
from fastcl.precision import _rows
from fastcl.precision._layers import discover

F64 = torch.float64
CLASSES = 4


class Sequences(nn.Module):
    """Linear layers on [N, T, in] and on [N, in], with and without bias; a normalisation."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 5), nn.LayerNorm(5)
        self.outer, self.plain = nn.Linear(5, 6), nn.Linear(6, CLASSES, bias=False)

    def forward(self, x):
        return self.plain(torch.tanh(self.outer(torch.tanh(self.norm(self.inner(x))))).mean(1))


class Images(nn.Module):
    """Convolutions, grouped and not, and normalisations over channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.batch, self.grouped = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.group, self.last = nn.GroupNorm(3, 6), nn.Linear(6, CLASSES)
        self.batch.running_mean.normal_()
        self.batch.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = torch.relu_(self.batch(self.first(x)))  # in place: the hooks see what was before
        return self.last(torch.tanh(self.group(self.grouped(x))).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self, padding=None):
        super().__init__()
        self.tokens, self.last = nn.Embedding(7, 3, padding_idx=padding), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.tokens(x)).mean(1))


def images(n=5):
    return torch.randn(n, 2, 7, 6, dtype=F64)


def tokens(n=6):
    return torch.randint(7, (n, 5))


CASES = {
    "sequences": (Sequences, lambda: torch.randn(5, 3, 3, dtype=F64)),
    "images": (Images, images),
    "tokens": (Tokens, tokens),
    "padded tokens": (lambda: Tokens(padding=2), tokens),
}


def build(case):
    make, data = CASES[case]
    return make().to(F64).eval(), data()


def per_sample(model, x, fisher, y):
    """(weight, gradients by name) for every sample and, for "exact", every label."""
    for i in range(len(x)):
        logits = model(x[i : i + 1])
        labels = range(CLASSES) if fisher == "exact" else [int(y[i])]
        for label in labels:
            weight = logits.softmax(1)[0, label].item() if fisher == "exact" else 1.0
            loss = cross_entropy(logits, torch.tensor([label]))
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            yield weight, dict(zip([n for n, _ in model.named_parameters()], grads, strict=True))


def squares(model, x, fisher, y):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for weight, grads in per_sample(model, x, fisher, y):
        for name, g in grads.items():
            total[name] += weight * g.detach() ** 2 / len(x)
    return total


def collect(precision, x, fisher, y, **words):
    precision.model.eval()
    with precision.collect(fisher, **words) as collection:
        collection.backward(precision.model(x), y if fisher == "empirical" else None)
    return precision.fisher()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("case", CASES)
def test_diagonals_are_mean_squares_of_single_gradients(case, fisher):
    model, x = build(case)
    y = torch.randint(CLASSES, (len(x),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision = DiagonalPrecision(model, 10)
    with precision.collect(fisher) as collection:
        for half in (slice(0, 2), slice(2, None)):
            collection.backward(model(x[half]), y[half] if fisher == "empirical" else None)
    wanted = squares(model, x, fisher, y)
    before = precision.diagonal
    assert all(torch.equal(d, torch.full_like(d, 0.1)) for d in before.values())
    precision.merge_()
    for name, d in precision.diagonal.items():
        torch.testing.assert_close(d, 0.1 + wanted[name], rtol=1e-12, atol=1e-14, msg=name)
        assert name.endswith("bias") or wanted[name].max() > 0


def rows(model, module, x, fisher, y, kind="linear"):
    """For every sample and label: weight, inputs [T, n], gradients [T, m] at the module's outputs."""
    for i in range(len(x)):
        seen = []
        handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
        logits = model(x[i : i + 1])
        handle.remove()
        for label in range(CLASSES) if fisher == "exact" else [int(y[i])]:
            weight = logits.softmax(1)[0, label].item() if fisher == "exact" else 1.0
            grads = torch.autograd.grad(cross_entropy(logits, torch.tensor([label])), [out for _, out in seen], retain_graph=True)
            if kind == "convolution":
                inputs = [nn.functional.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)[0].T for a, _ in seen]
                grads = [g[0].flatten(1).T for g in grads]
            elif kind == "embedding":
                inputs = [nn.functional.one_hot(a[0], module.num_embeddings).to(F64) for a, _ in seen]
                grads = [g[0] for g in grads]
            else:
                inputs, grads = [a[0].reshape(-1, a.shape[-1]) for a, _ in seen], [g[0].reshape(-1, g.shape[-1]) for g in grads]
            yield weight, torch.cat([a.detach() for a in inputs]), torch.cat(grads)


def naive(model, module, x, fisher, y, sequence, kind="linear", bias=True, padding=None):
    """The factors by their definition."""
    A = G = 0
    for weight, a, g in rows(model, module, x, fisher, y, kind):
        if padding is not None:
            keep = a[:, padding] == 0
            a, g = a[keep], g[keep]
        a = torch.cat([a, torch.ones(len(a), 1, dtype=F64)], 1) if bias else a
        T = len(a)
        if sequence == "reduce":
            a, g = a.mean(0, keepdim=True), g.sum(0, keepdim=True)
        # The inputs do not depend on the label: over all of them the weights sum to 1.
        A = A + weight * a.T @ a / len(x)
        G = G + weight * g.T @ g / len(x) / (T if sequence == "expand" else 1)
    return A, G


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(
    ("case", "name", "kind", "bias"),
    [
        ("sequences", "inner", "linear", True),
        ("sequences", "outer", "linear", True),
        ("sequences", "plain", "linear", False),
        ("images", "first", "convolution", True),
        ("images", "last", "linear", True),
    ],
)
def test_factors_are_those_of_the_definition(case, name, kind, bias, fisher, sequence):
    model, x = build(case)
    y = torch.randint(CLASSES, (len(x),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the grouped convolution
        precision = KroneckerPrecision(model, 10)
    found, _ = collect(precision, x, fisher, y, sequence=sequence)
    A, G = naive(model, model.get_submodule(name), x, fisher, y, sequence, kind, bias)
    torch.testing.assert_close(found[name][0], A, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[name][1], G, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_embedding_has_a_diagonal_over_tokens(sequence):
    model, x = build("tokens")
    y = torch.randint(CLASSES, (len(x),))
    found, _ = collect(KroneckerPrecision(model, 10), x, "empirical", y, sequence=sequence)
    A, G = naive(model, model.tokens, x, "empirical", y, sequence, "embedding", bias=False)
    torch.testing.assert_close(found["tokens"][1], A.diagonal(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["tokens"][0], G, rtol=1e-12, atol=1e-15)


def test_padding_has_no_part_in_an_embeddings_factors():
    model, x = build("padded tokens")
    x[:, 0], x[:, 1] = 2, 3  # one row of padding at least, never only padding
    y = torch.randint(CLASSES, (len(x),))
    found, _ = collect(KroneckerPrecision(model, 10), x, "empirical", y, sequence="reduce")
    A, G = naive(model, model.tokens, x, "empirical", y, "reduce", "embedding", bias=False, padding=2)
    torch.testing.assert_close(found["tokens"][1], A.diagonal(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["tokens"][0], G, rtol=1e-12, atol=1e-15)
    found, _ = collect(KroneckerPrecision(model, 10), x, "empirical", y)
    kept = [(a[a[:, 2] == 0], g[a[:, 2] == 0]) for _, a, g in rows(model, model.tokens, x, "empirical", y, "embedding")]
    a, g = (torch.cat(parts) for parts in zip(*kept, strict=True))
    torch.testing.assert_close(found["tokens"][1], a.square().sum(0) / len(x), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["tokens"][0], g.T @ g / len(g), rtol=1e-12, atol=1e-15)
    assert found["tokens"][1][2] == 0


def test_equal_to_the_dense_fisher_where_the_product_is_exact():
    """With one input a layer's Fisher information is a Kronecker product; the one of all of them together by autograd."""
    model = nn.Sequential(nn.Linear(3, CLASSES)).to(F64)
    x = torch.randn(1, 3, dtype=F64).expand(6, 3)
    found, _ = collect(KroneckerPrecision(model, 10), x, "exact", None)
    dense = 0
    for weight, grads in per_sample(model, x, "exact", None):
        g = torch.cat([grads["0.weight"], grads["0.bias"][:, None]], 1).flatten()
        dense = dense + weight * torch.outer(g, g) / len(x)
    A, G = found["0"]
    torch.testing.assert_close(torch.kron(G, A), dense, rtol=1e-12, atol=1e-15)
    assert torch.linalg.matrix_norm(dense) > 0.01


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
        nn.Conv1d(4, 6, 4, padding="same", dilation=2),
        nn.Conv1d(4, 6, 2, padding=1, groups=2, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)),
        nn.Conv2d(4, 6, 3, padding="valid"),
        nn.Conv2d(4, 6, (2, 4), padding="same"),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, groups=4, stride=2),
        nn.Conv3d(4, 6, (2, 1, 3), padding=(0, 1, 1), stride=(1, 2, 1)),
    ],
    ids=repr,
)
def test_rows_of_convolutions_give_the_weights_gradient(module):
    module = copy.deepcopy(module).to(F64)
    x = torch.randn(3, 4, *(9, 8, 5)[: len(module.kernel_size)], dtype=F64)
    out = module(x)
    grad = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, module.weight, grad)
    a, g = _rows.inputs("convolution", module, x), _rows.gradients("convolution", module, grad)
    products = torch.unflatten(g.transpose(1, 2) @ a, 0, (-1, module.groups)).sum(0)
    torch.testing.assert_close(products.reshape(wanted.shape), wanted, rtol=1e-12, atol=1e-12)


def test_chunks_of_large_layers_change_nothing(monkeypatch):
    model, x = build("images")
    y = torch.randint(CLASSES, (len(x),))
    with pytest.warns(UserWarning, match="grouped.weight"):
        precision = KroneckerPrecision(model, 10)
    once = collect(precision, x, "empirical", y)
    diagonal = collect(DiagonalPrecision(model, 10), x, "empirical", y)
    monkeypatch.setattr(_rows, "CHUNK", 1)
    again = collect(KroneckerPrecision(model, 10, layers=["first", "last"]), x, "empirical", y)
    torch.testing.assert_close(once[0]["first"][0], again[0]["first"][0], rtol=1e-13, atol=0)
    torch.testing.assert_close(diagonal, collect(DiagonalPrecision(model, 10), x, "empirical", y), rtol=1e-12, atol=1e-18)


def test_drawn_labels_are_those_of_the_model_in_the_mean():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, CLASSES)).to(F64)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    x = torch.randn(1, 2, dtype=F64).expand(100_000, 2)
    exact, _ = collect(KroneckerPrecision(model, 10), x[:1], "exact", None)
    drawn, _ = collect(KroneckerPrecision(model, 10), x, "sample", None)
    for name in ("0", "2"):
        torch.testing.assert_close(drawn[name][0], exact[name][0], rtol=1e-9, atol=0)
        # 100,000 draws: five standard deviations are below 2 % of the largest element.
        assert (drawn[name][1] - exact[name][1]).abs().max() < 0.02 * exact[name][1].abs().max()
    assert not torch.equal(drawn["2"][1], exact["2"][1])


def test_other_parameters_are_right_in_the_mean():
    """A free parameter's diagonal comes from squares of whole batches' gradients: E[(sum g)^2] is the sum of E[g^2]."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.scale = nn.Linear(3, CLASSES), nn.Parameter(torch.tensor([1.0, -0.5, 2.0]))

        def forward(self, x):
            return self.last(x * self.scale)

    model = Scaled().to(F64)
    with pytest.warns(UserWarning, match="'scale'"):
        precision = KroneckerPrecision(model, 10)
    x = torch.randn(8, 3, dtype=F64)
    with precision.collect(seed=3) as collection:
        for _ in range(2000):
            collection.backward(model(x))
    wanted = squares(model, x, "exact", None)["scale"]
    torch.testing.assert_close(precision.fisher()[1]["scale"], wanted, rtol=0.2, atol=0)
    for fisher in ("exact", "empirical"):
        with pytest.raises(ValueError, match="'scale'"), precision.collect(fisher):
            pass


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_of_ones_own(case, reduction):
    model, x = build(case)
    y = torch.randint(CLASSES, (len(x),))
    precision, diagonal = KroneckerPrecision(model, 10, layers=[]), DiagonalPrecision(model, 10)
    names = [layer.name for layer in discover(model, None).layers]
    precision = KroneckerPrecision(model, 10, layers=names)
    for own in (precision, diagonal):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with own.collect("empirical", reduction=reduction):
            for part in (slice(0, 2), slice(2, None)):
                cross_entropy(model(x[part]), y[part], reduction=reduction).backward()
        assert not any(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        fresh = KroneckerPrecision(model, 10, layers=names) if own is precision else DiagonalPrecision(model, 10)
        for p in model.parameters():
            p.grad = None
        wanted = collect(fresh, x, "empirical", y)
        assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(own.fisher(), wanted, rtol=1e-12, atol=1e-16)


def test_blocks_add_up_and_graphs_may_be_used_twice():
    model, x = build("sequences")
    y = torch.randint(CLASSES, (len(x),))
    once, twice = KroneckerPrecision(model, 10), KroneckerPrecision(model, 10)
    for part in (slice(0, 2), slice(2, None)):
        collect(once, x[part], "empirical", y[part])
    torch.testing.assert_close(once.fisher(), collect(twice, x, "empirical", y), rtol=1e-12, atol=1e-16)
    # Two backward passes through one graph are one batch: inputs count once.
    with KroneckerPrecision(model, 10).collect("empirical") as collection:
        loss = cross_entropy(model(x), y, reduction="sum")
        loss.backward(retain_graph=True)
        loss.backward()
    found = collection.sums()
    assert found.samples == len(x)
    torch.testing.assert_close(found.tensors["inputs", "inner"].double() / len(x), once.fisher()[0]["inner"][0])


class Twice(nn.Module):
    """A module that is called twice, and two modules that share their weight and bias."""

    def __init__(self):
        super().__init__()
        self.shared, self.other, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, CLASSES)
        self.other.weight, self.other.bias = self.shared.weight, self.shared.bias

    def forward(self, x):
        x = torch.tanh(self.shared(x))
        return self.last(torch.tanh(self.other(torch.tanh(self.shared(x)))))


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_calls_and_tied_modules_are_positions(sequence):
    model, x = Twice().to(F64), torch.randn(5, 3, dtype=F64)
    y = torch.randint(CLASSES, (5,))
    precision = KroneckerPrecision(model, 10)
    assert "tied over 2 modules" in precision.report["shared.weight"]
    assert len(precision.blocks) == 1
    assert precision.blocks[0].names == ("shared.weight", "shared.bias", "last.weight", "last.bias")
    found, _ = collect(precision, x, "empirical", y, sequence=sequence)
    A = G = 0
    for (_, a1, g1), (_, a2, g2) in zip(rows(model, model.shared, x, "", y), rows(model, model.other, x, "", y), strict=True):
        a, g = torch.cat([a1, a2]), torch.cat([g1, g2])
        a = torch.cat([a, torch.ones(3, 1, dtype=F64)], 1)
        assert a.shape == (3, 4)
        if sequence == "reduce":
            a, g = a.mean(0, keepdim=True), g.sum(0, keepdim=True)
        A, G = A + a.T @ a / 5, G + g.T @ g / 5 / len(g)
    torch.testing.assert_close(found["shared"][0], A, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["shared"][1], G, rtol=1e-12, atol=1e-15)
    diagonal = DiagonalPrecision(model, 10)
    torch.testing.assert_close(collect(diagonal, x, "empirical", y)[1], squares(model, x, "", y), rtol=1e-12, atol=1e-15)


def test_tied_weights_with_biases_of_their_own():
    model = Twice().to(F64)
    model.other.bias = nn.Parameter(torch.randn(3, dtype=F64))
    x, y = torch.randn(5, 3, dtype=F64), torch.randint(CLASSES, (5,))
    precision = KroneckerPrecision(model, 10)
    assert precision.factors["shared"][0].shape == (3, 3)
    assert [precision.report[name][:8] for name in ("shared.bias", "other.bias")] == ["diagonal"] * 2
    diagonals = collect(precision, x, "empirical", y)[1]
    wanted = squares(model, x, "", y)
    for name in ("shared.bias", "other.bias"):
        torch.testing.assert_close(diagonals[name], wanted[name], rtol=1e-12, atol=1e-15)


def test_weights_tied_over_kinds_have_a_diagonal():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x):
            return self.head(torch.tanh(self.tokens(x)))

    model = Language()
    with pytest.warns(UserWarning, match=r"'tokens\.weight'"):
        precision = KroneckerPrecision(model, 10)
    assert list(precision.report) == ["tokens.weight"]
    assert "different kinds" in precision.report["tokens.weight"]
    with precision.collect() as collection:
        collection.backward(model(torch.randint(6, (4, 5))))  # [samples, positions, classes]
    precision.merge_()
    assert (precision.diagonal["tokens.weight"] > 0.1).all()


def test_unused_layers_and_frozen_parameters():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(3, 5), nn.ModuleList(nn.Linear(5, CLASSES) for _ in range(2))
            self.frozen = nn.Linear(5, 5)
            self.frozen.requires_grad_(False)
            self.partly = nn.Linear(5, 5)
            self.partly.weight.requires_grad_(False)

        def forward(self, x, task):
            return self.heads[task](torch.tanh(self.partly(self.frozen(self.body(x)))))

    model, x = Heads().to(F64), torch.randn(6, 3, dtype=F64)
    precision = KroneckerPrecision(model, 10)
    assert "frozen.weight" not in precision.report
    assert precision.report["partly.bias"] == "diagonal: bias of linear 'partly'"
    before = {name: [t.clone() for t in pair] for name, pair in precision.factors.items()}
    with precision.collect("exact") as collection:
        collection.backward(model(x, 0))
        with torch.no_grad():
            model(x, 1)  # a pass without a graph counts for nothing
        model(x, 1)  # nor does one without a backward pass
    assert set(precision.fisher()[0]) == {"body", "heads.0"}
    torch.testing.assert_close(precision.fisher()[0]["body"][0][-1, -1].item(), 1.0)
    precision.merge_()
    assert all(torch.equal(a, b) for a, b in zip(before["heads.1"], precision.factors["heads.1"], strict=True))
    assert not torch.equal(before["body"][0], precision.factors["body"][0])


def test_half_precision_is_widened():
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    x, y = torch.randn(50, 64), torch.randint(CLASSES, (50,))
    precision = KroneckerPrecision(model, 10)
    with precision.collect("empirical") as collection, torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        collection.backward(logits, y)
    A, _ = precision.fisher()[0]["0"]
    a = torch.cat([x, torch.ones(50, 1)], 1).double()
    # float32's products of the float32 input, not bfloat16's.
    torch.testing.assert_close(A, a.T @ a / 50, rtol=1e-5, atol=1e-6)
    wide = collect(KroneckerPrecision(model.to(torch.bfloat16), 10), x.bfloat16(), "empirical", y)[0]
    assert wide["0"][0].dtype == F64
    assert KroneckerPrecision(model, 10).factors["0"][0].dtype == torch.float32


def test_a_nan_names_the_layer_and_loses_nothing():
    model, x = build("sequences")
    precision = KroneckerPrecision(model, 10)
    collect(precision, x, "exact", None)
    kept = copy.deepcopy(precision.fisher())
    version = precision.version
    x[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or an Inf in .*'inner'"):
        collect(precision, x, "sample", None)
    torch.testing.assert_close(precision.fisher(), kept, rtol=0, atol=0)
    assert precision.version == version
    precision.merge_()
    assert all(t.isfinite().all() for pair in precision.factors.values() for t in pair)


def test_a_batch_of_one_with_statistics_of_its_own():
    model, x = build("images")
    precision = KroneckerPrecision(model, 10, layers=["first", "last"])
    model.train()
    with pytest.raises(ValueError, match=r"'batch' \(BatchNorm2d, in train mode\) got a batch of one"), precision.collect() as collection:
        collection.backward(model(x[:1]))
    with precision.collect() as collection:
        collection.backward(model(x))
    model.eval()
    with precision.collect() as collection:
        collection.backward(model(x[:1]))


def test_samples_that_cannot_be_told_apart():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

        def forward(self, x):  # [N, T, in], with the positions first inside
            return self.last(self.norm(self.inner(x.transpose(0, 1))).mean(0))

    model, x = Turned().to(F64), torch.randn(6, 4, 3, dtype=F64)
    precision = KroneckerPrecision(model, 10)
    with pytest.raises(ValueError, match="the layer 'inner' saw 4 rows of inputs in a batch of 6 samples"):
        collect(precision, x, "sample", None, sequence="reduce")
    with pytest.raises(ValueError, match="the layer 'norm' saw 4 rows"):
        collect(precision, x, "exact", None)
    found, squares_of_batches = collect(precision, x, "sample", None)
    rows_in = torch.cat([x, torch.ones(6, 4, 1, dtype=F64)], 2).flatten(0, 1)
    torch.testing.assert_close(found["inner"][0], rows_in.T @ rows_in / 6)
    assert (squares_of_batches["norm.weight"] > 0).all()


def test_weights_that_bypass_their_module():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.first.weight))

    model, x = Direct(), torch.randn(6, 3)
    precision = KroneckerPrecision(model, 10)
    with pytest.raises(ValueError, match=r"'first\.weight' had gradients though no call.*leave the modules out of layers"):
        collect(precision, x, "sample", None)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    with pytest.warns(UserWarning, match=r"in_proj_weight.*out_proj\.weight"):
        precision = KroneckerPrecision(attention, 10)
    assert precision.factors == {}


def test_arguments():
    model, x = build("sequences")
    precision = KroneckerPrecision(model, 10)
    for words, name in (({"fisher": "true"}, "fisher"), ({"sequence": "sum"}, "sequence"), ({"reduction": "none"}, "reduction")):
        with pytest.raises(ValueError, match=f"^{name} must be one of"), precision.collect(**words):
            pass
    with pytest.raises(RuntimeError, match="nothing was collected"):
        precision.merge_()
    with precision.collect():
        pass
    with pytest.raises(RuntimeError, match="nothing was collected"):
        precision.merge_()
    with precision.collect() as collection:
        with pytest.raises(RuntimeError, match="running already"), precision.collect():
            pass
        with pytest.raises(TypeError, match="logits must be a tensor, got int"):
            collection.backward(3)
        with pytest.raises(ValueError, match="carry no gradient"):
            collection.backward(model(x).detach())
        with pytest.raises(ValueError, match="takes no targets"):
            collection.backward(model(x), torch.zeros(5))
        with pytest.raises(ValueError, match=r"shape \[samples, \.\.\., classes\]"):
            collection.backward(model(x)[0])
    with precision.collect("empirical") as collection, pytest.raises(ValueError, match="needs the targets"):
        collection.backward(model(x))
    with precision.collect("exact") as collection, pytest.raises(ValueError, match=r"shape \[samples, classes\]"):
        collection.backward(model(x).unsqueeze(1))


def test_seeds():
    model, x = build("sequences")
    found = [collect(KroneckerPrecision(model, 10), x, "sample", None, seed=s)[0]["plain"][1] for s in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.manual_seed(5)
    first = collect(KroneckerPrecision(model, 10), x, "sample", None)[0]["plain"][1]
    torch.manual_seed(5)
    assert torch.equal(first, collect(KroneckerPrecision(model, 10), x, "sample", None)[0]["plain"][1])


class InPlace(nn.Module):
    """Operations that change a module's output where it is, which for inputs [N, T, in] is a view."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.how, self.relu, self.drop = how, nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)

    def forward(self, x):
        h = self.first(x)
        if self.how == "module":
            h = self.drop(self.relu(h))
        elif self.how == "function":
            torch.relu_(h)
        else:
            h += h.detach() * 0.5
        h = self.second(torch.tanh(self.second(h))).mul_(0.5) if self.how == "one of two" else self.second(h)
        return self.last(h.tanh_().flatten(1, -2).mean(1))


def test_diagonals_and_factors_where_outputs_are_changed_in_place():
    for how in ("module", "function", "sum", "one of two"):
        for shape in ((5, 3, 3), (5, 2, 3, 3)):
            model, x, y = InPlace(how).to(F64), torch.randn(shape, dtype=F64), torch.randint(CLASSES, (5,))
            for fisher in ("exact", "empirical"):
                found = collect(DiagonalPrecision(model, 10), x, fisher, y)[1]
                wanted = squares(model, x, fisher, y)
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15, msg=lambda m, at=(how, shape): f"{at}: {m}")
                assert all(t.abs().max() > 0 for t in wanted.values())
            # Out of place the hooks of the definition see every output.
            found = collect(KroneckerPrecision(model, 10), x, "empirical", y, sequence="reduce")[0]
            A, G = factors_by_captures(model, x, y)
            for name in ("first", "second", "last"):
                torch.testing.assert_close(found[name], (A[name], G[name]), rtol=1e-12, atol=1e-15)


def factors_by_captures(model, x, y):
    """sequence="reduce": the outputs get zeros added whose gradients are those of the outputs, before anything is done in place."""
    A = dict.fromkeys(("first", "second", "last"), 0)
    G = dict(A)
    for i in range(len(x)):
        seen = []

        def add_zeros(module, args, out, seen=seen):
            zeros = torch.zeros_like(out, requires_grad=True)
            seen.append((module, args[0].detach().clone(), zeros))
            return out + zeros

        handles = [getattr(model, name).register_forward_hook(add_zeros) for name in A]
        loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, [zeros for *_, zeros in seen])
        for name in A:
            calls = [(a, g) for (m, a, _), g in zip(seen, grads, strict=True) if m is getattr(model, name)]
            a = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in calls])
            a = torch.cat([a, torch.ones(len(a), 1, dtype=F64)], 1).mean(0)
            g = torch.cat([g.reshape(-1, g.shape[-1]) for _, g in calls]).sum(0)
            A[name], G[name] = A[name] + torch.outer(a, a) / len(x), G[name] + torch.outer(g, g) / len(x)
    return A, G


def test_changes_in_place_under_autocast_and_by_another_hook():
    model, x, y = InPlace("module"), torch.randn(5, 4, 3), torch.randint(CLASSES, (5,))
    wanted = squares(model, x, "empirical", y)
    precision = DiagonalPrecision(model, 10)
    with precision.collect("empirical") as collection, torch.autocast("cpu", torch.bfloat16):
        collection.backward(model(x), y)
    for name, found in precision.fisher()[1].items():
        torch.testing.assert_close(found, wanted[name].double(), rtol=0.1, atol=0.02 * float(wanted[name].max()))
    # A hook that was there before and changes the output, in place or not, comes after.
    model = InPlace("sum").to(F64)
    model.first.register_forward_hook(lambda module, args, out: out.mul_(3) if module.training else out * 3)
    x = x.double()
    for train in (False, True):
        precision = DiagonalPrecision(model.train(train), 10)
        with precision.collect("empirical") as collection:
            collection.backward(model(x), y)
        torch.testing.assert_close(precision.fisher()[1], squares(model, x, "empirical", y), rtol=1e-12, atol=1e-15)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.inner, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.ones(5, dtype=F64))

    def part(self, h):
        return torch.tanh(torch.relu_(self.inner(h)) * self.scale)

    def forward(self, x):
        h = self.first(x)
        for _ in range(2):
            h = self.part(h) if self.reentrant is None else torch.utils.checkpoint.checkpoint(self.part, h, use_reentrant=self.reentrant)
        return self.last(torch.tanh(self.inner(h)).mean(1))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:'scale'")
def test_checkpoints_change_nothing(reentrant):
    """A module within checkpoints and outside of them, called three times in all."""
    torch.manual_seed(0)
    model, x, y = Checkpointed(None).to(F64), torch.randn(6, 4, 3, dtype=F64), torch.randint(CLASSES, (6,))
    for make in (DiagonalPrecision, KroneckerPrecision, LowRankPrecision):
        found = []
        for how in (None, reentrant):
            model.reentrant = how
            precision = make(model, 10)
            with precision.collect("sample", reduction="mean"):
                for half in (slice(0, 2), slice(2, None)):
                    cross_entropy(model(x[half]), y[half]).backward()
            samples = precision._sums.samples
            precision.merge_()
            found.append((samples, precision.multiply([torch.ones_like(p) for p in model.parameters()])))
        assert found[0][0] == found[1][0] == 6
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-12)


class Functional(nn.Module):
    """A module that is called, one whose parameters are used without it, and one with which both is done."""

    def __init__(self, both):
        super().__init__()
        self.both = both
        self.tokens = nn.Embedding(6, 5)
        self.first, self.grouped, self.last = nn.Linear(5, 6), nn.Conv1d(6, 6, 2, groups=2, padding=1), nn.Linear(6, 6)

    def forward(self, x):
        h = torch.tanh(nn.functional.linear(self.tokens(x), self.first.weight, self.first.bias))
        if self.both == "linear":
            h = h + self.first(self.tokens(x))
        c = self.grouped(h.transpose(1, 2))
        if self.both == "convolution":
            c = c + nn.functional.conv1d(h.transpose(1, 2), self.grouped.weight, None, padding=1, groups=2) ** 2
        h = torch.tanh(self.last(c.mean(2)))
        return nn.functional.linear(h[:, :5], self.tokens.weight) if self.both == "embedding" else h


def labels(model, x):
    return torch.randint(6, (len(x),))


def all_forms(model):
    for make in (DiagonalPrecision, KroneckerPrecision, lambda m, n: LowRankKroneckerPrecision(m, n, rank=2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield make(model, 10)


def test_parameters_without_calls_have_squares_of_batches():
    model, x = Functional(None).to(F64), torch.randint(6, (4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        kinds = [DiagonalPrecision(model, 10), KroneckerPrecision(model, 10, layers=["tokens", "last"])]
    for precision in kinds:
        wanted = {"first.weight": 0, "first.bias": 0}
        with precision.collect(reduction="mean"):  # the loss tells which labels were drawn
            for half in (slice(0, 3), slice(3, None)):
                model.zero_grad()
                loss = cross_entropy(model(x[half]), labels(model, x[half]))
                loss.backward()
                for name in wanted:
                    wanted[name] = wanted[name] + (model.get_parameter(name).grad * len(x[half])) ** 2 / 4
        found = precision.fisher()[1]
        for name, t in wanted.items():
            torch.testing.assert_close(found[name], t, rtol=1e-12, atol=0)
        for fisher in ("exact", "empirical"):
            with pytest.raises(ValueError, match=r"'first\.weight', 'first\.bias' had gradients though no call.*use fisher='sample'"):
                collect(precision, x, fisher, labels(model, x))
    with pytest.raises(ValueError, match=r"'first\.weight', 'first\.bias' had gradients.*layers=\[\.\.\.\]"):
        collect(KroneckerPrecision(model, 10, layers=["first"]), x, "sample", None)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("both", "name"), [("linear", "first.weight"), ("convolution", "grouped.weight"), ("embedding", "tokens.weight")])
def test_parameters_with_calls_and_without_are_named(both, name, dtype):
    torch.manual_seed(3)
    x = torch.randint(6, (32, 3))
    for precision in all_forms(Functional(both).to(dtype)):
        if both != "linear" and not isinstance(precision, DiagonalPrecision):
            precision = type(precision)(precision.model, 10, layers=["tokens", "last"])
        with pytest.raises(ValueError, match=f"^'{name}' had other gradients than calls.*shares the parameter"):
            collect(precision, x, "sample", None, seed=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast", "train"])
@pytest.mark.filterwarnings("ignore:'grouped")
def test_no_false_alarms(case, how):
    make, data = CASES[case]
    torch.manual_seed(1)
    model = make().to(torch.bfloat16 if how == "bfloat16" else torch.float32).train(how == "train")
    kinds = [DiagonalPrecision(model, 10), KroneckerPrecision(model, 10, layers=["last"] if case != "sequences" else None)]
    for precision in kinds:
        with precision.collect() as collection, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            for _ in range(4):
                x = torch.cat([data() for _ in range(30)])
                collection.backward(model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x))
        assert all((t > 0).any() for t in precision.fisher()[1].values())


def test_hooks_that_change_a_gradient_are_no_other_use():
    model, x = Sequences().to(F64), torch.randn(5, 3, 3, dtype=F64)
    mask = torch.arange(5)[:, None] > 2
    handle = model.inner.weight.register_hook(lambda g: g * mask)
    found = collect(DiagonalPrecision(model, 10), x, "exact", None)[1]
    handle.remove()
    torch.testing.assert_close(found, squares(model, x, "exact", None), rtol=1e-12, atol=1e-15)


class Breaks(torch.autograd.Function):
    """The identity, without a way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("on purpose")


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.breaks = False
        self.inner, self.outer, self.scale = nn.Linear(3, 5), nn.Linear(5, CLASSES), nn.Parameter(torch.ones(CLASSES))

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.outer(Breaks.apply(h) if self.breaks else h) * self.scale


FORMS = [
    DiagonalPrecision,
    KroneckerPrecision,
    lambda model, n: LowRankKroneckerPrecision(model, n, rank=2),
    lambda model, n: LowRankPrecision(model, n, rank=8),
]


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("how", ["freed", "by hand", "backward"])
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.filterwarnings("ignore:'scale'")
def test_a_backward_pass_that_fails_leaves_no_trace(make, how, sequence):
    model, x, y = Broken().to(F64), torch.randn(12, 3, dtype=F64), torch.randint(CLASSES, (12,))
    found = []
    for failing in (False, True):
        precision = make(model, 10)
        with precision.collect("sample", sequence=sequence) as collection:
            for part in (slice(0, 2), slice(2, 6), slice(6, 12)):
                loss = cross_entropy(model(x[part]), y[part], reduction="sum")
                loss.backward()
                if not failing:
                    continue
                if how == "freed":
                    with pytest.raises(RuntimeError, match="second time"):
                        loss.backward()
                else:
                    model.breaks = True
                    logits = model(x[:5])
                    with pytest.raises(MemoryError):
                        collection.backward(logits) if how == "backward" else logits.sum().backward()
                    model.breaks = False
        assert precision._sums.samples == 12
        precision.merge_()
        found.append(precision.multiply([torch.ones_like(p) for p in model.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_batch_that_was_added_by_half_is_an_error():
    model, x = Broken().to(F64), torch.randn(6, 3, dtype=F64)
    model.scale.requires_grad_(False)
    precision = DiagonalPrecision(model, 10)
    collect(precision, x, "exact", None)
    kept = copy.deepcopy(precision.fisher())
    passes = []

    def third(grad):
        passes.append(grad)
        if len(passes) == 3:
            raise MemoryError("on purpose")

    def batches():
        with precision.collect("exact") as collection:
            logits = model(x)
            logits.register_hook(third)
            with pytest.raises(MemoryError):
                collection.backward(logits)
            collection.backward(model(x))

    with pytest.raises(RuntimeError, match="after a part of its batch had been added"):
        batches()
    torch.testing.assert_close(precision.fisher(), kept, rtol=0, atol=0)


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("fisher", ["sample", "exact", "empirical"])
def test_an_empty_batch_contributes_nothing(make, fisher):
    model, x, y = Sequences().to(F64), torch.randn(6, 4, 3, dtype=F64), torch.randint(CLASSES, (6,))
    found = []
    for empty in (False, True):
        precision = make(model, 10)
        with precision.collect(fisher, seed=3) as collection:
            for part in [slice(0, 2)] + [slice(0, 0)] * empty + [slice(2, 6)]:
                collection.backward(model(x[part]), y[part] if fisher == "empirical" else None)
        precision.merge_()
        found.append(precision.multiply([torch.ones_like(p) for p in model.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    precision = make(model, 10)
    with precision.collect("empirical" if fisher != "empirical" else "sample") as collection:
        collection.backward(model(x[:0]), y[:0] if fisher != "empirical" else None)
    with pytest.raises(RuntimeError, match="nothing was collected"):
        precision.merge_()


@pytest.mark.parametrize("make", FORMS)
def test_copies_made_within_a_block_are_outside_of_it(make):
    model, x = Images().to(F64).eval(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        precision = make(model, 10)
    with precision.collect(seed=1) as collection:
        collection.backward(model(x))
        copies = [copy.deepcopy(precision), pickle.loads(pickle.dumps(precision))]
        for other in copies:  # the copy's passes are nobody's
            other.model(x).sum().backward()
    for other in copies:
        assert other.model is not model
        other.model.train()(x[:1])  # nor does the block's rule hold
        other.model.load_state_dict(model.state_dict())
        other.model.eval()
        with other.collect(seed=1) as again:
            again.backward(other.model(x))
        torch.testing.assert_close(other._sums.tensors, precision._sums.tensors, rtol=0, atol=0)
        assert other._sums.samples == len(x)
        other.merge_()
    with pytest.raises(RuntimeError, match=r"has ended; call backward\(\) within it"):
        collection.backward(model(x))


def test_kinds_of_arguments():
    model = Sequences().to(F64)
    for make in FORMS:
        precision = make(model, 10)
        for method, argument in ((precision.solve, "grads"), (precision.multiply, "deltas"), (precision.quadratic, "deltas")):
            weight = torch.ones(5, 3, dtype=F64)
            bad = [
                weight.long(),
                weight.bool(),
                weight.to(torch.complex128),
                weight.to_sparse(),
                torch.zeros((5, 3), dtype=torch.float8_e4m3fn),
            ]
            for t in bad:
                with pytest.raises(TypeError, match=rf"^{argument}\['inner.weight'\] must be a dense tensor of dtype float64, float32"):
                    method({"inner.weight": t})
            method({"inner.weight": weight.half()})
        with precision.collect() as collection:
            collection.backward(model(torch.randn(2, 3, 3, dtype=F64)))
        with pytest.raises(TypeError, match=r"^weight must be a number, got bool"):
            precision.merge_(weight=True)
        with pytest.raises(TypeError, match="alpha of damping must be a number, got bool"):
            precision.damping = ("exact", True)
        with pytest.raises(TypeError, match=r"^n_data must be a number, got bool"):
            make(model, True)
    with pytest.raises(ValueError, match=r"^factors has '9', which names no module"):
        KroneckerPrecision.from_factors(model, {"9": (torch.eye(2), torch.eye(2))}, n_data=10)
    tied = Twice()
    with pytest.raises(ValueError, match=r"^factors lacks 'shared'"):
        KroneckerPrecision.from_factors(tied, {"other": (torch.eye(4), torch.eye(3))}, n_data=10)
