"""MNIST and CIFAR from files written here in the same formats."""

import gzip
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from fastcl.data import load_cifar10, load_cifar100, load_mnist, stream
from fastcl.data._idx import read_idx

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_arrays(n=40, m=20, size=6):
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (n, size, size), dtype=np.uint8),
        np.arange(n, dtype=np.uint8) % 10,
        rng.integers(0, 256, (m, size, size), dtype=np.uint8),
        np.arange(m, dtype=np.uint8) % 10,
    ]


def write_mnist(folder, arrays, zipped=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(NAMES, arrays, strict=True):
        (folder / (name + ".gz" if name in zipped else name)).write_bytes(gzip.compress(idx(array)) if name in zipped else idx(array))


def write_cifar(root, classes=10, n=20, protocol=2):
    rng = np.random.default_rng(classes)
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    written = []
    for name in names:
        data, labels = rng.integers(0, 256, (n, 3072), dtype=np.uint8), [i % classes for i in range(n)]
        content = {
            b"data": data,
            b"labels" if classes == 10 else b"fine_labels": labels,
            b"filenames": [b"a.png"] * n,
            b"batch_label": name,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
        written.append((data, labels))
    return written


@pytest.mark.parametrize("zipped", [(), NAMES, NAMES[:1]])
@pytest.mark.parametrize("folder", ["MNIST/raw", "."])
def test_mnist(tmp_path, zipped, folder):
    arrays = mnist_arrays()
    write_mnist(tmp_path / folder, arrays, zipped)
    data = load_mnist(tmp_path)
    assert data.classes == 10
    assert data.train_x.shape == (40, 1, 6, 6)
    assert (data.train_x.dtype, data.train_y.dtype) == (torch.float32, torch.int64)
    for x, y, pixels, labels in ((data.train_x, data.train_y, *arrays[:2]), (data.test_x, data.test_y, *arrays[2:])):
        assert np.array_equal(x.numpy()[:, 0], pixels.astype(np.float32) / 255)
        assert y.tolist() == labels.tolist()


@pytest.mark.parametrize(("classes", "load"), [(10, load_cifar10), (100, load_cifar100)])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_cifar(tmp_path, classes, load, protocol):
    written = write_cifar(tmp_path, classes, protocol=protocol)
    data = load(str(tmp_path))
    assert data.classes == classes
    expected = np.concatenate([pixels for pixels, _ in written[:-1]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train_x.numpy(), expected.astype(np.float32) / 255)
    assert data.train_y.tolist() == [label for _, labels in written[:-1] for label in labels]
    assert np.array_equal(data.test_x.numpy().reshape(-1, 3072), written[-1][0].astype(np.float32) / 255)


def test_a_given_root_is_the_only_place_and_the_variable_comes_before_the_usual_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTCL_DATA", raising=False)
    home, local, named = mnist_arrays(n=11), mnist_arrays(n=12), mnist_arrays(n=13)
    write_mnist(tmp_path / "home/data/MNIST/raw", home)
    assert len(load_mnist().train_x) == 11
    write_mnist(tmp_path / "data/MNIST/raw", local)
    assert len(load_mnist().train_x) == 12
    write_mnist(tmp_path / "named", named)
    monkeypatch.setenv("FASTCL_DATA", str(tmp_path / "named"))
    assert len(load_mnist().train_x) == 13
    with pytest.raises(FileNotFoundError):
        load_mnist(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "folder", "missing"),
    [
        ("split-mnist", "MNIST/raw", NAMES[0]),
        ("split-cifar10", "cifar-10-batches-py", "data_batch_3"),
        ("split-cifar100", "cifar-100-python", "train"),
    ],
)
def test_what_is_missing_and_every_place_is_named(tmp_path, monkeypatch, name, folder, missing):
    (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTCL_DATA", str(tmp_path / "named"))
    with pytest.raises(FileNotFoundError) as raised:
        stream(name)
    text = str(raised.value)
    for place in (tmp_path / "named", tmp_path / "home/data"):
        assert f"{place / folder}: no such folder" in text
        assert f"{place}: no such folder" in text
    found = next(line for line in text.splitlines() if line.strip().startswith(f"{tmp_path / 'data' / folder}:"))
    assert "without" in found
    assert missing in found
    assert f"{tmp_path / '../data' / folder}" in text
    assert "FASTCL_DATA" in text


def test_named_streams_from_files(tmp_path):
    write_mnist(tmp_path / "MNIST/raw", mnist_arrays())
    write_cifar(tmp_path, 100, n=200)
    split = stream("split-mnist", "task", root=tmp_path)
    assert [(t.labels, t.classes, tuple(t.train_x.shape)) for t in split[:2]] == [((0, 1), 2, (8, 1, 6, 6)), ((2, 3), 2, (8, 1, 6, 6))]
    assert [t.train_x.shape for t in stream("permuted-mnist", root=tmp_path)] == [(40, 1, 6, 6)] * 5
    assert [t.train_x.shape for t in stream("rotated-mnist", root=tmp_path, tasks=3)] == [(40, 1, 6, 6)] * 3
    hundred = stream("split-cifar100", root=tmp_path)
    assert [t.labels for t in hundred] == [tuple(range(10 * k, 10 * k + 10)) for k in range(10)]
    assert {t.classes for t in hundred} == {100}


def test_validation_takes_a_quarter_of_every_class_from_the_training_images(tmp_path):
    write_mnist(tmp_path, mnist_arrays())
    real, tuning = (stream("permuted-mnist", root=tmp_path, tasks=1, seed=s, validation=v)[0] for s, v in ((0, False), (3, True)))
    assert tuning.test_y.bincount().tolist() == [1] * 10
    assert tuning.train_y.bincount().tolist() == [3] * 10
    together = torch.cat([tuning.train_x, tuning.test_x]).flatten(1).tolist()
    assert sorted(together) == sorted(real.train_x.flatten(1).tolist())
    again = stream("permuted-mnist", root=tmp_path, tasks=1, validation=True)[0]
    assert torch.equal(again.test_x, tuning.test_x)


IMAGES = idx(np.zeros((2, 3, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", IMAGES[:-1], r"must hold 18 bytes after its header, as the shape \(2, 3, 3\) there says; it has only 17"),
        ("a", IMAGES + b"x", "it has more"),
        ("a", IMAGES[:16] + b"", "it has only 0"),
        ("a", IMAGES[:9], "truncated: its header has 9 of 16 bytes"),
        ("a", b"", "magic number 0x00000803, got 0x$"),
        ("a", idx(np.zeros(3, dtype=np.uint8)), "magic number 0x00000803, got 0x00000801"),
        ("a", bytes([0, 0, 13, 3]) + IMAGES[4:], "got 0x00000d03"),
        ("a", IMAGES[:4] + b"\xff" * 12 + b"abc", "it has only 3"),
        ("a.gz", IMAGES, "is no gzip file, or it is damaged"),
        ("a.gz", gzip.compress(IMAGES)[:-9], "is no gzip file, or it is damaged"),
        ("a.gz", gzip.compress(IMAGES)[:10] + b"\xff" * 20, "is no gzip file, or it is damaged"),
        ("a.gz", gzip.compress(IMAGES[:-1]), "it has only 17"),
    ],
    ids=range(12),
)
def test_damaged_idx_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_idx(tmp_path / name, 3)
    assert str(tmp_path / name) in str(raised.value)


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(IMAGES + bytes(2**26), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="it has more"):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(1, a[1][:-1]), "has 40 images"),
        (lambda a: a.__setitem__(3, a[3] + 1), "must be from 0 to 9, got 1 to 10"),
        (lambda a: a.__setitem__(2, a[2][:, 1:]), r"\(6, 6\) and \(5, 6\) pixels"),
        (lambda a: (a.__setitem__(0, a[0][:0]), a.__setitem__(1, a[1][:0])), "has 0 images"),
    ],
)
def test_mnist_files_that_do_not_fit(tmp_path, change, message):
    arrays = mnist_arrays()
    change(arrays)
    write_mnist(tmp_path, arrays)
    with pytest.raises(ValueError, match=message):
        load_mnist(tmp_path)


def test_a_home_that_nobody_has(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"Searched:\n  ~nosuchuser/x: the home folder in it cannot be determined"):
        load_mnist("~nosuchuser/x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCL_DATA", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does where there is no home
    with pytest.raises(FileNotFoundError, match=r"(?s)~/data: the home folder.*data/MNIST/raw: no such folder"):
        load_mnist()


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (0, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 3, (2**32 - 1, 2**32 - 1, 0)])
def test_idx_shapes_that_no_tensor_has(tmp_path, shape):
    path = tmp_path / NAMES[0]
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape))
    with pytest.raises(ValueError, match=NAMES[0]):
        read_idx(path, 3)
