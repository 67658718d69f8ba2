"""The operators adamw_ and sgd_: against their definition, torch.optim, and each transform's own op."""

from __future__ import annotations

import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fastcl
from fastcl import ops, reference
from fastcl.ops import _transforms
from fastcl.ops.optimizers import transformed_dot
from fastcl.reference import optimizers as definition
from fastcl.testing import clone, gradients, importances, largest_error, unit_roundoff
from fastcl.testing import optimizers as cases
from layouts import BROADCASTS, FLOATING, INTERPRETED, LAYOUTS, SHAPES, STORED, identical

HYPER = {"lr": 0.03, "beta1": 0.9, "beta2": 0.99, "eps": 1e-7, "weight_decay": 0.1}
MIXED = [(5, 7), (), (3, 4, 5), (0, 3), (1,), (129,)]
KINDS = ["soft_mask", "child_mask", "fixed_mask", "project", "pull"]


def state(shapes, dtype=torch.float32, device="cpu", seed=0):
    return [list(column) for column in cases._adamw_args(shapes, dtype, dtype, device, seed)]


def entry(kind, shapes, device, seed=5, other=torch.float32):
    """A transform of every parameter."""
    if kind == "soft_mask":
        return (kind, importances(shapes, other, device, seed), 0.7)
    if kind == "child_mask":
        return (kind, 0.4, 2**63 + seed)
    if kind == "fixed_mask":
        return (kind, [m.bits for m in cases.masks(shapes, device, seed)])
    if kind == "project":
        return (kind, gradients(shapes, other, device, seed), torch.tensor([-0.3], dtype=torch.float64, device=device))
    return (kind, [t.abs() for t in gradients(shapes, other, device, seed)], gradients(shapes, other, device, seed + 1), 0.2)


def run_reference(name, args, keywords):
    numbers = dict(keywords)
    front = [numbers.pop("transforms", ()), numbers.pop("places", None)]
    if name == "adamw_":
        front.append(numbers.pop("compact", None))
    front += [numbers.pop("scale", None), numbers.pop("found_inf", None)]
    if name == "adamw_":
        rest = {**HYPER, "maximize": False, "hf": numbers.pop("decay", "torch") == "hf", **numbers}
        names = ("lr", "beta1", "beta2", "eps", "weight_decay", "hf", "maximize")
    else:
        rest = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False, "first": False}
        rest.update(numbers)
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "first")
    getattr(definition, name)(*args, *front, *(rest[n] for n in names))


def check(name, args, **keywords):
    """The op and its definition, bit for bit, in everything that is written; and nothing else is."""
    expected, before = clone(args), clone((args[1], keywords))
    run_reference(name, expected, clone(keywords))
    assert getattr(ops, name)(*args, **({**HYPER, **keywords} if name == "adamw_" else {"lr": 0.1, **keywords})) is None
    for column, exact in zip(args, expected, strict=True):
        for n, (t, e) in enumerate(zip(column, exact, strict=True)):
            assert identical(t, e), f"tensor {n} of {t.dtype}, {tuple(t.shape)}, strides {t.stride()}"
    flat_before, flat_after = (torch.utils._pytree.tree_leaves(x) for x in (before, (args[1], keywords)))
    assert all(identical(a, b) for a, b in zip(flat_after, flat_before, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("decay", ["torch", "hf"])
def test_shapes(device, shapes, decay):
    check("adamw_", state(shapes, device=device), decay=decay)
    p, g, m, _, t = state(shapes, device=device)
    check("sgd_", [p, g, m, t], momentum=0.9, nesterov=decay == "hf", weight_decay=0.1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("grad", FLOATING, ids=str)
def test_dtypes(device, dtype, grad):
    args = state(MIXED, dtype, device)
    args[1] = [g.to(grad) for g in args[1]]
    check("adamw_", args, transforms=[entry(k, MIXED, device) for k in KINDS])
    p, g, m, _, t = state(MIXED, dtype, device)
    check("sgd_", [p, g, m, t], momentum=0.9, dampening=0.1, transforms=[entry(k, MIXED, device) for k in KINDS])
    check("sgd_", [p, g, [], []], weight_decay=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", STORED, ids=str)
def test_operands_of_every_dtype(device, kind, other):
    if other == torch.uint8 and kind != "soft_mask":
        return
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check("adamw_", state(MIXED, dtype, device), transforms=[entry(kind, MIXED, device, other=other)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", LAYOUTS)
def test_strides(device, layout, others):
    shapes = [(6, 10), (2, 3, 4, 5), (33,), ()]
    p, g, m, v, t = state(shapes, device=device)

    def laid(tensors, name):
        return [LAYOUTS[name](x) for x in tensors]

    transforms = [entry(k, shapes, device) for k in KINDS]
    for k in (0, 3, 4):
        kind, *rest = transforms[k]
        transforms[k] = (kind, *(laid(r, others) if isinstance(r, list) else r for r in rest))
    check("adamw_", [laid(p, layout), laid(g, others), laid(m, layout), laid(v, layout), t], transforms=transforms)


@pytest.mark.parametrize("form", BROADCASTS)
def test_broadcast_importance(device, form):
    shapes = [(6, 10), (2, 3, 4, 5), (33,), (), (1, 7)]
    for stored in (torch.float32, torch.uint8):
        soft = ("soft_mask", importances([BROADCASTS[form](s) for s in shapes], stored, device, 1), 0.9)
        check("adamw_", state(shapes, device=device), transforms=[soft])


def test_expanded_gradients(device):
    p, g, m, v, t = state([(4, 5), (3, 4)], device=device)
    check("adamw_", [p, [g[0][:1].expand(4, 5), torch.ones((), device=device).expand(3, 4)], m, v, t])


@pytest.mark.parametrize("order", list(itertools.permutations(KINDS))[::7], ids=str)
def test_any_order_of_transforms(device, order):
    check("adamw_", state(MIXED, device=device), transforms=[entry(k, MIXED, device, seed=n) for n, k in enumerate(order)], maximize=True)


def test_what_is_absent_is_left_out(device):
    shapes = [(5, 7), (40,), (0, 3)]
    for kind in ("soft_mask", "fixed_mask", "project", "pull"):
        kind_, *rest = entry(kind, shapes, device)
        nothing = torch.empty(0, dtype=torch.uint8 if kind == "fixed_mask" else torch.float32, device=device)
        rest[0] = [nothing, *rest[0][1:]]
        args = state(shapes, device=device)
        plain = clone(args)
        check("adamw_", args, transforms=[(kind_, *rest)])
        ops.adamw_(*plain, **HYPER)
        assert identical(args[0][0], plain[0][0])
        assert not identical(args[0][1], plain[0][1])


def own_op(kind, rest, grads, params, step, scale):
    if kind == "soft_mask":
        ops.soft_mask_(grads, *rest)
    elif kind == "child_mask":
        reference.child_mask_(grads, *rest, step)
    elif kind == "fixed_mask":
        reference.bit_mask_(grads, rest[0])
    elif kind == "project":
        for g, r in zip(grads, rest[0], strict=True):
            g.copy_(g.double() + rest[1] * r.double())
    else:
        reference.ewc_pull_(grads, params, *rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_transform_is_its_own_op_before_the_step(device, kind, dtype):
    shapes = [(33, 5), (70,)]
    args = state(shapes, dtype, device)
    apart = clone(args)
    transform = entry(kind, shapes, device, other=dtype)
    ops.adamw_(*args, **HYPER, transforms=[transform])
    own_op(kind, transform[1:], apart[1], apart[0], cases.STEPS, None)
    ops.adamw_(*apart, **HYPER)
    for column, other in zip((args[0], *args[2:]), (apart[0], *apart[2:]), strict=True):
        assert all(identical(a, b) for a, b in zip(column, other, strict=True))


def torchs_step(args, lr, beta1, beta2, eps, weight_decay):
    """One step of torch.optim.AdamW with its square root made exact: what it returns on processors where it is."""
    theirs = [torch.nn.Parameter(x.clone()) for x in args[0]]
    optimizer = torch.optim.AdamW(theirs, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, foreach=False)
    for q, g, m, v, t in zip(theirs, *args[1:], strict=True):
        q.grad = g.clone()
        optimizer.state[q] = {"step": t.clone(), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "step")
    return [[q.detach() for q in theirs], args[1], *([optimizer.state[q][n] for q in theirs] for n in names)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("steps", [0.0, 3.0, 9999.0])
def test_torch_order_is_torchs_but_for_its_square_root(device, dtype, betas, steps):
    if device != "cpu":
        pytest.skip("torch's own bits differ between devices")
    args = state([(33, 70), (129,), ()], dtype)
    args[4] = [torch.full((), steps) for _ in args[4]]
    hyper = {"lr": 0.01, "beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "weight_decay": 0.2}
    theirs, before = torchs_step(args, **hyper), clone(args)
    ops.adamw_(*args, **hyper)
    for n in (2, 3, 4):
        assert all(identical(a, b) for a, b in zip(args[n], theirs[n], strict=True))
    for a, b, p in zip(args[0], theirs[0], before[0], strict=True):
        # The root's one ulp moves the update by as much, and the sum is rounded once.
        ulp = torch.finfo(dtype).eps
        assert bool(((a - b).abs() <= ulp * (2 * (a - 0.998 * p).abs() + torch.maximum(a.abs(), b.abs()))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_hf_order_is_eager_code(device, dtype, decay):
    if device != "cpu":
        pytest.skip("torch's own bits differ between devices")
    args = state([(33, 70), (129,), ()], dtype)
    expected = clone(args)
    for step in range(cases.STEPS + 1, cases.STEPS + 6):
        ops.adamw_(*args, **{**HYPER, "weight_decay": decay}, decay="hf")
        for p, g, m, v, t in zip(*expected, strict=True):
            t += 1
            m.mul_(0.9).add_(g, alpha=1 - 0.9)
            v.mul_(0.99).addcmul_(g, g, value=1 - 0.99)
            size = 0.03 * math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
            p.addcdiv_(m, definition._root(v).add_(1e-7), value=-size)
            if decay:
                p.add_(p, alpha=-0.03 * decay)
    assert all(identical(a, b) for x, y in zip(args, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0.0, 3.0, 700.0])
def test_torch_order_has_torchs_bits_with_an_exact_square_root(device, dtype, steps, exact_root):
    if device != "cpu":
        pytest.skip("torch's own bits differ between devices")
    args = state([(33, 70), (129,), ()], dtype)
    args[4] = [torch.full((), steps) for _ in args[4]]
    theirs = torchs_step(args, **HYPER)
    ops.adamw_(*args, **HYPER)
    assert all(identical(a, b) for x, y in zip(args, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_square_root_of_the_definition(dtype):
    values = torch.rand(10_000, dtype=dtype, generator=torch.Generator().manual_seed(1))
    values = torch.cat([values, torch.tensor([0.0, math.inf, math.nan, -1.0, 1e-300 if dtype == torch.float64 else 1e-40], dtype=dtype)])
    with np.errstate(invalid="ignore"):
        exact = torch.from_numpy(np.sqrt(values.numpy()))
    assert identical(definition._root(values), exact)


@pytest.mark.parametrize("decay", ["torch", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_compact_moments_are_the_dense_ones(device, dtype, decay):
    shapes = [(70, 130), (5,), (2048 * 3 + 5,)]
    p, g, m, v, t, transforms, compact = cases._compact_args(shapes, dtype, dtype, device)
    bools = [x.to_bool() for x in cases.masks(shapes, device, 0)]
    whole = [
        [torch.zeros(x, dtype=c[0].dtype, device=device).masked_scatter_(b, y) for x, b, y in zip(shapes, bools, c, strict=True)]
        for c in (m, v)
    ]
    dense = clone([p, g, *whole, t])
    check("adamw_", [p, g, m, v, t], transforms=transforms, compact=compact, decay=decay)
    for n in range(3):
        ops.adamw_(*dense, **HYPER, transforms=transforms, decay=decay)
        if n:  # the first was checked above
            ops.adamw_(p, g, m, v, t, **HYPER, transforms=transforms, compact=compact, decay=decay)
    assert all(identical(a, b) for a, b in zip(p, dense[0], strict=True))
    for column, own in zip(dense[2:4], (m, v), strict=True):
        assert all(identical(x[b], y) for x, b, y in zip(column, bools, own, strict=True))
        assert not any(x[~b].any() for x, b in zip(column, bools, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_lr_and_found_inf_are_read_on_the_device(device, dtype):
    scale = torch.tensor(2.0**-7, dtype=dtype, device=device)
    lr = torch.tensor(0.05, dtype=dtype, device=device)
    check("adamw_", state(MIXED, device=device), scale=scale, lr=lr, found_inf=torch.zeros(1, device=device))
    p, g, m, _, t = state(MIXED, device=device)
    check("sgd_", [p, g, m, t], momentum=0.9, lr=lr, scale=scale, first=True, found_inf=torch.zeros((), device=device))
    for found in (1.0, math.inf, math.nan, 1e-40):
        args = state(MIXED, device=device)
        before = clone(args)
        check("adamw_", args, found_inf=torch.tensor(found, device=device), transforms=[entry(k, MIXED, device) for k in KINDS])
        ops.sgd_(args[0], args[1], args[2], args[4], lr=0.1, momentum=0.9, first=True, found_inf=torch.tensor([found], device=device))
        assert all(identical(a, b) for x, y in zip(args, before, strict=True) for a, b in zip(x, y, strict=True)), found


def test_places_shift_the_draws(device):
    whole, part = state([(8, 6)], device=device), state([(8, 6)], device=device)
    other = [[x[0], x[0][3:]] for x in whole[:4]]
    other = [[torch.zeros(1, device=device), o[1].clone()] for o in other]
    steps = [torch.full((), 3.0, device=device) for _ in range(2)]
    ops.adamw_(*whole, **HYPER, transforms=[("child_mask", 0.5, 7)])
    check("adamw_", [*clone(other), clone(steps)], transforms=[("child_mask", 0.5, 7)], places=[(1, 0, (1,)), (0, 18, (6, 1))])
    ops.adamw_(*other, steps, **HYPER, transforms=[("child_mask", 0.5, 7)], places=[(1, 0, (1,)), (0, 18, (6, 1))])
    assert identical(other[0][1], whole[0][0][3:])
    assert part[0][0].shape == (8, 6)


def test_each_parameter_draws_by_its_own_step(device):
    args = state([(500,), (500,)], device=device)
    args[4][1].fill_(9)
    check("adamw_", args, transforms=[("child_mask", 0.5, 0)])
    assert [float(t) for t in args[4]] == [4, 10]


@pytest.mark.parametrize("where", [0, 64, 128])
def test_nan_and_inf_propagate(device, where):
    for value in (math.nan, math.inf):
        args = state([(129,), (129,)], device=device)
        args[1][0][where] = value
        check("adamw_", args)
        assert not args[0][0][where].isfinite()
        assert int((~args[0][0].isfinite()).sum()) == 1


def test_threads_do_not_change_the_bits(device):
    shapes = [(70_001,), (33, 1000), (5,)]
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            args = state(shapes, device=device)
            ops.adamw_(*args, **HYPER, transforms=[entry(k, shapes, device) for k in KINDS])
            args.append([transformed_dot(*args[:2], args[4], [entry("child_mask", shapes, device)], None, None, args[1])])
        finally:
            torch.set_num_threads(before)
        results.append(args)
    assert all(identical(a, b) for x, y in zip(*results, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("count", range(4))
def test_transformed_dot(device, count):
    p, g, _, _, t = state(MIXED, device=device)
    transforms = [entry(k, MIXED, device) for k in ("soft_mask", "child_mask", "fixed_mask")[:count]]
    r = gradients(MIXED, torch.bfloat16, device, 8)
    scale = torch.tensor(0.25, device=device)
    found = transformed_dot(p, g, t, transforms, None, scale, r)
    written = [x * 0.25 for x in g]
    for kind, *rest in transforms:
        own_op(kind, rest, written, p, cases.STEPS, None)
    products = [float((a.double() * b.double()).sum()) for a, b in ((w, x) for w, x in zip(written, r, strict=True))]
    size = sum(float((a.double() * b.double()).abs().sum()) for a, b in zip(written, r, strict=True))
    assert found.dtype == torch.float64
    assert abs(float(found[0]) - math.fsum(products)) <= 4 * unit_roundoff(torch.float64) * 1000 * size
    assert abs(float(found[1] - sum((x.double() ** 2).sum() for x in r))) <= 1e-12 * float(found[1])
    assert all(float(s) == cases.STEPS for s in t)


def test_writes_are_seen_by_autograd(device):
    for n in (0, 2, 3, 4):
        args = state([(4,)], device=device)
        x = torch.ones((4,) if n < 4 else (), device=device, requires_grad=True)
        y = x.exp()
        args[n][0] = y.detach()
        with torch.no_grad():
            ops.adamw_(*args, **HYPER)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("several", [False, True])
def test_opcheck(device, several):
    args = state([(4, 5), (7,)], device=device)
    transforms = [entry(k, [(4, 5), (7,)], device) for k in KINDS] if several else []
    flat = _transforms.flatten(transforms)
    found = torch.zeros((), device=device)
    numbers = (None, None, found, None)
    torch.library.opcheck(torch.ops.fastcl.adamw_.default, (*args, *flat, [], [], None, found, None, *HYPER.values(), False, False))
    p, g, m, _, t = args
    rest = (0.9, 0.1, 0.01, False, False, True)
    torch.library.opcheck(torch.ops.fastcl.sgd_.default, (p, g, m, t, *flat, [], None, None, torch.tensor(0.1, device=device), 0.0, *rest))
    torch.library.opcheck(torch.ops.fastcl.transformed_dot.default, (p, g, t, *flat, [], None, g))
    assert numbers[2] is found


def test_compile_fullgraph(device):
    torch._dynamo.reset()
    shapes = [(6, 10), (7,)]

    @torch.compile(fullgraph=True)
    def step(p, g, m, v, t, importance):
        doubled = [2 * x for x in g]
        ops.adamw_(p, doubled, m, v, t, **HYPER, transforms=[("soft_mask", importance, 0.5), ("child_mask", 0.5, 2**64 - 1)])
        return [x.sum() for x in p]

    args, importance = state(shapes, device=device), importances(shapes, torch.float32, device, 1)
    expected = clone(args)
    run_reference(
        "adamw_",
        [expected[0], [2 * x for x in expected[1]], *expected[2:]],
        {"transforms": [("soft_mask", importance, 0.5), ("child_mask", 0.5, 2**64 - 1)]},
    )
    sums = step(*args, importance)
    for x, y in zip(args, expected, strict=True):
        assert all(identical(a, b) for a, b in zip(x, y, strict=True))
    assert all(torch.allclose(a, b.sum()) for a, b in zip(sums, expected[0], strict=True))


@hypothesis.given(
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple),
    dtype=st.sampled_from(FLOATING),
    kinds=st.lists(st.sampled_from(KINDS), max_size=4),
    layout=st.sampled_from(list(LAYOUTS)),
    lr=st.floats(0, 10),
    # With 0 torch's own lerp gives a zero one sign in vectors and the other behind them.
    betas=st.tuples(st.floats(1e-3, 0.999), st.floats(0, 0.999)),
    decay=st.sampled_from(["torch", "hf"]),
    seed=st.integers(0, 999),
)
@hypothesis.settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_call(device, shape, dtype, kinds, layout, lr, betas, decay, seed):
    shapes = [shape, (3,)]
    columns = state(shapes, dtype, device, seed)
    args = [[LAYOUTS[layout](x) for x in column] for column in columns[:4]]
    transforms = [entry(k, shapes, device, seed=seed + n) for n, k in enumerate(kinds)]
    check("adamw_", [*args, columns[4]], transforms=transforms, lr=lr, beta1=betas[0], beta2=betas[1], decay=decay)


def test_float64_is_no_worse_than_torch(device):
    args = state([(1000,), (30, 40)], torch.bfloat16, device)
    exact = clone(args, torch.float64)
    run_reference("adamw_", exact, {})
    ops.adamw_(*args, **HYPER)
    largest = max(float(e.abs().max()) for e in exact[0])
    assert largest_error(args[0], exact[0]) <= (unit_roundoff(torch.bfloat16) + 8 * unit_roundoff(torch.float32)) * largest


def replaced(args, n, i, value):
    column = list(args[n])
    column[i] = value
    return [*args[:n], column, *args[n + 1 :]]


BAD = {
    "length": (lambda a: ([a[0], a[1][:1], *a[2:]], {}), ValueError, "grads has 1 tensors and params has 2"),
    "grad shape": (lambda a: (replaced(a, 1, 1, a[1][1][:2]), {}), ValueError, r"grads\[1\] has shape \(2, 4\), params\[1\]"),
    "sparse": (lambda a: (replaced(a, 1, 0, a[1][0].to_sparse()), {}), TypeError, r"grads\[0\] must be a dense tensor"),
    "complex": (lambda a: (replaced(a, 0, 0, a[0][0].cfloat()), {}), TypeError, r"params\[0\] has dtype complex64"),
    "state dtype": (lambda a: (replaced(a, 2, 0, a[2][0].double()), {}), TypeError, r"exp_avgs\[0\] has dtype torch.float64; the state"),
    "state strides": (
        lambda a: (replaced(a, 3, 1, a[3][1].t().contiguous().t()), {}),
        ValueError,
        r"exp_avg_sqs\[1\] is non-contiguous state",
    ),
    "state shape": (lambda a: (replaced(a, 3, 0, a[3][1]), {}), ValueError, r"exp_avg_sqs\[0\] has shape \(3, 4\)"),
    "step dtype": (lambda a: (replaced(a, 4, 0, a[4][0].double()), {}), TypeError, r"steps\[0\] has dtype float64"),
    "step shape": (lambda a: (replaced(a, 4, 0, a[4][0][None]), {}), ValueError, r"steps\[0\] has shape \(1,\); a step is 0-d"),
    "device": (lambda a: (replaced(a, 2, 0, a[2][0].to("meta")), {}), ValueError, r"exp_avgs\[0\] is on meta"),
    "shared state": (lambda a: (replaced(a, 3, 0, a[2][0]), {}), ValueError, r"exp_avg(_sq)?s\[0\] and exp_avg(_sq)?s\[0\] share memory"),
    "gradient is the parameter": (lambda a: (replaced(a, 1, 0, a[0][0]), {}), ValueError, "share memory"),
    "same step": (lambda a: (replaced(a, 4, 0, a[4][1]), {}), ValueError, r"steps\[\d\] and steps\[\d\] share memory"),
    "records": (lambda a: (replaced(a, 0, 0, a[0][0].clone().requires_grad_()), {}), ValueError, r"params\[0\] requires grad"),
    "NaN lr": (lambda a: (a, {"lr": math.nan}), ValueError, "lr must be a finite number >= 0, got nan"),
    "negative lr": (lambda a: (a, {"lr": -1.0}), ValueError, "lr must be a finite number >= 0, got -1"),
    "lr shape": (lambda a: (a, {"lr": torch.ones(1)}), ValueError, r"lr has shape \(1,\)"),
    "beta": (lambda a: (a, {"beta2": 1.0}), ValueError, r"beta2 must be in \[0, 1\)"),
    "eps": (lambda a: (a, {"eps": -1.0}), ValueError, "eps must be a finite number >= 0"),
    "order": (lambda a: (a, {"decay": "adam"}), ValueError, "decay must be one of torch, hf, got 'adam'"),
    "scale": (lambda a: (a, {"scale": torch.ones(1)}), ValueError, "scale must be 0-d"),
    "found_inf": (lambda a: (a, {"found_inf": torch.ones(2)}), ValueError, "found_inf must be of one element"),
    "transform": (lambda a: (a, {"transforms": [("mask", 1)]}), TypeError, r"transforms\[0\] must be a tuple that begins with one of"),
    "operands": (lambda a: (a, {"transforms": [("soft_mask", a[1])]}), TypeError, "soft_mask with 1 operands; it takes 2"),
    "keep": (lambda a: (a, {"transforms": [("child_mask", 0.0, 1)]}), ValueError, r"keep must be in \(0, 1\], got 0"),
    "large keep": (lambda a: (a, {"transforms": [("child_mask", 1.1, 1)]}), ValueError, r"keep must be in \(0, 1\], got 1.1"),
    "seed": (lambda a: (a, {"transforms": [("child_mask", 0.5, 2**64)]}), ValueError, "seed must be an integer in"),
    "importance": (
        lambda a: (a, {"transforms": [("soft_mask", [a[1][0], a[1][1][:2]], 1.0)]}),
        ValueError,
        r"importance\[1\] has shape \(2, 4\), which does not broadcast to params\[1\]",
    ),
    "missing": (
        lambda a: (a, {"transforms": [("soft_mask", [a[1][0], None], 1.0)]}),
        TypeError,
        r"importance\[1\] must be a tensor, got NoneType",
    ),
    "few": (lambda a: (a, {"transforms": [("soft_mask", a[1][:1], 1.0)]}), ValueError, "importance has 1 tensors and params has 2"),
    "bits": (
        lambda a: (a, {"transforms": [("fixed_mask", [torch.ones(2, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8)])]}),
        ValueError,
        r"masks\[0\] has shape \(2,\); for params\[0\] of shape \(5,\) the bits are a contiguous \[1\]",
    ),
    "reference": (
        lambda a: (a, {"transforms": [("project", [a[2][0], a[2][1][:, :3]], torch.ones(1, dtype=torch.float64))]}),
        ValueError,
        r"reference\[1\] has shape \(3, 3\)",
    ),
    "coefficient": (lambda a: (a, {"transforms": [("project", a[1], torch.ones(1))]}), TypeError, r"coefficient\[0\] has dtype float32"),
    "strength": (lambda a: (a, {"transforms": [("pull", a[1], a[1], -1.0)]}), ValueError, "strength must be a finite number >= 0"),
    "compact": (
        lambda a: (
            a,
            {"compact": ([torch.ones(1, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)], [torch.zeros(2, dtype=torch.int64)] * 2)},
        ),
        ValueError,
        r"compact ranks\[0\] has shape \(2,\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    if device != "cpu" and kind in ("lr shape", "scale", "found_inf", "bits", "coefficient", "compact", "reference"):
        pytest.skip("made on the CPU")
    make, error, message = BAD[kind]
    args = state([(5,), (3, 4)], device=device)
    before = clone(args)
    called, keywords = make(args)
    with pytest.raises(error, match=message):
        ops.adamw_(*called, **{**HYPER, **keywords})
    assert all(identical(a, b) for x, y in zip(args, before, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p, g, m, t: ((p, g, m), {"momentum": 0.0}), ValueError, "momentum_buffers has 2 tensors and momentum is 0"),
        (lambda p, g, m, t: ((p, g), {"momentum": 0.9}), ValueError, "momentum_buffers has 0 tensors and params has 2"),
        (lambda p, g, m, t: ((p, g), {"transforms": [("child_mask", 0.5, 0)]}), ValueError, "steps has 0 tensors and params has 2"),
        (lambda p, g, m, t: ((p, g), {"momentum": math.nan}), ValueError, "momentum must be a finite number"),
        (lambda p, g, m, t: ((p, g, m), {"momentum": 0.9, "dampening": -1}), ValueError, "dampening must be a finite number >= 0"),
        (lambda p, g, m, t: ((p, g), {"lr": math.inf}), ValueError, "lr must be a finite number >= 0, got inf"),
    ],
)
def test_bad_input_of_sgd(device, make, error, message):
    p, g, m, _, t = state([(5,), (3, 4)], device=device)
    before = clone([p, m])
    args, keywords = make(p, g, m, t)
    with pytest.raises(error, match=message):
        ops.sgd_(*args, **{"lr": 0.1, **keywords})
    assert all(identical(a, b) for x, y in zip([p, m], before, strict=True) for a, b in zip(x, y, strict=True))


def test_public_names():
    assert {"adamw_", "sgd_"} <= set(ops.__all__)
    assert fastcl.ops.adamw_ is ops.adamw_
