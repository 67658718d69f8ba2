"""Replay buffers: what they keep, draw and refuse."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import KINDS, content, every_kind, offer, seeded
from fastcl.data import Batches, ClassBalancedBuffer, ReservoirBuffer, TaskBalancedBuffer


def test_class_balance_after_every_task():
    buffer = ClassBalancedBuffer(100, generator=seeded())
    for task in range(5):
        loader = Batches(torch.rand(300, 4), torch.arange(300) % 2 + 2 * task, 32)
        buffer.add_task(loader, task)
        classes = 2 * task + 2
        assert torch.cat([buffer.of_task(k)[1] for k in buffer.tasks]).bincount().tolist() == [100 // classes] * classes
        assert buffer.tasks == list(range(task + 1))
    assert buffer.seen == 1500


def test_task_balance_and_local_targets():
    by_task, by_class, by_both = TaskBalancedBuffer(100), ClassBalancedBuffer(100), ClassBalancedBuffer(100, per_task=True)
    for buffer in (by_task, by_class, by_both):
        for task in range(5):
            offer(buffer, [0, 0, 0, 1] * 50, task, 1000 * task)
    assert [len(by_task.of_task(t)[1]) for t in range(5)] == [20] * 5
    assert [by_both.of_task(t)[1].bincount().tolist() for t in range(5)] == [[10, 10]] * 5
    assert sum(by_class.of_task(t)[1].bincount(minlength=2) for t in range(5)).tolist() == [50, 50]


def test_a_rare_class_keeps_everything_and_leaves_its_room():
    buffer = ClassBalancedBuffer(100, generator=seeded())
    offer(buffer, [0] * 500, 0)
    assert len(buffer) == 100
    offer(buffer, [1] * 10 + [2] * 500, 1, 500)
    labels = torch.cat([buffer.of_task(k)[1] for k in (0, 1)])
    assert labels.bincount().tolist() == [45, 10, 45]
    assert set(range(500, 510)) <= set(content(buffer))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    capacity=st.integers(9, 20),
    batches=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=25)), max_size=8),
)
def test_any_stream(kind, capacity, batches):
    buffer, first, seen = KINDS[kind](capacity, generator=seeded()), 0, {}
    key = {"reservoir": lambda y, t: 0, "class": lambda y, t: y, "class and task": lambda y, t: (t, y), "task": lambda y, t: t}[kind]
    kept_before: set[int] = set()
    for task, labels in batches:
        offer(buffer, labels, task, first)
        for i, y in enumerate(labels):
            seen[first + i] = key(y, task)
        first += len(labels)
        numbers = set(content(buffer))
        assert numbers <= kept_before | set(range(first - len(labels), first)), "what was dropped comes back"
        kept_before = numbers
        counts = {k: list(seen.values()).count(k) for k in seen.values()}
        room = next((r for r in range(capacity, -1, -1) if sum(min(c, r) for c in counts.values()) <= capacity), 0)
        expected = {k: min(c, room) for k, c in counts.items()} if kind != "reservoir" else {k: min(c, capacity) for k, c in counts.items()}
        assert {k: sum(seen[n] == k for n in numbers) for k in counts} == expected
        assert (buffer.seen, len(buffer), buffer.capacity) == (first, len(numbers), capacity)


@every_kind
def test_samples_are_copied_in_without_history_and_usable_after_inference_mode(make):
    buffer = make(4)
    x = torch.ones(2, 3, requires_grad=True)
    buffer.add(x * 2, torch.tensor([0, 1]), 0)
    with torch.inference_mode():
        y = torch.tensor([0, 1])
        buffer.add(torch.full((2, 3), 5.0), y, 0)
        made, _, _ = buffer.sample(4)
    stored, _ = buffer.of_task(0)
    for t in (stored, made):
        assert not t.requires_grad
        assert not t.is_inference()
    begun = make(4)
    with torch.inference_mode():
        begun.add(torch.ones(2, 3), torch.tensor([0, 1]), 0)
    begun.add(torch.ones(2, 3), torch.tensor([0, 1]), 0)
    assert not begun.sample(2)[0].is_inference()
    assert not begun.state_dict()["x"].is_inference()
    weight = torch.ones(3, requires_grad=True)
    (made @ weight).sum().backward()
    source = torch.zeros(1, 3)
    other = make(4)
    other.add(source, torch.tensor([0]), 0)
    source.add_(7)
    assert not other.of_task(0)[0].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_dtype_and_targets_of_any_shape(dtype):
    buffer = ReservoirBuffer(5)
    buffer.add(torch.ones(9, 3, 4, 4, dtype=dtype), torch.ones(9, 2), 1)
    x, y, _ = buffer.sample(7)
    assert (x.dtype, x.shape, y.shape) == (dtype, (7, 3, 4, 4), (7, 2))
    small = ClassBalancedBuffer(4)
    small.add(torch.ones(6, 1), torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8), 0)
    assert small.of_task(0)[1].bincount().tolist() == [1, 1, 1]


@every_kind
def test_a_loaded_buffer_goes_on_as_the_first_would(make):
    first = make(20, generator=seeded(4))
    for k in range(3):
        offer(first, [0, 1, 2] * 9, k, 100 * k)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(20, generator=seeded(99))
    offer(second, [0] * 30, 7)
    second.load_state_dict(torch.load(file, weights_only=True))
    for k in range(3, 6):
        for mine, other in zip(first.sample(6), second.sample(6), strict=True):
            assert torch.equal(mine, other)
        for buffer in (first, second):
            offer(buffer, [2, 1, 0] * 11, k, 100 * k)
        assert first.tasks == second.tasks
        assert all(torch.equal(a, b) for a, b in zip(first.sample(40), second.sample(40), strict=True))
    one, two = first.state_dict(), second.state_dict()
    assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)
    assert all(isinstance(v, (torch.Tensor, int)) for v in one.values())


@every_kind
def test_the_state_is_a_copy_and_an_empty_one_is_fine(make):
    buffer = make(6, generator=seeded())
    empty = buffer.state_dict()
    offer(buffer, [0, 1], 0)
    state = buffer.state_dict()
    offer(buffer, [0, 1] * 5, 1, 10)
    other = make(6)
    other.load_state_dict(state)
    assert content(other) == [0, 1]
    for t in state.values():
        if isinstance(t, torch.Tensor):
            t.zero_()
    assert content(other) == [0, 1]
    other.load_state_dict(empty)
    assert (len(other), other.seen, other.tasks) == (0, 0, [])
    offer(other, [2], 5)
    assert content(other) == [0]
