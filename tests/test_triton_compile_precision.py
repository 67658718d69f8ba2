"""The Triton kernels of Kronecker-factored and low-rank precision, compiled ahead of time; see test_triton_compile.py."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
    pytest.skip("interpreted functions cannot be compiled", allow_module_level=True)

from ahead_of_time import NVIDIA, argument_bytes, compiled, empty, keys, recorded, resources, vectors
from fastcl.kernels import kronecker, low_rank

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
STEP = torch.zeros((), dtype=F64)
FLOAT64 = r"\b(?:add|sub|mul|fma|div|sqrt|mma)\.\S*f64"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded([kronecker, low_rank], monkeypatch.setattr)


# ---- Kronecker factors


def padded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return empty((rows, -(-columns // 16) * 16), dtype)[:, :columns]


def layers(count: int, rows: int, inputs: int, dtype: torch.dtype, stored: torch.dtype) -> dict[str, list[Tensor]]:
    made = {
        "weights": lambda: empty((rows, inputs), stored),
        "biases": lambda: empty((rows,), stored),
        "A": lambda: padded(inputs + 1, inputs + 1, dtype),
        "G": lambda: padded(rows, rows, dtype),
        **{name: lambda: padded(rows, inputs + 1, dtype) for name in ("M", "H", "V")},
    }
    return {name: [make() for _ in range(count)] for name, make in made.items()}


def small(op: str, count: int, rows: int, inputs: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    on = layers(count, rows, inputs, dtype, stored)
    x, factors = (on["weights"], on["biases"]), (on["A"], on["G"])
    if op == "step":
        kronecker.ncl_small_step_(*x, *x, on["M"], on["H"], *factors, 0.1, 0.9, 1.0)
    elif op == "direction":
        kronecker.ncl_small_direction_(on["M"], on["V"], *x, on["H"], *factors, 0.9, 1.0)
    elif op == "product":
        kronecker.kron_small_(*x, *factors)
    else:
        kronecker.kron_small_quadratic(*x, *factors)


SMALL = ("product", "quadratic", "step", "direction")


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize(("target", "size", "stored"), [*((t, 64, F32) for t in NVIDIA), ("sm_90", 128, F32), ("sm_90", 32, BF16)], ids=str)
def test_ptx_of_small_layers(op: str, target: str, size: int, stored: torch.dtype, launches: list[Any], tmp_path: Path) -> None:
    small(op, 1, size, size, F32, stored)
    ptx = compiled(launches[0], target)["ptx"]
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st") or stored != F32 or op == "quadratic"
    # float32 is multiplied as float32 is, not as the 10 bits that tensor cores take of it.
    assert "tf32" not in ptx
    assert "mma" not in ptx
    wide = re.findall(FLOAT64, ptx)
    assert bool(wide) == (op in ("quadratic", "direction")), wide
    # Of each product <X, V> an element has one, and no more: a thread has 32 (64 x 64 of 128 threads) or 64, beside the sums over threads.
    assert sum(name.startswith(("mul", "fma")) for name in wide) <= 2 * max(1, size * size // (256 if size == 128 else 128)) + 16
    assert "atom" not in ptx
    # A thread has 64 elements of V, and at the end of a direction 64 of M, of which a few do not fit.
    assert resources(launches[0], target, tmp_path / "cubin")["STACK"] <= (64 if (op, size) == ("direction", 128) else 8)


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("op", SMALL)
def test_float64_is_multiplied_in_float64(op: str, size: int, launches: list[Any], tmp_path: Path) -> None:
    small(op, 1, size, size, F64, F64)
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64" in ptx
    assert not re.search(r"\b(mul|add|fma)\.\S*f32", ptx)
    # 128 x 128 doubles are half of all registers, and at its end a direction has two of them.
    allowed = 0 if size < 128 else 900 if op == "direction" else 320
    assert resources(launches[0], "sm_90", tmp_path / "cubin")["STACK"] <= allowed


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("op", SMALL)
def test_amd_compiles_small_layers(op: str, dtype: torch.dtype, launches: list[Any]) -> None:
    small(op, 1, 64, 64, dtype, dtype)
    text = compiled(launches[0], "gfx942")["amdgcn"]
    assert "s_endpgm" in text
    assert re.search(r"\.vgpr_spill_count: *0\b", text)
    assert "xf32" not in text
    assert re.search(r"\b(buffer|global)_load_dwordx[24]\b", text)


def test_a_column_that_stands_apart_is_no_padding(launches: list[Any]) -> None:
    for rows, inputs in ((32, 32), (64, 64), (128, 128)):
        small("product", 1, rows, inputs, F32, F32)
    assert [(k[2]["PLAN"].M, k[2]["PLAN"].N, k[2]["PLAN"].TAIL) for k in launches] == [(n, n, True) for n in (32, 64, 128)]
    launches.clear()
    # 129 inputs without a bias too.
    kronecker.kron_small_([empty((128, 129), F32)], [empty((0,), F32)], [padded(129, 129, F32)], [padded(128, 128, F32)])
    assert (launches[0][2]["PLAN"].N, launches[0][2]["PLAN"].TAIL) == (128, True)


def test_layers_share_launches(launches: list[Any]) -> None:
    for count, wanted in ((1, 1), (32, 1), (64, 2), (70, 3)):
        launches.clear()
        small("step", count, 32, 32, F32, F32)
        assert len(launches) == wanted
    launches.clear()
    sizes = [(20, 30), (25, 18), (32, 17), (3, 5), (9, 12)]
    on = [layers(1, rows, inputs, F32, F32) for rows, inputs in sizes]
    lists = {name: [x[name][0] for x in on] for name in on[0]}
    x = (lists["weights"], lists["biases"])
    kronecker.ncl_small_direction_(lists["M"], lists["V"], *x, lists["H"], lists["A"], lists["G"], 0.9, 1.0)
    tiles = [(k[2]["PLAN"].M, k[2]["PLAN"].N) for k in launches]
    assert set(tiles) == {(32, 32), (16, 16)}


def test_another_model_compiles_no_new_layers(launches: list[Any]) -> None:
    # Sizes of 1 and multiples of 16 among them: on these Triton would specialise.
    for rows, inputs in ((17, 20), (32, 32), (20, 28), (31, 24)):
        for op in SMALL:
            small(op, 3, rows, inputs, F32, F32)
    names = {"product_kernel", "step_kernel", "direction_kernel"}
    own = [k for k in launches if k[0].__name__ in names]
    assert len(keys(own)) == len(SMALL)


@pytest.mark.parametrize("lr", [None, 0.1])
@pytest.mark.parametrize(("target", "stored"), [*((t, F32) for t in NVIDIA), ("sm_90", BF16)], ids=str)
def test_ptx_of_the_sweeps(target: str, stored: torch.dtype, lr: float | None, launches: list[Any], tmp_path: Path) -> None:
    on = layers(1, 300, 500, F32, stored)
    kronecker.ncl_momentum_(on["M"], on["H"], on["weights"], on["biases"], 0.9, 1.0, lr)
    kronecker.ncl_apply_(on["weights"], on["biases"], on["H"], on["V"], on["M"], STEP)
    assert [k[0].__name__ for k in launches] == ["momentum_kernel"] * 2 + ["apply_kernel"] * 2
    for launch in (launches[0], launches[2]):
        ptx = compiled(launch, target)["ptx"]
        # Through rows that are padded, 16 bytes at a time.
        assert vectors(ptx, "ld")
        assert vectors(ptx, "st")
        assert not re.findall(FLOAT64, ptx)
        assert resources(launch, target, tmp_path / "cubin")["STACK"] == 0


def test_amd_compiles_the_sweeps(launches: list[Any]) -> None:
    for dtype in (F32, F64):
        on = layers(3, 30, 500, dtype, BF16)
        kronecker.ncl_momentum_(on["M"], on["H"], on["weights"], on["biases"], 0.9, 1.0, 0.1)
        kronecker.ncl_apply_(on["weights"], on["biases"], on["H"], on["V"], on["M"], STEP)
    for launch in launches:
        assert "s_endpgm" in compiled(launch, "gfx942")["amdgcn"]


# ---- low rank


def many(dtype: torch.dtype, tensors: int = 1, shape: tuple[int, ...] = (60, 100)) -> list[Tensor]:
    return [empty(shape, dtype) for _ in range(tensors)]


def run(op: str, dtype: torch.dtype, stored: torch.dtype, rank: int = 8, tensors: int = 1, shape: tuple[int, ...] = (60, 100)) -> None:
    kept, other = many(dtype, tensors, shape), many(stored, tensors, shape)
    basis, sigma = many(dtype, tensors, (rank, *shape)), torch.zeros(rank, dtype=F64)
    vectors_of = [other] * 2
    mix = torch.zeros(rank + 2, rank + 2, dtype=F64)
    {
        "products": lambda: low_rank.low_rank_products(other, kept, basis, True),
        "step_products": lambda: low_rank.low_rank_step_products(other, other, kept, kept, kept, basis, 0.9, 1.0),
        "update": lambda: low_rank.low_rank_update_(other, kept, basis, sigma),
        "step_update": lambda: low_rank.low_rank_step_update_(other, other, kept, kept, kept, basis, sigma, STEP, 0.9, 1.0),
        "gram": lambda: low_rank.low_rank_gram(kept, basis, sigma, vectors_of),
        "compress": lambda: low_rank.low_rank_compress_(kept, basis, sigma, vectors_of, mix),
        "rotate": lambda: low_rank.low_rank_rotate_(basis, mix[:rank, :rank].contiguous()),
    }[op]()


SWEEPS = ("products", "step_products", "update", "step_update")
ROWS = ("gram", "compress", "rotate")


@pytest.mark.parametrize("op", SWEEPS)
@pytest.mark.parametrize(("target", "stored"), [*((t, F32) for t in NVIDIA), ("sm_90", BF16)], ids=str)
def test_ptx_of_the_low_rank_sweeps(op: str, target: str, stored: torch.dtype, launches: list[Any], tmp_path: Path) -> None:
    run(op, F32, stored)
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names == (["products_kernel", "sum_kernel"] if "products" in op else ["update_kernel"])
    ptx = compiled(launches[0], target)["ptx"]
    # The rows of the basis, whose length is known at run time alone, are read 16 bytes at a time.
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st") == ("update" in op)
    # Products and their sums alone are float64; roots, quotients and what is written are not.
    wide = set(re.findall(r"\b(add|sub|mul|fma|div|sqrt|mma)\.\S*f64", ptx))
    assert wide == ({"add", "mul", "fma"} if "products" in op else set())
    assert "sqrt.rn.f32" in ptx
    assert "atom" not in ptx
    used = resources(launches[0], target, tmp_path / "cubin")
    assert used["STACK"] <= 8
    assert used["REG"] <= 168, used


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("target", NVIDIA)
def test_ptx_of_the_low_rank_rows(op: str, target: str, launches: list[Any], tmp_path: Path) -> None:
    run(op, F32, F32)
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names == (["gram_kernel"] if op == "gram" else ["mix_kernel", "gram_kernel"])
    for launch in launches:
        ptx = compiled(launch, target)["ptx"]
        assert vectors(ptx, "ld")
        assert not re.search(r"\b(mul|add|fma)\.\S*f32|tf32", ptx)
        assert resources(launch, target, tmp_path / "cubin")["STACK"] == 0


@pytest.mark.parametrize("op", [*SWEEPS, *ROWS])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_amd_compiles_low_rank(op: str, dtype: torch.dtype, launches: list[Any]) -> None:
    run(op, dtype, dtype)
    for launch in launches:
        text = compiled(launch, "gfx942")["amdgcn"]
        assert "s_endpgm" in text
        assert re.search(r"\.vgpr_spill_count: *0\b", text)
        if launch[0].__name__ != "sum_kernel":
            assert re.search(r"\b(buffer|global)_load_dwordx[24]\b", text), launch[0].__name__


def test_another_rank_compiles_no_new_sweep(launches: list[Any]) -> None:
    for rank, shape in ((1, (16,)), (3, (60, 100)), (16, (8,)), (200, (4, 4))):
        for op in SWEEPS:
            run(op, F32, F32, rank, 2, shape)
    assert {kernel.__name__ for kernel, *_ in launches} == {"products_kernel", "update_kernel", "sum_kernel"}
    assert len(keys(launches)) == len(SWEEPS) + 1


def test_a_launch_fits_the_4_kb_of_arguments(launches: list[Any]) -> None:
    for op in (*SWEEPS, *ROWS):
        run(op, F64, F64, tensors=70)
    for op in SMALL:
        small(op, 70, 30, 30, F64, F64)
    on = layers(70, 30, 30, F64, F64)
    kronecker.ncl_momentum_(on["M"], on["H"], on["weights"], on["biases"], 0.9, 1.0, 0.1)
    kronecker.ncl_apply_(on["weights"], on["biases"], on["H"], on["V"], on["M"], STEP)
    for launch in launches:
        assert argument_bytes(launch) <= 4096 - 64, launch[0].__name__  # Triton appends pointers of its own


def test_many_elements_do_not_make_many_matrices() -> None:
    # 2^31 elements and rows for a tile: 1024 programs and a few, 32 KB each.
    big = [torch.empty(1 << 31, dtype=torch.uint8, device="meta")]
    assert (1 << 31) // low_rank._stretch(big) <= 2 * low_rank.PROGRAMS
