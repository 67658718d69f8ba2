"""Joint training: the merged stream and the interleaved batches."""

import dataclasses

import pytest
import torch

from fastcl.data import Task
from fastcl.methods import Joint


def tasks(classes=(4, 4), width=(3, 3)):
    stream = []
    for t, (c, w) in enumerate(zip(classes, width, strict=True)):
        n, m = 7 + t, 3 + t
        x = 100.0 * t + torch.arange((n + m) * w).view(n + m, w)
        y = (torch.arange(n + m) + t) % c
        stream.append(Task(f"task {t}", c, x[:n], y[:n], x[n:], y[n:]))
    return stream


def test_the_stream_is_one_task_with_all_data():
    given = tasks()
    (joint,) = Joint.stream(given)
    assert joint.classes == 4
    assert joint.labels == (0, 1, 2, 3)
    assert Joint.stream([dataclasses.replace(t, labels=(3, n)) for n, t in enumerate(given)])[0].labels == (0, 1, 3)
    for part in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(joint, part), torch.cat([getattr(t, part) for t in given]))


@pytest.mark.parametrize("seed", [None, 0])
def test_batches_hold_one_task_each_and_every_sample_once(seed):
    given = tasks(classes=(4, 2), width=(3, 3))
    loader = Joint.batches(given, 2, None if seed is None else torch.Generator().manual_seed(seed))
    passes = [[(x, y, t) for x, y, t in loader] for _ in range(2)]
    for drawn in passes:
        assert len(drawn) == len(loader) == 8
        for t, task in enumerate(given):
            x = torch.cat([x for x, _, k in drawn if k == t])
            y = torch.cat([y for _, y, k in drawn if k == t])
            order = x[:, 0].argsort()
            assert torch.equal(x[order], task.train_x)
            assert torch.equal(y[order], task.train_y)
        turns = [t for _, _, t in drawn]
        assert turns[:4] != [0] * 4
        if seed is None:
            assert turns == [0, 1] * 4
    assert seed is None or [t for *_, t in passes[0]] != [t for *_, t in passes[1]]


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match=r"tasks\[1\] has 2 classes and tasks\[0\] 4"):
        Joint.stream(tasks(classes=(4, 2)))
    with pytest.raises(ValueError, match=r"inputs of tasks\[1\] have shape \(5,\)"):
        Joint.stream(tasks(width=(3, 5)))
    for make in (Joint.stream, lambda t: Joint.batches(t, 2)):
        with pytest.raises(ValueError, match="tasks is empty"):
            make([])
        with pytest.raises(TypeError, match=r"list of fastcl\.data\.Task"):
            make([1])
    with pytest.raises(ValueError, match="batch_size"):
        Joint.batches(tasks(), 0)
