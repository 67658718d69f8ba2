"""What collect() gathers, against its definition written out with autograd, sample by sample, class by class, position by position."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastcl import DiagonalPrecision, KroneckerPrecision
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
