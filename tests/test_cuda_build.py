"""What can be known about the CUDA library without a GPU: the planner, the arithmetic thread by thread, the compiler's report, the SASS."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = (
    *("soft_mask", "importance", "importance_spg", "importance_fisher", "projection", "child_mask", "pull", "bit_mask", "quantile"),
    *("optimizers", "optimizers_sgd", "kronecker", "low_rank", "yardstick"),
)
DISASSEMBLED = tuple(name for name in KERNEL_FILES if name != "yardstick")
HOST_CASES = (
    *("plan", "dimensions", "quotients", "pairs", "spg", "dots", "project", "combine", "gram"),
    *("child_mask", "bit_mask", "pull", "fisher", "radix", "adamw", "compact", "sgd", "transformed_dot"),
    *("layers", "ncl_sweeps", "low_rank_sweeps", "low_rank_append"),
)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda")
    sources = [*sorted((ROOT / "tests/cuda").glob("host*.cpp")), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-DFASTCL_NO_CLONES", f"-I{ROOT / 'csrc'}"]
    # A misaligned vector works on most CPUs and is an error on a GPU.
    flags += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        built = _run(compiler, *flags, "-c", source, "-o", out)
        assert built.returncode == 0, built.stderr
        return out

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, sources))
    built = _run(compiler, *flags, *objects, "-o", folder / "host")
    assert built.returncode == 0, built.stderr
    return folder / "host"


@pytest.mark.parametrize("case", HOST_CASES)
def test_host(host: Path, case: str) -> None:
    result = _run(host, case)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_solver_waits_wherever_its_threads_share(tmp_path: Path) -> None:
    """A block's threads as real threads under ThreadSanitizer."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]
    built = _run(compiler, *flags, ROOT / "tests/cuda/team.cpp", "-o", tmp_path / "team")
    if "libtsan" in built.stderr or "-fsanitize=thread" in built.stderr:
        pytest.skip(f"{compiler} has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    for threads in (1, 5):
        result = _run(tmp_path / "team", str(threads))
        assert result.returncode == 0, (result.stdout + result.stderr)[:4000]


@pytest.fixture(scope="module")
def library() -> Path:
    """The library that `make test` built; it is not compiled again here."""
    found = sorted((ROOT / "fastcl").glob("_C_cuda*.so"))
    if found:
        return found[-1]
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is not installed, so fastcl._C_cuda was not built")
    pytest.fail("nvcc is installed, but fastcl._C_cuda was not built")


@pytest.fixture(scope="module")
def logs(library: Path) -> dict[str, str]:
    found = {name: sorted((ROOT / "build").glob(f"ninja-*/cuda_{name}.o.log")) for name in KERNEL_FILES}
    if not all(found.values()):
        pytest.skip("the library was not built in this checkout, so the compiler's reports are not here")
    return {name: files[-1].read_text() for name, files in found.items()}


def test_no_spills(logs: dict[str, str]) -> None:
    for name, log in logs.items():
        reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert len(reports) >= 7, f"{name}: ptxas reported on {len(reports)} kernels"
        assert set(reports) == {("0", "0", "0")}, f"{name}: a kernel uses local memory: {set(reports)}"


def test_registers_leave_room_for_two_blocks(logs: dict[str, str]) -> None:
    for name, log in logs.items():
        registers = [int(r) for r in re.findall(r"Used (\d+) registers", log)]
        assert registers, name
        assert max(registers) <= 128, f"{name}: {max(registers)} registers"


def _registers(log: str, kernel: str) -> list[int]:
    found = re.findall(rf"Compiling entry function '\w*{kernel}\w*'[\s\S]*?Used (\d+) registers", log)
    assert found, kernel
    return [int(r) for r in found]


def test_blocks_of_layers_fit_into_the_registers(logs: dict[str, str]) -> None:
    """Blocks of 512 threads: two of the narrow tile on a multiprocessor, one of the wide ones."""
    assert max(_registers(logs["kronecker"], "layer_kernelIfLi2ELi5E")) <= 64
    assert max(_registers(logs["kronecker"], "layer_kernelIfLi4ELi9E")) <= 128
    assert max(_registers(logs["kronecker"], "layer_kernelIdLi4ELi9E")) <= 128


def test_no_undefined_cuda_or_torch_symbols(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    undefined = _run("nm", "-D", "--undefined-only", library).stdout
    assert "Py" in undefined
    assert not re.findall(r"\bcuda[A-Z]\w*|\bcu[A-Z]\w*|c10|torch|at\d*native", undefined)
    defined = {line.split()[-1] for line in _run("nm", "-D", "--defined-only", library).stdout.splitlines()}
    assert "PyInit__C_cuda" in defined
    assert not any(name.startswith("cuda") for name in defined), "the static CUDA runtime would answer for torch's"


def test_module_imports_and_explains_itself(library: Path) -> None:
    from fastcl import _C_cuda

    info = _C_cuda.info()
    assert info["runtime"] >= 12010
    assert info["built_for"]
    if not info["driver"]:
        assert "driver" in info["problem"]
        with pytest.raises(RuntimeError, match="driver"):
            _C_cuda.connect(object, object, _capsule(), 1, 1)


def _capsule() -> object:
    import torch

    return torch.Tensor.__dlpack_c_exchange_api__


def _disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = [Path(p) / "backends/nvidia/bin/cuobjdump" for p in (spec.submodule_search_locations or [])] if spec else []
    return shutil.which("cuobjdump") or next((str(p) for p in bundled if p.exists()), None)


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), body


@pytest.fixture(scope="module")
def sass(logs: dict[str, str]) -> dict[str, dict[str, str]]:
    tool = _disassembler()
    if tool is None:
        pytest.skip("neither the CUDA toolkit's nor Triton's cuobjdump is installed")
    out = {}
    for name in DISASSEMBLED:
        built = sorted((ROOT / "build").glob(f"ninja-*/cuda_{name}.o"))[-1]
        result = _run(tool, "--dump-sass", "-arch", "sm_90", built)
        if result.returncode != 0 or "Function :" not in result.stdout:
            pytest.skip(f"cuobjdump does not read the library: {result.stderr.strip()[:200]}")
        out[name] = dict(_functions(result.stdout))
    return out


def _kernels(functions: dict[str, str], part: str) -> list[str]:
    found = [body for name, body in functions.items() if part in name]
    assert found, part
    return found


@pytest.mark.parametrize("family", ["soft_mask", "importance"])
def test_float_pairs_move_in_vectors(sass: dict[str, dict[str, str]], family: str) -> None:
    for body in _kernels(sass[family], "pair_kernelIff"):
        # Four vectors of each tensor are in flight before the first is used.
        assert re.search(r"(LDG\.E\.128(?:(?!STG|FMUL|FSETP)[\s\S])*){8}", body)
        assert body.count("STG.E.128") >= 4
        assert not re.search(r"\b(LDL|STL)\b", body), "local memory"


def test_spg_moves_in_vectors(sass: dict[str, dict[str, str]]) -> None:
    for body in _kernels(sass["importance_spg"], "moments_kernelIf"):
        assert body.count("LDG.E.128") >= 4
    for body in _kernels(sass["importance_spg"], "update_kernelIff"):
        assert "LDG.E.128" in body
        assert "STG.E.128" in body


def test_dots_move_in_vectors_and_add_in_double(sass: dict[str, dict[str, str]]) -> None:
    for pair in ("Iff", "INS_8BFloat16ES", "INS_7Float16ES", "Idd"):
        for body in _kernels(sass["projection"], f"dot_kernel{pair}"):
            # Four vectors of each list are in flight before the first product.
            assert re.search(r"(LDG\.E\.128(?:(?!DFMA)[\s\S])*){8}", body), pair
            assert not re.search(r"\b(ATOM|RED)\b", body)
            assert not re.search(r"\bFF?MA\b|\bFMUL\b|\bFADD\b|\bDMUL\b", body), "a product or sum that rounds more than once"


def test_projections_round_once(sass: dict[str, dict[str, str]]) -> None:
    for body in _kernels(sass["projection"], "add_kernelIff"):
        assert re.search(r"(LDG\.E\.128(?:(?!STG|DFMA)[\s\S])*){8}", body)
        assert body.count("STG.E.128") >= 4
        assert "DFMA" in body
        assert not re.search(r"\b(FFMA|FMUL|FADD|DMUL)\b", body)
    for body in _kernels(sass["projection"], "combine_kernel"):
        assert "LDG.E.128" in body
        assert "STG.E.128" in body
        assert "DFMA" in body
        assert not re.search(r"\b(FFMA|FMUL|FADD|DMUL)\b", body)


def test_second_sweep_ends_before_it_reads_a_gradient(sass: dict[str, dict[str, str]]) -> None:
    for kernel in ("add_kernelIff", "combine_kernel"):
        for body in _kernels(sass["projection"], kernel):
            first = body.index("EXIT")
            assert "LDG.E.128" not in body[:first]
            assert "LDG.E" in body[:first], "nothing was asked"


def test_gram_multiplies_from_shared_memory(sass: dict[str, dict[str, str]]) -> None:
    for body in _kernels(sass["projection"], "gram_kernel"):
        assert body.count("LDG.E.128") >= 4
        assert body.count("DFMA") >= 16
        assert "LDS" in body
        assert not re.search(r"\b(ATOM|RED|LDL|STL)\b", body)


def test_soft_mask_rounds_every_operation(sass: dict[str, dict[str, str]]) -> None:
    for body in _kernels(sass["soft_mask"], "pair_kernelIff"):
        assert "FMUL" in body
        assert "FFMA" not in body, "a contracted multiply-add rounds once where the definition rounds twice"


def test_no_double_precision_where_floats_compute(sass: dict[str, dict[str, str]]) -> None:
    for family in ("soft_mask", "importance"):
        for body in _kernels(sass[family], "pair_kernelIff"):
            assert not re.search(r"\bD(ADD|MUL|FMA)\b", body)


def test_new_sweeps_move_in_vectors(sass: dict[str, dict[str, str]]) -> None:
    """Loads and stores of 16 bytes: parameter, gradient and state, or what else a kernel has."""
    expected = {
        ("pull", "pull_kernelIf"): (4, 1),
        ("child_mask", "child_mask_kernelIf"): (2, 2),
        ("importance_fisher", "fisher_kernelIf"): (2, 1),
        ("bit_mask", "bit_mask_kernelIj"): (1, 1),
        ("quantile", "radix_kernelIj"): (1, 0),
        ("optimizers", "12adamw_kernelIf"): (4, 3),
        ("optimizers_sgd", "sgd_kernelIfLb1"): (3, 2),
        ("kronecker", "ncl_momentum_kernelIf"): (3, 2),
        ("kronecker", "ncl_apply_kernelIf"): (4, 2),
        # The rows of the basis, four or eight at a time, come on top of the vectors.
        ("low_rank", "low_rank_sums_kernelIfLb0"): (2 + 8, 0),
        ("low_rank", "low_rank_sums_kernelIfLb1"): (5 + 8, 0),
        ("low_rank", "low_rank_update_kernelIfLb0"): (2 + 8, 1),
        ("low_rank", "low_rank_update_kernelIfLb1"): (5 + 8, 2),
    }
    for (family, kernel), (loads, stores) in expected.items():
        for body in _kernels(sass[family], kernel):
            assert body.count("LDG.E.128") >= loads, kernel
            assert body.count("STG.E.128") >= stores, kernel
            assert not re.search(r"\b(LDL|STL)\b", body), f"{kernel}: local memory"


def test_sums_in_a_fixed_order_use_no_atomics(sass: dict[str, dict[str, str]]) -> None:
    for family in ("importance_fisher", "optimizers", "optimizers_sgd", "kronecker", "low_rank"):
        for body in _kernels(sass[family], "kernel"):
            assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\b", body), family
    for body in _kernels(sass["quantile"], "radix_kernel"):
        assert "ATOMS" in body, "counts in shared memory"


def test_pulls_and_draws_round_every_operation(sass: dict[str, dict[str, str]]) -> None:
    for family, kernel in (("pull", "pull_kernelIf"), ("child_mask", "child_mask_kernelIf")):
        for body in _kernels(sass[family], kernel):
            assert "FMUL" in body
            assert not re.search(r"\b(FFMA|DADD|DMUL|DFMA)\b", body), kernel


def test_adamw_fuses_where_the_definition_does(sass: dict[str, dict[str, str]]) -> None:
    for body in _kernels(sass["optimizers"], "12adamw_kernelIf"):
        assert "FFMA" in body
        assert "MUFU.RSQ" in body, "the root"
        assert "MUFU.RCP" in body, "the quotient"


def test_layers_multiply_from_shared_memory(sass: dict[str, dict[str, str]]) -> None:
    """Each multiply-add is fused, and of the words that it takes most come from registers."""
    for tile, least in (("Li4ELi9E", 3.0), ("Li2ELi5E", 1.4)):
        for body in _kernels(sass["kronecker"], f"layer_kernelIf{tile}"):
            # The inner loop's, unrolled: what lies between two barriers and multiplies.
            parts = [part for part in body.split("BAR.SYNC") if part.count("FFMA") > 36]
            assert len(parts) == 2, "two products"
            for part in parts:
                assert part.count("FFMA") >= least * len(re.findall(r"\bLDS\b", part))
            assert not re.search(r"\b(LDL|STL)\b", body), "local memory"
            assert not re.search(r"\bLD\.E\b|\bST\.E\b", body), "generic addresses"
    for body in _kernels(sass["kronecker"], "layer_kernelId"):
        assert "DFMA" in body
        assert not re.search(r"\b(LDL|STL|DMUL)\b", body.split("BAR.SYNC")[2])


def test_rows_of_a_basis_are_on_their_way_together(sass: dict[str, dict[str, str]]) -> None:
    for kernel, loads in {"sums_kernelIfLb0": 8, "sums_kernelIfLb1": 8, "update_kernelIfLb0": 6, "update_kernelIfLb1": 6}.items():
        for body in _kernels(sass["low_rank"], f"low_rank_{kernel}"):
            assert re.search(rf"(LDG\.E\.128(?:(?!FFMA|SHFL|STG)[\s\S])*){{{loads}}}", body), kernel


def test_products_of_rows_are_double(sass: dict[str, dict[str, str]]) -> None:
    for kernel in ("low_rank_products_kernelIf", "low_rank_mix_kernelIf"):
        for body in _kernels(sass["low_rank"], kernel):
            assert "DFMA" in body
            assert "LDS" in body
