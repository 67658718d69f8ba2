"""`python -m fastcl`: what runs here and why something else does not, for people and for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import backends
from fastcl.support import render, support
from processes import environment, package_copy, python


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return package_copy(tmp_path_factory.mktemp("copy"))


def test_text(copy) -> None:
    out = python("-m", "fastcl", path=copy).stdout
    assert out.startswith(f"fastcl {fastcl.__version__}  (Python {sys.version.split()[0]}, torch {torch.__version__}, ")
    for op in backends.FAMILIES:
        assert f"\n{op} " in out
    assert "\nbackend asked for: auto\n" in out
    assert "  triton on cpu: triton serves GPUs; on the CPU it needs TRITON_INTERPRET=1" in out
    assert "cpp on cuda: cpp serves the CPU and the tensors are on cuda" in out


def test_json(copy) -> None:
    data = json.loads(python("-m", "fastcl", "--json", path=copy).stdout)
    assert set(data) == {"versions", "platform", "build", "cpu", "gpus", "requested_backend", "ops"}
    assert data["versions"]["fastcl"] == fastcl.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["python"] == sys.version.split()[0]
    assert data["cpu"]["threads"] == 1  # OMP_NUM_THREADS
    assert data["requested_backend"] == "auto"
    assert set(data["ops"]) == set(backends.FAMILIES)
    for row in data["ops"].values():
        assert set(row["devices"]) == {"cpu", "cuda"}
        for device, state in row["devices"].items():
            assert state["served_by"] in {None, *backends.NAMES}
            assert state["served_by"] not in state["not_available"]
            assert (state["served_by"] is None) == (state["error"] is not None)
            assert all(state["not_available"].values()), device
        cpu = row["devices"]["cpu"]
        # Every backend is either the one that serves, able to serve, or has a reason.
        able = [b for b in backends.ORDER["cpu"] if b not in cpu["not_available"]]
        assert cpu["served_by"] == able[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(copy) -> None:
    data = json.loads(python("-m", "fastcl", "--json", path=copy).stdout)
    assert data["gpus"] == []
    state = data["ops"]["soft_mask_"]["devices"]["cuda"]
    assert (state["served_by"], state["error"]) == (None, "torch sees no CUDA device")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_invalid_backend_is_reported(copy, options) -> None:
    out = python("-m", "fastcl", *options, path=copy, FASTCL_BACKEND="gpu").stdout
    assert "invalid: FASTCL_BACKEND is 'gpu'; accepted are auto, reference, cpp, cuda, triton" in out
    if options:
        assert json.loads(out)["ops"]["emax_"]["devices"]["cpu"]["served_by"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_named_backend_that_cannot_serve_is_reported(copy) -> None:
    out = python("-m", "fastcl", path=copy, FASTCL_BACKEND="cuda").stdout
    assert "backend asked for: cuda" in out
    assert "soft_mask_         none         none" in out
    assert "cpu: the backend 'cuda' was asked for and cannot serve: cuda serves NVIDIA GPUs and the tensors are on cpu" in out


def test_unknown_option(copy) -> None:
    done = python("-m", "fastcl", "--yaml", path=copy, check=False)
    assert done.returncode == 2
    assert "unrecognized arguments: --yaml" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe(copy, options) -> None:
    """As in `python -m fastcl | head -1`, where the reader is gone before the report is written."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcl", *options], cwd=copy, env=environment(copy), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (0, "")


def test_the_build_is_told() -> None:
    data = support()
    data["build"] = {"compiler": "g++ 99.1", "_C_cuda": "not built: nvcc was not found; install the CUDA toolkit"}
    assert "\nC++: compiled with g++ 99.1\nCUDA: not built: nvcc was not found; install the CUDA toolkit\n" in render(data)
    data["build"] = {"_C": "not built: no C++ compiler", "_C_cuda": "not built: no C++ compiler"}
    assert "\nC++: not built: no C++ compiler\nCUDA: not built: no C++ compiler\n" in render(data)
    data["build"] = {}
    assert "\nC++: unknown: this installation has no record of its build\n" in render(data)


def test_gpus_are_listed() -> None:
    data = support()
    data["gpus"] = [{"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.2}]
    assert "\nGPU 0: NVIDIA H100, compute capability 9.0, 79.2 GiB\n" in render(data)
