"""With which chance replay buffers keep and draw a sample."""

import pytest
import torch
from scipy import stats

from buffers import content, every_kind, offer, seeded
from fastcl.data import ClassBalancedBuffer, ReservoirBuffer
from fastcl.data._storage import RANDOM


def uniform_p_value(counts, trials, chance) -> float:
    """Of the hypothesis that each of n samples is kept with this chance, when every trial keeps as many (Pearson's statistic)."""
    counts = torch.tensor(counts, dtype=torch.float64)
    n = len(counts)
    statistic = float(((counts - trials * chance) ** 2).sum() / (trials * chance * (1 - chance)) * (n - 1) / n)
    return float(stats.chi2.sf(statistic, n - 1))


@every_kind
@pytest.mark.parametrize("sizes", [(40,), (7,) * 6, (1,) * 12 + (13,), (3, 30, 9)])
def test_every_sample_is_kept_with_the_same_chance(make, sizes):
    trials, capacity, n = 800, 10, sum(sizes)
    kept, pairs = [0] * n, 0
    generator = seeded(17)
    for _ in range(trials):
        buffer, first = make(capacity, generator=generator), 0
        for size in sizes:
            offer(buffer, [0] * size, 0, first)
            first += size
        numbers = content(buffer)
        assert len(numbers) == capacity
        pairs += {0, n - 1} <= set(numbers)
        for i in numbers:
            kept[i] += 1
    assert uniform_p_value(kept, trials, capacity / n) > 1e-3
    together = capacity * (capacity - 1) / (n * (n - 1))
    assert stats.binomtest(pairs, trials, together).pvalue > 1e-3


@pytest.mark.parametrize("batch", [1, 5, 16, 64])
def test_a_reservoir_is_vitters_algorithm_r_sample_by_sample(batch):
    capacity, n = 8, 64
    buffer, draws = ReservoirBuffer(capacity, generator=seeded(3)), seeded(3)
    reservoir: list[int] = []
    for first in range(0, n, batch):
        offer(buffer, [0] * min(batch, n - first), 0, first)
        drawn = iter(
            torch.randint(RANDOM, (len([i for i in range(first, min(first + batch, n)) if i >= capacity]),), generator=draws).tolist()
        )
        for i in range(first, min(first + batch, n)):
            if i < capacity:
                reservoir.append(i)
            elif (j := next(drawn) % (i + 1)) < capacity:
                reservoir[j] = i
    assert buffer.of_task(0)[0][:, 0].long().tolist() == reservoir


@pytest.mark.parametrize("seed", range(5))
def test_each_class_keeps_its_smallest_priorities(seed):
    """One priority per sample, drawn as it comes; dropping others and filling their places must not mix them up."""
    buffer, draws, priority = ClassBalancedBuffer(20, generator=seeded(seed)), seeded(seed), {}
    for labels in ([0] * 30, [0] * 10 + [1] * 30, [0, 1, 2] * 15, [3] * 9 + [1] * 4, [0, 2, 4] * 8):
        first = len(priority)
        offer(buffer, labels, 0, first)
        drawn = torch.randint(RANDOM, (len(labels),), generator=draws).tolist()
        priority |= {first + i: (y, p) for i, (y, p) in enumerate(zip(labels, drawn, strict=True))}
        classes = {y for y, _ in priority.values()}
        expected = []
        for c in classes:
            mine = sorted((p, n) for n, (y, p) in priority.items() if y == c)
            expected += [n for _, n in mine[: 20 // len(classes)]]
        assert buffer.of_task(0)[0][:, 0].long().sort().values.tolist() == sorted(expected)


def test_the_room_of_a_group_shrinks_without_a_preference():
    """After a second class takes half of the room, every sample of the first is still kept with the same chance."""
    trials, kept = 800, [0] * 30
    generator = seeded(5)
    for _ in range(trials):
        buffer = ClassBalancedBuffer(10, generator=generator)
        offer(buffer, [0] * 15, 0)
        offer(buffer, [1] * 20, 0, 100)
        offer(buffer, [0] * 15, 0, 15)
        for i in content(buffer):
            if i < 30:
                kept[i] += 1
    assert sum(kept) == 5 * trials
    assert uniform_p_value(kept, trials, 5 / 30) > 1e-3


@every_kind
def test_sampling(make):
    buffer = make(12, generator=seeded(1))
    offer(buffer, [0, 1, 2] * 4, 3)
    counts = [0] * 12
    for _ in range(1200):
        x, y, task = buffer.sample(5)
        assert (x.shape, y.shape, task.tolist()) == ((5, 3), (5,), [3] * 5)
        numbers = x[:, 0].long().tolist()
        assert len(set(numbers)) == 5
        for i in numbers:
            counts[i] += 1
    assert uniform_p_value(counts, 1200, 5 / 12) > 1e-3
    many = torch.cat([buffer.sample(120)[0][:, 0].long() for _ in range(100)]).bincount(minlength=12)
    assert stats.chisquare(many.numpy()).pvalue > 1e-3
    x, _, _ = buffer.sample(12)
    x.zero_()
    buffer.of_task(3)[0].zero_()
    assert content(buffer) == list(range(12)), "samples are copies"
