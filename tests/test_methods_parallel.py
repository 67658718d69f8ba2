"""Methods on two ranks: the same as one process with all the data."""

import datetime
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcl import optim
from fastcl.data import TaskBalancedBuffer
from fastcl.methods import AGEM, EWC, GEM, ChildTuning, Replay, _fisher
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


def least_likely(probabilities, _, generator):
    """In the place of drawn labels, which every rank draws for itself: some that do not depend on who draws."""
    return probabilities.argmin(1, keepdim=True)


FISHER = {
    "F": lambda model: ChildTuning(model, "F", keep=0.5, seed=2),
    "D": lambda model: ChildTuning(model, "D", keep=0.5, competing="0."),
    "EWC": lambda model: EWC(model, strength=3.0),
    "EWC, true labels": lambda model: EWC(model, strength=3.0, gamma=0.5, labels="true"),
}


def tuned(name, how, rows, fused, folder=None):
    """The weights after three tasks; the state goes through a file on the way."""
    model = wrapped(how)
    method = FISHER[name](model)
    child = isinstance(method, ChildTuning)
    for task in range(3):
        loader = [(x[rows], y[rows]) for x, y in batches(task, sizes=(8, 8, 4))]
        if child:
            method.start_task(loader, loss_fn)
        if folder is not None and task == 1:
            method.save(f"{folder}/{name}")
            dist.barrier()
            method = FISHER[name](model)
            method.load(f"{folder}/{name}")
        optimizer = optim.SGD(model.parameters(), lr=0.3, transforms=method.transforms() if fused else ())
        for x, y in loader[:STEPS]:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            if not fused:
                method.after_backward()
            optimizer.step()
        method.end_task() if child else method.end_task(loader, loss_fn)
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()])


def tuning_rank(rank, folder, how):
    torch.set_num_threads(1)
    _fisher.torch.multinomial = least_likely
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {(name, fused): tuned(name, how, slice(rank, None, 2), fused, folder) for name in FISHER for fused in (False, True)}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_fisher_information_and_masks_on_two_ranks(how, tmp_path, monkeypatch):
    torch.multiprocessing.spawn(tuning_rank, args=(str(tmp_path), how), nprocs=2)
    monkeypatch.setattr(torch, "multinomial", least_likely)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    seen = []
    for name in FISHER:
        for fused in (False, True):
            alone = tuned(name, "one process", EVERYTHING, fused)
            for rank in ranks:
                torch.testing.assert_close(rank[name, fused], alone, rtol=1e-9, atol=1e-11)
            seen.append(alone)
        if name != "F":  # whose masks are numbered by the optimizer's steps, and a new one begins with 0
            assert torch.equal(seen[-1], seen[-2])
    assert len({tuple(t.tolist()) for t in seen}) == len(FISHER) + 1


def diverging_rank(rank, folder, how):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=20)  # a rank that waits for one that has raised
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    try:
        said = {}
        for labels in ("model", "true"):
            ewc = EWC(wrapped(how), labels=labels)
            loader = [(x.clone(), y) for x, y in batches(0, sizes=(4, 4, 4))]
            loader[1][0][2, 3] = torch.nan if rank else 0.0
            with pytest.raises(ValueError, match="NaN or an Inf") as raised:
                ewc.end_task(loader, loss_fn)
            ewc.end_task(batches(0), loss_fn)  # the ranks are still in step
            said[labels] = (str(raised.value), ewc.tasks_seen)
        torch.save(said, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_is_the_same_error_on_both(how, tmp_path):
    torch.multiprocessing.spawn(diverging_rank, args=(str(tmp_path), how), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first["model"] == ("the logits have a NaN or an Inf, so no label can be drawn: the training has diverged", 1)
    assert first["true"][1] == 1


def test_ranks_draw_labels_of_their_own():
    """The same draws on every rank would make the samples' gradients dependent."""
    model = wrapped("one process")
    slots, loader, labels = EWC(model)._slots, batches(0), {}

    class Rank(NamedTuple):
        size: int
        rank: int

        def total(self, count):
            return 2 * count

    multinomial = torch.multinomial
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fisher._distributed, "data_parallel", lambda *_, rank=rank: Rank(2, rank))
            drawn: list = []
            patch.setattr(torch, "multinomial", lambda *a, drawn=drawn, **k: drawn.append(multinomial(*a, **k)) or drawn[-1])
            _fisher.of_drawn_labels(model, slots, loader, model, "0 0")
        labels[rank] = torch.cat(drawn)
    assert not torch.equal(labels[0], labels[1])


def test_shards_of_unknown_kinds_are_refused():
    from fastcl import _distributed

    model = wrapped("one process")
    slots = EWC(model)._slots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_distributed._sharded, "is_sharded", lambda *_: True)
        patch.setattr(_distributed._sharded, "mesh_of", lambda *_: None)
        with pytest.raises(TypeError, match=r"'0\.weight' is sharded by other means than fully_shard.*Accepted are"):
            _distributed.data_parallel(model, slots)


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
