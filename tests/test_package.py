"""The package as it is laid out, imported, documented, built and installed."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import fastcl
from processes import LEFT_OUT, ROOT, environment, package_copy, python

PACKAGE = sorted((ROOT / "fastcl").rglob("*.py"))
BELOW_EXPERIMENTS = ("fastcl/ops", "fastcl/reference", "kernels", "fastcl/data", "fastcl/methods", "fastcl/testing")
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return package_copy(tmp_path_factory.mktemp("copy"))


class TestImport:
    CODE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import fastcl
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}))
"""

    def test_it_is_lean(self, copy) -> None:
        runs = [json.loads(python("-c", self.CODE, path=copy).stdout) for _ in range(3)]
        roots = {name.split(".")[0] for name in runs[0]["new"]}
        assert "fastcl" in roots
        assert not roots & {"triton", "sklearn", "matplotlib", "scipy", "safetensors", "tqdm", "rich", "typer", "pandas"}
        assert not [
            name for name in runs[0]["new"] if name.startswith(("torch._dynamo", "torch._inductor", "fastcl.kernels", "fastcl.methods"))
        ]
        assert not any(run["cuda"] for run in runs)
        assert min(run["seconds"] for run in runs) < 0.3, "processor time of `import fastcl` after `import torch`"

    def test_methods_and_ops_bring_no_triton(self, copy) -> None:
        code = """
import sys, torch, fastcl, fastcl.methods, fastcl.data, fastcl.metrics
before = "triton" in sys.modules
fastcl.ops.soft_mask_([torch.ones(3)], [torch.ones(3)])
assert ("triton" in sys.modules) == before == False, "triton was imported"
assert not {"sklearn", "matplotlib"} & set(sys.modules)
assert not torch.cuda.is_initialized()
"""
        python("-c", code, path=copy)

    def test_the_checkouts_kernels_do_not_import_as_top_level(self) -> None:
        done = python("-c", "import kernels", path=ROOT, check=False)
        assert done.returncode == 1
        assert "ImportError: this folder is installed as fastcl.kernels; import that" in done.stderr

    def test_version(self) -> None:
        assert re.fullmatch(r"\d+\.\d+\.\d+", fastcl.__version__)


def public_objects() -> Iterator[tuple[str, object]]:
    """Every public class and function of every public module, where it is defined, and the public methods of the classes."""
    for found in pkgutil.walk_packages(fastcl.__path__, "fastcl."):
        if any(part.startswith("_") for part in found.name.split(".")) or found.name.startswith("fastcl.kernels"):
            continue
        module = importlib.import_module(found.name)
        yield found.name, module
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != found.name or not callable(value):
                continue
            yield f"{found.name}.{name}", value
            if inspect.isclass(value):
                yield from (
                    (f"{found.name}.{name}.{n}", v) for n, v in vars(value).items() if not n.startswith("_") and inspect.isroutine(v)
                )


class TestDocumentation:
    def test_public_names_have_docstrings(self) -> None:
        documented = dict(public_objects())
        assert len(documented) > 30
        assert [name for name, value in documented.items() if not inspect.getdoc(value)] == []

    @pytest.mark.parametrize("name", [n for n in fastcl.ops.__all__ if not inspect.isclass(getattr(fastcl.ops, n))])
    def test_ops_name_their_arguments_and_errors(self, name) -> None:
        op = getattr(fastcl.ops, name)
        text = inspect.getdoc(op) or ""
        arguments, errors = re.search(r"\nArgs:\n(.*?)\n\n", text, re.S), re.search(r"\nRaises:\n(.*)", text, re.S)
        assert arguments is not None
        assert errors is not None
        for parameter in inspect.signature(op).parameters:
            assert f"    {parameter}: " in arguments[1] + "\n"
        assert "TypeError" in errors[1]
        assert "ValueError" in errors[1]
        assert "written" in errors[1], "whether something has been written when it raises"

    @pytest.mark.parametrize("module", [fastcl, fastcl.ops, fastcl.reference])
    def test_all_names_exist(self, module) -> None:
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        assert sorted(module.__all__) == module.__all__


# Attributes that wait for the device, and functions that do when their argument is a tensor.
SYNCS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
CASTS = {"bool", "float", "int"}
# The casts there are: of a Python number, after tensors have been refused.
PYTHON_NUMBERS = {("_checks.py", "float"), ("_checks.py", "int"), ("gradients.py", "int")}


def syncs(source: str, file: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SYNCS:
            found.append(f"{file}:{node.lineno} .{node.func.attr}()")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CASTS and node.args:
            # A number's name, or a setting of Triton that is read at import.
            constant = isinstance(node.args[0], ast.Constant) or "knobs" in ast.unparse(node.args[0])
            if (file, node.func.id) not in PYTHON_NUMBERS and not constant:
                found.append(f"{file}:{node.lineno} {node.func.id}()")
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            called = [c.func for c in ast.walk(node.test) if isinstance(c, ast.Call)]
            branches = [f for f in called if isinstance(f, ast.Attribute) and f.attr in {"any", "all", "equal"}]
            found += [f"{file}:{f.lineno} a branch on .{f.attr}()" for f in branches]
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["fastcl", *path.relative_to(ROOT / "fastcl").parts[:-1]] if path.is_relative_to(ROOT / "fastcl") else ["kernels"]
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names |= {f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names}
    return names


class TestSource:
    """What nobody should have to look for in a review."""

    def test_nothing_waits_for_the_device(self) -> None:
        named = [ROOT / "fastcl/gradients.py", ROOT / "fastcl/masks.py"]
        files = [*(ROOT / "fastcl/ops").glob("*.py"), *(ROOT / "fastcl/reference").glob("*.py"), *KERNELS, *named]
        assert len(files) > 12
        # Loading and the counts of compact state are no part of a step.
        files += [f for f in (ROOT / "fastcl/optim").glob("*.py") if f.name not in ("_saved.py", "_load_checks.py", "_compact.py")]
        files.remove(ROOT / "fastcl/reference/_quadratic.py")  # the definition of GEM's programme is solved on the host, as it says
        for once_per_task in ("reference/kronecker_merge.py", "ops/_low_rank_compress.py", "reference/low_rank.py"):
            files.remove(ROOT / "fastcl" / once_per_task)
        assert [line for file in files for line in syncs(file.read_text(), file.name)] == []

    @pytest.mark.parametrize(
        "line", ["t.item()", "t.tolist()", "x = t.cpu()", "bool(t)", "float(t.sum())", "if t.any(): pass", "while (t > 0).all(): pass"]
    )
    def test_the_scan_sees(self, line) -> None:
        assert syncs(line, "some.py")

    def test_nothing_is_validated_by_assert(self) -> None:
        files = [
            *PACKAGE,
            *KERNELS,
            *(p for folder in ("bench", "examples", "gpu") for p in (ROOT / folder).glob("*.py")),
            ROOT / "setup.py",
        ]
        found = [
            f"{p.relative_to(ROOT)}:{n.lineno}" for p in files for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Assert)
        ]
        assert found == []

    @pytest.mark.parametrize(
        ("folder", "forbidden"),
        [
            ("fastcl/ops", ("fastcl.methods", "fastcl.data", "fastcl.metrics", "fastcl.gradients")),
            ("fastcl/reference", ("fastcl.ops", "fastcl.methods", "fastcl.kernels", "fastcl.backends", "fastcl._native")),
            ("fastcl/optim", ("fastcl.methods", "fastcl.data", "fastcl.metrics", "fastcl.gradients", "fastcl.kernels", "fastcl.backends")),
            ("kernels", ("fastcl.ops", "fastcl.methods", "fastcl.backends", "fastcl._native", "kernels")),
            ("fastcl/data", ("fastcl.ops", "fastcl.methods")),
            ("fastcl/methods", ("fastcl.kernels", "fastcl.backends", "fastcl._native", "fastcl.reference")),
            ("fastcl/experiment", ("fastcl.ops", "fastcl.gradients", "fastcl.kernels", "fastcl._native", "fastcl.reference")),
            *((folder, ("fastcl.experiment", "fastcl.cli")) for folder in BELOW_EXPERIMENTS),
        ],
    )
    def test_arrows_point_one_way(self, folder, forbidden) -> None:
        files = sorted((ROOT / folder).rglob("*.py"))
        assert files
        found = [(p.name, name) for p in files for name in imports(p) if any(name == f or name.startswith(f + ".") for f in forbidden)]
        assert found == []

    def test_csrc_knows_neither_torch_nor_python_outside_bind(self) -> None:
        files = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
        included = {
            (p.relative_to(ROOT / "csrc").parts[0], name)
            for p in files
            for name in re.findall(r'#\s*include\s*[<"]([^>"]+)', p.read_text())
        }
        assert ("bind", "pybind11/pybind11.h") in included
        assert [pair for pair in included if re.match(r"(torch|ATen|c10|caffe2)/", pair[1])] == []
        outside = [pair for pair in included if pair[0] != "bind"]
        assert [pair for pair in outside if re.match(r"(Python\.h|pybind11/|bind/|numpy/)", pair[1])] == []
        core = [pair for pair in outside if pair[0] == "core"]
        assert [pair for pair in core if re.match(r"(cpu|cuda)/", pair[1])] == []


def tree(folder: Path) -> Path:
    """What a build reads, without what an earlier one left."""
    for name in ("csrc", "fastcl", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def pip_wheel(folder: Path, *options: str, check: bool = True, **variables: str | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--verbose", "--disable-pip-version-check", "-w", "out", *options]
    env = environment(None, **{"FASTCL_CUDA": "0", **variables})
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500, check=False)
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}")
    return done


def build(folder: Path, **variables: str | None) -> Path:
    pip_wheel(tree(folder), "--no-build-isolation", **variables)
    (wheel,) = (folder / "out").glob("*.whl")
    return wheel


def install(wheel: Path, target: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, env=environment(None), check=True, capture_output=True, timeout=120)
    return target


def no_compilers(folder: Path) -> str:
    """A PATH without any C++ compiler: only what a build needs besides."""
    (folder / "bin").mkdir()
    for tool in ("sh", "uname", "env", "git"):
        found = shutil.which(tool)
        if found:
            (folder / "bin" / tool).symlink_to(found)
    return str(folder / "bin")


needs_build = pytest.mark.skipif(
    # Not find_spec: asking for pip's spec makes setuptools unimportable in this process.
    not {"setuptools", "pybind11", "ninja", "pip"} <= {d.name for d in importlib.metadata.distributions()},
    reason="setuptools, pybind11, ninja and pip are needed to build",
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
RUN = """
import json, torch, fastcl
from fastcl import backends, ops
g = [torch.full((70,), 3.0)]
ops.soft_mask_(g, [torch.full((70,), 0.5)], 0.5)
print(json.dumps({"file": fastcl.__file__, "serving": backends.serving("cpu"), "value": g[0].unique().tolist()}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Compiled without optimisation, which takes a third of the time: what is in it and that it runs is looked at, not how fast."""
    folder = tmp_path_factory.mktemp("build")
    quick = folder / "quick"
    quick.write_text(f'#!/bin/sh\nexec {next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), "c++")} "$@" -O0\n')
    quick.chmod(0o755)
    return build(folder, CXX=str(quick))


@needs_build
class TestBuild:
    @needs_compiler
    def test_contents(self, wheel) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (top,) = [name for name in names if name.endswith("top_level.txt")]
            assert archive.read(top).decode().split() == ["fastcl"]
            (metadata,) = [name for name in names if name.endswith("/METADATA")]
            described = archive.read(metadata).decode()
            info = json.loads(archive.read("fastcl/_build_info.json"))
        assert {name.split("/")[0] for name in names} == {"fastcl", f"fastcl-{fastcl.__version__}.dist-info"}
        for file in [*PACKAGE, ROOT / "fastcl/py.typed"]:
            assert file.relative_to(ROOT).as_posix() in names
        for file in KERNELS:
            assert f"fastcl/kernels/{file.name}" in names
        assert [name for name in names if re.fullmatch(r"fastcl/_C\.[^/]+\.so", name)]
        assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o", ".pyc"))]
        assert f"\nVersion: {fastcl.__version__}\n" in described
        assert "\nRequires-Dist: torch>=2.10\n" in described
        assert info["compiler"]
        assert info["_C_cuda"] == "not built: FASTCL_CUDA=0 was set at build time; reinstall without it"
        assert "linux" not in sys.platform or "linux" in wheel.name, "a wheel with compiled modules has a platform's tag"

    @needs_compiler
    def test_it_works_from_a_fresh_folder(self, wheel, tmp_path) -> None:
        target = install(wheel, tmp_path / "site")
        said = json.loads(python("-c", RUN, path=target).stdout)
        assert Path(said["file"]).is_relative_to(target)
        assert (said["serving"], said["value"]) == ("cpp", [2.25])
        assert "C++: compiled with " in python("-m", "fastcl", path=target).stdout

    @needs_compiler
    def test_the_library_needs_no_torch(self, wheel, tmp_path) -> None:
        if shutil.which("nm") is None:
            pytest.skip("nm is not installed")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.startswith("fastcl/_C.")]
            library = archive.extract(name, tmp_path)
        undefined = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
        assert "PyCapsule_GetPointer" in undefined
        assert not re.findall(r"c10|torch|at\d+native|omp_|GOMP", undefined)

    @pytest.mark.parametrize(
        ("case", "reason"),
        [
            ("FASTCL_NATIVE=0", "not built: FASTCL_NATIVE=0 was set at build time; reinstall without it"),
            ("no compiler on PATH", "not built: no C++ compiler was found; install g++ and reinstall fastcl"),
            ("CXX=/nonexistent", "not built: no C++ compiler was found; install g++ and reinstall fastcl (CXX names '/nonexistent')"),
        ],
    )
    def test_without_compiled_modules(self, tmp_path, case, reason) -> None:
        (tmp_path / "tree").mkdir()
        variables = {"CXX": "/nonexistent"}
        if case == "FASTCL_NATIVE=0":
            variables = {"FASTCL_NATIVE": "0"}
        elif case == "no compiler on PATH":
            variables = {"PATH": no_compilers(tmp_path)}
        wheel = build(tmp_path / "tree", FASTCL_CUDA=None, **variables)
        with zipfile.ZipFile(wheel) as archive:
            assert not [name for name in archive.namelist() if name.endswith(".so")]
        target = install(wheel, tmp_path / "site")
        said = json.loads(python("-c", RUN, path=target).stdout)
        assert (said["serving"], said["value"]) == ("reference", [2.25])
        report = python("-m", "fastcl", path=target).stdout
        assert f"C++: {reason}\nCUDA: {reason}\n" in report
        assert f"  cpp on cpu: {reason}" in report

    def test_a_compiler_that_fails(self, tmp_path) -> None:
        done = pip_wheel(tree(tmp_path), "--no-build-isolation", check=False, CXX=shutil.which("false") or "/bin/false")
        assert done.returncode != 0
        assert "fastcl: the compiler failed (see above); FASTCL_NATIVE=0 installs without compiled modules" in done.stdout + done.stderr

    def test_a_source_distribution_is_complete(self, tmp_path) -> None:
        tree(tmp_path)
        code = "import setuptools.build_meta as b; print(b.build_sdist('out'))"
        (tmp_path / "out").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(None), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        shutil.unpack_archive(next((tmp_path / "out").glob("*.tar.gz")), tmp_path / "unpacked")
        (root,) = (tmp_path / "unpacked").iterdir()
        for folder in ("csrc", "kernels", "fastcl"):
            wanted = {p.relative_to(tmp_path) for p in (tmp_path / folder).rglob("*") if p.is_file()}
            assert wanted <= {p.relative_to(root) for p in root.rglob("*")}

    @pytest.mark.slow
    @needs_compiler
    def test_with_build_isolation(self, tmp_path) -> None:
        done = pip_wheel(tree(tmp_path), check=False)
        said = done.stdout + done.stderr
        if done.returncode and re.search(
            r"No matching distribution found|Failed to establish a new connection|ConnectionError|Read timed out", said
        ):
            pytest.skip(f"the package index does not give the build's requirements: {said.strip().splitlines()[-1][:200]}")
        assert done.returncode == 0, said[-6000:]
        (wheel,) = (tmp_path / "out").glob("*.whl")
        target = install(wheel, tmp_path / "site")
        assert json.loads(python("-c", RUN, path=target).stdout)["serving"] == "cpp"


class TestSetup:
    """How setup.py chooses, without building."""

    @pytest.fixture
    def setup(self) -> ModuleType:
        # setuptools itself cannot be imported where distutils already was.
        stand_in = mock.MagicMock(name="setuptools", __spec__=None)
        command = ModuleType("setuptools.command.build_ext")
        command.build_ext = object  # type: ignore[attr-defined]
        spec = importlib.util.spec_from_file_location("fastcl_setup", ROOT / "setup.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        names = {"setuptools": stand_in, "setuptools.command": stand_in, "setuptools.command.build_ext": command}
        with mock.patch.dict(sys.modules, names):
            spec.loader.exec_module(module)
        return module

    @pytest.fixture(autouse=True)
    def _tools(self, monkeypatch, tmp_path) -> None:
        """A PATH with a C++ compiler and nothing else."""
        pytest.importorskip("pybind11")
        pytest.importorskip("ninja")
        for name in ("CXX", "NVCC", "FASTCL_CUDA", "FASTCL_NATIVE"):
            monkeypatch.delenv(name, raising=False)
        self.tool(tmp_path / "g++")
        monkeypatch.setenv("PATH", str(tmp_path))
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: path != Path("/usr/local/cuda/bin/nvcc") and exists(path))

    @staticmethod
    def tool(path: Path) -> None:
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)

    def test_nvcc_missing(self, setup) -> None:
        assert setup.find_tools()[1] == {
            "_C_cuda": "not built: nvcc was not found; install the CUDA toolkit (or set NVCC) and reinstall fastcl"
        }

    def test_nvcc_on_the_path(self, setup, tmp_path) -> None:
        self.tool(tmp_path / "nvcc")
        tools, missing = setup.find_tools()
        assert missing == {}
        assert tools["nvcc"] == str(tmp_path / "nvcc")

    def test_nvcc_not_wanted(self, setup, tmp_path, monkeypatch) -> None:
        self.tool(tmp_path / "nvcc")
        monkeypatch.setenv("FASTCL_CUDA", "0")
        assert setup.find_tools()[1] == {"_C_cuda": "not built: FASTCL_CUDA=0 was set at build time; reinstall without it"}

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("PATH", "PATH", "nvcc was not found"),
            ("CXX", "/nonexistent", "no C++ compiler was found"),
            ("FASTCL_NATIVE", "0", "FASTCL_NATIVE=0"),
        ],
    )
    def test_cuda_wanted_and_impossible(self, setup, monkeypatch, name, value, reason) -> None:
        monkeypatch.setenv("FASTCL_CUDA", "1")
        if name != "PATH":
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=f"FASTCL_CUDA=1 was set, but fastcl._C_cuda was not built: .*{re.escape(reason)}"):
            setup.find_tools()

    @pytest.mark.parametrize("package", ["pybind11", "ninja"])
    def test_a_build_requirement_is_missing(self, setup, monkeypatch, package) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        assert f"the Python package {package} was missing at build time" in setup.find_tools()[1]["_C"]


def test_typed_marker_and_licence() -> None:
    assert (ROOT / "fastcl/py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:300]


def test_the_oldest_torch_is_said_once() -> None:
    from fastcl import _native

    major, minor = _native.OLDEST_TORCH
    assert f'"torch>={major}.{minor}"' in (ROOT / "pyproject.toml").read_text()
