"""Methods with a memory on two ranks: the same gradients as one process with all the data."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcl.data import TaskBalancedBuffer
from fastcl.methods import AGEM, GEM, Replay
from learners import Heads, batches, loss_fn, with_head

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")

KINDS = [Replay, AGEM, GEM]
STEPS = 3
EVERYTHING = slice(None)


def wrapped(how):
    torch.manual_seed(0)
    if how.endswith("heads"):
        model = Heads().double()
        return DistributedDataParallel(model, find_unused_parameters=True) if how.startswith("ddp") else model
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    if how.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=how == "ddp, views")
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        return fully_shard(model)
    return model


def whole(model):
    """The gradients of all parameters, of all ranks' shards, in one vector."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in found])


def gradients(kind, how, rows):
    """The gradients after ``after_backward`` in steps that climb and descend, for the part of every batch that ``rows`` is."""
    model = wrapped(how)
    heads = how.endswith("heads")
    method = kind(model, TaskBalancedBuffer(1000), loss_fn, forward=with_head if heads else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen = []
    for task in range(3):
        loader = [(x[rows], y[rows]) for x, y in batches(task, sizes=(8, 8, 4))]
        for step, (x, y) in enumerate(loader[:STEPS]):
            optimizer.zero_grad()
            (loss_fn(model(x, task) if heads else model(x), y) * (-1) ** step).backward()
            before = whole(model)
            method.after_backward()
            seen.append((before, whole(model)))
            optimizer.step()
        method.end_task(loader)
    return seen


def rank_main(rank, folder, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        kinds = KINDS
        torch.save([gradients(kind, how, slice(rank, None, 2)) for kind in kinds], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "ddp, views", "ddp, heads", "fsdp"])
def test_two_ranks_do_what_one_process_does(how, tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path), how), nprocs=2)
    one_process = "one process, heads" if how.endswith("heads") else "one process"
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for n in range(len(ranks[0])):
        changed = 0
        for (before, after), *others in zip(gradients(KINDS[n], one_process, EVERYTHING), *(rank[n] for rank in ranks), strict=True):
            for own_before, own_after in others:
                torch.testing.assert_close(own_before, before, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(own_after, after, rtol=1e-9, atol=1e-12)
            changed += not torch.equal(before, after)
        assert changed >= 2


def test_a_model_whose_gradients_are_parts_without_a_name_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Sharded(FullyShardedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)  # the real one wants an accelerator

    model = nn.Sequential(nn.Linear(5, 4), Sharded())
    Replay(model, TaskBalancedBuffer(10), loss_fn)
    for kind in (AGEM, GEM):
        with pytest.raises(TypeError, match="FullyShardedDataParallel"):
            kind(model, TaskBalancedBuffer(10), loss_fn)
