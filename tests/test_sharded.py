"""Lists of DTensors and models under fully_shard and DDP, on 1, 2 and 4 processes: the checks are in sharded_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcl import ops, reference
from fastcl.ops import _dispatch, importance
from fastcl.testing import CASES, clone, largest_error, unit_roundoff
from processes import ROOT, environment, package_copy, python

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import sharded_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    """For each number of ranks what every rank reports; the ranks are started once."""
    known: dict[int, list[dict[str, str]]] = {}

    def of(world: int) -> list[dict[str, str]]:
        if world not in known:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            variables = environment(None, PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)]))
            if Path("/sys/class/net/lo").exists():
                variables["GLOO_SOCKET_IFNAME"] = "lo"
            script = str(ROOT / "tests/sharded_ranks.py")
            files = [folder / f"{rank}.json" for rank in range(world)]
            ranks = [
                subprocess.Popen(
                    [sys.executable, script, str(rank), str(world), str(folder / "store"), str(file)],
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank, file in enumerate(files)
            ]
            said = [rank.communicate(timeout=300)[0] for rank in ranks]
            known[world] = [
                json.loads(file.read_text()) if file.is_file() else {"": f"the rank died\n{text[-4000:]}"}
                for file, text in zip(files, said, strict=True)
            ]
        return known[world]

    return of


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in sharded_ranks.WORLDS for name, (on, _) in sharded_ranks.CHECKS.items() if world in on]
)
def test_on_ranks(world: int, name: str, results) -> None:
    for rank, found in enumerate(results(world)):
        assert found.get(name) == "ok", f"rank {rank}: " + (found.get(name) or f"not reached, since: {list(found.values())[-1]}")


@pytest.mark.parametrize("heads", [1, 9])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.uint8)]
)
def test_the_two_sweeps_apart(device: str, dtype: torch.dtype, stored: torch.dtype, parts: int, heads: int) -> None:
    """The stages on parts of tensors, combined, are the op on the whole tensors."""
    accumulated, gradients = CASES["spg_importance_"].make([(40_000,), (17,), (64, 65)], dtype, stored, device, 3, heads=heads)
    exact = clone(accumulated, torch.float64)
    reference.spg_importance_(exact, clone(gradients, torch.float64))
    dense = clone(accumulated)
    whole = ops.spg_importance_(dense, gradients)
    cut = [[t.chunk(parts)[n] for t in accumulated] for n in range(parts)]
    cut_gradients = [[[t.chunk(parts)[n] for t in g] for g in gradients] for n in range(parts)]
    at = accumulated[0].device
    rows = [_dispatch.run_reading("spg_moments", at, a, g) for a, g in zip(cut, cut_gradients, strict=True)]
    assert [r.shape for r in rows] == [(heads, 3, 4)] * parts
    moments = importance._whole_moments(torch.stack(rows))
    means = [_dispatch.run("spg_update_", at, a, g, [moments]) for a, g in zip(cut, cut_gradients, strict=True)]
    allowed = 2 * largest_error(dense, exact) + (unit_roundoff(stored) if stored != torch.uint8 else 0) + 4 * unit_roundoff(torch.float64)
    assert largest_error(accumulated, exact) <= allowed
    counts = [sum(t.numel() for t in a) for a in cut]
    together = sum(float(m) * n for m, n in zip(means, counts, strict=True)) / sum(counts)
    if parts == 1:
        assert all(torch.equal(a, b) for a, b in zip(accumulated, dense, strict=True))
        assert float(means[0]) == float(whole)
    assert together == pytest.approx(float(whole), abs=float(unit_roundoff(stored)) + 1e-6)


def test_nobody_pays_who_does_not_shard(tmp_path: Path) -> None:
    code = """
import sys, torch, fastcl, fastcl.methods
class Tagged(torch.Tensor): pass
g = [torch.ones(3), torch.ones(3).as_subclass(Tagged)]
fastcl.ops.soft_mask_(g, [torch.full((3,), 0.25)] * 2)
fastcl.ops.spg_importance_(g, [[torch.rand(3)] * 2])
assert "torch.distributed.tensor" not in sys.modules
"""
    python("-c", code, path=package_copy(tmp_path))
