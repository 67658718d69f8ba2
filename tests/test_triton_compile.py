"""Compiles every Triton kernel ahead of time, as its launches would, for GPUs that need not be here; reads what the compiler made."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
    pytest.skip("interpreted functions cannot be compiled", allow_module_level=True)

from ahead_of_time import NVIDIA, approximate, argument_bytes, compiled, contracted, empty, keys, recorded, resources, vectors  # noqa: E402
from fastcl.kernels import _lists, _moments, _products, importance, projection, soft_mask  # noqa: E402

F64, F32, BF16, F16, U8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded([soft_mask, importance, _moments, _products, projection], monkeypatch.setattr)


def run(op: str, dtype: torch.dtype, stored: torch.dtype, tensors: int = 1, small: tuple[int, ...] = (60, 100), heads: int = 1) -> None:
    def many(shape: tuple[int, ...], d: torch.dtype) -> list[Tensor]:
        return [empty(shape, d) for _ in range(tensors)]

    if op == "soft_mask_":
        soft_mask.soft_mask_(many((60, 100), dtype), many(small, stored), 0.3)
    elif op == "emax_":
        importance.emax_(many((60, 100), stored), many(small, dtype))
    else:
        importance.spg_importance_(many((60, 100), stored), [many((60, 100), dtype) for _ in range(heads)])


PAIRS = [(F32, F32), (BF16, BF16), (F16, F32), (F32, U8), (BF16, U8)]


@pytest.mark.parametrize("op", ["soft_mask_", "emax_"])
@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=str)
@pytest.mark.parametrize("target", NVIDIA)
def test_ptx_of_the_bitwise_ops(op: str, dtype: torch.dtype, stored: torch.dtype, target: str, launches: list[Any]) -> None:
    run(op, dtype, stored)
    assert len(launches) == 1
    ptx = compiled(launches[0], target)["ptx"]
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st")
    assert "f64" not in ptx
    assert not contracted(ptx)
    assert not approximate(ptx)


@pytest.mark.parametrize("op", ["soft_mask_", "emax_"])
@pytest.mark.parametrize(("tensors", "small"), [(8, (60, 100)), (64, (60, 100)), (1, ()), (1, (60, 1)), (5, (1, 100))], ids=str)
def test_ptx_of_lists_and_broadcasts(op: str, tensors: int, small: tuple[int, ...], launches: list[Any]) -> None:
    run(op, F32, F32, tensors, small)
    assert len(launches) == 1
    ptx = compiled(launches[0], "sm_90")["ptx"]
    # The written tensor is walked through in order whatever form the other one has.
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st")
    assert "f64" not in ptx
    assert not contracted(ptx)
    assert not approximate(ptx)


@pytest.mark.parametrize("op", ["soft_mask_", "emax_"])
@pytest.mark.parametrize("stored", [F64, U8], ids=str)
def test_float64_is_divided_and_computed_in_float64(op: str, stored: torch.dtype, launches: list[Any]) -> None:
    run(op, F64, stored)
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert vectors(ptx, "ld")
    assert not contracted(ptx)
    assert ("div.rn.f64" in ptx) == (stored == U8)
    assert not re.search(r"\b(mul|sub|div)\.(rn\.)?f32", ptx)


@pytest.mark.parametrize(("dtype", "stored"), [(F32, F32), (BF16, U8), (F32, BF16)], ids=str)
def test_ptx_of_spg(dtype: torch.dtype, stored: torch.dtype, launches: list[Any]) -> None:
    run("spg_importance_", dtype, stored)
    texts = {kernel.__name__: compiled((kernel, *rest), "sm_90")["ptx"] for kernel, *rest in launches}
    assert set(texts) == {"moments_kernel", "combine_kernel", "spg_kernel", "mean_kernel"}
    sweep = texts["spg_kernel"]
    assert vectors(texts["moments_kernel"], "ld")
    assert vectors(sweep, "ld")
    assert vectors(sweep, "st")
    # Of each element nothing but the sum of what was stored is float64, and of a code not even that.
    assert not re.search(r"\b(mul|fma|sub|max|ex2|sqrt)\S*\.f64", sweep)
    assert not re.search(r"\b(fma|max|ex2|sqrt)\S*\.f64", texts["moments_kernel"]) or dtype == F64
    assert ("add.f64" in sweep) == (stored != U8)
    assert "atom" not in "".join(texts.values())


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_the_two_sweeps_apart(target: str, launches: list[Any]) -> None:
    stored, heads = [empty((60, 100), F32), empty((7,), BF16)], [[empty((60, 100), F32), empty((7,), F64)]] * 2
    rows = importance.spg_moments(stored, heads)
    importance.spg_update_(stored, heads, [rows])
    assert rows.shape == (2, 2, 4)
    assert {kernel.__name__ for kernel, *_ in launches} == {
        "moments_kernel",
        "combine_kernel",
        "scaling_kernel",
        "spg_kernel",
        "mean_kernel",
    }
    for launch in launches:
        compiled(launch, target)


def lists(count: int, dtype: torch.dtype, shape: tuple[int, ...] = (60, 100), tensors: int = 1) -> list[list[Tensor]]:
    return [[empty(shape, dtype) for _ in range(tensors)] for _ in range(count)]


def gem(count: int, dtype: torch.dtype, shape: tuple[int, ...] = (60, 100), tensors: int = 1) -> None:
    grads, *memories = lists(1 + count, dtype, shape, tensors)
    projection.gem_project_(grads, memories, 0.5, 1e-3)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("target", NVIDIA)
def test_ptx_of_a_gem(dtype: torch.dtype, target: str, launches: list[Any], tmp_path: Path) -> None:
    projection.project_(*lists(2, dtype))
    assert [kernel.__name__ for kernel, *_ in launches] == ["products_kernel", "agem_kernel", "combine_kernel"]
    texts = [compiled(launch, target)["ptx"] for launch in launches]
    assert vectors(texts[0], "ld")
    assert vectors(texts[2], "ld")
    assert vectors(texts[2], "st")
    # Two products per element, summed as they are made; g + v m in two roundings, as in the definition.
    assert "fma.rn.f64" in texts[0]
    assert not contracted(texts[2])
    assert not re.search(r"\b(mul|add|fma|sub)\.\S*f32", "".join(texts))
    assert "atom" not in "".join(texts)
    assert all(resources(launch, target, tmp_path / "cubin")["STACK"] == 0 for launch in launches)


@pytest.mark.parametrize("target", NVIDIA)
def test_ptx_of_gem(target: str, launches: list[Any], tmp_path: Path) -> None:
    gem(10, F32)
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names == ["products_kernel", "sum_kernel"] * 3 + ["gem_kernel", "combine_kernel"]
    for launch in launches:
        ptx = compiled(launch, target)["ptx"]
        if launch[0].__name__ in ("products_kernel", "combine_kernel"):
            assert vectors(ptx, "ld")
        assert "atom" not in ptx
        # A few doubles of the widest tile may not fit: two with the compiler of Triton 3.9, six with that of 3.6.
        assert resources(launch, target, tmp_path / "cubin")["STACK"] <= 48


def test_a_memory_that_counts_for_nothing_is_loaded_under_a_predicate(launches: list[Any]) -> None:
    grads, *memories = lists(4, F32)
    projection.combine_(grads, memories, torch.zeros(3, dtype=F64))
    ptx = compiled(launches[0], "sm_90")["ptx"]
    loads = re.findall(r"(@%p\d+ )?ld\.global\.v4\.b32", ptx)
    assert len(loads) == 16
    assert sum(map(bool, loads)) == 12


@pytest.mark.parametrize("count", [1, 10, 17, 64])
def test_the_quadratic_programme_compiles(count: int, launches: list[Any], tmp_path: Path) -> None:
    projection.gem_coefficients(torch.zeros(count + 1, count + 1, dtype=F64), 0.5, 1e-3)
    for target in ("sm_80", "sm_90"):
        used = resources(launches[0], target, tmp_path / "cubin")
        # Three tiles of 64 x 64 are more than 16 warps hold: 192 bytes per thread stay in the cache with Triton 3.9, 368 with 3.6.
        assert used["STACK"] <= (368 if count > 32 else 16), used
    assert not re.search(r"\b(div|sqrt)\.(full|approx)|\.f32\b", compiled(launches[0], "sm_90")["ptx"])


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_amd_compiles_the_projections(dtype: torch.dtype, launches: list[Any]) -> None:
    projection.project_(*lists(2, dtype))
    gem(3, dtype)
    for launch in launches:
        text = compiled(launch, "gfx942")["amdgcn"]
        assert "s_endpgm" in text
        assert re.search(r"\.vgpr_spill_count: *0\b", text)
        if launch[0].__name__ in ("products_kernel", "combine_kernel"):
            # A wavefront has 64 lanes, so of 1024 elements of 16 bits each takes 8 bytes.
            assert re.search(r"\b(buffer|global)_load_dwordx" + ("[24]" if dtype == BF16 else "4") + r"\b", text)


def test_lists_are_read_as_often_as_the_tiles_demand(launches: list[Any]) -> None:
    for count in (1, 2, 8, 9, 16, 17, 65):
        launches.clear()
        projection.gram(lists(count, F32))
        reads = [len(options["SHAPE"].KINDS) for kernel, _, options in launches if kernel.__name__ == "products_kernel"]
        assert sum(reads) == count * -(-count // projection.TILE)
    launches.clear()
    projection.project_(*lists(2, F32, tensors=64))
    assert [kernel.__name__ for kernel, *_ in launches] == ["products_kernel", "agem_kernel", "combine_kernel"]


def test_offsets_of_flat_walks_are_64_bit(launches: list[Any]) -> None:
    run("soft_mask_", F32, F32)
    ttir = compiled(launches[0], "sm_90")["ttir"]
    assert f"%c{_lists.BLOCK}_i64" in ttir
    assert not re.search(rf"arith\.muli .*%c{_lists.BLOCK}_i32", ttir)


def test_offsets_of_wide_strided_walks_are_64_bit(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lists, "_wide", lambda w: bool(w.sizes))
    run("soft_mask_", F32, F32, small=(60, 1))
    ttir = compiled(launches[0], "sm_90")["ttir"]
    assert f"%c{_lists.STRIDED_BLOCK}_i64" in ttir
    assert not re.search(rf"arith\.muli .*%c{_lists.STRIDED_BLOCK}_i32", ttir)


@pytest.mark.parametrize(("dtype", "stored"), [(F32, F32), (BF16, U8), (F64, F64)], ids=str)
@pytest.mark.parametrize("op", ["soft_mask_", "emax_", "spg_importance_"])
def test_amd_compiles(op: str, dtype: torch.dtype, stored: torch.dtype, launches: list[Any]) -> None:
    run(op, dtype, stored)
    for launch in launches:
        text = compiled(launch, "gfx942")["amdgcn"]
        assert "s_endpgm" in text
        if op == "soft_mask_" and dtype != F64:
            assert not re.search(r"\bv_(pk_)?(fma|mad)(c|ak|mk)?_f32", text)
            assert re.search(r"\b(buffer|global)_load_dwordx4\b", text)


def test_a_launch_fits_the_4_kb_of_arguments(launches: list[Any]) -> None:
    run("soft_mask_", F32, F32, tensors=64)
    run("spg_importance_", F32, F32, tensors=64, heads=4)
    tall = [torch.zeros(3, 4, 5, 6, 7)[:, ::2, :, ::2, ::3] for _ in range(8)]
    importance.spg_importance_(tall, [[torch.zeros(t.shape) for t in tall] for _ in range(4)])
    for count in (1, 3, 7, 8, 15, 16, 63, 64):
        gem(count, F32, tensors=70)
        grads, *memories = lists(1 + count, F32, (3, 4, 5, 6, 7), 9)
        memories = [[t.permute(4, 0, 3, 1, 2).contiguous().permute(1, 3, 4, 2, 0)[..., :] for t in m] for m in memories]
        projection.gem_project_([g[:, ::2, :, ::2, ::3] for g in grads], [[t[:, ::2, :, ::2, ::3] for t in m] for m in memories], 0, 0)
    for launch in launches:
        assert argument_bytes(launch) <= 4096 - 64, launch[0].__name__  # Triton appends pointers of its own


def test_another_model_compiles_nothing_new(launches: list[Any]) -> None:
    # Sizes of 1 and multiples of 16 among them: on these Triton would specialise.
    for sizes in ([(1,), (16,), (7,)], [(4096,), (4097,), (8192,), (5, 5)], [(768, 768), (3, 1), (1, 16), (2, 2), (1 << 18,)]):
        soft_mask.soft_mask_([empty(s, F32) for s in sizes], [empty(s, F32) for s in sizes], 0.0)
        soft_mask.soft_mask_([empty(s, F32) for s in sizes], [empty(s, F32) for s in sizes], 1.0)
    assert len(keys(launches)) == 1
    launches.clear()
    for rows, columns in ((2, 2), (16, 32), (64, 768), (3, 5000), (17, 1024)):
        soft_mask.soft_mask_([empty((rows, columns), F32)], [empty((rows, 1), F32)])
    assert len(keys(launches)) == 1
    launches.clear()
    for count in (2, 5, 8):
        for size in (1, 16, 4096, 5000):
            run_spg = [empty((size,), F32) for _ in range(count)]
            importance.spg_importance_(run_spg, [[empty((size,), F32) for _ in range(count)]])
    assert len(keys(launches)) == 4


def test_few_launches(launches: list[Any]) -> None:
    run("soft_mask_", F32, F32, tensors=148)
    assert len(launches) == 3
    launches.clear()
    run("soft_mask_", F32, F32, tensors=64, small=())
    assert len(launches) == 1


def test_more_than_2_to_the_31_elements_are_planned() -> None:
    big = torch.empty(3 << 31, dtype=U8, device="meta")
    (launch,) = _lists.launches([big, torch.empty(5, dtype=U8, device="meta")], [big, torch.empty(5, dtype=U8, device="meta")])
    assert launch.grid == ((3 << 31) // _lists.BLOCK + 1,)
    assert all(v < 1 << 31 for v in launch.starts + launch.tails)
    rows = torch.empty(3 << 20, 1 << 11, dtype=U8, device="meta")
    (launch,) = _lists.launches([rows], [torch.empty(3 << 20, 1, dtype=U8, device="meta")])
    assert launch.shape.BIAS == _lists.WIDE_BIAS
    assert all(v >= 1 << 31 for v in launch.sizes)
