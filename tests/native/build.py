"""Compiles csrc/core and csrc/cpu with bindings.cpp for NumPy, once per content and flags, without torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [Path(__file__).with_name("bindings.cpp"), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]
# The sanitizers watch one version of each loop; the plain build has all versions, as the package has.
VARIANTS = {
    "plain": ["-O3"],
    "asan": [
        *("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero"),
        *("-fno-sanitize-recover=all", "-DFASTCL_NO_CLONES"),
    ],
    "tsan": ["-g", "-O1", "-fsanitize=thread", "-DFASTCL_NO_CLONES"],
}
RUNTIMES = {"asan": "libasan.so", "tsan": "libtsan.so"}


class CannotBuild(RuntimeError):
    """No compiler, or a compiler without this sanitizer; the message says which."""


def compiler() -> str:
    """The g++ that is used."""
    found = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if found is None:
        raise CannotBuild("no g++ was found")
    return found


def runtime(variant: str) -> str | None:
    """The libraries to preload: the sanitizer's runtime, and the one whose exceptions it has to find when it starts."""
    name = RUNTIMES.get(variant)
    if name is None:
        return None
    paths = [_library(name), _library("libstdc++.so.6")]
    if not Path(paths[0]).is_absolute():
        raise CannotBuild(f"{compiler()} has no {name}; install its sanitizer runtimes")
    return ":".join(paths)


def _library(name: str) -> str:
    return subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def _key(flags: list[str]) -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\n".join([version, pybind11.__version__, sysconfig.get_config_var("EXT_SUFFIX"), *flags]).encode())
    for path in sorted([*SOURCES, *(ROOT / "csrc" / "core").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(variant: str) -> Path:
    """The folder with the compiled module _fastcl_numpy."""
    flags = [*COMMON, *VARIANTS[variant]]
    folder = ROOT / "build" / "native-tests" / f"{variant}-{_key(flags)}"
    target = folder / f"_fastcl_numpy{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{ROOT / 'csrc'}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def compile_one(source: Path) -> str:
            out = str(Path(scratch, f"{source.stem}.o"))
            _run([compiler(), *flags, *include, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_one, SOURCES))
        linked = Path(scratch, target.name)
        _run([compiler(), *flags, "-shared", *objects, "-o", str(linked)])
        linked.replace(target)  # in one step: another process may look for it
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
