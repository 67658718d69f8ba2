"""What the tests of the replay buffers share."""

import pytest
import torch

from fastcl.data import ClassBalancedBuffer, ReservoirBuffer, TaskBalancedBuffer

KINDS = {
    "reservoir": ReservoirBuffer,
    "class": ClassBalancedBuffer,
    "class and task": lambda capacity, **kw: ClassBalancedBuffer(capacity, per_task=True, **kw),
    "task": TaskBalancedBuffer,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offer(buffer, labels, task, first=0) -> None:
    """Samples that say in x who they are: number, label, task."""
    y = torch.as_tensor(labels, dtype=torch.int64)
    number = torch.arange(first, first + len(y))
    buffer.add(torch.stack([number, y, torch.full_like(y, task)], 1).double(), y, task)


def content(buffer) -> list[int]:
    """The numbers of the stored samples, after checking that each is whole and none is there twice."""
    if not len(buffer):
        return []
    x, y, task = buffer.sample(len(buffer))
    assert torch.equal(x[:, 1].long(), y)
    assert torch.equal(x[:, 2].long(), task)
    numbers = x[:, 0].long().tolist()
    assert len(set(numbers)) == len(numbers)
    return sorted(numbers)
