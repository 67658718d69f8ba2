"""scikit-learn's digits: 1797 images of 8 x 8 pixels, ten classes, part of scikit-learn itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastcl.data._task import Dataset, Task
from fastcl.data.compose import permuted

SPLIT_SEED = 0
TEST_FRACTION = 0.25


@functools.cache
def _digits(validation: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images and labels of the fixed split; with ``validation`` the training part is split once more."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits streams need scikit-learn: pip install 'fastcl[demo]', or '.[demo]' in a checkout") from error
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=labels)
    if validation:
        train_x, test_x, train_y, test_y = train_test_split(
            train_x, train_y, test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=train_y
        )
    x = [torch.as_tensor(a, dtype=torch.float32) / 16 for a in (train_x, test_x)]
    y = [torch.as_tensor(a, dtype=torch.int64) for a in (train_y, test_y)]
    return x[0], y[0], x[1], y[1]


def load_digits(*, validation: bool = False) -> Dataset:
    """The digits, pixel / 16 in [0, 1], inputs [n, 64], in a fixed split.

    1347 training and 450 test images: 75/25, stratified by class, ``train_test_split`` with ``random_state=0``.

    Args:
        validation: for tuning: the 1347 training images are split once more the same way, into 1010 and 337, and the ``test`` tensors
            hold those 337; the real test images are not touched.

    Raises:
        ImportError: scikit-learn is missing.
    """
    train_x, train_y, test_x, test_y = (t.clone() for t in _digits(validation))
    return Dataset(train_x, train_y, test_x, test_y, classes=10)


def permuted_digits(tasks: int = 5, seed: int = 0, *, validation: bool = False) -> list[Task]:
    """Permuted-Digits: every task is all ten digits under a pixel permutation of its own, as Permuted-MNIST does it.

    Inputs are [n, 64]. The permutations are those of :func:`fastcl.data.permuted`, the split is that of
    :func:`fastcl.data.load_digits`, the same for every task and seed.

    Args:
        tasks: number of tasks, at least 1.
        seed: of the permutations.
        validation: the test tensors hold a part of the training images instead; see :func:`fastcl.data.load_digits`.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: a number of tasks that is no int.
        ValueError: fewer than one task.
    """
    return permuted(load_digits(validation=validation), tasks, seed)
