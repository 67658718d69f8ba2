import sys

import pytest
import torch

from fastcl.data import Batches, permuted_digits
from fastcl.data import digits as module


@pytest.fixture(autouse=True)
def _needs_scikit_learn():
    pytest.importorskip("sklearn")


def test_the_stream_is_digits_under_permutations():
    stream = permuted_digits(tasks=4, seed=3)
    assert len(stream) == 4
    first = stream[0]
    assert first.train_x.shape == (1347, 64)
    assert first.test_x.shape == (450, 64)
    assert first.train_x.dtype == torch.float32
    assert first.train_y.dtype == torch.int64
    for task in stream:
        assert task.classes == 10
        assert torch.equal(task.train_y, first.train_y)
        assert 0 <= float(task.train_x.min()) < float(task.train_x.max()) == 1
        # The same pixels in another place: rows agree once sorted, and the move is one permutation for all images.
        assert torch.equal(task.train_x.sort(1).values, first.train_x.sort(1).values)
        assert torch.equal(task.test_x.sort(1).values, first.test_x.sort(1).values)
        together = torch.cat([first.train_x, first.test_x]).T.tolist()
        moved = torch.cat([task.train_x, task.test_x]).T.tolist()
        assert sorted(together) == sorted(moved)
    assert not any(torch.equal(stream[a].train_x, stream[b].train_x) for a in range(4) for b in range(a))


def test_task_zero_is_unpermuted_and_the_split_is_stratified_and_disjoint():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    task = permuted_digits(tasks=1)[0]
    rows = sorted(torch.cat([task.train_x, task.test_x]).tolist())
    assert rows == sorted((torch.as_tensor(images, dtype=torch.float32) / 16).tolist())
    total = torch.bincount(torch.as_tensor(labels))
    assert torch.equal(task.train_y.bincount() + task.test_y.bincount(), total)
    assert float((task.test_y.bincount() / total - 0.25).abs().max()) < 0.01


def test_seeds_change_the_permutations_and_not_the_split():
    a, again, b = permuted_digits(3, seed=1), permuted_digits(3, seed=1), permuted_digits(3, seed=2)
    assert torch.equal(a[0].train_x, b[0].train_x)
    assert torch.equal(a[0].test_y, b[0].test_y)
    assert torch.equal(a[2].train_x, again[2].train_x)
    assert not torch.equal(a[2].train_x, b[2].train_x)
    assert torch.equal(a[1].test_x, permuted_digits(2, seed=1)[1].test_x)


def test_validation_stays_inside_the_training_part():
    real, tuning = permuted_digits(1)[0], permuted_digits(1, validation=True)[0]
    assert (len(tuning.train_x), len(tuning.test_x)) == (1010, 337)
    assert sorted(torch.cat([tuning.train_x, tuning.test_x]).tolist()) == sorted(real.train_x.tolist())


def test_streams_do_not_share_memory():
    a = permuted_digits(2)
    a[0].train_x.zero_()
    a[0].train_y.zero_()
    assert a[1].train_x.any()
    assert permuted_digits(1)[0].train_x.any()
    assert permuted_digits(1)[0].train_y.any()


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    module._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastcl\[demo\]'"):
        permuted_digits()


def test_batches():
    x, y = torch.arange(10.0).reshape(10, 1), torch.arange(10)
    ordered = Batches(x, y, 4)
    assert len(ordered) == 3
    assert [b.tolist() for _, b in ordered] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = Batches(x, y, 4, torch.Generator().manual_seed(0))
    passes = [torch.cat([b for _, b in shuffled]) for _ in range(2)]
    assert not torch.equal(*passes)
    assert all(sorted(p.tolist()) == list(range(10)) for p in passes)
    assert all(torch.equal(a[:, 0].long(), b) for a, b in shuffled)
    with pytest.raises(ValueError, match="one target per sample"):
        Batches(x, y[:-1], 4)
    with pytest.raises(ValueError, match="batch_size"):
        Batches(x, y, 0)
    with pytest.raises(ValueError, match="no sample"):
        Batches(x[:0], y[:0], 4)
    with pytest.raises(ValueError, match="at least 1"):
        permuted_digits(0)
