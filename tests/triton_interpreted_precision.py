"""The Triton kernels of Kronecker-factored and low-rank precision against the definition, in the interpreter; see triton_interpreted.py."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastcl.kernels import _layers, kronecker, low_rank
from fastcl.reference import kronecker as dense_layers
from fastcl.reference import low_rank as definition
from fastcl.testing import clone, unit_roundoff
from fastcl.testing.low_rank import low_rank_precision
from layouts import LAYOUTS, identical

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# NaN and Inf are what some cases are about; numpy warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(got: list[Tensor], want: list[Tensor], sums: int, computed: torch.dtype = F64) -> None:
    """Within the roundings of so many sums of numbers like the largest one, which are computed in a dtype and stored in their own."""
    largest = max((float(w.double().abs().max()) for w in want if w.numel()), default=0.0)
    for x, w in zip(got, want, strict=True):
        assert x.dtype == w.dtype
        assert (
            float((x.double() - w.double()).abs().max() if w.numel() else 0.0)
            <= sums * max(map(unit_roundoff, (x.dtype, computed))) * largest
        ), x.shape


# ---- Kronecker factors


Layers = dict[str, list[Tensor]]


def rows_of(rows: int, columns: int, pad: int, seed: int, dtype: torch.dtype) -> Tensor:
    out = torch.full((rows, columns + pad), 7.0, dtype=dtype)[:, :columns]
    return out.copy_(normal((rows, columns), seed, dtype))


def layers(shapes: list[tuple[int, ...]], bias: bool, dtype: torch.dtype = F32, stored: torch.dtype = F32, pad: int = 3) -> Layers:
    made: Layers = {name: [] for name in ("w", "b", "gw", "gb", "M", "H", "V", "A", "G")}
    for at, shape in enumerate(shapes):
        rows, columns = shape[0], math.prod(shape[1:]) + bias
        for n, name in enumerate(("w", "gw")):
            made[name].append(normal(shape, 10 * at + n, stored))
        for n, name in enumerate(("b", "gb")):
            made[name].append(normal((rows,) if bias else (0,), 10 * at + n + 2, stored))
        for n, name in enumerate(("M", "H", "V")):
            made[name].append(rows_of(rows, columns, pad, 10 * at + n + 4, dtype))
        for name, size in (("A", columns), ("G", rows)):
            made[name].append(rows_of(size, size, pad, 10 * at + size, dtype))
    return made


def lists(on: Layers, *names: str) -> list[list[Tensor]]:
    return [on[name] for name in names]


def kept(on: Layers) -> Layers:
    """Copies with the same strides."""

    def copy(t: Tensor) -> Tensor:
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        return torch.full((reach,), 7.0, dtype=t.dtype).as_strided(t.shape, t.stride()).copy_(t)

    return {name: [copy(t) for t in tensors] for name, tensors in on.items()}


def check_layers(on: Layers, sums: int = 300) -> None:
    """Every stage, on copies."""
    x, factors, numbers = ("w", "b"), ("A", "G"), (0.9, 0.7)
    for stage, names, more in (
        ("kron_small_", (*x, *factors), ()),
        ("kron_small_quadratic", (*x, *factors), ()),
        ("ncl_small_step_", (*x, "gw", "gb", "M", "H", *factors), (0.01, *numbers)),
        ("ncl_small_direction_", ("M", "V", "gw", "gb", "H", *factors), numbers),
        ("ncl_momentum_", ("M", "H", "gw", "gb"), (*numbers, None)),
        ("ncl_momentum_", ("M", "H", "gw", "gb"), (*numbers, 0.01)),
        ("ncl_apply_", (*x, "H", "V", "M"), (torch.tensor(0.3, dtype=F64),)),
    ):
        ours, theirs = kept(on), kept(on)
        value = getattr(kronecker, stage)(*lists(ours, *names), *more)
        want = getattr(dense_layers, stage)(*lists(theirs, *names), *more)
        for name in on:
            close(ours[name], theirs[name], sums)
        if want is not None:
            assert value.shape == want.shape
            # The definition rounds V to the own dtype before it is multiplied.
            scale = sum(float(v.double().norm() * m.double().norm()) for v, m in zip(theirs["V"], theirs["M"], strict=True))
            scale += sum(float(w.double().square().sum()) * (1 + w.shape[0]) * (1 + w[0].numel()) for w in theirs["w"])
            assert float((value - want).abs().max()) <= 8 * unit_roundoff(on["A"][0].dtype) * scale, stage


@pytest.mark.parametrize(
    ("dtype", "stored", "bias"), [(F32, F32, True), (F32, F32, False), (F64, F64, True), (F32, BF16, True), (F64, F32, False)], ids=str
)
def test_small_layers(dtype: torch.dtype, stored: torch.dtype, bias: bool) -> None:
    check_layers(layers([(5, 7), (1, 1), (33, 17)], bias, dtype, stored))


@pytest.mark.parametrize("pad", [0, 3])  # with 3, rows of 12 columns and a bias are 16 apart
def test_columns_and_rows_of_every_alignment(pad: int) -> None:
    check_layers(layers([(17, 12), (8, 31), (12, 8)], True, pad=pad))


def test_the_largest_small_layer() -> None:
    on = layers([(128, 128)], True)
    ours, theirs = kept(on), kept(on)
    kronecker.kron_small_(*lists(ours, "w", "b", "A", "G"))
    dense_layers.kron_small_(*lists(theirs, "w", "b", "A", "G"))
    close(ours["w"] + ours["b"], theirs["w"] + theirs["b"], 300)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 2, 5), (3, 17)], ids=str)
def test_layouts_of_layers(shape: tuple[int, ...], layout: str) -> None:
    on = layers([shape, shape], False)
    on["w"] = [LAYOUTS[layout](w) for w in on["w"]]
    on["gw"][0] = LAYOUTS[layout](on["gw"][0])
    check_layers(on)


def test_addresses_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layers, "NARROW", 1)
    check_layers(layers([(6, 10), (3, 17)], True))


@pytest.mark.parametrize("count", [0, 1, 9, 33])
def test_lengths_of_lists_of_layers(count: int) -> None:
    on = layers([(n % 3 + 1, n % 4 + 1) for n in range(count)], True)
    numbers = (0.01, 0.9, 0.7)
    ours, theirs = kept(on), kept(on)
    names = ("w", "b", "gw", "gb", "M", "H", "A", "G")
    kronecker.ncl_small_step_(*lists(ours, *names), *numbers)
    dense_layers.ncl_small_step_(*lists(theirs, *names), *numbers)
    for name in on:
        close(ours[name], theirs[name], 300)


def test_what_stands_beside_the_matrices_stays() -> None:
    on = layers([(5, 7)], True)
    M, V = (on[name][0] for name in ("M", "V"))
    beyond = [t.as_strided((t.shape[0], 3), t.stride(), t.shape[1]) for t in (M, V)]
    kronecker.ncl_small_direction_(*lists(on, "M", "V", "gw", "gb", "H", "A", "G"), 0.9, 0.7)
    kronecker.ncl_momentum_(*lists(on, "M", "H", "gw", "gb"), 0.9, 0.7, 0.1)
    assert all(bool((t[:-1] == 7).all()) for t in beyond)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_nan_and_inf_of_layers_stay_in_their_layer(special: float) -> None:
    on = layers([(5, 7), (5, 7)], True)
    on["gw"][0][2, 3] = special
    ours, theirs = kept(on), kept(on)
    names = ("M", "V", "gw", "gb", "H", "A", "G")
    q = kronecker.ncl_small_direction_(*lists(ours, *names), 0.9, 0.7)
    dense_layers.ncl_small_direction_(*lists(theirs, *names), 0.9, 0.7)
    assert not bool(q[0].isfinite())
    assert bool(q[1].isfinite())
    for name in ("M", "V"):
        assert identical(ours[name][0].isfinite().double(), theirs[name][0].isfinite().double())
        close(ours[name][1:], theirs[name][1:], 300)


# ---- low rank


SHAPES = [(5, 7), (1030,), (8, 12), (), (0, 3), (2, 3, 4, 5)]


def gradients(stored: torch.dtype, seed: int, turned: bool = False) -> list[Tensor]:
    tensors = [normal(s, 20 * seed + n, stored) for n, s in enumerate(SHAPES)]
    return [LAYOUTS["reversed dimensions"](t) for t in tensors] if turned else tensors


def check_products(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert got.dtype == F64
    # Elements are rounded to the own dtype, sums are float64: of random signs, as large as the root of how many.
    assert float((got - want).abs().max() if len(want) else 0.0) <= 8 * unit_roundoff(dtype) * float(want.abs().max())


@pytest.mark.parametrize(("dtype", "stored", "rank"), [(F32, F32, 0), (F32, F32, 7), (F64, F64, 4), (F32, BF16, 1), (F32, F64, 5)], ids=str)
def test_low_rank_sweeps(dtype: torch.dtype, stored: torch.dtype, rank: int) -> None:
    diagonal, basis, _ = low_rank_precision(SHAPES, dtype, rank)
    coefficients, step = normal((rank,), 3, F64), torch.tensor(0.3, dtype=F64)
    g, w, momenta, anchors = gradients(stored, 1, True), gradients(stored, 2), gradients(dtype, 3), gradients(dtype, 4)
    for inverse in (True, False):
        args = (g, diagonal, basis, inverse)
        check_products(low_rank.low_rank_products(*args), definition.low_rank_products(*args), dtype)
    ours, theirs = clone(g), clone(g)
    low_rank.low_rank_update_(ours, diagonal, basis, coefficients)
    definition.low_rank_update_(theirs, diagonal, basis, coefficients)
    close(ours, theirs, 8 + 2 * rank, dtype)
    for momentum, strength in itertools.product((0.9, 0.0), (0.7, 0.0)):
        kept_momenta, kept_anchors = momenta if momentum else [], anchors if strength else []
        rest = (diagonal, basis, momentum, strength)
        products = [m.low_rank_step_products(w, g, kept_momenta, kept_anchors, *rest) for m in (low_rank, definition)]
        check_products(*products, dtype)
        ours, theirs = [clone(w), clone(kept_momenta)], [clone(w), clone(kept_momenta)]
        last = (diagonal, basis, coefficients, step, momentum, strength)
        low_rank.low_rank_step_update_(ours[0], g, ours[1], kept_anchors, *last)
        definition.low_rank_step_update_(theirs[0], g, theirs[1], kept_anchors, *last)
        for got, want in zip(ours, theirs, strict=True):
            close(got, want, 8 + 2 * rank, dtype)


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 2), (5, 3), (3, 63)])
def test_low_rank_rows(rank: int, count: int) -> None:
    dtype = F32 if count % 2 else F64
    shapes = SHAPES if count < 20 else SHAPES[:1]
    diagonal, basis, sigma = low_rank_precision(shapes, dtype, rank)
    vectors = [gradients(F32, 5 + k, k == 1)[: len(shapes)] for k in range(count)]
    got, want = (m.low_rank_gram(diagonal, basis, sigma, vectors) for m in (low_rank, definition))
    assert torch.equal(got, got.T)
    close([got], [want], 64)
    mix = normal((rank + count, rank + count), 6, F64)
    ours, theirs = [clone(diagonal), clone(basis)], [clone(diagonal), clone(basis)]
    got, want = (m.low_rank_compress_(*lists, sigma, vectors, mix) for m, lists in ((low_rank, ours), (definition, theirs)))
    close(ours[0] + ours[1], theirs[0] + theirs[1], 8 if dtype == F32 else 64)
    # Of the rows that were written, which may differ by a rounding.
    exact = definition.low_rank_rotate_(clone(ours[1]), torch.eye(rank, dtype=F64))
    assert torch.equal(got, got.T)
    close([got], [exact], 64)
    assert want.shape == got.shape
    turn = normal((rank, rank), 7, F64)
    ours, theirs = clone(basis), clone(basis)
    got = low_rank.low_rank_rotate_(ours, turn)
    definition.low_rank_rotate_(theirs, turn)
    close(ours, theirs, 8 if dtype == F32 else 64)
    close([got], [definition.low_rank_rotate_(clone(ours), torch.eye(rank, dtype=F64))], 64)


def test_nothing_is_made_of_no_elements() -> None:
    sigma = torch.zeros(2, dtype=F64)
    for diagonal, basis in (([], []), ([torch.ones(0, 3)], [torch.zeros(2, 0, 3)])):
        products = low_rank.low_rank_products(diagonal, diagonal, basis, True)
        assert torch.equal(products, torch.zeros(3 if basis else 1, dtype=F64))
        low_rank.low_rank_update_(diagonal, diagonal, basis, sigma)
        assert torch.equal(low_rank.low_rank_gram(diagonal, basis, sigma, [diagonal]), torch.zeros(3, 3, dtype=F64))


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_nan_and_inf_of_gradients(special: float) -> None:
    diagonal, basis, _ = low_rank_precision(SHAPES, F32, 3)
    g = gradients(F32, 1)
    g[1][1029] = special
    for inverse in (True, False):
        got, want = (m.low_rank_products(g, diagonal, basis, inverse) for m in (low_rank, definition))
        assert identical(got.isfinite().double(), want.isfinite().double())
    finite = low_rank.low_rank_products(gradients(F32, 1), diagonal, basis, True)
    assert bool(finite.isfinite().all())
