"""fastcl.optim as torch.optim's optimizers: what their users expect of them."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fastcl.optim import SGD, AdamW, ChildMask, FixedMask, Project, Pull, SoftMask
from fastcl.testing import clone
from layouts import identical

pytestmark = pytest.mark.usefixtures("exact_root")
SHAPES = [(5, 3), (7,), (), (4, 2, 3, 3)]
PAIRS = {
    "AdamW": (AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW maximize": (AdamW, torch.optim.AdamW, {"lr": 0.05, "maximize": True, "betas": (0.5, 0.9), "eps": 1e-3}),
    "SGD": (SGD, torch.optim.SGD, {"lr": 0.05}),
    "SGD momentum": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD nesterov": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def give(step, *lists, missing=()):
    """The same gradients to parameters of several models."""
    for n, row in enumerate(zip(*lists, strict=True)):
        g = torch.randn(row[0].shape, generator=torch.Generator().manual_seed(100 * step + n), dtype=torch.float64)
        for p in row:
            p.grad = None if n in missing else g.to(p.dtype).clone()


def same(ours, theirs):
    return all(identical(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True))


def same_state(a, b, params_a, params_b):
    for p, q in zip(params_a, params_b, strict=True):
        left = {k: v for k, v in a.state.get(p, {}).items() if v is not None}
        right = {k: v for k, v in b.state.get(q, {}).items() if v is not None}
        assert set(left) == set(right)
        assert all(identical(left[k], right[k]) for k in left)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_bits(device, pair, dtype):
    own, official, settings = pair
    p, q = parameters(dtype), parameters(dtype)
    a, b = own(p, **settings), official(q, **settings)
    for step in range(25):
        give(step, p, q, missing=(1,) if step in (0, 3) else ())
        a.step()
        b.step()
        assert same(p, q), step
    same_state(a, b, p, q)


@pairs
def test_switching_over_and_back(device, pair):
    """torch.optim, fastcl, torch.optim in one run, with the bits of torch.optim alone."""
    own, official, settings = pair
    p, q = parameters(), parameters()
    alone, current = official(q, **settings), official(p, **settings)
    for step in range(30):
        give(step, p, q)
        alone.step()
        current.step()
        if step in (9, 19):
            after = (own if step == 9 else official)(p, **{**settings, "lr": 7.0})
            after.load_state_dict(current.state_dict())
            current = after
        assert same(p, q), step
    assert current.param_groups[0]["lr"] == 0.05
    same_state(current, alone, p, q)


@pairs
def test_state_dict_keeps_torchs_keys_and_our_own(device, pair):
    own, official, settings = pair
    p, q = parameters(), parameters()
    a, b = own(p, **settings), official(q, **settings)
    assert set(b.param_groups[0]) <= set(a.param_groups[0])
    give(0, p, q)
    a.step()
    b.step()
    assert {k: set(v) for k, v in b.state_dict()["state"].items()} == {k: set(v) for k, v in a.state_dict()["state"].items()}
    if own is AdamW:
        a.param_groups[0]["decay"] = "hf"
    a.load_state_dict(b.state_dict())
    if own is AdamW:
        assert a.param_groups[0]["decay"] == "hf"
        c = AdamW(parameters(), decay="torch")
        c.load_state_dict(a.state_dict())
        assert c.param_groups[0]["decay"] == "hf"


def test_what_is_loaded_is_copied(device):
    p = parameters()
    a = AdamW(p)
    give(0, p)
    a.step()
    saved = a.state_dict()
    b = AdamW(parameters())
    b.load_state_dict(saved)
    before = clone(saved["state"][0]["exp_avg"])
    give(1, b.param_groups[0]["params"])
    b.step()
    assert identical(saved["state"][0]["exp_avg"], before)
    assert float(saved["state"][0]["step"]) == 1


@pytest.mark.parametrize("form", ["save", "pickle", "deepcopy", "safetensors"])
def test_state_survives(device, form, tmp_path):
    p = parameters(torch.bfloat16)
    a = AdamW(p, lr=0.05, transforms=[ChildMask(0.5, 3)])
    for step in range(3):
        give(step, p)
        a.step()
    q = [nn.Parameter(x.detach().clone()) for x in p]
    b = AdamW(q, lr=0.05, transforms=[ChildMask(0.5, 3)])
    if form == "save":
        buffer = io.BytesIO()
        torch.save(a.state_dict(), buffer)
        buffer.seek(0)
        b.load_state_dict(torch.load(buffer, weights_only=True))
    elif form == "safetensors":
        from safetensors.torch import load_file, save_file

        state = a.state_dict()
        save_file({f"{k}.{n}": t for k, s in state["state"].items() for n, t in s.items()}, tmp_path / "state.safetensors")
        flat = load_file(tmp_path / "state.safetensors")
        names = ("step", "exp_avg", "exp_avg_sq")
        b.load_state_dict({**state, "state": {k: {n: flat[f"{k}.{n}"] for n in names} for k in state["state"]}})
    else:
        q, b = pickle.loads(pickle.dumps((p, a))) if form == "pickle" else copy.deepcopy((p, a))
        assert b.param_groups[0]["params"][0] is q[0]
    assert all(t.dtype == torch.float32 for s in b.state.values() for t in s.values())
    for step in range(3, 6):
        give(step, p, q)
        a.step()
        b.step()
    assert same(p, q)
    same_state(a, b, p, q)


def test_deepcopy_and_pickle_keep_what_belongs_to_parameters(device):
    p = parameters()
    a = AdamW(p, clip_norm=0.5, transforms=[SoftMask({p[0]: torch.rand(5, 3)}), FixedMask([torch.rand(t.shape) < 0.5 for t in p])])
    for make in (lambda x: copy.deepcopy(x), lambda x: pickle.loads(pickle.dumps(x))):
        q, b = make((p, a))
        r = [nn.Parameter(x.detach().clone()) for x in p]
        c = AdamW(r, clip_norm=0.5, transforms=[SoftMask({r[0]: a.transforms[0].importance[p[0]]}), a.transforms[1]])
        for step in range(3):
            give(step, q, r)
            b.step()
            c.step()
        assert same(q, r)
        assert not same(p, q)


def test_groups_have_hyper_parameters_of_their_own(device):
    def groups(p):
        return [{"params": p[:2], "lr": 0.3, "betas": (0.5, 0.6)}, {"params": p[2:], "weight_decay": 0.7}]

    p, q = parameters(), parameters()
    a, b = AdamW(groups(p), lr=0.01), torch.optim.AdamW(groups(q), lr=0.01)
    for step in range(5):
        give(step, p, q)
        a.step()
        b.step()
    assert same(p, q)


@pairs
def test_lambda_scheduler(device, pair):
    own, official, settings = pair
    p, q = parameters(), parameters()
    a, b = own(p, **settings), official(q, **settings)
    first, second = (lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)) for o in (a, b))
    for step in range(5):
        give(step, p, q)
        a.step()
        b.step()
        first.step()
        second.step()
    assert same(p, q)
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] != settings["lr"]


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
def test_one_cycle_scheduler_cycles_momentum_too(device, name):
    own, official, settings = PAIRS[name]
    p, q = parameters(), parameters()
    a, b = own(p, **settings), official(q, **settings)
    first, second = (lr_scheduler.OneCycleLR(o, 0.1, total_steps=10) for o in (a, b))
    seen = set()
    for step in range(9):
        give(step, p, q)
        a.step()
        b.step()
        first.step()
        second.step()
        seen.add(a.param_groups[0].get("momentum") or a.param_groups[0]["betas"][0])
    assert same(p, q)
    assert len(seen) > 5


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("own", [AdamW, SGD])
def test_tensor_lr_is_the_number(device, own, shape):
    p, q = parameters(torch.float64), parameters(torch.float64)
    lr = torch.full(shape, 0.05, dtype=torch.float64)
    a, b = own(p, lr=lr), own(q, lr=0.05)
    for step in range(4):
        give(step, p, q)
        a.step()
        b.step()
        lr.mul_(0.5)
        b.param_groups[0]["lr"] *= 0.5
    assert same(p, q)


def test_zero_grad_closures_and_hooks(device):
    p = parameters()
    a = AdamW(p, lr=0.1)
    order = []
    a.register_step_pre_hook(lambda o, args, kwargs: order.append("pre"))
    a.register_step_post_hook(lambda o, args, kwargs: order.append("post"))
    a.register_state_dict_pre_hook(lambda o: order.append("saving"))
    a.register_state_dict_post_hook(lambda o, s: {**s, "note": 1})
    a.register_load_state_dict_pre_hook(lambda o, s: order.append(("loading", s["note"])))
    a.register_load_state_dict_post_hook(lambda o: order.append(("loaded", len(o.state))))

    def closure():
        a.zero_grad()
        loss = sum((x**2).sum() for x in p)
        loss.backward()
        assert torch.is_grad_enabled()
        order.append("closure")
        return loss

    first = a.step(closure)
    assert a.step(closure) < first
    assert order == ["pre", "closure", "post"] * 2
    a.load_state_dict(a.state_dict())
    assert order[6:] == ["saving", ("loading", 1), ("loaded", 4)]
    a.zero_grad(set_to_none=False)
    assert all(not x.grad.any() for x in p)
    a.zero_grad()
    assert all(x.grad is None for x in p)
    assert a.step() is None


def test_a_load_hook_may_change_what_is_loaded(device):
    p = parameters()
    a = AdamW(p)
    give(0, p)
    a.step()
    saved = a.state_dict()
    b = AdamW(parameters())
    b.register_load_state_dict_pre_hook(lambda o, s: {**s, "state": {k: v for k, v in s["state"].items() if k == 1}})
    b.load_state_dict(saved)
    assert len(b.state) == 1
    assert len(b._optimizer_load_state_dict_pre_hooks) == 1


def test_parameters_that_get_gradients_later(device):
    for own, official in ((AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)):
        settings = {"lr": 0.1} | ({"momentum": 0.9, "dampening": 0.2} if own is SGD else {})
        p, q = parameters(), parameters()
        a, b = own(p, **settings), official(q, **settings)
        for step, missing in enumerate([(0, 1, 2, 3), (0, 1), (0, 1), (), (2,), ()]):
            give(step, p, q, missing=missing)
            a.step()
            b.step()
            assert same(p, q), (own, step)
        same_state(a, b, p, q)


def test_add_param_group(device):
    p, q = parameters(), parameters()
    a, b = AdamW(p[:2], lr=0.1), torch.optim.AdamW(q[:2], lr=0.1)
    for step in range(4):
        if step == 2:
            a.add_param_group({"params": p[2:], "lr": 0.01})
            b.add_param_group({"params": q[2:], "lr": 0.01})
        give(step, p, q)
        a.step()
        b.step()
    assert same(p, q)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        a.add_param_group({"params": p[:1]})
    for bad, message in (({"lr": math.nan}, "Invalid learning rate: nan"), ({"eps": -1.0}, "Invalid epsilon value: -1.0")):
        with pytest.raises(ValueError, match=message):
            a.add_param_group({"params": parameters(), **bad})
    assert len(a.param_groups) == 2


def test_named_parameters(device):
    model = nn.Linear(3, 2)
    a = AdamW(model.named_parameters(), transforms=[SoftMask({"bias": torch.ones(2)})])
    before = clone(list(model.parameters()))
    model(torch.rand(4, 3)).sum().backward()
    a.param_groups[0]["weight_decay"] = 0.0
    a.step()
    assert a.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert identical(model.bias, before[1])
    assert not identical(model.weight, before[0])


def test_replaced_state_and_parameters_are_seen(device):
    p, q = parameters(), parameters()
    a, b = AdamW(p, lr=0.1), torch.optim.AdamW(q, lr=0.1)
    for step in range(6):
        if step == 2:  # an entry
            for o, x in ((a, p[0]), (b, q[0])):
                o.state[x]["exp_avg"] = torch.ones(5, 3)
        if step == 3:  # a dictionary
            for o, x in ((a, p[1]), (b, q[1])):
                o.state[x] = {k: v.clone().mul_(2) if k != "step" else v.clone() for k, v in o.state[x].items()}
        if step == 4:  # a parameter
            for o, x in ((a, p), (b, q)):
                x[3] = o.param_groups[0]["params"][3] = nn.Parameter(torch.full((4, 2, 3, 3), 0.5))
        if step == 5:
            a.state.clear()
            b.state.clear()
        give(step, p, q)
        a.step()
        b.step()
        assert same(p, q), step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [AdamW, SGD])
def test_half_parameters_keep_float32_state(device, dtype, own):
    settings = {"lr": 0.05} | ({"momentum": 0.9} if own is SGD else {})
    p = parameters(dtype)
    wide = [nn.Parameter(x.detach().float()) for x in p]
    a, b = own(p, **settings), own(wide, **settings)
    for step in range(5):
        give(step, p)
        for x, w in zip(p, wide, strict=True):
            w.data.copy_(x.detach())
            w.grad = x.grad.float()
        a.step()
        b.step()
        assert all(identical(x.detach(), w.detach().to(dtype)) for x, w in zip(p, wide, strict=True))
        a.load_state_dict(a.state_dict())
    same_state(a, b, p, wide)
    assert all(t.dtype == torch.float32 for s in a.state.values() for t in s.values())


def test_a_strided_parameter_has_state_of_its_strides(device):
    p = [nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)), nn.Parameter(torch.randn(6, 4)[:, ::2])]
    q = [nn.Parameter(x.detach().clone()) for x in p]
    a, b = AdamW(p, lr=0.1), torch.optim.AdamW(q, lr=0.1)
    for step in range(3):
        give(step, p, q)
        a.step()
        b.step()
        a.load_state_dict(b.state_dict())  # laid out as theirs
    assert same(p, q)
    assert all(a.state[x]["exp_avg"].stride() == x.stride() for x in p)
    p[0].data = p[0].detach().contiguous()
    give(5, p)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is non-contiguous state"):
        a.step()


def test_compile(device):
    for transforms in ((), (ChildMask(0.5, 1),)):
        torch._dynamo.reset()
        p, q = parameters(), parameters()
        a, b = AdamW(p, lr=0.1, transforms=transforms), AdamW(q, lr=0.1, transforms=transforms)
        step = torch.compile(a.step)
        for n in range(3):
            give(n, p, q)
            step()
            b.step()
        assert same(p, q)


def test_compiled_training_step(device):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    other = copy.deepcopy(model)
    importance = [torch.rand_like(x) for x in model.parameters()]
    results = []
    for m, compiled in ((model, True), (other, False)):
        a = AdamW(m.parameters(), lr=0.1, transforms=[SoftMask(importance)], clip_norm=1.0)

        def train(x, m=m, a=a):
            a.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            a.step()
            return loss

        run = torch.compile(train) if compiled else train
        results.append([float(run(torch.ones(3, 6) * n)) for n in range(4)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class TestGradScaler:
    @pairs
    @pytest.mark.parametrize("unscaled", [False, True])
    def test_as_unscale_and_step(self, device, pair, unscaled):
        own, official, settings = pair
        p, q = parameters(), parameters()
        a, b = own(p, **settings), official(q, **settings)
        first, second = (torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2))
        for step in range(6):
            give(step, p, q)
            for x, y in zip(p, q, strict=True):
                x.grad = x.grad * first.scale(torch.ones(()))
                y.grad = y.grad * second.scale(torch.ones(()))
            if step == 2:
                p[1].grad[3] = q[1].grad[3] = math.inf
            before, steps = clone(p), [float(s["step"]) for s in a.state.values() if "step" in s]
            if unscaled:
                first.unscale_(a)
            first.step(a)
            second.step(b)
            first.update()
            second.update()
            assert first.get_scale() == second.get_scale()
            assert same(p, q), step
            if step == 2:
                assert same(p, before)
                assert steps == [float(s["step"]) for s in a.state.values() if "step" in s]
        same_state(a, b, p, q)

    def test_a_first_step_that_is_skipped(self, device):
        for own, settings in ((AdamW, {}), (SGD, {"momentum": 0.9})):
            p, q = parameters(), parameters()
            a, b = own(p, lr=0.1, **settings), own(q, lr=0.1, **settings)
            a.found_inf, a.grad_scale = torch.ones(()), torch.ones(())
            give(9, p)
            a.step()
            del a.found_inf, a.grad_scale
            for step in range(3):
                give(step, p, q)
                a.step()
                b.step()
            assert same(p, q)

    def test_nothing_is_asked_of_the_device(self, device, monkeypatch):
        p = parameters()
        masks = [FixedMask([torch.rand(x.shape) < 0.5 for x in p]), SoftMask([torch.rand(()) for _ in p])]
        transforms = [ChildMask(0.5, 1), Project([torch.randn_like(x) for x in p]), *masks]
        a = AdamW(p, clip_norm=0.5, transforms=transforms)
        give(0, p)
        a.step()
        a.found_inf, a.grad_scale = torch.zeros(()), torch.full((), 8.0)

        def forbidden(*args, **kwargs):
            raise AssertionError("a wait for the device")

        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, forbidden)
        for n in range(2):
            a.transforms[1].reference = [x.grad * n for x in p]
            a.step()


class TestClipNorm:
    @pytest.mark.parametrize("limit", [1e-3, 0.5, 1e6])
    def test_as_clip_grad_norm(self, device, limit):
        p, q = parameters(torch.float64), parameters(torch.float64)
        a, b = AdamW(p, lr=0.1, clip_norm=limit), torch.optim.AdamW(q, lr=0.1)
        for step in range(5):
            give(step, p, q)
            kept = [x.grad.clone() for x in p]
            torch.nn.utils.clip_grad_norm_(q, limit)
            a.step()
            b.step()
            assert all(identical(x.grad, k) for x, k in zip(p, kept, strict=True))
        for x, y in zip(p, q, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

    def test_the_norm_is_that_of_all_groups_after_unscaling(self, device):
        p, q = parameters(), parameters()
        a = SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}], lr=0.2, clip_norm=0.7)
        b = SGD([{"params": q[:1]}, {"params": q[1:], "lr": 0.1}], lr=0.2)
        give(0, p, q)
        for x in p:
            x.grad *= 64
        a.grad_scale, a.found_inf = torch.full((), 64.0), torch.zeros(())
        a.step()
        torch.nn.utils.clip_grad_norm_(q, 0.7)
        b.step()
        for x, y in zip(p, q, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)

    def test_nan_and_values(self, device):
        p = parameters()
        a = AdamW(p, clip_norm=1.0)
        give(0, p)
        p[0].grad[0, 0] = math.nan
        a.step()
        assert all(x.isnan().all() for x in p)
        for bad, kind in ((0.0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)):
            with pytest.raises(kind, match="clip_norm must be"):
                AdamW(parameters(), clip_norm=bad)


BAD = {
    "lr": (lambda p: AdamW(p, lr=-1.0), ValueError, "Invalid learning rate: -1"),
    "NaN lr": (lambda p: AdamW(p, lr=math.nan), ValueError, "Invalid learning rate: nan"),
    "NaN lr of SGD": (lambda p: SGD(p, lr=math.nan), ValueError, "Invalid learning rate: nan"),
    "tensor lr": (lambda p: AdamW(p, lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
    "beta": (lambda p: AdamW(p, betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1.0"),
    "tensor beta": (lambda p: AdamW(p, betas=(torch.tensor(0.9), 0.9)), TypeError, "betas must be a pair of numbers"),
    "eps": (lambda p: AdamW(p, eps=-1e-8), ValueError, "Invalid epsilon value: -1e-08"),
    "weight decay": (lambda p: AdamW(p, weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    "decay": (lambda p: AdamW(p, decay="adam"), ValueError, "decay must be one of torch, hf, got 'adam'"),
    "momentum": (lambda p: SGD(p, momentum=-0.1), ValueError, "Invalid momentum value: -0.1"),
    "nesterov": (lambda p: SGD(p, nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
    "complex": (lambda p: AdamW([nn.Parameter(torch.ones(2).cfloat())]), TypeError, r"params\[0\] has dtype complex64"),
    "integers": (lambda p: AdamW([torch.ones(2, dtype=torch.int64)]), TypeError, r"params\[0\] has dtype int64"),
    "no list": (lambda p: AdamW(p[0]), TypeError, "params argument given to the optimizer should be an iterable"),
    "empty": (lambda p: AdamW([]), ValueError, "optimizer got an empty parameter list"),
    "transform": (
        lambda p: AdamW(p, transforms=[torch.ones(1)]),
        TypeError,
        r"transforms\[0\] must be a transform of fastcl.optim, got Tensor",
    ),
    "keep": (lambda p: ChildMask(0.0, 1), ValueError, r"keep must be in \(0, 1\], got 0"),
    "large keep": (lambda p: ChildMask(1.5, 1), ValueError, r"keep must be in \(0, 1\], got 1.5"),
    "seed": (lambda p: ChildMask(0.5, -1), ValueError, "seed must be an integer in"),
    "strength": (lambda p: SoftMask(p, 2.0), ValueError, r"strength must be in \[0, 1\], got 2.0"),
    "pull": (lambda p: Pull(p, p, math.inf), ValueError, "strength must be a finite number"),
    "few": (lambda p: AdamW(p, transforms=[SoftMask(p[:2])]), ValueError, "importance has 2 entries and the optimizer 4 parameters"),
    "missing": (lambda p: SoftMask([*p[:3], None]), TypeError, r"importance\[3\] must be a tensor, got NoneType"),
    "shape": (lambda p: AdamW(p, transforms=[SoftMask([*p[:3], torch.ones(3)[:2]])]), ValueError, r"importance\[3\] has shape \(2,\)"),
    "dtype": (lambda p: AdamW(p, transforms=[SoftMask([*p[:3], p[3].long()])]), TypeError, r"importance\[3\] has dtype int64"),
    "device": (lambda p: AdamW(p, transforms=[SoftMask([*p[:3], p[3].to("meta")])]), ValueError, r"importance\[3\] is on meta"),
    "mask": (lambda p: FixedMask([torch.ones(2)]), TypeError, r"masks\[0\] must be a BitMask, a bool tensor or None, got torch.float32"),
    "mask shape": (
        lambda p: AdamW(p, transforms=[FixedMask([torch.ones(3, 5, dtype=torch.bool), None, None, None])]),
        ValueError,
        r"masks\[0\] is for the shape \(3, 5\) and params\[0\] has shape \(5, 3\)",
    ),
    "reference": (lambda p: AdamW(p, transforms=[Project([None, p[0], None, None])]), ValueError, r"reference\[1\] has shape \(5, 3\)"),
    "anchor": (lambda p: AdamW(p, transforms=[Pull(p, p[:1], 1.0)]), ValueError, "anchor has 1 entries"),
    "half a pull": (
        lambda p: AdamW(p, transforms=[Pull({p[0]: p[0]}, {p[1]: p[1]}, 1.0)]),
        ValueError,
        "do not belong to the same parameters",
    ),
    "no transforms": (lambda p: AdamW(p, transforms=None), TypeError, "transforms must be a list of transforms.*got NoneType"),
    "a number": (lambda p: SGD(p, transforms=5), TypeError, "transforms must be a list of transforms.*got int"),
    "one transform": (lambda p: SGD(p, transforms=ChildMask(0.5, 1)), TypeError, "transforms must be a list of transforms.*got ChildMask"),
    "maximize": (lambda p: AdamW(p, maximize="no"), TypeError, "maximize must be True or False, got 'no'"),
    "nesterov's type": (lambda p: SGD(p, momentum=0.9, nesterov="x"), TypeError, "nesterov must be True or False, got 'x'"),
    "compact_state": (lambda p: AdamW(p, compact_state="x"), TypeError, "compact_state must be True or False, got 'x'"),
    "stranger": (lambda p: AdamW(p, transforms=[SoftMask({torch.ones(1): p[0]})]), ValueError, "importance has an entry for a Tensor"),
    "name": (lambda p: AdamW(p, transforms=[SoftMask({"w": p[0]})]), ValueError, "importance has an entry for 'w'.*it has no names"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind):
    make, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        make(parameters())


def changed(state, **groups):
    return {**state, "param_groups": [{**g, **groups} for g in state["param_groups"]]}


def with_state(state, **entries):
    return {**state, "state": {k: {**v, **entries} for k, v in state["state"].items()}}


def sparse(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return t.to_sparse()


STATES = {
    "of SGD": (lambda s: torch.optim.SGD(parameters()).state_dict(), r"param_groups\[0\] of the state_dict has no 'betas'"),
    "amsgrad": (lambda s: changed(s, amsgrad=True), "has amsgrad=True, whose state max_exp_avg_sq AdamW has no use for"),
    "amsgrad's state": (lambda s: with_state(s, max_exp_avg_sq=torch.ones(1)), r"state\[0\] of the state_dict has 'max_exp_avg_sq'"),
    "of Adam": (lambda s: changed(s, decoupled_weight_decay=False), "decoupled_weight_decay=False: it is Adam's"),
    "of Adamax": (lambda s: with_state(s, exp_inf=torch.ones(1)), "has 'exp_inf', which AdamW has no use for"),
    "shape": (lambda s: with_state(s, exp_avg=torch.ones(1)), r"state\[0\]\['exp_avg'\] of the state_dict has shape \(1,\)"),
    "NaN lr": (lambda s: changed(s, lr=math.nan), "Invalid learning rate: nan"),
    "incomplete": (lambda s: {**s, "state": {0: {"step": torch.ones(())}}}, r"state\[0\] of the state_dict has no 'exp_avg'"),
    "groups": (lambda s: {**s, "param_groups": s["param_groups"] * 2}, "has 2 parameter groups and the optimizer 1"),
    "parameters": (lambda s: changed(s, params=[0]), "has 1 parameters and the optimizer's 4"),
    "no state_dict": (lambda s: {"model": 1}, "state_dict has no 'state'"),
    "sparse state": (
        lambda s: with_state(s, exp_avg=sparse(torch.ones(5, 3))),
        r"state\[0\]\['exp_avg'\] of the state_dict must be a float",
    ),
    "meta state": (lambda s: with_state(s, exp_avg=torch.ones(5, 3, device="meta")), r"state\[0\]\['exp_avg'\] of .* on meta"),
    "no moment": (lambda s: with_state(s, exp_avg=None), r"state\[0\]\['exp_avg'\] of .* got NoneType"),
    "a stranger": (lambda s: {**s, "state": {**s["state"], 99: {"exp_avg": 1}}}, r"state\[99\] of the state_dict belongs to none"),
    "two steps": (lambda s: with_state(s, step=torch.ones(2)), r"state\[0\]\['step'\] of the state_dict must be a tensor of one"),
    "NaN step": (lambda s: with_state(s, step=torch.tensor(math.nan)), r"state\[0\]\['step'\] of the state_dict must be a finite"),
    "negative step": (lambda s: with_state(s, step=-1), r"state\[0\]\['step'\] of the state_dict must be a finite number >= 0, got -1"),
    "twice": (lambda s: changed(s, params=[0, 1, 1, 2]), r"param_groups\[0\]\['params'\] of the state_dict has 1 a second time"),
    **{f"step {v!r}": (lambda s, v=v: with_state(s, step=v), r"state\[0\]\['step'\] of .* must be a number") for v in (None, "a", [1])},
    "maximize": (lambda s: changed(s, maximize="no"), r"param_groups\[0\] of the state_dict: maximize must be True or False, got 'no'"),
    "params": (lambda s: changed(s, params=3), r"param_groups\[0\]\['params'\] of the state_dict must be a list of numbers, got 3"),
    "betas": (lambda s: changed(s, betas=("a", 0.9)), r"param_groups\[0\] of the state_dict: betas\[0\] must be a number, got str"),
    "state's type": (lambda s: {**s, "state": 3}, "state of the state_dict must be a mapping, got int"),
    "an entry's type": (lambda s: {**s, "state": {0: 3}}, r"state\[0\] of the state_dict must be a mapping, got int"),
    "groups' type": (lambda s: {**s, "param_groups": 3}, "param_groups of the state_dict must be a list, got int"),
    "a group's type": (lambda s: {**s, "param_groups": [3]}, r"param_groups\[0\] of the state_dict must be a mapping, got int"),
    "type": (lambda s: 3, "state_dict must be a mapping, got int"),
}
TYPES = {"step None", "step 'a'", "step [1]", "maximize", "params", "betas", "state's type", "an entry's type", "groups' type"}
TYPES |= {"a group's type", "type"}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(device, kind):
    make, message = STATES[kind]
    p = parameters()
    a = AdamW(p, lr=0.1)
    give(0, p)
    a.step()
    saved = make(a.state_dict())
    before, groups = clone(list(a.state[p[0]].values())), copy.copy(a.param_groups[0])
    with pytest.raises(TypeError if kind in TYPES else ValueError, match=message):
        a.load_state_dict(saved)
    assert all(identical(x, y) for x, y in zip(a.state[p[0]].values(), before, strict=True))
    assert a.param_groups[0] == groups


def test_a_step_that_is_refused_writes_nothing(device):
    p = parameters()
    a = AdamW(p, lr=0.1)
    give(0, p)
    a.step()
    before = clone(p)
    a.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be a finite number"):
        a.step()
    a.param_groups[0]["lr"] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p[1].grad = p[1].grad.to_sparse()
    with pytest.raises(TypeError, match=r"grads\[1\] must be a dense tensor, got torch.sparse_coo"):
        a.step()
    assert same(p, before)
    assert float(a.state[p[0]]["step"]) == 1


LATE = {
    "NaN lr": (lambda a, p: a.param_groups[1].update(lr=math.nan), ValueError, r"param_groups\[1\]: Invalid learning rate: nan"),
    "lr of two": (lambda a, p: a.param_groups[1].update(lr=torch.ones(2)), ValueError, r"param_groups\[1\]: Tensor lr must be 1-element"),
    "sparse": (lambda a, p: setattr(p[1], "grad", sparse(p[1].grad)), TypeError, r"param_groups\[1\]: grads\[0\] must be a dense tensor"),
}


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("own", [AdamW, SGD])
def test_a_step_that_a_later_group_refuses_writes_nothing(device, own, steps, kind):
    spoil, error, message = LATE[kind]
    p = parameters()[:2]
    a = own([{"params": [x]} for x in p], lr=0.1, **({"momentum": 0.9} if own is SGD else {}))
    for step in range(steps):
        give(step, p)
        a.step()
    give(5, p)
    before, state = clone(p), copy.deepcopy([dict(a.state.get(x, {})) for x in p])
    spoil(a, p)
    with pytest.raises(error, match=message):
        a.step()
    assert same(p, before)
    assert [set(a.state.get(x, {})) for x in p] == [set(s) for s in state]
    assert all(identical(a.state[x][k], v) for x, s in zip(p, state, strict=True) for k, v in s.items())


def test_a_first_step_that_is_refused_is_still_to_come(device):
    p, q = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    a, b = SGD(p, **settings), torch.optim.SGD(q, **settings)
    p[0].grad, p[1].grad = torch.ones(3), sparse(torch.ones(4))
    with pytest.raises(TypeError, match="must be a dense tensor"):
        a.step()
    assert not a.state
    # refused by the operator itself, behind all other checks
    p[1].grad, a.found_inf = torch.ones(4), torch.zeros(2)
    with pytest.raises(ValueError, match="found_inf must be"):
        a.step()
    assert not a.state
    del a.found_inf
    for step in range(2):
        give(step, p, q)
        a.step()
        b.step()
    assert same(p, q)
    same_state(a, b, p, q)
