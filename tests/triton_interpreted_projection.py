"""The Triton kernels of the projection family against the reference, in the interpreter; see triton_interpreted.py."""

import itertools
import math

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from fastcl import ops
from fastcl.kernels import _lists, projection
from fastcl.reference import projection as reference
from fastcl.testing import clone
from layouts import FLOATING, LAYOUTS, identical

U = 2.0**-53
F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normal(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=F64).to(dtype) for s in shapes]


def flat(tensors: list[Tensor]) -> list[float]:
    return [v for t in tensors for v in t.double().flatten().tolist()]


def close_dot(value: Tensor, a: list[Tensor], b: list[Tensor]) -> bool:
    products = [x * y for x, y in zip(flat(a), flat(b), strict=True)]
    return value.dtype == F64 and abs(float(value) - math.fsum(products)) <= 4 * U * math.fsum(map(abs, products))


def close_gram(vectors: list[list[Tensor]]) -> Tensor:
    matrix = ops.gram(vectors)
    assert torch.equal(matrix, matrix.T)
    for (i, a), (j, b) in itertools.product(enumerate(vectors), repeat=2):
        assert close_dot(matrix[i, j], a, b), (i, j)
    return matrix


def all_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(identical(x, y) for x, y in zip(a, b, strict=True))


def check_written(grads: list[Tensor], before: list[Tensor], memories: list[list[Tensor]], v: Tensor) -> None:
    """Bit for bit what the definition makes of the same coefficients."""
    reference.combine_(before, memories, v)
    assert all_same(grads, before)


def check_project(grads: list[Tensor], memory: list[Tensor]) -> None:
    before, again = clone(grads), clone(grads)
    values, same_values = projection.project_(grads, memory), projection.project_(again, memory)
    assert torch.equal(values, same_values)
    assert all_same(grads, again)
    assert close_dot(values[0], before, memory)
    assert close_dot(values[1], memory, memory)
    assert float(values[2]) == (0 if float(values[0]) >= 0 else -float(values[0]) / float(values[1]))
    check_written(grads, before, [memory], values[2:])


def check_gem(grads: list[Tensor], memories: list[list[Tensor]], margin: float = 0.5, ridge: float = 1e-3) -> None:
    before = clone(grads)
    products = close_gram([*memories, grads])
    values = projection.gem_project_(grads, memories, margin, ridge)
    want = reference.gem_coefficients(products, margin, ridge)
    torch.testing.assert_close(values, want, rtol=1e-9, atol=1e-9)
    check_written(grads, before, memories, values[1 : 1 + len(memories)])


@pytest.mark.parametrize(("dtype", "other"), list(itertools.product(FLOATING, FLOATING)), ids=str)
def test_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    shapes = [(4097,), (3, 21), ()]
    grads, memory = normal(shapes, 0, dtype), normal(shapes, 1, other)
    assert close_dot(ops.grad_dot(grads, memory), grads, memory)
    for sign in (-1, 1):
        check_project(clone(grads), [(sign * g.double() + m.double()).to(other) for g, m in zip(grads, memory, strict=True)])


def test_mixed_dtypes_in_one_list() -> None:
    pairs = list(itertools.product(FLOATING, FLOATING))
    grads, memory = ([normal([(37,)], n, p[side])[0] for n, p in enumerate(pairs, 50 * side)] for side in (0, 1))
    check_project(clone(grads), [-m for m in memory])
    check_gem(grads, [memory, [-m for m in memory]])


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(_lists, "_wide", lambda w: bool(w.sizes))
    shapes = [(6, 10), (2, 3, 4, 5), (33,), ()]
    grads, memory, plain = [LAYOUTS[layout](g) for g in normal(shapes, 0)], normal(shapes, 1), normal(shapes, 2)
    turned = [LAYOUTS[layout](-m) for m in memory]
    assert close_dot(ops.grad_dot(plain, grads), plain, grads)
    check_project(clone(grads), [-m for m in memory])
    check_gem(grads, [turned, memory, plain])


def test_neighbours_in_memory_stay_as_they_are() -> None:
    memory = torch.zeros(64, 64)
    projection.combine_([memory[3:50:2, 5:40:3]], [[torch.ones(24, 12)]], torch.ones(1, dtype=F64))
    assert float(memory.sum()) == 24 * 12


def test_expanded_tensors_are_read() -> None:
    one, row = torch.full((), -1.5).expand(30, 40), torch.linspace(-1, 1, 40).expand(30, 40)
    full = normal([(30, 40)], 0)[0]
    for a, b in itertools.product((one, row, full), repeat=2):
        assert close_dot(ops.grad_dot([a], [b]), [a], [b])
    for memory in (one, row, -full):
        check_project([full.clone()], [memory])
    check_gem([full.clone()], [[one], [row], [-full]])
    # Where whole blocks end, what is beyond the last element counts for nothing, even beside Inf.
    assert float(ops.grad_dot([torch.tensor(math.inf).expand(5000)], [torch.ones(5000)])) == math.inf


def test_more_dims_than_one_walk_holds() -> None:
    g = normal([(3,) * 8], 0)[0][:, ::2][:, :, ::2][:, :, :, :, ::2][..., ::2].permute(3, 0, 2, 1, 4, 6, 5, 7)
    m = normal([tuple(g.shape)], 1)[0]
    assert len(_lists.walk([g, m]).sizes) > _lists.MOST_DIMS
    check_gem([g], [[m], [-m]])


@pytest.mark.parametrize("count", [0, 1, 8, 9, 100])
def test_lengths_of_lists(count: int) -> None:
    shapes = [(n % 5 + 1, 3) if n % 4 else (0, 3) for n in range(count)]
    grads, memory = normal(shapes, 0), normal(shapes, 1)
    assert ops.grad_dot(grads, memory).shape == ()
    check_project(clone(grads), [-m for m in memory])
    if count < 100:  # the interpreter takes long for what is the same in every launch
        check_gem(grads, [memory, [-m for m in memory]])


def test_nothing_is_made_of_nothing() -> None:
    empty = [torch.zeros(0, 3), torch.zeros(2, 0)]
    for lists in ([], empty):
        assert float(ops.grad_dot(lists, lists)) == 0
        assert not ops.gram([lists] * 3).any()
        assert not projection.project_(lists, lists).any()
        assert torch.equal(projection.gem_project_(lists, [lists] * 2, 0.5, 1e-3), torch.zeros(5, dtype=F64))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 10, 17])
def test_gram(count: int) -> None:
    close_gram([normal([(11, 3)], k, FLOATING[k % 2]) for k in range(count)])


def test_gram_over_several_blocks() -> None:
    close_gram([normal([(1500,), (70, 30), (3,)], k) for k in range(10)])


def test_sums_of_many_blocks() -> None:
    blocks = projection.CHUNK + 5
    partials = torch.arange(2 * blocks, dtype=F64) % 7
    out = torch.empty(3, dtype=F64)
    projection.agem_kernel[(1,)](partials, out, blocks, CHUNK=projection.CHUNK)
    assert out[:2].tolist() == [float(part.sum()) for part in partials.view(2, -1)]


# ---- the quadratic programme


def memories_of(kind: str, count: int) -> Tensor:
    gen = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 100, dtype=F64, generator=gen)
    return {
        "independent": lambda: rows,
        "near-collinear": lambda: rows[:1] + 1e-6 * rows,
        "duplicates": lambda: rows[torch.arange(count) % max(1, count // 3)],
        "dependent": lambda: rows[:, :8] @ torch.randn(8, 100, dtype=F64, generator=gen),
        "scales": lambda: rows * 10.0 ** ((torch.arange(count) % 7)[:, None] - 3),
        "one is zero": lambda: rows * (torch.arange(count) != count // 2)[:, None],
    }[kind]()


def with_gradient(rows: Tensor, margin: float) -> Tensor:
    """The Gram matrix with a gradient under which about half of the variables are free."""
    g = torch.randn(100, dtype=F64, generator=torch.Generator().manual_seed(7)) - rows.mean(0) * (1 + margin)
    stacked = torch.cat([rows, g[None]])
    return stacked @ stacked.T


@pytest.mark.parametrize("kind", ["independent", "near-collinear", "duplicates", "dependent", "scales", "one is zero"])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 17, 64])
def test_quadratic_programme(count: int, kind: str) -> None:
    rows = memories_of(kind, count)
    for margin, ridge in ((0.5, 1e-3), (0.0, 1e-3), (0.1, 0.0), (0.0, 0.0)):
        products = with_gradient(rows, margin)
        values = projection.gem_coefficients(products, margin, ridge)
        want = reference.gem_coefficients(products, margin, ridge)
        dots, v, other = products[:-1, -1], values[1 : 1 + count], want[1 : 1 + count]
        assert float(values[0]) == float(want[0]) == float((dots < 0).any())
        assert torch.equal(values[1 + count :], dots)
        assert bool((v >= margin).all()) or not bool(values[0])
        # What the coefficients make is unique where they are not.
        quadratic = products[:-1, :-1] + ridge * torch.eye(count, dtype=F64)
        scale = float(products.diagonal().max().sqrt()) * (1 + float(v.max()))
        distance = float(((v - other) @ quadratic @ (v - other)).clamp_min(0).sqrt())
        assert distance <= 1e-7 * scale
        # What refinement against Q leaves where the bound does not hold v: rounding, however badly Q is conditioned.
        slope = (quadratic @ v + dots).abs() / (quadratic.abs() @ v + dots.abs()).clamp_min(1e-300)
        assert not bool(values[0]) or float((slope * (v > margin)).max()) <= 4 * count * 2 * U
        if kind == "independent":
            torch.testing.assert_close(v, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 17, 64])
@pytest.mark.parametrize("size", [8, 100])
def test_quadratic_programme_against_scipy(count: int, size: int) -> None:
    gen = torch.Generator().manual_seed(count)
    rows, g = torch.randn(count, size, dtype=F64, generator=gen), torch.randn(size, dtype=F64, generator=gen)
    stacked = torch.cat([rows, (g - rows.mean(0))[None]])
    values = projection.gem_coefficients(stacked @ stacked.T, 0.5, 1e-3)
    if not bool(values[0]):
        pytest.fail("the case is no case")
    # Half the square of |[G^T; sqrt(ridge)] v + [g; 0]|, v = u + margin.
    left = torch.cat([rows.T, math.sqrt(1e-3) * torch.eye(count, dtype=F64)])
    right = -torch.cat([stacked[-1], torch.zeros(count, dtype=F64)]) - left.sum(1) * 0.5
    v = torch.tensor(nnls(left.numpy(), right.numpy(), maxiter=5000)[0]) + 0.5
    assert float((values[1 : 1 + count] - v).abs().max()) <= 1e-8 * float(v.max())


def test_margin_and_ridge_arrive_in_float64() -> None:
    products = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=F64)
    for margin, ridge in ((1e300, 1e-300), (0.3 + 2**-50, 0.0), (0.0, 1 / 3)):
        values = projection.gem_coefficients(products, margin, ridge)
        assert float(values[1]) == pytest.approx(max(margin, 1 / (4 + ridge)), rel=4 * U, abs=0)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_products_that_are_no_numbers(special: float) -> None:
    good = with_gradient(memories_of("independent", 9), 0.5)
    for place in ((0, 0), (3, 5), (8, 9), (9, 9)):
        products = good.clone()
        products[place] = products[place[::-1]] = special
        values, want = projection.gem_coefficients(products, 0.5, 1e-3), reference.gem_coefficients(products, 0.5, 1e-3)
        assert torch.equal(values.isnan(), want.isnan())
        assert identical(values[[0]], want[[0]])


# ---- the second sweep


@pytest.mark.parametrize("count", [1, 2, 3, 10, 17, 64])
def test_combine(count: int) -> None:
    for dtype in FLOATING:
        grads, memories = normal([(40,), (3, 3)], 0, dtype), [normal([(40,), (3, 3)], k, FLOATING[k % 2]) for k in range(1, 1 + count)]
        v = torch.arange(count, dtype=F64) % 3
        before = clone(grads)
        projection.combine_(grads, memories, v + (v == 0) * (count == 1))
        check_written(grads, before, memories, v + (v == 0) * (count == 1))


def test_a_memory_with_coefficient_0_does_not_count() -> None:
    bad = [torch.full((5000,), math.nan), torch.tensor(math.inf).expand(7)]
    grads, good = normal([(5000,), (7,)], 0), normal([(5000,), (7,)], 1)
    before = clone(grads)
    projection.combine_(grads, [bad, good, bad], torch.tensor([0.0, 2.0, -0.0], dtype=F64))
    check_written(grads, before, [good], torch.tensor([2.0], dtype=F64))


def test_without_violation_no_program_comes_to_the_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object) -> None:
        raise LookupError("the elements were asked for")

    grads = normal([(5000,), (3,)], 0)
    monkeypatch.setattr(projection, "here", touched)
    projection.combine_(grads, [grads] * 3, torch.tensor([0.0, -0.0, 0.0], dtype=F64))
    with pytest.raises(Exception, match="the elements were asked for"):
        projection.combine_(grads, [grads] * 3, torch.tensor([0.0, 0.0, 1e-300], dtype=F64))


@pytest.mark.parametrize("place", [0, 2500, 4999])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(special: float, place: int) -> None:
    for where, sign in itertools.product(("gradient", "memory"), (-1, 1)):
        grads, memory = [torch.ones(5000)], [torch.full((5000,), float(sign))]
        (grads if where == "gradient" else memory)[0][place] = special
        (ours, theirs), (gem, gem_theirs) = [clone(grads), clone(grads)], [clone(grads), clone(grads)]
        values, want = projection.project_(ours, memory), reference.project_(theirs, memory)
        assert identical(values, want)
        assert all_same(ours, theirs)
        values = projection.gem_project_(gem, [memory, memory], 0.5, 1e-3)
        want = reference.gem_project_(gem_theirs, [memory, memory], 0.5, 1e-3)
        assert identical(values, want)
        assert all_same(gem, gem_theirs)
