"""Streams made of scikit-learn's digits: 1797 images of 8 x 8 pixels, ten classes, part of scikit-learn itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastcl.data._task import Task

SPLIT_SEED = 0
TEST_FRACTION = 0.25


@functools.cache
def _digits(validation: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images and labels of the fixed split; with ``validation`` the training part is split once more."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits streams need scikit-learn: pip install 'fastcl[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=labels)
    if validation:
        train_x, test_x, train_y, test_y = train_test_split(
            train_x, train_y, test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=train_y
        )
    x = [torch.as_tensor(a, dtype=torch.float32) / 16 for a in (train_x, test_x)]
    y = [torch.as_tensor(a, dtype=torch.int64) for a in (train_y, test_y)]
    return x[0], y[0], x[1], y[1]


def permuted_digits(tasks: int = 5, seed: int = 0, *, validation: bool = False) -> list[Task]:
    """Permuted-Digits: every task is all ten digits under a pixel permutation of its own, as Permuted-MNIST does it.

    Task 0 has the pixels in their place, every other task a random permutation drawn from ``seed``. Inputs are [n, 64], pixel / 16 in
    [0, 1]. The split into 1347 training and 450 test images (75/25, stratified by class, ``train_test_split`` with ``random_state=0``)
    is the same for every task and seed.

    Args:
        tasks: number of tasks, at least 1.
        seed: of the permutations.
        validation: for tuning: the 1347 training images are split once more the same way, into 1010 and 337, and the ``test`` tensors
            hold those 337; the real test images are not touched.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: fewer than one task.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}")
    train_x, train_y, test_x, test_y = _digits(validation)
    generator = torch.Generator().manual_seed(seed)
    stream = []
    for t in range(tasks):
        order = torch.randperm(64, generator=generator) if t else torch.arange(64)
        stream.append(Task(f"permutation {t}", 10, train_x[:, order], train_y.clone(), test_x[:, order], test_y.clone()))
    return stream
