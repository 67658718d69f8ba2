"""The named streams."""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

from fastcl.data._checks import whole
from fastcl.data._task import Dataset, Task
from fastcl.data.compose import permuted, rotated, split_by_class
from fastcl.data.digits import load_digits
from fastcl.data.image_files import held_out, load_cifar10, load_cifar100, load_mnist

Root = str | os.PathLike[str] | None


class Stream(NamedTuple):
    """What a named stream is made of.

    ``scenarios`` are those it can be had in, the default first; ``tasks`` is the default number of tasks.
    """

    description: str
    scenarios: tuple[str, ...]
    tasks: int


_SPLIT, _SHARED = ("class", "task", "domain"), ("domain", "task")

STREAMS: dict[str, Stream] = {
    "split-digits": Stream("scikit-learn's digits, two classes a task; inputs [64]", _SPLIT, 5),
    "permuted-digits": Stream("scikit-learn's digits, the pixels permuted in every task; inputs [64]", _SHARED, 5),
    "rotated-digits": Stream("scikit-learn's digits, turned by 180 t / tasks degrees; inputs [64]", _SHARED, 5),
    "split-mnist": Stream("MNIST, two classes a task; inputs [1, 28, 28]", _SPLIT, 5),
    "permuted-mnist": Stream("MNIST, the pixels permuted in every task; inputs [1, 28, 28]", _SHARED, 5),
    "rotated-mnist": Stream("MNIST, turned by 180 t / tasks degrees; inputs [1, 28, 28]", _SHARED, 5),
    "split-cifar10": Stream("CIFAR-10, two classes a task; inputs [3, 32, 32]", _SPLIT, 5),
    "split-cifar100": Stream("CIFAR-100, ten classes a task; inputs [3, 32, 32]", _SPLIT, 10),
}


def stream(
    name: str,
    scenario: str | None = None,
    *,
    tasks: int | None = None,
    seed: int = 0,
    validation: bool = False,
    root: Root = None,
    shuffle_classes: bool = False,
) -> list[Task]:
    """The tasks of a named stream.

    Split streams (:func:`fastcl.data.split_by_class`) come class-, task- and domain-incremental. Permuted
    (:func:`fastcl.data.permuted`) and rotated ones (:func:`fastcl.data.rotated`) have all classes in every task: domain-incremental with
    one head, task-incremental with a head per task; the tasks are the same. Inputs are float32 in [0, 1]. Every task holds its own
    tensors: five tasks of Permuted-MNIST are 1.1 GB.

    Args:
        name: a key of :data:`fastcl.data.STREAMS`.
        scenario: ``"class"``, ``"task"`` or ``"domain"``; the stream's first one by default.
        tasks: number of tasks; the stream's own by default. A split stream takes a divisor of the number of classes.
        seed: of the permutations, and of the order of the classes with ``shuffle_classes``; nothing else depends on it.
        validation: for tuning: the ``test`` tensors hold a quarter of the training images (stratified by class, the same for every
            seed), the ``train`` tensors the rest; the real test images are not touched.
        root: the folder of MNIST or CIFAR; see :func:`fastcl.data.load_mnist`. The digits streams have no files and refuse it.
        shuffle_classes: draw the order of a split stream's classes from ``seed`` instead of the natural order.

    Raises:
        TypeError: a name that is no string, a number of tasks or a seed that is no int.
        ValueError: an unknown name, a scenario that the stream does not come in, a number of tasks that it cannot have, ``root`` or
            ``shuffle_classes`` where it means nothing, a damaged file.
        FileNotFoundError: the data set is not on this machine; the message names every place that was searched.
        ImportError: scikit-learn is missing (digits).
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name not in STREAMS:
        raise ValueError(f"name must be one of {', '.join(map(repr, STREAMS))}; got {name!r}")
    found = STREAMS[name]
    scenario = found.scenarios[0] if scenario is None else scenario
    if scenario not in found.scenarios:
        raise ValueError(f"scenario of {name} must be one of {', '.join(map(repr, found.scenarios))}; got {scenario!r}")
    seed = whole("seed", seed, -(2**63), 2**64 - 1)  # what torch's generators take
    tasks = found.tasks if tasks is None else tasks
    kind, source = name.split("-")
    if shuffle_classes and kind != "split":
        raise ValueError(f"shuffle_classes is for split streams; every task of {name} has all classes")
    data = _load(source, validation, root)
    if kind == "split":
        return split_by_class(data, tasks, scenario=scenario, seed=seed, shuffle_classes=shuffle_classes)
    if kind == "permuted":
        return permuted(data, tasks, seed)
    return rotated(data, tasks) if source != "digits" else _rotated_digits(data, tasks)


def _load(source: str, validation: bool, root: Root) -> Dataset:
    if source == "digits":
        if root is not None:
            raise ValueError(f"root is for data sets on disk; the digits come with scikit-learn. Got {os.fspath(root)!r}")
        return load_digits(validation=validation)
    data = {"mnist": load_mnist, "cifar10": load_cifar10, "cifar100": load_cifar100}[source](root)
    return held_out(data) if validation else data


def _rotated_digits(data: Dataset, tasks: int) -> list[Task]:
    images = dataclasses.replace(data, train_x=data.train_x.view(-1, 1, 8, 8), test_x=data.test_x.view(-1, 1, 8, 8))
    return [dataclasses.replace(t, train_x=t.train_x.flatten(1), test_x=t.test_x.flatten(1)) for t in rotated(images, tasks)]
