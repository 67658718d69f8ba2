"""Builds the compiled modules with ninja; needs no torch, and installs without a compiler too.

FASTCL_NATIVE=0 leaves them out; FASTCL_CUDA=0|1 decides about fastcl._C_cuda (default: when nvcc is found); CXX and NVCC name compilers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-trapping-math -fno-math-errno -Wall -Wextra"
# Where results are held to a tolerance and not to bits, multiply-adds may fuse.
CONTRACTED = {
    "gram.cpp",
    "importance_spg.cpp",
    "kronecker.cpp",
    "kronecker_rows.cpp",
    "kronecker_tiles.cpp",
    "low_rank.cpp",
    "low_rank_append.cpp",
    "projection.cpp",
}
# The oldest GPU that nvcc 13 still builds comfortably for, Hopper, and PTX for everything newer.
CUDA_ARCHITECTURES = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90"
NVCC_FLAGS = f"-std=c++17 -O3 -fmad=false -Xptxas -v {CUDA_ARCHITECTURES} -Xcompiler -fPIC,-fvisibility=hidden"

RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++  $in
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = CUDA $in
rule link
  command = $cxx -shared $in -o $out $libraries
  description = link $out
"""


def find_tools() -> tuple[dict[str, str], dict[str, str]]:
    """The compilers, and for each module that cannot be built the reason."""
    cxx = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    tools, missing = {"cxx": cxx}, {}
    try:
        import ninja
        import pybind11

        tools["ninja"] = str(Path(ninja.BIN_DIR) / "ninja")
        tools["pybind11"] = pybind11.get_include()
    except ImportError as error:
        missing["_C"] = f"not built: the Python package {error.name} was missing at build time; pip install pybind11 ninja and reinstall"
    if not cxx or not shutil.which(cxx.split()[0]):
        named = f" (CXX names {cxx!r})" if cxx else ""
        missing["_C"] = f"not built: no C++ compiler was found; install g++ and reinstall fastcl{named}"
    if os.environ.get("FASTCL_NATIVE") == "0":
        missing["_C"] = "not built: FASTCL_NATIVE=0 was set at build time; reinstall without it"
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or ""
    if not nvcc and Path("/usr/local/cuda/bin/nvcc").exists():
        nvcc = "/usr/local/cuda/bin/nvcc"
    wanted = os.environ.get("FASTCL_CUDA", "")
    if "_C" in missing:
        missing["_C_cuda"] = missing["_C"]
    elif wanted == "0":
        missing["_C_cuda"] = "not built: FASTCL_CUDA=0 was set at build time; reinstall without it"
    elif not nvcc:
        missing["_C_cuda"] = "not built: nvcc was not found; install the CUDA toolkit (or set NVCC) and reinstall fastcl"
    if wanted == "1" and "_C_cuda" in missing:
        raise SystemExit(f"FASTCL_CUDA=1 was set, but fastcl._C_cuda was {missing['_C_cuda']}")
    tools["nvcc"] = nvcc
    return tools, missing


def ninja_file(tools: dict[str, str], targets: dict[str, Path]) -> str:
    include = f"-I{ROOT / 'csrc'} -isystem {tools['pybind11']} -isystem {sysconfig.get_path('include')}"
    lines = [RULES, f"cxx = {tools['cxx']}", f"nvcc = {tools['nvcc']} -ccbin {tools['cxx'].split()[0]}"]
    shared = [ROOT / "csrc/bind" / name for name in ("gate.cpp", "gated_kronecker.cpp", "gated_optimizers.cpp", "torch_runtime.cpp")]
    sources = {
        "_C": [*shared, ROOT / "csrc/bind/module_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))],
        "_C_cuda": [*shared, ROOT / "csrc/bind/module_cuda.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))],
    }
    known: set[str] = set()
    for module, target in targets.items():
        objects = []
        for source in sources[module]:
            name = f"{source.parent.name}_{source.stem}.o"
            objects.append(name)
            if name not in known:
                rule, flags = ("nvcc", NVCC_FLAGS) if source.suffix == ".cu" else ("cxx", CXX_FLAGS)
                if source.name in CONTRACTED:
                    flags += " -ffp-contract=fast"
                lines.append(f"build {name}: {rule} {source}\n  flags = {flags} {include}")
                known.add(name)
        libraries = static_cudart(tools["nvcc"]) if module == "_C_cuda" else ""
        lines.append(f"build {target}: link {' '.join(objects)}\n  libraries = {libraries}")
    return "\n".join(lines) + "\n"


def static_cudart(nvcc: str) -> str:
    """What links the static CUDA runtime. Where it lies knows nvcc alone, which may be a wrapper script."""
    dry = subprocess.run([*nvcc.split(), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    folders = next((line.split("=", 1)[1] for line in dry.splitlines() if "LIBRARIES=" in line), "").replace('"', " ")
    # Its symbols stay inside: torch brings a CUDA runtime of its own, and neither may answer for the other.
    return f"{folders} -lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"


class NinjaBuild(build_ext):
    def run(self) -> None:
        package = Path(self.build_lib, "fastcl").resolve() if not self.inplace else ROOT / "fastcl"
        package.mkdir(parents=True, exist_ok=True)
        tools, missing = find_tools()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        targets = {name: package / f"{name}{suffix}" for name in ("_C", "_C_cuda") if name not in missing}
        for name in missing:  # left from an earlier build in place, it would be loaded in spite of the reason
            for stale in package.glob(f"{name}.*.so"):
                stale.unlink()
        if targets:
            self.ninja(tools, targets)
        info = {**missing, "compiler": version(tools["cxx"])} if "_C" in targets else dict(missing)
        if "_C_cuda" in targets:
            info["nvcc"] = version(tools["nvcc"])
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for name, reason in missing.items():
            print(f"fastcl.{name} {reason}", file=sys.stderr)

    def ninja(self, tools: dict[str, str], targets: dict[str, Path]) -> None:
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(tools, targets))
        try:
            subprocess.run([tools["ninja"], "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit("fastcl: the compiler failed (see above); FASTCL_NATIVE=0 installs without compiled modules") from error

    def get_outputs(self) -> list[str]:
        return []


def version(tool: str) -> str:
    lines = subprocess.run([*tool.split(), "--version"], capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return lines[0 if "g++" in tool or "c++" in tool else -2 if len(lines) > 1 else 0] if lines else "unknown"


# The extension is named so that wheels get their platform tag; NinjaBuild does the building.
setup(ext_modules=[Extension("fastcl._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
