"""The functions that work on a model's ``.grad``: projections, and taking gradients aside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastcl
from fastcl import ops
from layouts import identical


def model(device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)


def loss(net, seed, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.randn(5, 6, generator=gen).to(device), torch.randint(0, 3, (5,), generator=gen).to(device)
    return functional.cross_entropy(net(x), y)


def captured(net, seed, sign=1.0, device="cpu"):
    with fastcl.capture_gradients(net) as reference:
        (sign * loss(net, seed, device)).backward()
    return reference


def test_capture_leaves_the_own_gradients_and_copies_nothing(device):
    net = model(device)
    loss(net, 0, device).backward()
    own = [p.grad for p in net.parameters()]
    values, versions = [g.clone() for g in own], [g._version for g in own]
    seen = []
    with fastcl.capture_gradients(net) as reference:
        assert reference == []
        assert all(p.grad is None for p in net.parameters())
        loss(net, 1, device).backward()
        seen = [p.grad for p in net.parameters()]
    assert all(a is b for a, b in zip(reference, seen, strict=True))
    assert all(p.grad is g for p, g in zip(net.parameters(), own, strict=True))
    assert [g._version for g in own] == versions
    assert all(identical(g, v) for g, v in zip(own, values, strict=True))


def test_capture_of_missing_frozen_and_accumulated_gradients():
    net = model()
    net[0].weight.requires_grad_(False)
    captured_first = captured(net, 0)
    assert captured_first[0] is None
    assert all(g is not None for g in captured_first[1:])
    assert all(p.grad is None for p in net.parameters())
    with fastcl.capture_gradients(net) as reference:
        loss(net, 0).backward()
        loss(net, 0).backward()
    torch.testing.assert_close(reference[1], 2 * captured_first[1])


def test_capture_puts_the_gradients_back_when_the_block_raises():
    net = model()
    loss(net, 0).backward()
    own = [p.grad for p in net.parameters()]
    context = fastcl.capture_gradients(net)
    reference = context.__enter__()
    loss(net, 1).backward()
    with pytest.raises(KeyError):
        context.gen.throw(KeyError())
    assert reference == []
    assert all(p.grad is g for p, g in zip(net.parameters(), own, strict=True))


def test_captures_nest():
    net = model()
    with fastcl.capture_gradients(net) as outer:
        loss(net, 0).backward()
        with fastcl.capture_gradients(net) as inner:
            loss(net, 1).backward()
    assert all(identical(a, b) for a, b in zip(outer, captured(net, 0), strict=True))
    assert all(identical(a, b) for a, b in zip(inner, captured(net, 1), strict=True))


def test_gradients_that_are_views_of_a_bucket_survive_the_block():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    bucket = torch.arange(7.0)
    p.grad, q.grad = bucket[:3], bucket[3:]
    with fastcl.capture_gradients([p, q]) as reference:
        bucket.fill_(-1)  # as a reducer does before it hands its buffer out again
        p.grad, q.grad = bucket[:3], bucket[3:]
    assert p.grad.tolist() == [0, 1, 2]
    assert q.grad.tolist() == [3, 4, 5, 6]
    assert reference[0].tolist() == [-1] * 3


def test_a_block_that_writes_over_the_own_gradients_is_an_error():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    same = p.grad
    context = fastcl.capture_gradients([p])
    with pytest.raises(RuntimeError, match=r"gradient of params\[0\].*gradient_as_bucket_view=False"), context:
        p.grad = same
    assert p.grad is same


@pytest.mark.parametrize("bad", [torch.ones(3), 5, [1, 2]])
def test_capture_refuses_what_has_no_parameters(bad):
    with pytest.raises(TypeError, match="params"), fastcl.capture_gradients(bad):
        pass


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def test_project_gradients_is_the_op_on_all_gradients(device):
    net = model(device)
    loss(net, 0, device).backward()
    reference = captured(net, 0, -1.0, device)
    g, r = flat([p.grad for p in net.parameters()]), flat(reference)
    info = fastcl.project_gradients_(net, reference)
    torch.testing.assert_close(flat([p.grad for p in net.parameters()]), g - (g @ r) / (r @ r) * r, rtol=0, atol=1e-7)
    assert bool(info.violated)
    assert abs(float(ops.grad_dot([p.grad for p in net.parameters()], reference))) < 1e-6


def test_missing_gradients_are_made_where_the_projection_writes(device):
    net = model(device)
    loss(net, 0, device).backward()
    reference = captured(net, 0, -1.0, device)
    params = list(net.parameters())
    dense = [p.grad.clone() for p in params]
    dense[2].zero_()
    want = ops.project_(dense, reference)
    params[2].grad = None
    got = fastcl.project_gradients_(iter(params), reference)
    assert all(identical(p.grad, d) for p, d in zip(params, dense, strict=True))
    assert torch.equal(torch.stack(got[:2]), torch.stack(want[:2]))
    reference[1] = params[1].grad = None
    fastcl.gem_project_gradients_(params, [reference, reference])
    assert params[1].grad is None


def test_gem_projects_against_every_memory():
    net = model()
    loss(net, 0).backward()
    memories = [captured(net, seed, -1.0) for seed in (0, 3, 4)]
    info = fastcl.gem_project_gradients_(net, memories, margin=0.0, ridge=0.0)
    assert bool(info.violated)
    after = [p.grad for p in net.parameters()]
    assert all(float(ops.grad_dot(m, after)) > -1e-5 * float(ops.grad_dot(m, m)) for m in memories)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, r: fastcl.project_gradients_(net, r[:-1]), ValueError, "reference has 5 tensors and params has 6"),
        (lambda net, r: fastcl.project_gradients_(net, r[0]), TypeError, "reference must be a list or tuple with a tensor or None"),
        (lambda net, r: fastcl.project_gradients_(net[0].weight, r), TypeError, "params must be a Module or an iterable"),
        (lambda net, r: fastcl.project_gradients_(net, [t.int() for t in r]), TypeError, r"reference\[0\] has dtype int32"),
        (lambda net, r: fastcl.project_gradients_(net, [*r[:1], r[1][:2], *r[2:]]), ValueError, r"reference\[1\] has shape"),
        (lambda net, r: fastcl.project_gradients_(net, [p.grad for p in net.parameters()]), ValueError, "share memory"),
        (lambda net, r: fastcl.gem_project_gradients_(net, r), TypeError, r"memories\[0\] must be a list or tuple with a tensor or None"),
        (lambda net, r: fastcl.gem_project_gradients_(net, []), ValueError, "memories has 0 lists"),
        (lambda net, r: fastcl.gem_project_gradients_(net, [r], margin=-1), ValueError, "margin must be"),
    ],
)
def test_bad_input_changes_nothing(call, error, message):
    net = model()
    loss(net, 0).backward()
    reference = captured(net, 0, -1.0)
    list(net.parameters())[3].grad = None
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    with pytest.raises(error, match=message):
        call(net, reference)
    assert all((p.grad is None and b is None) or identical(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))


def test_a_scaler_skips_a_step_whose_reference_overflowed():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in net.parameters()]
    scaler.scale(loss(net, 0)).backward()
    reference = captured(net, 1)
    reference[0][0, 0] = float("inf")
    fastcl.project_gradients_(net, reference)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 4.0


def test_what_no_longer_fits_is_named_and_the_others_are_put_back():
    net = model()
    loss(net, 0).backward()
    own = [p.grad for p in net.parameters()]
    context = fastcl.capture_gradients(net)
    context.__enter__()
    net[2].weight.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"params\[2\] changed its shape"):
        context.__exit__(None, None, None)
    assert all(p.grad is g for n, (p, g) in enumerate(zip(net.parameters(), own, strict=True)) if n != 2)


def test_gradients_in_a_flat_buffer_stay_there():
    net = model()
    buffer = torch.zeros(sum(p.numel() for p in net.parameters()))
    at = 0
    for p in net.parameters():
        p.grad = buffer[at : at + p.numel()].view_as(p)
        at += p.numel()
    loss(net, 0).backward()
    own, values = [p.grad for p in net.parameters()], buffer.clone()
    captured(net, 1)
    assert all(p.grad is g for p, g in zip(net.parameters(), own, strict=True))
    assert torch.equal(buffer, values)
