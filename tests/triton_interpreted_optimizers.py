"""The optimizers' Triton kernels against the reference, bit for bit, in the interpreter; see triton_interpreted.py."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.kernels import optimizers
from fastcl.reference import optimizers as defined
from fastcl.reference.bit_mask import pack, set_bits
from layouts import identical

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [(2048,), (2500,), (23, 11), (3, 4, 5), (), (0, 2), (2, 700)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)), dtype=F64).to(dtype)


def laid_out(tensors: list[Tensor]) -> list[Tensor]:
    """Of a matrix the transpose in memory, of a tensor of 3 dims another order, the others as they are."""
    return [
        t.t().contiguous().t() if t.dim() == 2 and len(t) > 20 else t.transpose(0, 2).contiguous().transpose(0, 2) if t.dim() == 3 else t
        for t in tensors
    ]


def params(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return laid_out([normal(s, seed, dtype) for s in SHAPES])


def compute(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def kept(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in tensors]


def steps(first: float = 0.0) -> list[Tensor]:
    return [torch.tensor(first + n) for n in range(len(SHAPES))]


def absent(tensors: list[Tensor], *at: int) -> list[Tensor]:
    return [t.new_empty(0) if n in at else t for n, t in enumerate(tensors)]


BITS = [pack(normal(s, 9) > 0.4) for s in SHAPES]
IMPORTANCE = [normal(s, 8).abs().clamp(max=1) for s in SHAPES]
# One value for all, one for each row, 8 bits, and a tensor that is left out.
SOFT = absent([IMPORTANCE[0].mean(), *IMPORTANCE[1:6], torch.tensor([[255], [3]], dtype=torch.uint8)], 3)
REFERENCE = absent([normal(s, 7, BF16) for s in SHAPES], 1)
PRECISION, ANCHOR = absent([normal(s, 6).abs() for s in SHAPES], 2), absent(laid_out([normal(s, 5, F64) for s in SHAPES]), 2)
HALF, NOTHING = torch.tensor([0.5], dtype=F64), torch.tensor([0.0], dtype=F64)
TRANSFORMS: dict[str, list[tuple[Any, ...]]] = {
    "none": [],
    "soft_mask": [("soft_mask", SOFT, 0.7)],
    "child_mask": [("child_mask", 0.3, (1 << 64) - 5)],
    "fixed_mask": [("fixed_mask", absent(BITS, 0))],
    "project": [("project", REFERENCE, HALF)],
    "project by 0": [("project", [torch.full(s, math.inf) for s in SHAPES], NOTHING)],
    "pull": [("pull", PRECISION, ANCHOR, 0.1)],
    "all": [
        ("pull", PRECISION, ANCHOR, 0.1),
        ("child_mask", 0.6, 3),
        ("fixed_mask", BITS),
        ("project", REFERENCE, HALF),
        ("soft_mask", SOFT, 1 / 3),
        ("child_mask", 0.9, 4),
    ],
}
PLACES = [(3 * n, 8 * n + n % 2, [2] * len(s)) for n, s in enumerate(SHAPES)]


def adamw(dtype: torch.dtype, grad: torch.dtype, transforms: list[tuple[Any, ...]], *, first: float = 0.0, **options: Any) -> list[Tensor]:
    state = compute(dtype)
    written = [params(dtype), params(state, 1), [v.abs() for v in params(state, 2)], steps(first)]
    given = {"places": None, "compact": None, "scale": None, "found_inf": None, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    given |= {"weight_decay": 0.1, "hf": False, "maximize": False} | options
    return run("adamw_", written, [normal(s, 3, grad) for s in SHAPES], transforms, **given)


def run(name: str, written: list[list[Tensor]], grads: list[Tensor], transforms: list[tuple[Any, ...]], **given: Any) -> list[Tensor]:
    results = []
    for module in (optimizers, defined):
        copies = [kept(tensors) for tensors in written]
        getattr(module, name)(copies[0], grads, *copies[1:], transforms, **given)
        results.append([t for tensors in copies for t in tensors])
    for n, (a, b) in enumerate(zip(*results, strict=True)):
        assert identical(a, b), n
    return results[0]


DTYPES = [(F32, F32), (F64, F32), (BF16, BF16), (F16, F32)]


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_adamw_with_transforms(transforms: str) -> None:
    adamw(F32, F32, TRANSFORMS[transforms])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hf", [False, True], ids=["torch", "hf"])
def test_adamw(dtype: tuple[torch.dtype, torch.dtype], hf: bool) -> None:
    for transforms in ("none", "all"):
        adamw(*dtype, TRANSFORMS[transforms], hf=hf, maximize=hf, places=PLACES, scale=torch.tensor(0.37, dtype=F64), first=10.0 * hf)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor(1e-2)},
        {"lr": torch.tensor(1e-2, dtype=F64), "hf": True},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "hf": True},
        {"beta1": 0.3, "beta2": 0.0},
        {"beta1": 0.5, "eps": 0.0},
        {"found_inf": torch.zeros(1), "first": 16777216.0},
        {"scale": torch.tensor(1e-30)},
        {"maximize": True},
    ],
    ids=lambda o: " ".join(o),
)
def test_adamw_options(options: dict[str, Any]) -> None:
    for dtype in (F32, F64):
        adamw(dtype, BF16, TRANSFORMS["none"], **options)


@pytest.mark.parametrize("found", [1.0, math.inf, math.nan])
def test_nothing_is_written_where_a_gradient_was_not_finite(found: float) -> None:
    flag = torch.tensor([found])
    left = adamw(F32, F32, [], found_inf=flag)
    assert all(
        identical(a, b) for a, b in zip(left, [*params(F32), *params(F32, 1), *map(torch.abs, params(F32, 2)), *steps()], strict=True)
    )
    written = [params(F32), params(F32, 1), steps()]
    left = run("sgd_", written, params(F32, 3), [], places=None, scale=None, found_inf=flag, **MOMENTUM)
    assert all(identical(a, b) for a, b in zip(left, itertools.chain(*written), strict=True))


def compact(dtype: torch.dtype, bits: list[Tensor], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The states, once as the child's elements alone and once dense."""
    whole = [normal(s, 0, dtype) for s in SHAPES]
    grads = [g.t().contiguous().t() if g.dim() == 2 else g for g in (normal(s, 3, dtype) for s in SHAPES)]
    counts = [set_bits(b, 256) for b in bits]
    ranks = [c.cumsum(0) - c for c in counts]
    sizes = [s if not b.numel() else (int(c.sum()),) for s, b, c in zip(SHAPES, bits, counts, strict=True)]
    written = [whole, [normal(s, 1, compute(dtype)) for s in sizes], [normal(s, 2, compute(dtype)).abs() for s in sizes], steps()]
    given = {"places": None, "scale": None, "found_inf": None, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "maximize": False}
    given |= {"weight_decay": 0.1, "hf": False} | options
    small = run("adamw_", written, grads, [("fixed_mask", bits)], compact=(bits, ranks), **given)
    masks = [torch.ones(s, dtype=torch.bool) if not b.numel() else unpacked(b, s) for s, b in zip(SHAPES, bits, strict=True)]
    for column in (1, 2):
        written[column] = [torch.zeros(m.shape, dtype=t.dtype).masked_scatter_(m, t) for m, t in zip(masks, written[column], strict=True)]
    dense = run("adamw_", written, grads, [("fixed_mask", bits)], compact=None, **given)
    count = len(SHAPES)
    for column in (1, 2):
        rows = slice(column * count, (column + 1) * count)
        dense[rows] = [t if t.shape == s.shape else t[m] for t, s, m in zip(dense[rows], small[rows], masks, strict=True)]
    return small, dense


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = [(byte >> n) & 1 for byte in bits.tolist() for n in range(8)]
    return torch.tensor(flat[: math.prod(shape)], dtype=torch.bool).view(shape)


@pytest.mark.parametrize("options", [{}, {"hf": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_compact_states(dtype: torch.dtype, options: dict[str, Any]) -> None:
    small, dense = compact(dtype, absent(BITS, 2), **options)
    assert all(identical(a, b) for a, b in zip(small, dense, strict=True))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_compact_states_of_nothing_and_of_everything(keep: float) -> None:
    small, dense = compact(F32, [pack(torch.full(s, keep == 1)) for s in SHAPES])
    assert all(identical(a, b) for a, b in zip(small, dense, strict=True))


def test_compact_states_behind_many_elements() -> None:
    """Ranks add up over blocks; a strided gradient makes the walk's blocks smaller than theirs."""
    mask = normal((9, 1000), 1) > 0.2
    bits, count = pack(mask), int(mask.sum())
    counts = set_bits(bits, 256)
    written = [[normal((9, 1000), 2)], [normal((count,), 3)], [normal((count,), 4).abs()], [torch.tensor(5.0)]]
    given = {"scale": None, "found_inf": None, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "hf": False}
    for grad in (normal((9, 1000), 5), normal((1000, 9), 5).t()):
        ranks = [counts.cumsum(0) - counts]
        run("adamw_", written, [grad], [("fixed_mask", [bits])], places=None, compact=([bits], ranks), maximize=False, **given)


MOMENTUM = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False, "first": False}


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.0, "weight_decay": 0.1, "maximize": True},
        {"first": True, "weight_decay": 0.1},
        {"first": True, "nesterov": True},
        {"dampening": 0.1},
        {"nesterov": True, "weight_decay": 0.1, "lr": torch.tensor(0.01)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_sgd(dtype: tuple[torch.dtype, torch.dtype], options: dict[str, Any]) -> None:
    given = MOMENTUM | options
    for name in ("none", "all"):
        counted = steps(3.0) if name == "all" else []
        written = [params(dtype[0]), params(compute(dtype[0]), 1) if given["momentum"] else [], counted]
        grads = [normal(s, 3, dtype[1]) for s in SHAPES]
        run("sgd_", written, grads, TRANSFORMS[name], places=None, scale=torch.tensor(0.7), found_inf=torch.zeros(1), **given)


@pytest.mark.parametrize("transforms", ["none", "project", "all"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_transformed_dot(dtype: tuple[torch.dtype, torch.dtype], transforms: str) -> None:
    args = (params(dtype[0]), [normal(s, 3, dtype[1]) for s in SHAPES], steps(), TRANSFORMS[transforms], PLACES, torch.tensor(0.3))
    reference = laid_out([normal(s, 4, dtype[1]) for s in SHAPES])
    ours, again = (optimizers.transformed_dot(*args, reference) for _ in range(2))
    assert torch.equal(ours, again)
    assert ours.dtype == F64
    theirs = defined.transformed_dot(*args, reference)
    magnitude = float(defined.transformed_dot(*args[:3], TRANSFORMS[transforms], *args[4:], [r.abs() for r in reference])[1])
    assert float((ours - theirs).abs().max()) <= 64 * 2.0**-53 * magnitude
    assert all(float(s) == n for n, s in enumerate(args[2]))


def test_expanded_gradients_and_empty_lists() -> None:
    given = {"scale": None, "found_inf": None, **MOMENTUM}
    for transforms in ([], [("child_mask", 0.5, 1), ("fixed_mask", [BITS[0]])]):
        run(
            "sgd_",
            [[normal((2048,), 1)], [normal((2048,), 2)], [torch.tensor(1.0)]],
            [torch.tensor(0.5).expand(2048)],
            transforms,
            places=None,
            **given,
        )
    run("sgd_", [[], [], []], [], [], places=None, **given)
    assert optimizers.transformed_dot([], [], [], [], None, None, []).tolist() == [0, 0]


def test_70_tensors() -> None:
    many = [normal((n % 5, 3), n) for n in range(70)]
    transforms = [("child_mask", 0.5, 7)]
    written = [many, [], [torch.tensor(float(n)) for n in range(70)]]
    run(
        "sgd_",
        written,
        [normal((n % 5, 3), n + 1) for n in range(70)],
        transforms,
        places=None,
        scale=None,
        found_inf=None,
        **MOMENTUM | {"momentum": 0},
    )
