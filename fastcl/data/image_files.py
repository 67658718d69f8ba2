"""MNIST and CIFAR from files that are on the machine, in the folders in which torchvision leaves them. Nothing is ever downloaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcl.data._cifar import read_pickle
from fastcl.data._idx import read_idx
from fastcl.data._task import Dataset

VALIDATION_FRACTION = 0.25
# What examples hand to torchvision as its root.
USUAL_ROOTS = ("data", "../data", "~/data")

Root = str | os.PathLike[str] | None


def load_mnist(root: Root = None) -> Dataset:
    """MNIST: 60000 training and 10000 test images of handwritten digits; inputs [n, 1, 28, 28], pixel / 255.

    LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE 86 (1998).

    Args:
        root: the folder that holds ``MNIST/raw``, as in torchvision, or the four IDX files themselves (plain or .gz). None searches
            ``$FASTCL_DATA``, ``./data``, ``../data`` and ``~/data``; a given root is the only place that is searched.

    Raises:
        FileNotFoundError: the files are in none of these places; the message names them.
        ValueError: a damaged file, or files that do not fit together.
    """
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    files = _find("MNIST", root, ("MNIST/raw", "."), names, ("", ".gz"))
    train_x, train_y, test_x, test_y = (read_idx(path, 3 if "idx3" in path.name else 1) for path in files)
    parts = [_checked(x[:, None], y, path, 10) for x, y, path in ((train_x, train_y, files[0]), (test_x, test_y, files[2]))]
    return _dataset(parts, files, 10)


def load_cifar10(root: Root = None) -> Dataset:
    """CIFAR-10: 50000 training and 10000 test colour images; inputs [n, 3, 32, 32], pixel / 255.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, University of Toronto (2009). The files are
    pickles; they are read without running anything that they name.

    Args:
        root: the folder that holds ``cifar-10-batches-py`` ("CIFAR-10 python version"), or its files themselves; as in
            :func:`load_mnist`.

    Raises:
        FileNotFoundError: the files are in none of the places; the message names them.
        ValueError: a damaged file, or one that asks for something that a CIFAR file has no need of.
    """
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = _find("CIFAR-10", root, ("cifar-10-batches-py", "."), names)
    *train, test = (_cifar(path, b"labels", 10) for path in files)
    return _dataset([(torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])), test], files, 10)


def load_cifar100(root: Root = None) -> Dataset:
    """CIFAR-100: 50000 training and 10000 test colour images of 100 fine classes; inputs [n, 3, 32, 32], pixel / 255.

    As :func:`load_cifar10`, in the folder ``cifar-100-python``.
    """
    files = _find("CIFAR-100", root, ("cifar-100-python", "."), ["train", "test"])
    return _dataset([_cifar(path, b"fine_labels", 100) for path in files], files, 100)


def held_out(data: Dataset) -> Dataset:
    """The training data split once more, for tuning: a quarter of every class, the same every time, becomes the test data."""
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(data.train_y), dtype=torch.bool)
    for label in range(data.classes):
        index = (data.train_y == label).nonzero()[:, 0]
        order = torch.randperm(len(index), generator=generator)
        test[index[order[: round(VALIDATION_FRACTION * len(index))]]] = True
    return Dataset(data.train_x[~test], data.train_y[~test], data.train_x[test], data.train_y[test], data.classes)


def _find(what: str, root: Root, folders: Sequence[str], names: Sequence[str], suffixes: Sequence[str] = ("",)) -> list[Path]:
    """The files in the first folder that has all of them."""
    roots = [root] if root is not None else [*filter(None, [os.environ.get("FASTCL_DATA")]), *USUAL_ROOTS]
    searched, places = [], []
    for r in roots:
        try:
            places += [Path(r).expanduser() / f for f in folders]
        except RuntimeError:  # noqa: PERF203 (a handful of places); an unknown user, or a process without a home
            searched.append(f"  {os.fspath(r)}: the home folder in it cannot be determined")
    for folder in places:
        found = [next((p for s in suffixes if (p := folder / (name + s)).is_file()), None) for name in names]
        files = [p for p in found if p is not None]
        if len(files) == len(names):
            return files
        missing = [name for name, p in zip(names, found, strict=True) if p is None]
        searched.append(f"  {folder.absolute()}: " + (f"without {', '.join(missing)}" if folder.is_dir() else "no such folder"))
    remedy = "hand the folder as root, or set FASTCL_DATA to it; nothing is downloaded"
    raise FileNotFoundError("\n".join([f"{what} was not found ({remedy}). Searched:", *searched]))


def _cifar(path: Path, key: bytes, classes: int) -> tuple[Tensor, Tensor]:
    content = read_pickle(path)
    for name in (b"data", key):
        if name not in content:
            raise ValueError(f"{path} has no {name.decode()!r}; it has {sorted(map(str, content))}")
    x, labels = content[b"data"], content[key]
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != 3 * 32 * 32:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{path}: 'data' must be an array [n, 3072], got {got}")
    return _checked(x.reshape(-1, 3, 32, 32), _labels(labels, path, key, classes), path, classes)


def _labels(labels: Any, path: Path, key: bytes, classes: int) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    if not isinstance(labels, list) or not all(type(v) is int for v in labels):
        raise ValueError(f"{path}: {key.decode()!r} must be a list of whole numbers, got {type(labels).__name__}")
    wrong = [v for v in labels if not 0 <= v < classes]  # before it is a tensor: not every number of Python fits in one
    if wrong:
        raise ValueError(f"{path}: {key.decode()!r} must be from 0 to {classes - 1}, got {wrong[0]}")
    return torch.tensor(labels, dtype=torch.int64)


def _checked(x: Tensor, y: Tensor, path: Path, classes: int) -> tuple[Tensor, Tensor]:
    if len(x) != len(y) or y.dim() != 1 or not len(x):
        raise ValueError(f"{path} has {len(x)} images, and there are labels of shape {tuple(y.shape)}; one for each of them is needed")
    y = y.to(torch.int64)
    if bool(((y < 0) | (y >= classes)).any()):
        raise ValueError(f"the labels of {path} must be from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    return x, y


def _dataset(parts: Sequence[tuple[Tensor, Tensor]], files: Sequence[Path], classes: int) -> Dataset:
    (train_x, train_y), (test_x, test_y) = parts
    if train_x.shape[1:] != test_x.shape[1:]:
        shapes = f"{tuple(train_x.shape[2:])} and {tuple(test_x.shape[2:])} pixels"
        raise ValueError(f"training and test images of {files[0].parent} have {shapes}; they must have the same size")
    return Dataset(train_x.float().div_(255), train_y, test_x.float().div_(255), test_y, classes)
