"""The Triton kernels against the reference, in the interpreter. Started by test_triton_interpreter.py with TRITON_INTERPRET=1."""

import importlib.util
import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl import backends, ops, reference
from fastcl.kernels import _lists, _math, importance
from fastcl.reference._storage import decode
from fastcl.testing import CASES, clone, largest_error, unit_roundoff

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STORED = (*FLOATING, torch.uint8)
# NaN - NaN and 1 / 0 are what some cases are about; numpy warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BROADCASTS = {
    "element": ((6, 5, 7), (6, 5, 7)),
    "row": ((6, 5, 7), (6, 1, 1)),
    "column": ((6, 35), (1, 35)),
    "trailing": ((6, 35), (35,)),
    "scalar": ((6, 5, 7), ()),
    "one": ((6, 5, 7), (1, 1, 1)),
    "middle": ((6, 5, 7), (1, 5, 1)),
    "ends": ((6, 5, 7), (6, 1, 7)),
    "rows of several blocks": ((37, 61), (37, 1)),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def stored_importance(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    value = (torch.rand(shape, generator=seeded(seed), dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    return (value * 255).round().to(dtype) if dtype == torch.uint8 else value.to(dtype)


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def both(name: str, written: list[Tensor], *args: object) -> None:
    """Run the op and its definition on copies that keep the strides, and compare bit for bit."""
    ours, theirs = [keep(t) for t in written], [keep(t) for t in written]
    getattr(reference, name)(theirs, *args)
    getattr(ops, name)(ours, *args)
    same(ours, theirs)


def keep(t: Tensor) -> Tensor:
    """A copy with the same strides and the same alignment, in memory of its own."""
    reach = t.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    out = torch.full((reach,), 77).to(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())
    return out.copy_(t)


def test_the_interpreter_serves_the_ops() -> None:
    assert triton.knobs.runtime.interpret
    assert backends.serving("cpu") == "triton"
    assert backends.implementation("emax_", torch.device("cpu")) is importance.emax_


@pytest.mark.parametrize(("dtype", "stored"), list(itertools.product(FLOATING, STORED)), ids=str)
def test_soft_mask(dtype: torch.dtype, stored: torch.dtype) -> None:
    shapes = [(4097,), (64,), (), (1,), (3, 21)]
    both("soft_mask_", [gradient(s, dtype) for s in shapes], [stored_importance(s, stored) for s in shapes], 1 / 3)


@pytest.mark.parametrize("strength", [0, 0.0, 1e-300, 0.1, 1.0, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_strength(dtype: torch.dtype, strength: float) -> None:
    both("soft_mask_", [gradient((99,), dtype)], [stored_importance((99,), dtype)], strength)


@pytest.mark.parametrize(("new", "stored"), list(itertools.product(STORED, STORED)), ids=str)
def test_emax(new: torch.dtype, stored: torch.dtype) -> None:
    shapes = [(4097,), (64,), (), (1,), (3, 21)]
    both("emax_", [stored_importance(s, stored) for s in shapes], [stored_importance(s, new, 2) for s in shapes])


@pytest.mark.parametrize("form", BROADCASTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.uint8, torch.float64], ids=str)
def test_broadcast(form: str, stored: torch.dtype) -> None:
    shape, small = BROADCASTS[form]
    value = stored_importance(small, stored)
    both("soft_mask_", [gradient(shape, torch.float32)], [value], 0.7)
    both("emax_", [stored_importance(shape, torch.float32, 3)], [value])


def strided(kind: str) -> Tensor:
    return {
        "transposed": lambda: gradient((7, 70), torch.float32).t(),
        "channels_last": lambda: gradient((4, 3, 5, 6), torch.float32).to(memory_format=torch.channels_last),
        "unaligned": lambda: gradient((5000,), torch.float32)[1:],
        "every second": lambda: gradient((40, 50), torch.float32)[::2, 1::3],
        "permuted": lambda: gradient((4, 5, 6), torch.float32).permute(1, 2, 0),
        "unaligned 16 bit": lambda: gradient((300,), torch.bfloat16)[1:],
        "padded rows": lambda: gradient((9, 40), torch.float32)[:, :33],
    }[kind]()


KINDS = ("transposed", "channels_last", "unaligned", "every second", "permuted", "unaligned 16 bit", "padded rows")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True], ids=["32 bit", "64 bit"])
def test_strides(kind: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(_lists, "_wide", lambda w: bool(w.sizes))
    g = strided(kind)
    shape = tuple(g.shape)
    alike, plain = stored_importance(shape, torch.float32).to(g.dtype), stored_importance(shape, torch.float32)
    rows = stored_importance((shape[0], *(1,) * (len(shape) - 1)), torch.float32)
    for value in (torch.empty_like(g).copy_(alike), plain, rows, stored_importance((), torch.float32)):
        both("soft_mask_", [g, g + 1], [value, value], 0.9)
    both("emax_", [g], [plain])
    accumulated, theirs = [torch.zeros_like(g), torch.zeros(shape)], [torch.zeros_like(g), torch.zeros(shape)]
    mean = ops.spg_importance_(accumulated, [[g, g], [plain, plain]])
    exact = reference.spg_importance_(theirs, [[g, g], [plain, plain]])
    assert largest_error(accumulated, theirs) <= 4 * unit_roundoff(g.dtype)
    assert abs(float(mean - exact)) <= 1e-6


def test_neighbours_in_memory_stay_as_they_are() -> None:
    memory = torch.zeros(64, 64)
    ops.emax_([memory[3:50:2, 5:40:3]], [torch.ones(24, 12)])
    assert float(memory.sum()) == 24 * 12


def test_more_dims_than_one_walk_holds() -> None:
    source = gradient((3,) * 8, torch.float32)
    g = source[:, ::2][:, :, ::2][:, :, :, :, ::2][..., ::2].permute(3, 0, 2, 1, 4, 6, 5, 7)
    value = stored_importance(tuple(n if d % 2 else 1 for d, n in enumerate(g.shape)), torch.float32)
    assert len(_lists.walk([g, value]).sizes) > _lists.MOST_DIMS
    both("soft_mask_", [g], [value], 0.5)
    ours, theirs = [torch.zeros(g.shape)], [torch.zeros(g.shape)]
    mean = ops.spg_importance_(ours, [[g]])
    assert abs(float(mean - reference.spg_importance_(theirs, [[g]]))) < 1e-7
    assert largest_error(ours, theirs) <= 4 * unit_roundoff(torch.float32)


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 65])
def test_lengths_of_lists(count: int) -> None:
    shapes = [(n % 5 + 1, 3) if n % 4 else (0, 3) for n in range(count)]
    grads, values = [gradient(s, torch.float32, n) for n, s in enumerate(shapes)], [stored_importance(s, torch.float32) for s in shapes]
    both("soft_mask_", grads, values, 1.0)
    both("soft_mask_", [g.t() for g in grads], [v[:, :1].t() for v in values], 1.0)
    both("emax_", values, [g.abs() for g in grads])
    ours, theirs = clone(values), clone(values)
    mean, exact = ops.spg_importance_(ours, [grads]), reference.spg_importance_(theirs, [grads])
    assert largest_error(ours, theirs) <= 4 * unit_roundoff(torch.float32)
    assert mean.dtype == torch.float64
    assert mean.shape == ()
    assert abs(float(mean - exact)) <= 1e-7


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2500, 4999])
def test_nan_and_inf_propagate(special: float, place: int) -> None:
    for dtype in FLOATING:
        g = gradient((5000,), dtype)
        g[place] = special
        value = stored_importance((5000,), torch.float32)
        both("soft_mask_", [g, gradient((5000,), dtype)], [value, g.float()], 1.0)
        both("emax_", [g, value, stored_importance((5000,), torch.uint8)], [value, g, g])
    for stored in (torch.float32, torch.uint8):
        ours, theirs = [torch.zeros(5000, dtype=stored)], [torch.zeros(5000, dtype=stored)]
        g = gradient((5000,), torch.float32)
        g[place] = special
        mean, exact = ops.spg_importance_(ours, [[g]]), reference.spg_importance_(theirs, [[g]])
        same(ours, theirs)
        same([mean], [exact])


def test_rounding_at_every_bfloat16_neighbourhood() -> None:
    # Ties, subnormals, the largest numbers: all patterns of the upper half with the lower halves that decide the rounding.
    upper = torch.arange(0, 1 << 16, 7, dtype=torch.int64)
    bits = torch.cat([(upper << 16) + low for low in (0x7FFF, 0x8000, 0x8001)])
    value = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    both("emax_", [torch.full(value.shape, -math.inf, dtype=torch.bfloat16)], [value])
    both("emax_", [torch.full(value.shape, -math.inf, dtype=torch.float16)], [value])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uint8_codes(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    exact = decode(codes, dtype)
    grads = [torch.full((256,), -1.0, dtype=dtype)]
    both("soft_mask_", grads, [codes], 1.0)
    decoded = [torch.zeros(256, dtype=dtype)]
    ops.emax_(decoded, [codes])
    same(decoded, [exact])
    above, below = (torch.nextafter(exact, torch.tensor(end, dtype=dtype)) for end in (2.0, -1.0))
    for value in (exact, above, below, -exact):
        both("emax_", [torch.zeros(256, dtype=torch.uint8)], [value])
    back = [codes.clone()]
    ops.emax_(back, [exact])
    same(back, [codes])


def test_uint8_division_beyond_the_codes() -> None:
    @triton.jit
    def kernel(out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, BLOCK)
        tl.store(out + lane, _math.from_code((lane - 1).to(tl.float32)))

    out = torch.empty(512)
    kernel[(1,)](out, 512)
    same([out[:258]], [torch.arange(-1, 257, dtype=torch.float32) / 255])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh(dtype: torch.dtype) -> None:
    @triton.jit
    def kernel(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, BLOCK)
        tl.store(out + lane, _math.tanh_abs(tl.load(x + lane)))

    x = torch.cat([torch.linspace(-25, 25, 1 << 15), torch.logspace(-30, 2, 1 << 15)]).to(dtype)
    out = torch.empty_like(x)
    kernel[(1,)](x, out, 1 << 16)
    # float32 is judged by torch's float64, float64 by another formula, which does not cancel.
    wide = x.double().abs()
    exact = wide.tanh() if dtype == torch.float32 else -torch.expm1(-2 * wide) / (1 + torch.exp(-2 * wide))
    assert float(((out.double() - exact).abs() / exact).max()) <= 4 * torch.finfo(dtype).eps


AWKWARD = {
    "constant and large": lambda: torch.full((5000,), 7e30),
    "tiny": lambda: gradient((5000,), torch.float64).mul(1e-30).float(),
    "subnormal": lambda: gradient((5000,), torch.float64).mul(1e-41).float(),
    "huge": lambda: gradient((5000,), torch.float64).mul(5e37).float(),
    "far from 0": lambda: gradient((9000,), torch.float64).add(1e4).float(),
    "an outlier first": lambda: torch.full((9000,), 3.0).index_fill(0, torch.tensor([0]), 1e8),
    "ends of the range": lambda: torch.tensor([3.3e38, -3.3e38, 1.0]),
    "one element": lambda: torch.tensor([1e30]),
    "zero": lambda: torch.zeros(70, 70),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_spg_on_awkward_gradients(name: str) -> None:
    g = AWKWARD[name]()
    ours, theirs = [torch.zeros(g.shape)], [torch.zeros(g.shape)]
    mean, exact = ops.spg_importance_(ours, [[g]]), reference.spg_importance_(theirs, [[g]])
    assert largest_error(ours, theirs) <= 4 * unit_roundoff(torch.float32)
    assert abs(float(mean - exact)) <= 4 * unit_roundoff(torch.float32)
    if name in ("constant and large", "one element", "zero"):
        assert not ours[0].any()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_constant_tensors_are_of_no_importance(dtype: torch.dtype) -> None:
    # Lengths and values whose sums round, so that a mean by plain summation would miss the value.
    tensors = [torch.full((n,), v).to(dtype) for n in (3, 613, 5003) for v in (0.1, 1 / 3, -7.7, 1e-3, 60000.0)]
    ours = [torch.zeros(t.shape) for t in tensors]
    mean = ops.spg_importance_(ours, [tensors])
    assert not any(a.any() for a in ours)
    assert float(mean) == 0


@pytest.mark.parametrize(
    ("dtype", "stored", "heads"),
    [*((d, s, 2) for d in FLOATING for s in STORED), *((torch.float32, torch.float32, h) for h in (0, 1, 5))],
    ids=str,
)
def test_spg(dtype: torch.dtype, stored: torch.dtype, heads: int) -> None:
    args = CASES["spg_importance_"].make([(4500,), (7, 9), (), (0, 2)], dtype, stored, heads=heads)
    ours, again, theirs = clone(args), clone(args), clone(args)
    mean, same_mean, exact = ops.spg_importance_(*ours), ops.spg_importance_(*again), reference.spg_importance_(*theirs)
    same([*ours[0], mean], [*again[0], same_mean])
    # A value that rounds the other way lands one step of the storage further.
    step = 1 / 255 if stored == torch.uint8 else 2 * unit_roundoff(stored)
    arithmetic = unit_roundoff(torch.float64 if torch.float64 in (dtype, stored) else torch.float32)
    assert largest_error(ours[0], theirs[0]) <= step + 6 * arithmetic
    held = torch.cat([decode(a, torch.float64).flatten() for a in ours[0]]).mean()
    assert abs(float(mean - held)) <= 1e-14
    assert abs(float(mean - exact)) <= step


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, torch.float32), (torch.bfloat16, torch.uint8)], ids=str)
@pytest.mark.parametrize("heads", [1, 5])
def test_spg_in_two_sweeps(dtype: torch.dtype, stored: torch.dtype, heads: int) -> None:
    """As tensors that are sharded need it: the same bits, and rows whose order is that of heads and tensors."""
    shapes = [(4097,), (3, 21), (1,)]
    whole = [stored_importance(s, stored) // 4 if stored == torch.uint8 else stored_importance(s, stored) / 4 for s in shapes]
    grads = [[gradient(s, dtype, 10 * h + n) for n, s in enumerate(shapes)] for h in range(heads)]
    parts = [keep(t) for t in whole]
    rows = importance.spg_moments(parts, grads)
    defined = reference.importance.spg_moments(parts, grads)
    # Shift and distance to the mean are each implementation's own; what they say together is not.
    torch.testing.assert_close(rows[..., 0] + rows[..., 2], defined[..., 0] + defined[..., 2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rows[..., 1::2], defined[..., 1::2], rtol=1e-5, atol=1e-12)
    mean = importance.spg_update_(parts, grads, [rows])
    assert mean.equal(ops.spg_importance_(whole, grads))
    same(parts, whole)


def test_spg_heads_of_different_dtypes_and_strides() -> None:
    shape = (40, 30)
    heads = [[gradient(shape, torch.bfloat16)], [gradient(shape[::-1], torch.float32).t()], [gradient(shape, torch.float64)]]
    ours, theirs = [torch.zeros(shape)], [torch.zeros(shape)]
    ops.spg_importance_(ours, heads)
    reference.spg_importance_(theirs, heads)
    assert largest_error(ours, theirs) <= 4 * unit_roundoff(torch.float32)


# Of the families whose kernels there are.
KERNELS = [name for name in CASES if importlib.util.find_spec(f"fastcl.kernels.{backends.FAMILIES[name.split(',')[0]]}")]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_cases(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    case = CASES[name]
    if stored != torch.float32 and not case.pairs:
        return  # no list has this dtype
    if stored == torch.uint8 and not case.uint8:
        with pytest.raises(TypeError, match="has dtype uint8"):
            case.call(*case.make([(5,)], dtype, stored))
        return
    shapes = [(64,)] * 2 + [(63,), (65,), (4095,), (4096,), (8, 3, 7, 7)]
    # Of one element the rivals of SPG make NaN, which would make the allowed error infinite.
    args = case.make([*shapes, (), (2, 0)] if case.bitwise else shapes, dtype, stored)
    ours, theirs = clone(args), clone(args)
    case.call(*ours)
    case.reference(*theirs)
    if case.bitwise:
        same(ours[0], theirs[0])
    else:
        eager, exact = clone(args), case.in_float64(args)
        case.providers["eager"](*eager)
        case.reference(*exact)
        allowed = 2 * largest_error(eager[0], exact[0]) + 4 * unit_roundoff(args[0][0].dtype)
        assert largest_error(ours[0], exact[0]) <= allowed
