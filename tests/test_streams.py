"""Streams made of a data set, and the named ones."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from fastcl.data import STREAMS, Dataset, Task, digits, load_digits, permuted, rotated, split_by_class, stream


def images(n=12, classes=4, size=5, channels=2) -> Dataset:
    x = torch.rand(2 * n, channels, size, size, generator=torch.Generator().manual_seed(1))
    y = torch.arange(2 * n) % classes
    return Dataset(x[:n], y[:n], x[n:], y[n:], classes)


@pytest.mark.parametrize(("scenario", "outputs"), [("class", 4), ("task", 2), ("domain", 2)])
def test_a_split_gives_each_task_its_classes(scenario, outputs):
    data = images()
    tasks = split_by_class(data, 2, scenario=scenario)
    assert [t.labels for t in tasks] == [(0, 1), (2, 3)]
    assert [t.classes for t in tasks] == [outputs, outputs]
    for task in tasks:
        for part in ("train", "test"):
            x, y = getattr(task, part + "_x"), getattr(task, part + "_y")
            all_x, all_y = getattr(data, part + "_x"), getattr(data, part + "_y")
            mine = [i for i, label in enumerate(all_y.tolist()) if label in task.labels]
            assert torch.equal(x, all_x[mine])
            assert y.dtype == torch.int64
            named = y.tolist() if scenario == "class" else [task.labels[i] for i in y.tolist()]
            assert named == all_y[mine].tolist()


def test_shuffled_classes_are_drawn_from_the_seed():
    data = images()
    assert [t.labels for t in split_by_class(data, 4, seed=5)] == [(0,), (1,), (2,), (3,)]
    orders = {tuple(t.labels for t in split_by_class(data, 2, seed=s, shuffle_classes=True)) for s in range(10)}
    assert len(orders) > 4
    assert all(sorted(a + b) == [0, 1, 2, 3] for a, b in orders)
    task = split_by_class(data, 2, scenario="task", seed=3, shuffle_classes=True)[0]
    again = split_by_class(data, 2, scenario="class", seed=3, shuffle_classes=True)[0]
    assert again.labels == task.labels
    assert [task.labels[i] for i in task.train_y.tolist()] == again.train_y.tolist()


def test_labels_default_to_all_classes():
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert Task("all", 3, x, y, x, y).labels == (0, 1, 2)
    assert Task("some", 3, x, y, x, y, labels=(2,)).labels == (2,)


def test_permuted_keeps_the_shape_and_moves_all_elements_alike():
    data = images()
    tasks = permuted(data, 3, seed=2)
    assert torch.equal(tasks[0].train_x, data.train_x)
    moved = tasks[2]
    assert moved.train_x.shape == data.train_x.shape
    assert not torch.equal(moved.train_x, data.train_x)
    before = torch.cat([data.train_x, data.test_x]).flatten(1).T.tolist()
    after = torch.cat([moved.train_x, moved.test_x]).flatten(1).T.tolist()
    assert sorted(before) == sorted(after)


def test_rotation_is_that_of_scipy():
    data = images()
    tasks = rotated(data, 5)
    assert [t.name for t in tasks] == ["0 degrees", "36 degrees", "72 degrees", "108 degrees", "144 degrees"]
    assert torch.equal(tasks[0].train_x, data.train_x)
    for k, task in enumerate(tasks):
        for got, source in ((task.train_x, data.train_x), (task.test_x, data.test_x)):
            expected = ndimage.rotate(source.double().numpy(), 36 * k, axes=(3, 2), reshape=False, order=1, mode="grid-constant")
            assert np.abs(got.numpy() - expected).max() < 1e-5, f"task {k}"
        assert torch.equal(task.train_y, data.train_y)


def test_a_quarter_turn_is_counterclockwise_and_exact(monkeypatch):
    monkeypatch.setattr("fastcl.data.compose.ROTATED_AT_ONCE", 5)  # several pieces, the last one smaller
    data = images()
    task = rotated(data, 2)[1]
    assert task.name == "90 degrees"
    assert torch.allclose(task.train_x, torch.rot90(data.train_x, 1, (2, 3)), atol=1e-6)


@pytest.mark.parametrize("make", [lambda d: permuted(d, 2), lambda d: rotated(d, 2), lambda d: split_by_class(d, 1)])
def test_tasks_own_their_tensors(make):
    data = images()
    before = data.train_x.clone()
    for task in make(data):
        task.train_x.zero_()
        task.train_y.zero_()
    assert torch.equal(data.train_x, before)
    assert data.train_y.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: split_by_class(d, 3), ValueError, r"tasks must divide the 4 classes, so be one of \[1, 2, 4\]; got 3"),
        (lambda d: split_by_class(d, 2, scenario="online"), ValueError, "scenario must be one of 'class', 'task', 'domain'; got 'online'"),
        (lambda d: split_by_class(d, 0), ValueError, "tasks must be at least 1, got 0"),
        (lambda d: permuted(d, -1), ValueError, "tasks must be at least 1, got -1"),
        (lambda d: rotated(d, 2.0), TypeError, "tasks must be a whole number, got float"),
        (lambda d: rotated(d, True), TypeError, "tasks must be a whole number, got bool"),
        (lambda d: rotated(dataclasses.replace(d, train_x=d.train_x.flatten(1)), 2), ValueError, "square images"),
        (lambda d: rotated(dataclasses.replace(d, train_x=d.train_x[:, :, 1:]), 2), ValueError, r"shape \(12, 2, 4, 5\)"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(images())


class TestNamed:
    @pytest.fixture(autouse=True)
    def _needs_scikit_learn(self):
        pytest.importorskip("sklearn")

    @pytest.mark.parametrize("name", [n for n in STREAMS if n.endswith("digits")])
    def test_digits_come_in_all_their_scenarios(self, name):
        for scenario in STREAMS[name].scenarios:
            tasks = stream(name, scenario)
            assert len(tasks) == STREAMS[name].tasks == 5
            for task in tasks:
                assert task.train_x.shape[1:] == (64,)
                assert task.train_x.dtype == torch.float32
                assert 0 <= float(task.train_x.min()) < float(task.train_x.max()) <= 1 + 1e-6
                named = task.labels if scenario == "class" else range(task.classes)
                assert sorted(set(task.test_y.tolist())) == sorted(set(task.train_y.tolist())) == list(named)
        first = STREAMS[name].scenarios[0]
        for default, explicit in zip(stream(name), stream(name, first), strict=True):
            assert torch.equal(default.train_y, explicit.train_y)
            assert default.classes == explicit.classes

    def test_split_digits_is_the_fixed_split(self):
        data, tasks = load_digits(), stream("split-digits")
        assert [t.labels for t in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        assert [t.classes for t in tasks] == [10] * 5
        assert sum(len(t.train_x) for t in tasks) == len(data.train_x) == 1347
        assert sum(len(t.test_x) for t in tasks) == 450
        assert sorted(torch.cat([t.train_x for t in tasks]).tolist()) == sorted(data.train_x.tolist())

    @pytest.mark.parametrize("name", [n for n in STREAMS if n.endswith("digits")])
    def test_validation_does_not_touch_the_test_images(self, name):
        real, tuning = stream(name)[0], stream(name, validation=True)[0]
        assert sorted(torch.cat([tuning.train_x, tuning.test_x]).tolist()) == sorted(real.train_x.tolist())

    def test_seed_tasks_and_order(self):
        assert len(stream("split-digits", tasks=2)) == 2
        assert len(stream("rotated-digits", tasks=7)) == 7
        a, b = stream("permuted-digits", seed=1), stream("permuted-digits", seed=2)
        assert not torch.equal(a[1].train_x, b[1].train_x)
        assert [t.labels for t in stream("split-digits", seed=1)] == [t.labels for t in stream("split-digits")]
        shuffled = [t.labels for t in stream("split-digits", seed=1, shuffle_classes=True)]
        assert shuffled != [t.labels for t in stream("split-digits")]
        assert sorted(sum(shuffled, ())) == list(range(10))

    def test_digits_turn_as_images(self):
        upright, lying = stream("rotated-digits", tasks=2)
        turned = torch.rot90(upright.test_x.view(-1, 8, 8), 1, (1, 2)).flatten(1)
        assert torch.allclose(lying.test_x, turned, atol=1e-5)

    def test_missing_scikit_learn_says_what_to_install(self, monkeypatch):
        digits._digits.cache_clear()
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'fastcl\[demo\]'"):
            stream("rotated-digits")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "split-svhn"}, "name must be one of 'split-digits', .*; got 'split-svhn'"),
            ({"name": "permuted-digits", "scenario": "class"}, "scenario of permuted-digits must be one of 'domain', 'task'; got 'class'"),
            ({"name": "split-digits", "tasks": 3}, r"be one of \[1, 2, 5, 10\]; got 3"),
            ({"name": "split-digits", "tasks": 0}, "tasks must be at least 1"),
            ({"name": "split-digits", "root": "here"}, "root is for data sets on disk.* Got 'here'"),
            ({"name": "rotated-digits", "shuffle_classes": True}, "shuffle_classes is for split streams"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            stream(**arguments)


def test_arguments_of_other_types():
    with pytest.raises(TypeError, match="name must be a string, got list"):
        stream([])
    with pytest.raises(TypeError, match="seed must be a whole number, got float"):
        stream("permuted-digits", seed=1.5)
    with pytest.raises(ValueError, match="seed must be at most"):
        stream("permuted-digits", seed=2**64)
    task = split_by_class(images(), 2)[0]
    for size, error in ((2.5, TypeError), (True, TypeError), (0, ValueError), (2**63, ValueError)):
        with pytest.raises(error, match="batch_size must be"):
            task.train(size)
