"""Precisions on two ranks: what one process collects that has all the data, the same bits on every rank."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcl import DiagonalPrecision, KroneckerPrecision

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")

EVERYTHING = slice(None)


class Net(nn.Module):
    """Two layers, a normalisation, and a parameter whose gradient is known for whole batches only."""

    def __init__(self, free):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)
        if free:
            self.scale = nn.Parameter(torch.linspace(0.5, 2, 7))

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(x * self.scale if hasattr(self, "scale") else x)


def wrapped(how, free):
    torch.manual_seed(0)
    model = Net(free).double()
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.first)
        return fully_shard(model)
    return model


def data():
    gen = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 5, generator=gen, dtype=torch.float64), torch.randint(4, (8,), generator=gen)) for _ in range(2)]


def collected(how, rows, kind, fisher, free):
    """Two batches, merged and anchored: factors, diagonals, anchor, and products with Lambda."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the free parameter
        model = wrapped(how, free)
        precision = kind(model, 100)
    with precision.collect(fisher, seed=1) as collection:
        for x, y in data():
            collection.backward(model(x[rows]), y[rows] if fisher == "empirical" else None)
    factors, diagonals = precision.fisher()
    precision.merge_()
    precision.anchor_()
    v = {name: torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape) for name, t in precision.anchor.items()}
    return factors, diagonals, precision.anchor, precision.solve(v), precision.multiply(v), precision.report


CASES = [(KroneckerPrecision, "empirical", False), (DiagonalPrecision, "empirical", False), (KroneckerPrecision, "sample", True)]


def rank_main(rank, folder, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = [collected(how, slice(rank, None, 2), *case) for case in CASES]
        problems = []
        if how == "fsdp":
            for fisher, free in (("exact", False), ("sample", True)):
                model = wrapped(how, free)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    precision = KroneckerPrecision(model, 100)
                try:
                    with precision.collect(fisher) as collection:
                        logits = model(data()[0][0])
                        collection.backward(logits) if fisher == "exact" else logits.sum().backward()
                except ValueError as error:
                    problems.append(str(error))
        torch.save((found, problems), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_collect_what_one_process_does(how, tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path), how), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, case in enumerate(CASES):
        first, second = (found[i] for found, _ in ranks)
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
        one = collected("one process", EVERYTHING, *case)
        assert list(first[-1]) == list(one[-1])  # names are those of the model without a wrapper
        if case[1] == "empirical":
            for mine, its in zip(tensors(first), tensors(one), strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-13)
        else:
            # Other labels are drawn than in one process; inputs do not depend on them.
            torch.testing.assert_close(first[0]["first"][0], one[0]["first"][0], rtol=1e-12, atol=1e-15)
            assert not torch.equal(first[0]["last"][1], one[0]["last"][1])
            assert (first[1]["scale"] > 0).all()
            assert 0.02 < float(first[1]["scale"].mean() / one[1]["scale"].mean()) < 50
    if how == "fsdp":
        assert "fisher='exact' needs several backward passes" in ranks[0][1][0]
        assert "'scale' are sharded" in ranks[0][1][1]


def many(rank, folder, how):
    """The free parameter's squares, over many draws."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = wrapped(how, True)
            precision = KroneckerPrecision(model, 100)
            with precision.collect(seed=4) as collection:
                for _ in range(300):
                    collection.backward(model(data()[0][0][rank::2]))
        torch.save(precision.fisher()[1]["scale"], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_squares_of_whole_batches_are_unbiased_on_two_ranks(how, tmp_path):
    torch.multiprocessing.spawn(many, args=(str(tmp_path), how), nprocs=2)
    found = torch.load(tmp_path / "0.pt")
    model, x = wrapped("one process", True), data()[0][0]
    logits, wanted = model(x), torch.zeros(7, dtype=torch.float64)
    for i in range(8):
        for c in range(4):
            (g,) = torch.autograd.grad(-logits[i].log_softmax(0)[c], model.scale, retain_graph=True)
            wanted += logits[i].softmax(0)[c].detach() * g**2 / 8
    # 300 draws of 8 labels: relative deviations of about 8 %.
    torch.testing.assert_close(found, wanted, rtol=0.35, atol=0)
