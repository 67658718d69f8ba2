"""Child-Tuning's rules written out with autograd and NumPy, its state, and what it refuses."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastcl import BitMask, optim
from fastcl.methods import ChildTuning
from fastcl.reference import child_mask_
from learners import Heads, batches, grads, loss_fn, make, train, with_head

VARIANTS = ["F", "D"]


class Encoder(nn.Module):
    """Two layers that compete by name, an embedding and a head that do not; a frozen layer, and one that no pass uses."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(5, 8)
        self.layer = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)])
        self.layer[2].requires_grad_(False)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = torch.tanh(self.embedding(x))
        for layer in self.layer:
            x = torch.tanh(layer(self.drop(x)))
        return self.head(self.norm(x))


COMPETING = ["layer.0.weight", "layer.0.bias", "layer.1.weight"]


def build(variant, model=None, **options):
    model = make(Encoder) if model is None else model
    child = ChildTuning(model, variant, **options)
    child.start_task(batches(0), loss_fn)
    return model, child


def backward(model, task=0):
    model.zero_grad()
    x, y = batches(task, next(model.parameters()).dtype)[0]
    loss_fn(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def authors_fisher(model, max_norm, names=COMPETING):
    """A loop over batches with backward(), torch's clipping of each tensor, and a division by the number of batches."""
    model = copy.deepcopy(model).train()
    parameters = dict(model.named_parameters())
    fisher = {n: torch.zeros_like(parameters[n]) for n in names}
    for x, y in batches(0):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        for n in names:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(parameters[n], max_norm)
            fisher[n] += parameters[n].grad ** 2 / 3
    return fisher


@pytest.mark.parametrize("max_norm", [1.0, 0.02, None])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.55, 1.0])
def test_d_keeps_what_the_authors_rule_keeps(keep, max_norm):
    model = make(Encoder)
    torch.manual_seed(5)
    fisher = authors_fisher(model, max_norm)
    torch.manual_seed(5)
    _, child = build("D", model, keep=keep, max_norm=max_norm)
    everything = np.concatenate([f.detach().numpy().ravel() for f in fisher.values()])
    threshold = np.percentile(everything, 100 * (1 - keep))
    assert list(child.masks) == COMPETING
    for name, mask in child.masks.items():
        assert torch.equal(mask.to_bool(), fisher[name].detach() >= threshold), name
    kept = sum(int(m.count()) for m in child.masks.values())
    assert kept == round((everything >= threshold).sum())
    assert abs(kept - keep * len(everything)) <= 1
    before = backward(model)
    child.after_backward()
    for name, p in model.named_parameters():
        if name in COMPETING:
            assert torch.equal(p.grad, torch.where(child.masks[name].to_bool(), before[name], 0.0))
        else:
            assert (p.grad is None) == (name not in before)
            assert p.grad is None or torch.equal(p.grad, before[name])


def test_the_clipping_decides():
    """Without it one tensor's large gradients would take all the places."""
    model = make(Encoder)
    with torch.no_grad():
        model.layer[1].weight.mul_(30)
    counts = []
    for max_norm in (1e-3, None):
        torch.manual_seed(5)
        counts.append(int(build("D", model, max_norm=max_norm)[1].masks["layer.1.weight"].count()))
    assert counts[0] != counts[1]


def test_the_pass_is_in_train_mode_and_leaves_no_trace():
    model = make(Encoder)
    model.eval()
    model.layer.train()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, module.drop.training)))
    before = copy.deepcopy(model.state_dict())
    build("D", model)
    assert modes == [(True, True)] * 3
    assert [m.training for m in (model, model.layer, model.norm)] == [False, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("competing", ["head", lambda name: name.startswith("head.")])
def test_which_names_compete(competing):
    model, child = build("D", competing=competing)
    assert list(child.masks) == ["head.weight", "head.bias"]
    before = backward(model)
    child.after_backward()
    assert torch.equal(model.layer[0].weight.grad, before["layer.0.weight"])
    assert not torch.equal(model.head.weight.grad, before["head.weight"])


def test_fs_transform_counts_each_parameters_own_steps():
    """As documented: with a gradient missing in one step, its draws and after_backward's are no longer the same."""
    weights = []
    for fused in (True, False):
        model = make(Encoder)
        child = ChildTuning(model, "F", keep=0.5)
        optimizer = optim.SGD(model.parameters(), lr=0.1, transforms=child.transforms() if fused else ())
        for step in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            if not step:
                model.head.weight.grad = None
            if not fused:
                child.after_backward()
            optimizer.step()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    differing = {n for n, w in weights[0].items() if not torch.equal(w, weights[1][n])}
    assert differing == {"head.weight"}


def test_a_threshold_of_zero_keeps_everything():
    """As documented: a parameter that no pass uses competes here."""
    with pytest.warns(UserWarning, match=r"threshold is 0, which keeps every element, since more than 1 - keep = 0\.2 of") as given:
        _, child = build("D", competing=lambda name: name in ("unused", "head.bias"), keep=0.8)
    assert [w.filename for w in given] == [__file__]
    assert child.masks["unused"].count() == 3
    assert child.masks["head.bias"].count() == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, child = build("D", competing=lambda name: name in ("unused", "head.bias"), keep=0.4)
        build("D", competing=lambda name: name in ("unused", "head.bias"), keep=1.0)
    assert child.masks["unused"].count() == 0


def test_a_parameter_that_was_frozen_later_may_not_compete():
    model, child = build("D")
    before = child.state_dict()["masks"]
    model.embedding.requires_grad_(False)
    child.start_task(batches(0), loss_fn)  # it does not compete
    model.layer[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\('layer\.0\.weight'\): a competing parameter was frozen"):
        child.start_task(batches(0), loss_fn)
    assert child.state_dict()["masks"].keys() == before.keys()


def test_f_masks_every_parameter_anew_in_every_step():
    model, child = build("F", keep=0.4, seed=7)
    seen = []
    for step in range(4):
        before = backward(model)
        assert child.step == step
        child.after_backward()
        listed = list(model.named_parameters())
        wanted = [before.get(n, torch.zeros_like(p)) for n, p in listed]  # the position is that among all parameters
        child_mask_(wanted, 0.4, 7, step)
        for (name, p), w in zip(listed, wanted, strict=True):
            assert (p.grad is None) == (name not in before)
            assert p.grad is None or torch.equal(p.grad, w), name
        seen.append(grads(model) != 0)
    assert 0.3 < float(torch.stack(seen).double().mean()) < 0.5
    assert not torch.equal(seen[0], seen[1])
    assert child.masks == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_has_learned_nothing_is_first_trained_plainly(variant):
    model = make(Encoder)
    child = ChildTuning(model, variant, mask_first_task=False)
    child.start_task()  # nothing is read
    before = backward(model)
    child.after_backward()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert child.step == 0
    child.end_task()
    assert child.tasks_seen == 1
    child.start_task(batches(1), loss_fn)
    before = backward(model)
    child.after_backward()
    assert not torch.equal(model.layer[0].weight.grad, before["layer.0.weight"])


def test_every_task_has_its_own_mask():
    model, child = build("D")
    first = dict(child.masks)
    child.end_task()
    assert child.masks == {}
    backward(model)
    with pytest.raises(RuntimeError, match=r"no mask for this task yet: call start_task\(loader, loss_fn\)"):
        child.after_backward()
    with pytest.raises(RuntimeError, match="no mask for this task yet"):
        child.transforms()
    child.start_task(batches(1), loss_fn)
    assert child.masks.keys() == first.keys()
    assert child.masks != first


def test_heads():
    model = make(Heads)
    child = ChildTuning(model, "D", competing="body", forward=with_head)
    for task in range(2):
        child.start_task(batches(task), loss_fn)
        train(model, child, batches(task), task)
        child.end_task()
    assert child.tasks_seen == 2


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_that_is_saved_and_loaded_anywhere_goes_on_the_same(variant, stop, tmp_path):
    def run(stop):
        model = make(Encoder).eval()  # no dropout: its generator is not the method's to keep
        child, step = ChildTuning(model, variant, seed=3), 0
        for task in range(2):
            torch.manual_seed(task)
            child.start_task(batches(task), loss_fn)
            for batch in batches(task):
                train(model, child, [batch])
                step += 1
                if step == stop:
                    child.save(tmp_path / "child.safetensors")
                    state = copy.deepcopy(model.state_dict())
                    model = make(Encoder).eval()
                    model.load_state_dict(state)
                    child = ChildTuning(model, variant, seed=3)
                    child.load(tmp_path / "child.safetensors")
            child.end_task()
        assert child.step == (6 if variant == "F" else 0)
        return weights(model)

    assert torch.equal(run(stop), run(None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_a_copy_and_pickles(variant):
    model, child = build(variant)
    backward(model)
    child.after_backward()
    state, kept = child.state_dict(), copy.deepcopy(child.state_dict())
    again = ChildTuning(model, variant)
    again.load_state_dict(state)
    for bits in (state["masks"] or {}).values():
        bits.zero_()
    for method in (child, again, pickle.loads(pickle.dumps(child))):
        found = method.state_dict()
        assert (found["variant"], found["step"]) == (variant, kept["step"])
        assert (found["masks"] is None) == (variant == "F")
        assert all(torch.equal(bits, kept["masks"][n]) for n, bits in (found["masks"] or {}).items())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: [], TypeError, "mapping"),
        (lambda s: {**s, "format": "fastcl.spg"}, ValueError, r"format 'fastcl\.spg'"),
        (lambda s: {**s, "variant": "F"}, ValueError, "variant 'F'; this is 'D'"),
        (lambda s: {**s, "step": -1}, ValueError, r"state\['step'\] must be a whole number"),
        (lambda s: {**s, "step": None}, TypeError, r"state\['step'\] must be a whole number"),
        (lambda s: {**s, "masks": []}, TypeError, r"state\['masks'\] must be a mapping"),
        (lambda s: {**s, "masks": {}}, ValueError, "lacks 'layer.0.bias', 'layer.0.weight', 'layer.1.weight'"),
        (lambda s: {**s, "masks": {**s["masks"], "head.bias": torch.zeros(1)}}, ValueError, "has 'head.bias'"),
        (lambda s: {**s, "masks": {**s["masks"], "layer.0.bias": torch.zeros(1)}}, TypeError, r"'layer\.0\.bias'.*uint8"),
        (lambda s: {**s, "masks": {**s["masks"], "layer.0.bias": torch.zeros(2).byte()}}, ValueError, r"'layer\.0\.bias'.*\(2,\)"),
    ],
)
def test_a_bad_state_changes_nothing(spoil, error, message):
    _, child = build("D")
    before = copy.deepcopy(child.state_dict())
    with pytest.raises(error, match=message):
        child.load_state_dict(spoil(child.state_dict()))
    found = child.state_dict()
    assert found["step"] == before["step"]
    assert all(torch.equal(bits, before["masks"][n]) for n, bits in found["masks"].items())


def failing():
    yield batches(1)[0]
    raise OSError("disk")


@pytest.mark.parametrize(
    ("loader", "loss", "error", "message"),
    [
        (batches(1), None, TypeError, "loss_fn must be a function"),
        (None, loss_fn, TypeError, "loader must be an iterable of batches"),
        ([], loss_fn, ValueError, "loader gave no batch"),
        ([3], loss_fn, TypeError, "pairs"),
        (failing(), loss_fn, OSError, "disk"),
        (batches(1), lambda logits, y: logits, ValueError, "one element"),
        (batches(1), lambda logits, y: loss_fn(logits.detach(), y), ValueError, "no gradient"),
        (batches(1), lambda logits, y: loss_fn(logits, y) * torch.nan, ValueError, r"'layer\.0\.weight'.*NaN or an Inf"),
    ],
)
def test_a_failing_start_changes_nothing(loader, loss, error, message):
    model, child = build("D")
    before = child.state_dict()["masks"]
    with pytest.raises(error, match=message):
        child.start_task(loader, loss)
    assert all(torch.equal(bits, before[n]) for n, bits in child.state_dict()["masks"].items())
    assert model.training


def test_what_is_refused():
    model = make(Encoder)
    for variant, options, error, message in [
        ("f", {}, ValueError, "variant must be 'F' or 'D', got 'f'"),
        ("F", {"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0"),
        ("F", {"keep": -0.1}, ValueError, r"keep must be in \(0, 1\], got -0.1"),
        ("F", {"keep": 1.5}, ValueError, r"keep must be in \(0, 1\], got 1.5"),
        ("F", {"keep": float("nan")}, ValueError, "keep must be"),
        ("F", {"keep": "0.3"}, TypeError, "keep must be"),
        ("F", {"seed": 2**64}, ValueError, r"seed must be a whole number from 0 that is below 2\*\*64"),
        ("F", {"competing": "layer"}, ValueError, "competing is for the variant 'D': F masks every parameter"),
        ("D", {"competing": 3}, TypeError, "competing must be a part of names"),
        ("D", {"competing": "encoder"}, ValueError, r"no name contains 'encoder'\. Pass competing, .* the names are 'unused', 'embedding"),
        ("D", {"competing": lambda name: False}, ValueError, "the function accepts no name"),
        ("D", {"max_norm": 0.0}, ValueError, "max_norm must be above 0, or None"),
        ("D", {"max_norm": -1.0}, ValueError, "max_norm must be"),
        ("D", {"mask_first_task": 1}, TypeError, "mask_first_task must be True or False"),
        ("D", {"forward": 1}, TypeError, "forward must be a function"),
    ]:
        with pytest.raises(error, match=message):
            ChildTuning(model, variant, **options)
    with pytest.raises(ValueError, match=r"no parameter competes: no name contains 'layer'"):
        ChildTuning(make(Heads), "D")
    with pytest.raises(TypeError, match="model must be"):
        ChildTuning("model", "F")
    child = ChildTuning(model, "D")
    model.extra = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match="the model has changed"):
        child.start_task(batches(0), loss_fn)


def test_a_refused_gradient_does_not_advance_the_step():
    model, child = build("F")
    backward(model)
    model.head.weight.grad = torch.zeros(4, 8, dtype=torch.float64).to_sparse()
    with pytest.raises((TypeError, ValueError)):
        child.after_backward()
    assert child.step == 0


def test_masks_follow_new_parameter_objects():
    model, child = build("D")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    before = backward(model)
    child.after_backward()
    assert torch.equal(model.layer[0].bias.grad, torch.where(child.masks["layer.0.bias"].to_bool(), before["layer.0.bias"], 0.0))
    assert isinstance(child.masks["layer.0.bias"], BitMask)


OPTIMIZERS = {
    "SGD": lambda model, transforms: optim.SGD(model.parameters(), lr=0.1, momentum=0.9, transforms=transforms),
    "AdamW": lambda model, transforms: optim.AdamW(model.parameters(), lr=0.01, transforms=transforms),
    "AdamW, the authors' order": lambda model, transforms: optim.AdamW(
        model.parameters(), lr=0.01, decay="hf", clip_norm=0.5, transforms=transforms
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_transform_trains_as_after_backward_does(variant, optimizer):
    def run(fused):
        model = make(Encoder).eval()
        torch.manual_seed(1)
        _, child = build(variant, model, seed=9)
        clipped = "authors" in optimizer and not fused  # before the mask, as the authors do
        stepping = OPTIMIZERS[optimizer](model, child.transforms() if fused else ())
        if clipped:
            stepping = optim.AdamW(model.parameters(), lr=0.01, decay="hf")
        for batch in batches(0) * 3:
            stepping.zero_grad()
            loss_fn(model(batch[0]), batch[1]).backward()
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if not fused:
                child.after_backward()
            stepping.step()
        return weights(model)

    start, apart, fused = weights(make(Encoder)), run(False), run(True)
    assert not torch.equal(start, apart)
    if "authors" in optimizer:
        torch.testing.assert_close(fused, apart, rtol=1e-12, atol=1e-13)  # torch sums the norm in another order
    else:
        assert torch.equal(fused, apart)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_is_no_transform_where_nothing_is_masked(variant):
    assert ChildTuning(make(Encoder), variant, mask_first_task=False).transforms() == ()


def test_ds_transform_leaves_the_rest_as_it_is():
    model, child = build("D")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model)
    optim.SGD(model.parameters(), lr=0.1, transforms=child.transforms()).step()
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        assert not (moved & ~child.masks[name].to_bool()).any() if name in COMPETING else moved.any() or p.grad is None
