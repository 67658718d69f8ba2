"""Gradient transforms inside fastcl.optim's sweep: each is its own op followed by the step; compact state; what binds to parameters."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from test_optim_torch import give, parameters, same, same_state
from torch import nn

import fastcl
from fastcl import BitMask, reference
from fastcl.optim import SGD, AdamW, ChildMask, FixedMask, Project, Pull, SoftMask
from fastcl.testing import clone
from layouts import identical

KINDS = ["soft", "child", "fixed", "project", "pull"]
OPTIMIZERS = {"AdamW": (AdamW, {}), "hf": (AdamW, {"decay": "hf"}), "SGD": (SGD, {"momentum": 0.9})}


def like(p, seed, draw=torch.randn):
    generator = torch.Generator().manual_seed(seed)
    return [draw(x.shape, generator=generator, dtype=x.dtype) for x in p]


def made(kind, p, seed=3):
    """A transform, and what does the same to the gradients before the step."""
    if kind == "soft":
        importance = like(p, seed, torch.rand)
        return SoftMask(importance, 0.8), lambda grads, step: reference.soft_mask_(grads, importance, 0.8)
    if kind == "child":
        return ChildMask(0.4, seed), lambda grads, step: reference.child_mask_(grads, 0.4, seed, step)
    if kind == "fixed":
        masks = [m < 0.5 for m in like(p, seed, torch.rand)]
        bits = [BitMask.from_bool(m).bits for m in masks]
        return FixedMask(masks), lambda grads, step: reference.bit_mask_(grads, bits)
    if kind == "project":
        r = like(p, seed)
        return Project(r), lambda grads, step: reference.project_(grads, r)
    precision, anchor = like(p, seed, torch.rand), like(p, seed + 1)
    return Pull(precision, anchor, 0.3), lambda grads, step: reference.ewc_pull_(grads, [x.detach() for x in p], precision, anchor, 0.3)


def run(optimizer, before, p, steps=5, missing=()):
    for step in range(steps):
        give(step, p, missing=missing)
        with torch.no_grad():
            for change in before:
                change([x.grad for x in p], step)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kinds", [*itertools.combinations(KINDS, 1), *list(itertools.permutations(KINDS, 3))[::9]], ids="-".join)
def test_transforms_are_their_ops_before_the_step(device, kinds, name):
    own, settings = OPTIMIZERS[name]
    p, q = parameters(), parameters()
    transforms = [made(k, p, seed=n)[0] for n, k in enumerate(kinds)]
    apart = [made(k, q, seed=n)[1] for n, k in enumerate(kinds)]
    a, b = own(p, lr=0.05, transforms=transforms, **settings), own(q, lr=0.05, **settings)
    run(a, [], p)
    run(b, apart, q)
    assert same(p, q)
    assert not same(p, parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_empty_transforms_change_nothing(device, name):
    own, settings = OPTIMIZERS[name]
    p, q = parameters(), parameters()
    run(own(p, lr=0.05, transforms=[Project(), SoftMask({}), FixedMask([None] * 4)], **settings), [], p)
    run(own(q, lr=0.05, **settings), [], q)
    assert same(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_mappings_leave_other_parameters_alone(device, kind):
    if kind == "child":
        pytest.skip("has no values")
    p, q, untouched = parameters(), parameters(), parameters()
    transform, apart = made(kind, q)
    for operand in transform.operands:
        values = transform.values(operand)
        setattr(transform, operand, {q[2]: values[2], q[0]: values[0]})
    run(AdamW(q, lr=0.05, transforms=[transform]), [], q, steps=1)
    run(AdamW(untouched, lr=0.05), [], untouched, steps=1)
    give(0, p)
    before = clone([x.grad for x in p])
    with torch.no_grad():
        if kind == "project":
            reference.project_([p[0].grad, p[2].grad], [made(kind, p)[0].reference[i] for i in (0, 2)])
        elif kind == "pull":
            made(kind, p)[1]([x.grad for x in p], 0)
        else:
            made(kind, p)[1]([x.grad for x in p], 0)
    for i in (1, 3):
        p[i].grad = before[i]
    AdamW(p, lr=0.05).step()
    assert same(p, q)
    assert same([q[1], q[3]], [untouched[1], untouched[3]])
    assert apart is not None


def test_groups_and_missing_gradients_keep_every_value_with_its_parameter(device):
    p, q = parameters(), parameters()
    kinds = [k for k in KINDS if k != "project"]
    a = AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.2}], lr=0.05, transforms=[made(k, p)[0] for k in kinds])
    b = AdamW([{"params": q[:1]}, {"params": q[1:], "lr": 0.2}], lr=0.05)
    for step in range(5):
        missing = {1: (0,), 2: (1, 3)}.get(step, ())
        give(step, p)
        give(step, q)
        for k in kinds:  # of the gradients that are there at the end, all had to be there for the ops
            steps = [int(b.state[x]["step"]) if x in b.state else 0 for x in q]
            for i, x in enumerate(q):
                grads = [y.grad.clone() for y in q]
                with torch.no_grad():
                    made(k, q)[1](grads, steps[i])
                x.new_grad = grads[i]
            for x in q:
                x.grad = x.new_grad
        for i in missing:
            p[i].grad = q[i].grad = None
        a.step()
        b.step()
        assert same(p, q), step


def test_a_projection_counts_a_missing_gradient_as_zero(device):
    p, q = parameters(), parameters()
    r = [None if n == 3 else x for n, x in enumerate(like(p, 1))]
    a, b = AdamW(p, transforms=[Project(r)]), AdamW(q)
    for step in range(3):
        give(step, p, q, missing=(1, 3))
        fastcl.project_gradients_(q, r)
        a.step()
        b.step()
        assert p[1].grad is None
        assert p[3] not in a.state
    assert same(p, q)


def test_a_projection_decides_over_all_groups_after_what_comes_before(device):
    p, q = parameters(), parameters()
    soft, apart = made("soft", p)
    r = [-x for x in like(p, 1)]
    a = SGD([{"params": p[:2]}, {"params": p[2:]}], lr=0.1, transforms=[soft, Project(r)], clip_norm=0.5)
    b = SGD(q, lr=0.1)
    for step in range(4):
        give(step, p, q)
        torch.nn.utils.clip_grad_norm_(q, 0.5)
        apart([x.grad for x in q], step)
        fastcl.project_gradients_(q, r)
        a.step()
        b.step()
    for x, y in zip(p, q, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_values_may_be_assigned_and_written_between_steps(device):
    p, q = parameters(), parameters()
    soft = SoftMask([torch.zeros(()) for _ in p])
    a, b = AdamW(p, lr=0.05, transforms=[soft]), AdamW(q, lr=0.05)
    for step in range(4):
        give(step, p, q)
        if step == 1:
            soft.importance[0].fill_(0.5)
        if step == 2:
            soft.importance = like(p, 4, torch.rand)
        if step == 3:
            soft.strength = 0.25
        reference.soft_mask_([x.grad for x in q], soft.importance, soft.strength)
        a.step()
        b.step()
    assert same(p, q)
    soft.importance = [torch.zeros(2)] * 4
    give(5, p)
    with pytest.raises(ValueError, match=r"importance\[0\] has shape \(2,\)"):
        a.step()
    assert same(p, q)


def test_added_groups_need_values(device):
    p = parameters()
    a = AdamW(p[:2], transforms=[SoftMask(like(p[:2], 1, torch.rand))])
    with pytest.raises(ValueError, match="importance has 2 entries and the optimizer 4 parameters"):
        a.add_param_group({"params": p[2:]})
    assert len(a.param_groups) == 1
    give(0, p)
    a.step()
    values = {p[0]: torch.ones(5, 3)}
    soft = SoftMask(values)
    b = AdamW(p[:2], transforms=[soft], weight_decay=0)
    soft.importance = {**values, p[2]: torch.ones(())}
    b.add_param_group({"params": p[2:]})
    before = clone(p)
    b.step()
    assert identical(p[2], before[2])
    assert not identical(p[3], before[3])


def children(p, seed=0):
    return [None if n == 2 else m < 0.3 for n, m in enumerate(like(p, seed, torch.rand))]


COMPACT_SHAPES = [(70, 130), (33,), (5,), (4, 2, 3, 3), (0, 3), (5000,)]


class TestCompactState:
    @pytest.mark.parametrize("decay", ["torch", "hf"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_as_dense(self, device, dtype, decay):
        p, q = parameters(dtype, COMPACT_SHAPES), parameters(dtype, COMPACT_SHAPES)
        masks, importance = children(p), like(p, 4, torch.rand)
        settings = {"lr": 0.05, "decay": decay, "weight_decay": 0.2, "clip_norm": 5.0}
        transforms = [SoftMask(importance), FixedMask(masks), ChildMask(0.7, 2)]
        a, b = (AdamW(x, transforms=transforms, compact_state=c, **settings) for x, c in ((p, True), (q, False)))
        for step in range(12):
            give(step, p, q, missing=(1,) if step < 2 else ())
            a.step()
            b.step()
            assert same(p, q), step
        left, right = a.state_dict()["state"], b.state_dict()["state"]
        assert all(identical(left[k][n], right[k][n]) for k in left for n in left[k])
        kept = sum(a.state[x]["exp_avg"].numel() for x in p)
        assert (
            kept == sum(x.numel() if m is None else int(m.sum()) for x, m in zip(p, masks, strict=True)) < 0.4 * sum(x.numel() for x in p)
        )

    @pytest.mark.parametrize("into", ["dense", "torch", "compact", "pickle"])
    def test_state_goes_everywhere_and_back(self, device, into, exact_root):
        p, q = parameters(shapes=COMPACT_SHAPES), parameters(shapes=COMPACT_SHAPES)
        masks = children(p)
        alone, current = (AdamW(x, lr=0.05, transforms=[FixedMask(masks)], compact_state=True) for x in (p, q))
        for step in range(9):
            give(step, p, q)
            if step == 3:
                if into == "pickle":
                    q, current = copy.deepcopy((q, current))
                    give(step, q)
                else:
                    buffer = io.BytesIO()
                    torch.save(current.state_dict(), buffer)
                    buffer.seek(0)
                    if into == "torch":
                        current = torch.optim.AdamW(q, lr=0.05)
                    else:
                        current = AdamW(q, lr=0.05, transforms=[FixedMask(masks)], compact_state=into == "compact")
                    current.load_state_dict(torch.load(buffer, weights_only=True))
            if step == 6 and into != "pickle":
                saved = current.state_dict()
                current = AdamW(q, lr=0.05, transforms=[FixedMask(masks)], compact_state=True)
                current.load_state_dict(saved)
            if isinstance(current, torch.optim.AdamW):
                fastcl.apply_gradient_mask_(q, masks)
            current.step()
            alone.step()
            assert same(p, q), step
        same_state(alone, current, p, q)

    def test_parameters_that_are_not_contiguous_keep_whole_moments(self, device):
        def lists():
            return [nn.Parameter(x.detach().to(memory_format=torch.channels_last)) for x in parameters(shapes=[(4, 3, 5, 5)])]

        p, q = lists(), lists()
        masks = [torch.rand(4, 3, 5, 5) < 0.5]
        a, b = (AdamW(x, transforms=[FixedMask(masks)], compact_state=c) for x, c in ((p, True), (q, False)))
        for step in range(3):
            give(step, p, q)
            a.step()
            b.step()
        assert same(p, q)
        assert a.state[p[0]]["exp_avg"].shape == (4, 3, 5, 5)

    def test_moments_outside_of_the_masks_are_refused(self, device):
        p = parameters()
        dense = AdamW(p)
        give(0, p)
        dense.step()
        a = AdamW(p, transforms=[FixedMask([torch.zeros(x.shape, dtype=torch.bool) for x in p])], compact_state=True)
        with pytest.raises(ValueError, match=r"state\[0\]\['exp_avg'\] of the state_dict is not zero outside of the masks"):
            a.load_state_dict(dense.state_dict())

    @pytest.mark.parametrize(
        ("transforms", "message"),
        [
            (lambda p, m: [], "needs exactly one FixedMask among the transforms, got 0"),
            (lambda p, m: [FixedMask(m), FixedMask(m)], "needs exactly one FixedMask among the transforms, got 2"),
            (lambda p, m: [FixedMask(m), Project()], "Project behind FixedMask gives gradients there"),
            (lambda p, m: [FixedMask(m), Pull({}, {}, 1.0)], "Pull behind FixedMask gives gradients there"),
        ],
    )
    def test_transforms_that_do_not_go_with_it(self, transforms, message):
        p = parameters()
        with pytest.raises(ValueError, match=message):
            AdamW(p, transforms=transforms(p, children(p)), compact_state=True)

    def test_eps_of_zero_would_divide_zero_by_zero(self):
        p = parameters()
        with pytest.raises(ValueError, match="eps must be above 0 with compact_state"):
            AdamW(p, eps=0, transforms=[FixedMask(children(p))], compact_state=True)

    def test_masks_stay(self, device):
        p = parameters()
        fixed = FixedMask(children(p))
        a = AdamW(p, transforms=[fixed], compact_state=True)
        give(0, p)
        a.step()
        fixed.masks = children(p)  # the same values
        a.step()
        before = clone(p)
        fixed.masks = children(p, seed=7)
        with pytest.raises(ValueError, match=r"masks\[\d\] has changed, and with compact_state"):
            a.step()
        assert same(p, before)

    def test_an_added_group(self, device):
        p, q = parameters(), parameters()
        masks = [BitMask.from_bool(m) if m is not None else None for m in children(p)]
        for params, compact in ((p, True), (q, False)):
            fixed = FixedMask(dict(zip(params[:2], masks[:2], strict=True)))
            a = AdamW(params[:2], lr=0.1, transforms=[fixed], compact_state=compact)
            give(0, params)
            a.step()
            fixed.masks = {x: m for x, m in zip(params, masks, strict=True) if m is not None}
            a.add_param_group({"params": params[2:]})
            for step in range(1, 4):
                give(step, params)
                a.step()
        assert same(p, q)


@pytest.mark.parametrize("late", [0, 1])
def test_a_first_gradient_that_comes_late_does_not_move_the_draws(device, late):
    p = [nn.Parameter(torch.zeros(2000)) for _ in range(2)]
    a = SGD(p, lr=1.0, momentum=0.5, transforms=[ChildMask(0.5, 7)])
    p[1 - late].grad = torch.ones(2000)
    a.step()
    before = clone(p)
    for x in p:
        x.grad = torch.ones(2000)
    buffer = a.state[p[1 - late]]["momentum_buffer"].clone()
    a.step()
    for i, x in enumerate(p):
        draws = [torch.ones(2000), torch.ones(2000)]
        fastcl.ops.child_mask_(draws, 0.5, 7, 0 if i == late else 1)
        kept = torch.zeros(2000) if i == late else 0.5 * buffer
        assert identical(before[i].detach() - x.detach(), kept + draws[i])


@pytest.mark.parametrize("late", [False, True])
def test_moments_that_compact_state_cannot_keep_are_refused_before_anything_changes(device, monkeypatch, late):
    p, q = parameters(), parameters()
    masks = [x < 0.5 for x in like(p, 3, torch.rand)]
    a, b = AdamW(p, lr=0.5), AdamW(q, lr=0.1, transforms=[FixedMask(masks)], compact_state=True)
    give(0, p, q)
    a.step()
    b.step()
    if late:  # whatever else fails behind the checks
        monkeypatch.setattr(b, "_check_loaded", lambda states: None)
    before, kept, groups = clone(q), copy.deepcopy([b.state[x] for x in q]), copy.copy(b.param_groups[0])
    with pytest.raises(ValueError, match=r"exp_avg.* is not zero outside of the masks"):
        b.load_state_dict(a.state_dict())
    assert b.param_groups[0] == groups
    assert all(identical(b.state[x][k], v) for x, s in zip(q, kept, strict=True) for k, v in s.items())
    b.step()
    assert not same(q, before)


@pytest.mark.parametrize("form", [lambda a: a, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["made", "deepcopy", "pickle"])
def test_what_an_optimizer_was_built_with_stays(device, form):
    p = parameters()
    a = AdamW(p, transforms=[FixedMask([x < 0.5 for x in like(p, 3, torch.rand)])], compact_state=True)
    give(0, p)
    a.step()
    a = form(a)
    with pytest.raises(AttributeError, match="transforms cannot be replaced; build a new optimizer"):
        a.transforms = ()
    with pytest.raises(AttributeError, match="compact_state cannot be changed; build a new optimizer"):
        a.compact_state = False
    assert isinstance(a.transforms[0], FixedMask)
    assert a.compact_state
    give(1, a.param_groups[0]["params"])
    a.step()
    assert "exp_avg" in a.state_dict()["state"][0]


@pytest.mark.parametrize("form", [lambda a: a, copy.deepcopy], ids=["made", "deepcopy"])
def test_a_mask_that_is_written_in_place_is_noticed(device, form):
    p = parameters()
    a = form(AdamW(p, transforms=[FixedMask([x < 0.5 for x in like(p, 3, torch.rand)])], compact_state=True))
    p = a.param_groups[0]["params"]
    give(0, p)
    a.step()
    saved, before, kept = a.state_dict(), clone(p), copy.deepcopy([a.state[x] for x in p])
    fixed = a.transforms[0]
    fixed.masks[1].bits.fill_(0)
    again = lambda: setattr(fixed, "masks", list(fixed.masks)) or a.step()  # noqa: E731
    for act in (a.step, a.state_dict, lambda: a.load_state_dict(saved), again):
        with pytest.raises(ValueError, match=r"masks\[1\] has been written to, and with compact_state"):
            act()
    assert same(p, before)
    assert all(identical(a.state[x][k], v) for x, s in zip(p, kept, strict=True) for k, v in s.items())


def test_names_stay_with_the_parameters_whatever_is_loaded(device):
    w, v = (nn.Parameter(torch.zeros(2, device=device)) for _ in range(2))
    optimizer = SGD([("w", w), ("v", v)], lr=1.0, transforms=[SoftMask({"w": torch.ones(2, device=device)})])
    other = torch.optim.SGD([("v", nn.Parameter(torch.zeros(2))), ("w", nn.Parameter(torch.zeros(2)))], lr=0.5)
    for names in (["v", "w"], ["v"], 7):
        saved = other.state_dict()
        saved["param_groups"][0]["param_names"] = names
        optimizer.load_state_dict(saved)
        w.grad, v.grad = torch.ones_like(w), torch.ones_like(v)
        with torch.no_grad():
            w.zero_(), v.zero_()
        optimizer.step()
        assert (w.tolist(), v.tolist()) == ([0, 0], [-0.5, -0.5])
        assert optimizer.param_groups[0]["param_names"] == ["w", "v"]


SPOILED = {
    "dtype": (
        lambda o, p: o.state[p].update(exp_avg=torch.zeros_like(p).double()),
        TypeError,
        r"param_groups\[1\]: exp_avg of params\[0\] has dtype",
    ),
    "shape": (
        lambda o, p: o.state[p].update(exp_avg=torch.zeros_like(p)[0]),
        ValueError,
        r"param_groups\[1\]: exp_avg of params\[0\] has shape \(3,\)",
    ),
    "strides": (
        lambda o, p: o.state[p].update(exp_avg_sq=torch.zeros(3, 2, device=p.device).T),
        ValueError,
        r"exp_avg_sq of params\[0\] is non-contiguous state",
    ),
    "gone": (lambda o, p: o.state[p].pop("exp_avg_sq"), ValueError, r"param_groups\[1\]: the state of params\[0\] has no 'exp_avg_sq'"),
    "parameter": (lambda o, p: setattr(p, "data", p.data.double()), TypeError, r"param_groups\[1\]: "),
    "importance": (lambda o, p: o.transforms[0].importance[1].resize_(9), ValueError, r"importance\[1\] had 6 elements and has 9 now"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILED.values(), ids=SPOILED)
def test_a_refused_step_of_several_groups_writes_nothing(device, spoil, error, message):
    a, b = (nn.Parameter(torch.ones(2, 3, device=device)) for _ in range(2))
    mask = SoftMask([torch.full((2, 3), 0.5, device=device) for _ in range(2)])
    optimizer = AdamW([{"params": [a]}, {"params": [b]}], transforms=[mask])
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    spoil(optimizer, b)
    kept, state = a.detach().clone(), {n: t.clone() for n, t in optimizer.state[a].items()}
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(a, kept)
    assert all(torch.equal(optimizer.state[a][n], t) for n, t in state.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_written_mask_is_not_copied_with_its_moments(device, copied):
    p = nn.Parameter(torch.randn(8, device=device))
    mask = BitMask.from_bool(torch.arange(8, device=device) < 4)
    optimizer = AdamW([p], transforms=[FixedMask([mask])], compact_state=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    copied(optimizer)
    mask.bits.fill_(0xF0)
    with pytest.raises(ValueError, match=r"masks\[0\] has been written to"):
        copied(optimizer)


def test_ranks_in_inference_mode_follow_the_bits():
    with torch.inference_mode():
        mask = BitMask.from_bool(torch.ones(5000, dtype=torch.bool))
        assert mask.ranks.tolist() == [0, 2048, 4096]
        mask.bits.zero_()
        assert mask.ranks.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("decay", "weight_decay"), [("torch", 0.0), ("torch", 0.1), ("hf", 0.0)])  # hf's decay makes them positive
def test_compact_state_keeps_the_sign_of_zeros_outside_of_the_child(device, decay, weight_decay):
    p = nn.Parameter(torch.full((70,), -0.0, device=device))
    chosen = torch.arange(70, device=device) % 3 == 0
    mask = FixedMask([BitMask.from_bool(chosen)])
    optimizer = AdamW([p], 0.1, weight_decay=weight_decay, decay=decay, transforms=[mask], compact_state=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert bool((p[chosen] < 0).all())
    assert bool(p.detach()[~chosen].signbit().all())
    assert not p[~chosen].any()
