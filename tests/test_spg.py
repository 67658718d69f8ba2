"""SPG against a naive implementation written out here with plain autograd."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from fastcl.methods import SPG

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


class Net(nn.Module):
    """Feature extractor with batch normalisation; a bias of one element and a parameter that no head uses."""

    def __init__(self, heads=3, width=7, norm=True):
        super().__init__()
        # No bias before the normalisation: its gradient is 0 but for rounding, and importance standardises even rounding.
        self.body = nn.Sequential(
            nn.Linear(5, width, bias=not norm), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Tanh(), nn.Linear(width, 6)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(heads))

    def forward(self, x, task):
        return self.heads[task](self.body(x) * self.scale)


def make(heads=3, dtype=torch.float64, norm=True):
    torch.manual_seed(0)
    return Net(heads, norm=norm).to(dtype)


def batches(task, dtype=torch.float64, sizes=(8, 8, 5)):
    gen = torch.Generator().manual_seed(100 + task)
    draw = lambda n: torch.randn(n, 5, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    return [(draw(n), torch.randint(4, (n,), generator=gen)) for n in sizes]


loss_fn = nn.functional.cross_entropy


def train(model, loader, task, after_backward=None, lr=0.1, epochs=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in [batch for _ in range(epochs) for batch in loader]:
        optimizer.zero_grad()
        loss_fn(model(x, task), y).backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()


class NaiveSPG:
    """SPG in a few lines: backward() per batch, the formulas per tensor, Python loops."""

    def __init__(self, model):
        self.model, self.tasks, self.importance = model, 0, {}

    def features(self):
        return {n: p for n, p in self.model.named_parameters() if not n.startswith("heads.")}

    def mask(self):
        if self.tasks == 0:
            return
        values = torch.cat([i.flatten() for i in self.importance.values()])
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            p.grad = p.grad * (1 - (self.importance[name] if name in self.importance else values.mean()))

    def end_task(self, loader):
        twin = copy.deepcopy(self.model).train()
        for head in range(self.tasks + 1):
            twin.zero_grad()
            for x, y in loader:
                logits = twin(x, head)
                (loss_fn(logits, y) if head == self.tasks else logits.sum()).backward()
            for name, p in twin.named_parameters():
                if name.startswith("heads."):
                    continue
                h = torch.zeros_like(p) if p.grad is None else p.grad
                new = torch.zeros_like(h)
                if h.numel() > 1 and h.std() > 0:
                    new = torch.tanh((h - h.mean()) / h.std()).abs()
                self.importance[name] = torch.maximum(self.importance.get(name, torch.zeros_like(h)), new.detach())
        self.tasks += 1


def snapshot(model, spg):
    return copy.deepcopy(
        {
            "parameters": dict(model.state_dict()),
            "grads": {n: p.grad for n, p in model.named_parameters()},
            "modes": [m.training for m in model.modules()],
            "spg": spg.state_dict(),
            "mean": spg.mean,
        }
    )


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture
def trained():
    """A model after two of three tasks, with gradients left over and one module in eval mode."""
    model = make()
    spg = SPG(model, model.heads)
    for t in range(2):
        train(model, batches(t), t, spg.after_backward)
        spg.end_task(batches(t), loss_fn)
    loss_fn(model(*batches(2)[0][:1], 2), batches(2)[0][1]).backward()
    model.body[1].eval()
    return model, spg


def test_matches_the_naive_implementation_over_three_tasks():
    fused, naive = make(), make()
    spg, oracle = SPG(fused, fused.heads, dtype=torch.float64), NaiveSPG(naive)
    for t in range(3):
        train(fused, batches(t), t, spg.after_backward)
        train(naive, batches(t), t, oracle.mask)
        mean = spg.end_task(batches(t), loss_fn)
        oracle.end_task(batches(t))
        assert spg.importance.keys() == oracle.importance.keys() == oracle.features().keys()
        for name, value in oracle.importance.items():
            torch.testing.assert_close(spg.importance[name], value, rtol=0, atol=1e-12)
        expected = torch.cat([v.flatten() for v in oracle.importance.values()]).mean()
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-13)
        assert mean.shape == ()
        assert spg.tasks_seen == t + 1
    for (name, p), (_, q) in zip(fused.named_parameters(), naive.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11, msg=name)
    assert spg.importance["scale"].item() == 0  # one element: no spread, no importance
    assert not spg.importance["unused"].any()


def test_chi_comes_from_the_earlier_heads():
    model = make()
    spg = SPG(model, model.heads, dtype=torch.float64)
    train(model, batches(0), 0)
    spg.end_task(batches(0), loss_fn)
    start, state = copy.deepcopy(model.state_dict()), spg.state_dict()

    def second(weight):
        model.load_state_dict(start)
        spg.load_state_dict(state)
        with torch.no_grad():
            model.heads[0].weight.copy_(weight)
        spg.end_task(batches(1), loss_fn)
        return spg.state_dict()["importance"]["body.0.weight"]

    # With a head of zeros CHI's gradient is zero, so what is left is the task's own head and the past.
    without = second(torch.zeros_like(start["heads.0.weight"]))
    with_chi = second(start["heads.0.weight"])
    assert bool((with_chi >= without).all())
    assert float((with_chi - without).max()) > 0.1


def test_only_heads_up_to_this_task_are_run():
    seen = []
    model = make()

    def forward(model, x, head):
        seen.append(head)
        return model(x, head)

    spg = SPG(model, model.heads, forward=forward)
    spg.end_task(batches(0), loss_fn)
    assert seen == [0, 0, 0]
    seen.clear()
    spg.end_task(batches(1), loss_fn)
    assert seen == [0, 0, 0, 1, 1, 1]


def test_task_zero_is_not_masked():
    model = make()
    spg = SPG(model, model.heads)
    loss_fn(model(batches(0)[0][0], 0), batches(0)[0][1]).backward()
    before = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    spg.after_backward()
    for n, p in model.named_parameters():
        assert p.grad is before[n] is None or torch.equal(p.grad, before[n])


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_head_rule_and_strength(strength):
    model = make()
    spg = SPG(model, list(model.heads), strength=strength, dtype=torch.float64)
    spg.end_task(batches(0), loss_fn)
    assert 0 < float(spg.mean) < 1
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.heads[1].bias.grad = None
    model.unused.grad = None
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    importance = torch.cat([i.flatten() for i in spg.importance.values()])
    spg.after_backward()
    assert model.heads[1].bias.grad is None
    assert model.unused.grad is None
    for name, p in model.named_parameters():
        if p.grad is not None:
            factor = 1 - strength * (spg.importance[name] if name in spg.importance else importance.mean())
            torch.testing.assert_close(p.grad, before[name] * factor, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_importance_one_do_not_move_at_all(dtype):
    model = make(dtype=torch.float32)
    spg = SPG(model, model.heads, dtype=dtype)
    one = 255 if dtype == torch.uint8 else 1
    state = spg.state_dict()
    for i in state["importance"].values():
        i.fill_(0)
    state["importance"]["body.0.weight"].fill_(one)
    state["importance"]["body.3.weight"][::2] = one
    state["tasks_seen"] = 1
    spg.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    train(model, batches(1, torch.float32), 1, spg.after_backward, lr=1.0)
    after = model.state_dict()
    assert torch.equal(after["body.0.weight"], before["body.0.weight"])
    assert torch.equal(after["body.3.weight"][::2], before["body.3.weight"][::2])
    assert not torch.equal(after["body.3.weight"][1::2], before["body.3.weight"][1::2])
    assert not torch.equal(after["heads.1.weight"], before["heads.1.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_dtypes_follow_float64(dtype):
    model = make(norm=False)
    exact, spg = SPG(model, model.heads, dtype=torch.float64), SPG(model, model.heads, dtype=dtype)
    for t in range(2):
        exact.end_task(batches(t), loss_fn)
        spg.end_task(batches(t), loss_fn)
    for name, value in spg.importance.items():
        assert value.dtype == dtype
        assert value.shape == exact.importance[name].shape
        wide = value.double() / 255 if dtype == torch.uint8 else value.double()
        error = wide - exact.importance[name]
        if dtype == torch.uint8:
            assert float(error.min()) >= 0
            assert float(error.max()) < 1 / 255 + 1e-12
        else:
            assert float(error.abs().max()) <= torch.finfo(dtype).eps / 2
    loss_fn(model(batches(2)[0][0], 2), batches(2)[0][1]).backward()
    spg.after_backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    model = make(dtype=dtype, norm=False)
    spg = SPG(model, model.heads)
    spg.end_task(batches(0, dtype), loss_fn)
    train(model, batches(1, dtype), 1, spg.after_backward)
    spg.end_task(batches(1, dtype), loss_fn)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert float(spg.mean) > 0


def test_end_task_leaves_the_model_as_it_was(trained):
    model, spg = trained
    before = snapshot(model, spg)
    grads = [p.grad for p in model.parameters()]
    with torch.no_grad():
        spg.end_task(batches(2), loss_fn)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    after = snapshot(model, spg)
    for what in ("parameters", "grads", "modes"):
        assert_same(before[what], after[what])
    assert "body.1.running_mean" in before["parameters"]
    assert after["spg"]["tasks_seen"] == 3


def test_end_task_runs_in_train_mode_and_without_autograd_around_it():
    def importance(context, mode):
        model = make()
        model.train(mode)
        spg = SPG(model, model.heads)
        with context:
            spg.end_task(batches(0), loss_fn)
        assert model.training == mode
        return spg.state_dict()

    expected = importance(torch.enable_grad(), True)
    assert_same(expected, importance(torch.no_grad(), False))
    assert_same(expected, importance(torch.inference_mode(), False))


def boom(*_, **__):
    raise KeyboardInterrupt


def breaking_loader(after):
    class Loader:
        count = 0

        def __iter__(self):
            for batch in batches(2):
                self.count += 1
                if self.count > after:
                    raise OSError("disk")
                yield batch

    return Loader()


def read_once():
    class Loader:
        batches = iter(batches(2))

        def __iter__(self):
            return (b for b in self.batches)

    return Loader()


@pytest.mark.parametrize(
    ("loader", "loss", "error", "message"),
    [
        ([], loss_fn, ValueError, "loader gave no batch"),
        ((b for b in batches(2)), loss_fn, TypeError, "iterator"),
        (read_once(), loss_fn, ValueError, "second time"),
        ([batches(2)[0][0]], loss_fn, TypeError, "pairs"),
        ([(1, 2, 3)], loss_fn, TypeError, "pairs"),
        (breaking_loader(1), loss_fn, OSError, "disk"),
        (breaking_loader(7), loss_fn, OSError, "disk"),
        (batches(2), boom, KeyboardInterrupt, None),
        (batches(2), lambda logits, y: 3.0, TypeError, "loss_fn must return a tensor"),
        (batches(2), lambda logits, y: logits.sum(1), ValueError, "one element"),
        (batches(2), lambda logits, y: logits.sum() * math.nan, ValueError, "NaN"),
        (batches(2), lambda logits, y: logits.detach().sum(), ValueError, "no gradient"),
    ],
)
def test_a_failing_end_task_changes_nothing(trained, loader, loss, error, message):
    model, spg = trained
    before = snapshot(model, spg)
    with pytest.raises(error, match=message):
        spg.end_task(loader, loss)
    assert_same(before, snapshot(model, spg))
    spg.end_task(batches(2), loss_fn)
    assert spg.tasks_seen == 3


def test_more_tasks_than_heads(trained):
    model, spg = trained
    spg.end_task(batches(2), loss_fn)
    before = snapshot(model, spg)
    with pytest.raises(RuntimeError, match="3 tasks have ended and there are 3 heads"):
        spg.end_task(batches(2), loss_fn)
    assert_same(before, snapshot(model, spg))


def test_end_task_does_not_step_an_optimizer_in_a_gradient_hook():
    model = make()
    spg = SPG(model, model.heads)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    before = copy.deepcopy(model.state_dict())
    spg.end_task(batches(0), loss_fn)
    assert_same(dict(before), dict(model.state_dict()))


@pytest.mark.parametrize("change", ["replace", "add", "unfreeze"])
def test_a_changed_model_is_noticed(change):
    model = make()
    model.unused.requires_grad_(False)
    spg = SPG(model, model.heads)
    if change == "replace":
        model.body[0] = nn.Linear(5, 7, bias=False).double()
    elif change == "add":
        model.extra = nn.Linear(2, 2).double()
    else:
        model.unused.requires_grad_(True)
    with pytest.raises(ValueError, match="the model has changed"):
        spg.end_task(batches(0), loss_fn)
    assert spg.tasks_seen == 0


def test_new_parameter_objects_in_the_same_place_are_followed():
    model = make()
    spg = SPG(model, model.heads, dtype=torch.float64)
    spg.end_task(batches(0), loss_fn)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    spg.after_backward()
    torch.testing.assert_close(model.body[0].weight.grad, 1 - spg.importance["body.0.weight"])
    spg.end_task(batches(1), loss_fn)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
def test_state_dict_round_trip_and_conversion(own, stored):
    model = make()
    source, target = SPG(model, model.heads, dtype=stored), SPG(model, model.heads, dtype=own)
    for t in range(2):
        source.end_task(batches(t), loss_fn)
    target.load_state_dict(source.state_dict())
    assert target.tasks_seen == 2
    for name, value in target.importance.items():
        assert value.dtype == own
        given = source.importance[name]
        if own == stored:
            assert torch.equal(value, given)
            continue
        exact = given.double() / 255 if stored == torch.uint8 else given.double()
        if own == torch.uint8:
            assert bool((value.double() / 255 >= exact - 1e-7).all())
            assert bool((value.double() / 255 < exact + 1 / 255 + 1e-7).all())
        else:
            torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(own).eps, atol=1e-7)
    torch.testing.assert_close(target.mean, source.mean, rtol=0, atol=1 / 255 + 1e-3 if own != stored else 1e-13)


def test_state_dict_is_a_copy():
    model = make()
    spg = SPG(model, model.heads)
    spg.end_task(batches(0), loss_fn)
    state = spg.state_dict()
    state["importance"]["body.0.weight"].zero_()
    assert spg.importance["body.0.weight"].any()
    spg.load_state_dict(state)
    state["importance"]["body.0.weight"].fill_(1)
    assert not spg.importance["body.0.weight"].any()


def spoiled(state, name="body.0.weight", **changes):
    state = copy.deepcopy(state)
    state["importance"].update(changes.pop("importance", {}))
    state.update(changes)
    if name is None:
        del state["importance"]["body.0.weight"]
    return state


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: [], TypeError, "mapping"),
        (lambda s: spoiled(s, format="other"), ValueError, "format 'other'"),
        (lambda s: spoiled(s, version=2), ValueError, "version 2"),
        (lambda s: spoiled(s, tasks_seen=4), ValueError, "tasks_seen is 4"),
        (lambda s: spoiled(s, tasks_seen=-1), ValueError, "tasks_seen is -1"),
        (lambda s: spoiled(s, tasks_seen="2"), ValueError, "tasks_seen is '2'"),
        (lambda s: {**s, "importance": None}, TypeError, "mapping from names"),
        (lambda s: spoiled(s, None), ValueError, r"lacks 'body\.0\.weight'"),
        (lambda s: spoiled(s, importance={"odd": torch.zeros(1)}), ValueError, "'odd', which the feature extractor does not"),
        (lambda s: spoiled(s, importance={"scale": torch.zeros(2)}), ValueError, r"shape \(2,\)"),
        (lambda s: spoiled(s, importance={"scale": [0.0]}), TypeError, "must be a tensor"),
        (lambda s: spoiled(s, importance={"scale": torch.zeros(1, dtype=torch.int64)}), TypeError, "int64"),
        (lambda s: spoiled(s, importance={"scale": torch.tensor([1.5])}), ValueError, r"outside \[0, 1\]"),
        (lambda s: spoiled(s, importance={"scale": torch.tensor([math.nan])}), ValueError, r"outside \[0, 1\]"),
    ],
)
def test_a_bad_state_changes_nothing(trained, spoil, error, message):
    model, spg = trained
    before = snapshot(model, spg)
    with pytest.raises(error, match=message):
        spg.load_state_dict(spoil(spg.state_dict()))
    assert_same(before, snapshot(model, spg))


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(tmp_path, dtype):
    model = make()
    spg = SPG(model, model.heads, dtype=dtype)
    for t in range(2):
        spg.end_task(batches(t), loss_fn)
    path = tmp_path / "spg.safetensors"
    spg.save(path)
    again = SPG(model, model.heads, dtype=dtype)
    again.load(path)
    assert_same(spg.state_dict(), again.state_dict())
    torch.testing.assert_close(again.mean, spg.mean, rtol=0, atol=1e-13)
    spg.save(path)  # overwriting
    assert [p.name for p in tmp_path.iterdir()] == ["spg.safetensors"]


def test_save_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch, trained):
    _, spg = trained
    path = tmp_path / "spg.safetensors"
    spg.save(path)
    old = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", boom)
    with pytest.raises(KeyboardInterrupt):
        spg.save(path)
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="absent"):
        spg.save(tmp_path / "absent" / "spg.safetensors")


def test_damaged_and_foreign_files_change_nothing(tmp_path, trained):
    from safetensors.torch import save_file

    model, spg = trained
    path = tmp_path / "spg.safetensors"
    spg.save(path)
    whole = path.read_bytes()
    before = snapshot(model, spg)

    def refuse(message):
        with pytest.raises(ValueError, match=message) as caught:
            spg.load(path)
        assert str(path) in str(caught.value)
        assert_same(before, snapshot(model, spg))

    for end in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        refuse("damaged")
    for position in itertools.chain(range(8), range(len(whole) - 40, len(whole))):
        flipped = bytearray(whole)
        flipped[position] ^= 0x40
        path.write_bytes(flipped)
        refuse("damaged")
    path.write_bytes(b"\x80\x02}q\x00." * 50)
    refuse("not a safetensors file")
    tensors = {n: i.clone() for n, i in spg.importance.items()}
    save_file(tensors, path)
    refuse("format None")
    save_file(tensors, path, metadata={"format": "pt"})
    refuse("format 'pt'")
    save_file(tensors, path, metadata={"format": "fastcl.spg", "version": "2"})
    refuse("version '2'")
    other = Net(3, width=8).double()
    SPG(other, other.heads).save(path)
    refuse(r"shape \(8, 5\)")
    many = make(heads=5)
    longer = SPG(many, many.heads)
    for t in range(4):
        longer.end_task(batches(t), loss_fn)
    longer.save(path)
    refuse("tasks_seen is 4")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        spg.load(path)
    path.write_bytes(whole)
    spg.load(path)
    assert_same(before, snapshot(model, spg))


def test_a_loaded_run_goes_on_as_the_first(tmp_path):
    def run(interrupt):
        model = make()
        spg = SPG(model, model.heads, dtype=torch.uint8)
        for t in range(3):
            train(model, batches(t), t, spg.after_backward)
            spg.end_task(batches(t), loss_fn)
            if interrupt:
                spg.save(tmp_path / "spg")
                twin = make()
                twin.load_state_dict(model.state_dict())
                model, spg = twin, SPG(twin, twin.heads, dtype=torch.uint8)
                spg.load(tmp_path / "spg")
        return dict(model.state_dict())

    assert_same(run(False), run(True))


def test_construction_is_checked():
    def tied():
        model = make()
        model.heads[0].weight = model.body[3].weight
        return model, model.heads

    def tied_heads():
        model = make()
        model.heads[1].weight = model.heads[0].weight
        return model, model.heads

    model = make()
    lazy = nn.ModuleDict({"body": nn.LazyLinear(3), "head": nn.Linear(3, 2)})
    integers = make()
    integers.body[0].register_parameter("odd", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    for args, error, message in [
        ((model, []), ValueError, "heads is empty"),
        ((model, model.heads[0]), TypeError, "sequence of modules"),
        ((model, 3), TypeError, "sequence of torch.nn.Modules"),
        ((model, [model.heads[0], "head"]), TypeError, "sequence of torch.nn.Modules"),
        (("model", model.heads), TypeError, "model must be"),
        ((model, [model]), ValueError, "model itself"),
        ((model, [nn.Linear(6, 4)]), ValueError, "not a submodule"),
        ((model, [model.heads[0], model.heads[0]]), ValueError, "same module as heads"),
        ((model, [model.body, model.body[0]]), ValueError, "shares its parameter"),
        (tied(), ValueError, "is shared with heads"),
        (tied_heads(), ValueError, "shares its parameter"),
        ((nn.Sequential(nn.Linear(2, 2)), None), TypeError, "sequence"),
        ((lazy, [lazy["head"]]), ValueError, "no shape yet"),
        ((integers, integers.heads), TypeError, "complex64"),
    ]:
        with pytest.raises(error, match=message):
            SPG(*args)
    headed = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no trainable parameter outside"):
        SPG(headed, [headed[1]])
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        SPG(model, model.heads, dtype=torch.int8)
    with pytest.raises(TypeError, match="forward must be"):
        SPG(model, model.heads, forward=3)
    with pytest.raises(ValueError, match="strength"):
        SPG(model, model.heads, strength=1.5)


class OneHead(Net):
    """Every task number leads to the one head."""

    def __init__(self):
        super().__init__(heads=1)

    def forward(self, x, task):
        return self.heads[0](self.body(x) * self.scale)


def one_head():
    torch.manual_seed(0)
    return OneHead().double()


def test_a_shared_head_is_the_head_of_every_task():
    fused, naive = one_head(), one_head()
    spg, oracle = SPG(fused, fused.heads, dtype=torch.float64, shared=True), NaiveSPG(naive)
    for t in range(4):
        train(fused, batches(t), t, spg.after_backward)
        train(naive, batches(t), t, oracle.mask)
        spg.end_task(batches(t), loss_fn)
        oracle.end_task(batches(t))  # one pass per past task, all through the one head
        for name, value in oracle.importance.items():
            torch.testing.assert_close(spg.importance[name], value, rtol=0, atol=1e-12)
    assert spg.tasks_seen == 4
    for (name, p), (_, q) in zip(fused.named_parameters(), naive.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11, msg=name)
    other = SPG(fused, fused.heads, dtype=torch.float64, shared=True)
    other.load_state_dict(spg.state_dict())
    assert_same(other.state_dict(), spg.state_dict())


def test_a_shared_head_costs_two_passes_from_the_second_task_on():
    model = one_head()
    spg, read = SPG(model, model.heads, shared=True), []

    class Counted(list):
        def __iter__(self):
            read.append(spg.tasks_seen)
            return super().__iter__()

    for t in range(3):
        spg.end_task(Counted(batches(t)), loss_fn)
    assert read == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("heads", "shared", "error", "message"),
    [
        (2, True, ValueError, "one module, the head of all tasks, with shared=True; got 2"),
        (1, 1, TypeError, "shared must be True or False"),
    ],
)
def test_bad_sharing(heads, shared, error, message):
    model = make(heads)
    with pytest.raises(error, match=message):
        SPG(model, model.heads, shared=shared)


def test_expanded_buffers_frozen_parameters_and_default_forward():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 6)
            self.frozen = nn.Linear(6, 6)
            self.register_buffer("wide", torch.ones(1, 1).expand(4, 6))
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("cache", None)
            self.head = nn.Linear(6, 4)

        def forward(self, x, head):
            self.count = self.count + 1
            self.cache = x
            return self.head(self.frozen(torch.relu(self.first(x))) * self.wide[0])

    model = Odd().double()
    model.frozen.requires_grad_(False)
    count = model.count
    spg = SPG(model, [model.head])
    assert set(spg.importance) == {"first.weight", "first.bias"}
    spg.end_task(batches(0), loss_fn)
    assert model.count is count
    assert count == 0
    assert model.cache is None
    assert spg.importance["first.weight"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_importance_follows_the_model_to_another_device():
    model = make()
    spg = SPG(model, model.heads)
    spg.end_task(batches(0), loss_fn)
    model.cuda()
    train(model, [(x.cuda(), y.cuda()) for x, y in batches(1)], 1, spg.after_backward)
    assert all(i.is_cuda for i in spg.importance.values())
    assert spg.mean.is_cuda
    spg.end_task(batches(1), loss_fn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        spg.after_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.cpu()
    spg.end_task(batches(2), loss_fn)
    assert not spg.mean.is_cuda


def test_every_damaged_byte_of_the_header_is_noticed(tmp_path):
    _, spg = trained_for_damage()
    path = tmp_path / "spg.safetensors"
    spg.save(path)
    content = path.read_bytes()
    at = content.index(b'"tasks_seen":"') + len(b'"tasks_seen":"')
    dtype = content.index(b'"dtype":"F16"')
    for damaged in (content[:at] + b"0" + content[at + 1 :], content[:dtype] + b'"dtype":"BF16"' + content[dtype + 13 :]):
        if len(damaged) != len(content):  # one byte longer: the header states its own length
            length = int.from_bytes(content[:8], "little") + len(damaged) - len(content)
            damaged = length.to_bytes(8, "little") + damaged[8:]
        path.write_bytes(damaged)
        before = spg.state_dict()
        with pytest.raises(ValueError, match=r"spg\.safetensors"):
            spg.load(path)
        after = spg.state_dict()
        assert after["tasks_seen"] == before["tasks_seen"]
        assert all(torch.equal(after["importance"][n], t) for n, t in before["importance"].items())


def test_pickles(tmp_path):
    import pickle

    _, spg = trained_for_damage()
    again = pickle.loads(pickle.dumps(spg))
    assert again.tasks_seen == spg.tasks_seen
    assert all(torch.equal(again.importance[n], t) for n, t in spg.importance.items())


def trained_for_damage():
    torch.manual_seed(0)
    model = DamageNet()
    spg = SPG(model, model.heads, dtype=torch.float16)
    loader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    spg.end_task(loader, torch.nn.functional.cross_entropy)
    return model, spg


class DamageNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 5)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(5, 3) for _ in range(2))

    def forward(self, x, task):
        return self.heads[task](self.body(x).relu())
