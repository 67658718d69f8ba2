"""LowRankPrecision under fully_shard and DistributedDataParallel on 1, 2 and 4 processes: what one process does with all the data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dense_fisher import F64
from fastcl import LowRankPrecision
from fastcl.precision import _labels

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")

RANK, TASKS = 5, 2


def network(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()  # 7 and 3 rows: uneven and empty shards
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        return fully_shard(model)
    return DistributedDataParallel(model) if how == "ddp" else model


def whole(tensors):
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def one_sign(like, generator):
    """In the place of random ones, which every rank draws for itself: then the result does not depend on who draws."""
    return torch.ones_like(like)


def run(how, rows, folder=None):
    """Everything that a precision is, after two tasks of steps, collections and a file; ``rows`` are this rank's of every batch."""
    model = network(how)
    precision = LowRankPrecision(model, 40, rank=RANK, gather=3)
    states = [{} for _ in precision.blocks[0].params]
    precision.blocks[0].begin(states)
    seen = {}
    for task in range(TASKS):
        generator = torch.Generator().manual_seed(task)
        batches = [(torch.randn(8, 5, dtype=F64, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(8)]
        with precision.collect("empirical") as collection:
            for x, y in batches:
                collection.backward(model(x[rows]), y[rows])
        if folder is not None and task:
            precision.save(f"{folder}/state")
            dist.barrier()
            other = LowRankPrecision(model, 1, rank=RANK, gather=3)
            other.load(f"{folder}/state")
            seen["loaded"] = whole(other.basis.values())
            seen["saved"] = whole(precision.basis.values())
        precision.merge_()
        precision.anchor_()
        (block,) = precision.blocks
        block.reset(states)
        for turn in range(4):
            grads = [torch.sin(p.detach() * (turn + 2)) for p in block.params]
            if turn == 3:
                grads[0] = None
            if turn % 2:
                seen[f"square {task} {turn}"] = [block.direction(grads, states, 0.9, 0.5)]
                block.apply(states, torch.tensor(0.05, dtype=F64))
            else:
                block.step(grads, states, 0.05, 0.9, 0.5)
        x = [torch.cos(p.detach()) for p in block.params]
        names = block.names
        seen[f"solve {task}"] = whole(precision.solve(dict(zip(names, x, strict=True))).values())
        seen[f"multiply {task}"] = whole(precision.multiply(x))
        seen[f"quadratic {task}"] = [precision.quadratic(x)]
        seen[f"params {task}"] = whole(block.params)
        seen[f"diagonal {task}"] = whole(precision.diagonal.values())
        seen[f"sigma {task}"] = [precision.sigma.clone()]
        precision.damping = ("exact", 0.1)
    return seen


def rank_main(rank, folder, how, world):
    torch.set_num_threads(1)
    _labels._signs = one_sign
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(run(how, slice(rank, None, world), folder), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_the_ranks_do_what_one_process_does(how, world, tmp_path, monkeypatch):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path), how, world), nprocs=world)
    monkeypatch.setattr(_labels, "_signs", one_sign)
    alone = run("one process", slice(None))
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(found.pop("loaded"), found.pop("saved"), strict=True))
        assert found.keys() == alone.keys()
        for name, values in found.items():
            for a, b in zip(values, alone[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, at=f"{name} on rank {rank}": f"{at}: {m}")


def bad_rank(rank, folder, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = network(how)
        precision = LowRankPrecision(model, 40, rank=2)
        x = torch.full((4, 5), torch.nan if rank else 1.0, dtype=F64)
        said = ""
        try:
            with precision.collect() as collection:
                collection.backward(model(x))
        except ValueError as error:
            said = str(error)
        with precision.collect() as collection:  # the ranks are still in step
            collection.backward(model(torch.ones(4, 5, dtype=F64)))
        precision.merge_()
        torch.save((said, precision.sigma), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_a_nan_on_one_rank_is_the_same_error_on_both(how, tmp_path):
    torch.multiprocessing.spawn(bad_rank, args=(str(tmp_path), how), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0] == second[0]
    assert "NaN or an Inf" in first[0]
    assert torch.equal(first[1], second[1])
    assert first[1][0] > 0
