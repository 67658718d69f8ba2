"""The Triton kernels of masks, Fisher information, quantile, pull and optimizers, compiled ahead of time; see test_triton_compile.py."""

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

from ahead_of_time import NVIDIA, approximate, argument_bytes, compiled, contracted, empty, keys, recorded, resources, vectors
from fastcl.kernels import _fisher, _lists, _products, _transforms, bit_mask, child_mask, optimizers, pull, quantile

F64, F32, BF16, F16, U8, I64 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64
SHAPE = (60, 100)
LIMIT = torch.zeros((), dtype=F64)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded([child_mask, bit_mask, pull, quantile, _fisher, _products, optimizers], monkeypatch.setattr)


def many(dtype: torch.dtype, tensors: int = 1, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [empty(shape, dtype) for _ in range(tensors)]


def bits(tensors: int = 1, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [empty((-(-empty(shape, U8).numel() // 8),), U8) for _ in range(tensors)]


def run(op: str, dtype: torch.dtype, other: torch.dtype = F32, tensors: int = 1, shape: tuple[int, ...] = SHAPE) -> None:
    grads = many(dtype, tensors, shape)
    if op == "child_mask_":
        child_mask.child_mask_(grads, 0.3, 1 << 40, 16)
    elif op == "bit_mask_":
        bit_mask.bit_mask_(grads, bits(tensors, shape))
    elif op == "threshold_bits_":
        bit_mask.threshold_bits_(bits(tensors, shape), grads, LIMIT)
    elif op == "ewc_pull_":
        pull.ewc_pull_(grads, grads, many(other, tensors, shape), many(other, tensors, shape), 0.5)
    elif op == "fisher_add_":
        _fisher.fisher_update_(many(other, tensors, shape), grads, 0.5, torch.ones(tensors, dtype=F64))
    else:
        raise ValueError(op)


def fused(ptx: str) -> int:
    """How many products and sums of float32 are rounded once; newer GPUs make two of them at once."""
    assert set(contracted(ptx)) <= {"fma.rn.f32", "fma.rn.f32x2"}
    return sum(2 if kind.endswith("x2") else 1 for kind in contracted(ptx))


WRITERS = ["child_mask_", "bit_mask_", "ewc_pull_", "fisher_add_"]


@pytest.mark.parametrize("op", WRITERS)
@pytest.mark.parametrize(("target", "dtype"), [*((t, F32) for t in NVIDIA), ("sm_90", BF16), ("sm_90", F16)], ids=str)
def test_ptx_of_the_bitwise_ops(op: str, dtype: torch.dtype, target: str, launches: list[Any], tmp_path: Path) -> None:
    run(op, dtype)
    assert len(launches) == 1
    ptx = compiled(launches[0], target)["ptx"]
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st")
    assert "f64" not in ptx
    assert not contracted(ptx)
    assert not approximate(ptx)
    assert resources(launches[0], target, tmp_path / "cubin")["STACK"] == 0


@pytest.mark.parametrize("op", WRITERS)
def test_float64_is_computed_in_float64(op: str, launches: list[Any]) -> None:
    run(op, F64, F64)
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st")
    assert not contracted(ptx)
    assert not re.search(r"\b(mul|sub|add)\.(rn\.)?f32", ptx)


def test_a_block_of_philox_serves_eight_elements(launches: list[Any]) -> None:
    run("child_mask_", F32)
    child_mask.child_mask_([empty((100, 60), F32).t()], 0.3, 1, 2)
    run("child_mask_", F32, shape=())
    texts = [compiled(launch, "sm_90")["ptx"] for launch in launches]
    # Of 16 elements a thread: 2 blocks of 10 rounds, each of 2 products, and where a second draw is needed 4 more blocks. One that knows
    # nothing of its neighbours draws for each element alone. The first product is the same for all.
    products = [len(re.findall(r"\bmul\.hi\.u32|\bmul\.wide\.u32", text)) for text in texts]
    assert products[0] <= 6 * 20
    assert products[1] > 2 * products[0] / 2
    assert launches[0][2]["GROUPED"]
    assert not launches[1][2]["GROUPED"]
    assert vectors(texts[1], "ld")


def test_ptx_of_the_threshold(launches: list[Any]) -> None:
    run("threshold_bits_", F32)
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert vectors(ptx, "ld")
    assert re.search(r"st\.global\.b(16|32|64)", ptx)
    # The threshold is rounded up to float32 once, and no element becomes float64.
    assert len(re.findall(r"cvt\.\S*f64\.f32", ptx)) <= 2
    assert "setp.ge.f64" not in ptx


@pytest.mark.parametrize(("target", "dtype", "level"), [*((t, F32, 1) for t in NVIDIA), ("sm_90", BF16, 0)], ids=str)
def test_ptx_of_the_counts(level: int, dtype: torch.dtype, target: str, launches: list[Any], tmp_path: Path) -> None:
    quantile.radix_counts(many(dtype), torch.zeros(2, dtype=I64), level, False)
    ptx = compiled(launches[0], target)["ptx"]
    assert vectors(ptx, "ld")
    assert "f64" not in ptx
    # Whole numbers alone are added where others add, so that the order does not matter.
    added = {re.sub(r"^(atom|red)\.", "", name) for name in re.findall(r"\b(?:atom|red)\.\S+", ptx)}
    assert added == {"relaxed.sys.shared.add.u32", "global.gpu.relaxed.add.u64"}
    assert resources(launches[0], target, tmp_path / "cubin")["STACK"] == 0


def test_a_tensor_is_counted_in_long_stretches(launches: list[Any]) -> None:
    quantile.radix_counts([empty((1 << 20,), F32), empty((5,), F32)], torch.zeros(2, dtype=I64), 0, False)
    assert [kernel.__name__ for kernel, *_ in launches] == ["counts_kernel"]
    assert launches[0][2]["SHAPE"].BLOCK == quantile.STRETCH * launches[0][2]["PART"].BLOCK


Z = many(F32)
TRANSFORMS: dict[str, list[tuple[Any, ...]]] = {
    "none": [],
    "soft_mask": [("soft_mask", Z, 0.5)],
    "soft_mask of uint8": [("soft_mask", many(U8), 0.5)],
    "child_mask": [("child_mask", 0.3, 7)],
    "fixed_mask": [("fixed_mask", bits())],
    "pull": [("pull", Z, Z, 0.5)],
    "all": [("soft_mask", Z, 0.5), ("child_mask", 0.3, 7), ("fixed_mask", bits()), ("pull", Z, Z, 0.5)],
}
COUNTED = [torch.zeros(())]


def adamw(dtype: torch.dtype, transforms: list[tuple[Any, ...]], tensors: int = 1, shape: tuple[int, ...] = SHAPE, **options: Any) -> None:
    state = F64 if dtype == F64 else F32
    written = [many(dtype, tensors, shape), many(state, tensors, shape), many(state, tensors, shape), COUNTED * tensors]
    given = {"places": None, "compact": None, "scale": None, "found_inf": None, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    given |= {"weight_decay": 0.1, "hf": False, "maximize": False} | options
    optimizers.adamw_(written[0], many(dtype, tensors, shape), *written[1:], transforms, **given)


PLANS = [*(("sm_90", F32, name) for name in TRANSFORMS), *(("sm_90", BF16, name) for name in ("none", "all"))]
PLANS += [(target, F32, name) for target in ("sm_80", "sm_100") for name in ("none", "all")]


@pytest.mark.parametrize(("target", "dtype", "transforms"), PLANS, ids=str)
def test_ptx_of_adamw(target: str, dtype: torch.dtype, transforms: str, launches: list[Any], tmp_path: Path) -> None:
    adamw(dtype, TRANSFORMS[transforms])
    (launch,) = launches
    ptx = compiled(launch, target)["ptx"]
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st")
    assert "f64" not in ptx
    # Two fused operations per element, one for each moment, and no others: a thread has 8 elements, twice (whole blocks and tails).
    assert fused(ptx) == 2 * 2 * 8
    assert not approximate(ptx)
    assert "sqrt.rn.f32" in ptx
    assert not re.search(r"sqrt\.approx|\.ftz", ptx)
    used = resources(launch, target, tmp_path / "cubin")
    assert used["STACK"] == 0
    assert used["REG"] <= 128, used


@pytest.mark.parametrize("hf", [False, True], ids=["torch", "hf"])
def test_ptx_of_adamw_in_float64(hf: bool, launches: list[Any]) -> None:
    adamw(F64, [], hf=hf)
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert vectors(ptx, "ld")
    assert len(re.findall(r"\bfma\.rn\.f64", ptx)) == (3 if hf else 2) * 2 * 8
    assert not re.search(r"\.f32\b", ptx)


def test_float64_in_a_projected_step_is_the_definition_alone(launches: list[Any]) -> None:
    adamw(F32, [("project", Z, torch.zeros(1, dtype=F64))])
    ptx = compiled(launches[0], "sm_90")["ptx"]
    # Per element a product and a sum, and nothing else in float64 but conversions and the coefficient's comparison with 0.
    assert len(re.findall(r"\b(?:mul|add)\.(?:rn\.)?f64", ptx)) == 2 * 2 * 8
    assert not re.search(r"\b(?:fma|div|sqrt|sub)\.\S*f64", ptx)


def test_ptx_of_compact_states(launches: list[Any], tmp_path: Path) -> None:
    child = bits()
    optimizers.adamw_(
        Z, Z, [torch.zeros(9)], [torch.zeros(9)], COUNTED, [("fixed_mask", child)], None, (child, [torch.zeros(3, dtype=I64)]),
        None, None, 1e-3, 0.9, 0.999, 1e-8, 0.1, False, False,
    )  # fmt: skip
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert vectors(ptx, "ld")
    assert "f64" not in ptx
    assert resources(launches[0], "sm_90", tmp_path / "cubin")["STACK"] == 0


@pytest.mark.parametrize(("target", "momentum"), [("sm_80", 0.9), ("sm_90", 0.0), ("sm_90", 0.9), ("sm_100", 0.9)])
def test_ptx_of_sgd(target: str, momentum: float, launches: list[Any], tmp_path: Path) -> None:
    buffers = Z if momentum else []
    optimizers.sgd_(Z, Z, buffers, [], [], None, None, None, 0.1, momentum, 0.0, 0.1, momentum > 0, False, False)
    ptx = compiled(launches[0], target)["ptx"]
    assert vectors(ptx, "ld")
    assert vectors(ptx, "st")
    assert "f64" not in ptx
    assert fused(ptx) == (4 if momentum else 2) * 2 * 8
    assert resources(launches[0], target, tmp_path / "cubin")["STACK"] == 0


def test_ptx_of_the_transformed_dot(launches: list[Any], tmp_path: Path) -> None:
    optimizers.transformed_dot(Z, Z, [], [("soft_mask", Z, 0.5)], None, None, Z)
    assert [kernel.__name__ for kernel, *_ in launches] == ["dot_kernel", "sum_kernel"]
    ptx = compiled(launches[0], "sm_90")["ptx"]
    assert vectors(ptx, "ld")
    assert "atom" not in ptx
    assert not contracted(ptx)
    assert resources(launches[0], "sm_90", tmp_path / "cubin")["STACK"] == 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_amd_compiles(dtype: torch.dtype, launches: list[Any]) -> None:
    for op in (*WRITERS, "threshold_bits_"):
        run(op, dtype, dtype)
    _fisher.fisher_squares(many(dtype))
    quantile.radix_counts(many(dtype), torch.zeros(2, dtype=I64), 1, dtype == F64)
    adamw(dtype, [*TRANSFORMS["all"], ("project", Z, torch.zeros(1, dtype=F64))])
    optimizers.sgd_(many(dtype), many(dtype), [], [], [], None, None, None, 0.1, 0.0, 0.0, 0.1, False, False, False)
    for launch in launches:
        text = compiled(launch, "gfx942")["amdgcn"]
        assert "s_endpgm" in text, launch[0].__name__
        if launch[0].__name__ in ("pull_kernel", "fisher_kernel", "child_mask_kernel") and dtype != F64:
            assert not re.search(r"\bv_(pk_)?(fma|mad)(c|ak|mk)?_f32", text), launch[0].__name__
        if launch[0].__name__ in ("pull_kernel", "adamw_kernel", "child_mask_kernel"):
            assert re.search(r"\b(buffer|global)_load_dwordx[24]\b", text), launch[0].__name__


def test_a_launch_fits_the_4_kb_of_arguments(launches: list[Any]) -> None:
    for dtype in (F32, F64):
        for count in (1, 70):
            for op in WRITERS:
                run(op, dtype, tensors=count)
            operands = [many(F32, count) for _ in range(4)]
            transforms = [
                ("soft_mask", operands[0], 0.5),
                ("child_mask", 0.3, 7),
                ("fixed_mask", bits(count)),
                ("project", operands[1], torch.zeros(1, dtype=F64)),
                ("pull", operands[2], operands[3], 0.5),
            ]
            places = [(n, 3, (100, 1)) for n in range(count)]
            adamw(dtype, transforms, count)
            adamw(dtype, transforms * 3, count, places=places)
    tall = [torch.zeros(3, 4, 5, 6, 7)[:, ::2, :, ::2, ::3] for _ in range(9)]
    pull.ewc_pull_(tall, tall, tall, tall, 0.5)
    child_mask.child_mask_(tall, 0.5, 1, 1)
    for launch in launches:
        assert argument_bytes(launch) <= 4096 - 64, launch[0].__name__


def test_another_model_compiles_nothing_new(launches: list[Any]) -> None:
    sizes = [[(1,), (16,), (7,)], [(4096,), (4097,), (8192,), (5, 5)], [(768, 768), (3, 1), (1, 16), (2, 2)]]
    for step, shapes in enumerate(sizes):
        grads = [empty(s, F32) for s in shapes]
        child_mask.child_mask_(grads, 0.1 + 0.2 * step, 1 << 20 * step, 16 * step)
        masks = [bits(1, s)[0] for s in shapes]
        optimizers.adamw_(
            grads, grads, grads, grads, COUNTED * len(shapes), [("child_mask", 0.5 * step + 0.001, step), ("fixed_mask", masks)],
            None, None, None, None, 1.0 * step, 0.9, 0.1 * step, 0.0, 0.1, False, False,
        )  # fmt: skip
        _fisher.fisher_squares(grads)
        quantile.radix_counts(grads, torch.zeros(2, dtype=I64), 1, False)
    names = {"child_mask_kernel", "adamw_kernel", "products_kernel", "segments_kernel", "counts_kernel"}
    assert {kernel.__name__ for kernel, *_ in launches} == names
    assert len(keys(launches)) == len(names)


def test_few_launches(launches: list[Any]) -> None:
    for transforms in ("none", "child_mask"):
        launches.clear()
        adamw(F32, TRANSFORMS[transforms], 148, (5, 7))
        assert len(launches) == 3
    launches.clear()
    left_out = [empty((0,), U8) if n % 2 else empty((5,), U8) for n in range(100)]
    adamw(F32, [("fixed_mask", left_out)], 100, (5, 7))
    assert len(launches) == 2


def test_more_than_2_to_the_31_elements_are_planned() -> None:
    big = torch.empty(3 << 31, dtype=U8, device="meta")
    (sweep,) = _transforms.sweeps([0], [[big], [big]], [], [], None)
    assert sweep.launch.grid == ((3 << 31) // _transforms.BLOCK,)
    (launch,) = _lists.launches([torch.zeros(4)], [torch.empty(0, dtype=torch.int16, device="meta").as_strided((4,), (1,), 1 << 40)])
    assert launch.aligned(1)
    assert (launch.columns[1][0] - _lists.WIDE_BIAS) >> 1 == 1 << 40
