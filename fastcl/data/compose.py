"""Streams of tasks made from one data set: its classes split, its inputs permuted, its images rotated.

The three scenarios are those of van de Ven, Tuytelaars and Tolias ("Three types of incremental learning", Nature Machine Intelligence 4,
2022): in task-incremental learning (``"task"``) the task is known and has a head of its own, in domain-incremental learning
(``"domain"``) one head answers the same question for every task, in class-incremental learning (``"class"``) one head tells all classes
of all tasks apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fastcl.data._checks import whole
from fastcl.data._task import Dataset, Task

SCENARIOS = ("class", "task", "domain")
ROTATED_AT_ONCE = 4096


def split_by_class(data: Dataset, tasks: int, *, scenario: str = "class", seed: int = 0, shuffle_classes: bool = False) -> list[Task]:
    """Split a data set by class: task ``t`` has the classes number ``t n`` to ``(t + 1) n - 1``, ``n = classes / tasks``.

    ======== ========================== =====================================
    scenario targets                    ``Task.classes``
    ======== ========================== =====================================
    class    the data set's own labels  all of the data set, for one head
    task     0 to ``n - 1``             ``n``, for each task's head
    domain   0 to ``n - 1``             ``n``, for the one head of all tasks
    ======== ========================== =====================================

    Args:
        data: the data set.
        tasks: number of tasks; divides the number of classes.
        scenario: ``"class"``, ``"task"`` or ``"domain"``.
        seed: of the order of the classes; without ``shuffle_classes`` it has no effect.
        shuffle_classes: draw the order of the classes instead of taking it as it is.

    Raises:
        TypeError: a number of tasks that is no int.
        ValueError: a number of tasks that does not divide the classes, an unknown scenario.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(map(repr, SCENARIOS))}; got {scenario!r}")
    whole("tasks", tasks, 1)
    if data.classes % tasks:
        accepted = [n for n in range(1, data.classes + 1) if data.classes % n == 0]
        raise ValueError(f"tasks must divide the {data.classes} classes, so be one of {accepted}; got {tasks}")
    order = torch.arange(data.classes)
    if shuffle_classes:
        order = torch.randperm(data.classes, generator=torch.Generator().manual_seed(seed))
    stream = []
    for part in torch.split(order, data.classes // tasks):
        labels = tuple(part.tolist())
        (train_x, train_y), (test_x, test_y) = (
            _of_classes(x, y, part, local=scenario != "class") for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y))
        )
        name = "classes " + ", ".join(map(str, labels))
        stream.append(Task(name, data.classes if scenario == "class" else len(part), train_x, train_y, test_x, test_y, labels))
    return stream


def permuted(data: Dataset, tasks: int, seed: int = 0) -> list[Task]:
    """Every task is the whole data set under a permutation of its own of all elements of an input.

    Task 0 keeps the elements in their place, every other task has a random permutation drawn from ``seed``; the shape of the inputs
    stays. Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural Networks", arXiv 1312.6211.

    Args:
        data: the data set; every task holds a copy of it.
        tasks: number of tasks, at least 1.
        seed: of the permutations; the first tasks are the same however many follow.

    Raises:
        TypeError: a number of tasks that is no int.
        ValueError: fewer than one task.
    """
    whole("tasks", tasks, 1)
    generator = torch.Generator().manual_seed(seed)
    elements = math.prod(data.train_x.shape[1:])
    stream = []
    for t in range(tasks):
        order = torch.randperm(elements, generator=generator) if t else torch.arange(elements)
        train_x, test_x = (x.flatten(1)[:, order].reshape(x.shape) for x in (data.train_x, data.test_x))
        stream.append(Task(f"permutation {t}", data.classes, train_x, data.train_y.clone(), test_x, data.test_y.clone()))
    return stream


def rotated(data: Dataset, tasks: int) -> list[Task]:
    """Every task is the whole data set turned by an angle of its own: ``180 t / tasks`` degrees counterclockwise in task ``t``.

    The images turn about their centre with bilinear interpolation; what comes from outside is 0. The angles are evenly spaced from 0 up
    to, and without, 180 degrees, the range of Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
    arXiv 1706.08840.

    Args:
        data: a data set of images [n, channels, height, width]; every task holds a copy of it.
        tasks: number of tasks, at least 1.

    Raises:
        TypeError: a number of tasks that is no int.
        ValueError: fewer than one task, inputs that are no square images.
    """
    whole("tasks", tasks, 1)
    shape = tuple(data.train_x.shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"data must hold square images [n, channels, height, width], got inputs of shape {shape}")
    stream = []
    for t in range(tasks):
        angle = 180 * t / tasks
        train_x, test_x = (_rotate(x, angle) for x in (data.train_x, data.test_x))
        stream.append(Task(f"{angle:g} degrees", data.classes, train_x, data.train_y.clone(), test_x, data.test_y.clone()))
    return stream


def _rotate(images: Tensor, degrees: float) -> Tensor:
    """A rotated copy. A piece at a time, since the sampling grid takes twice the memory of a one-channel image."""
    if degrees == 0:
        return images.clone()
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The grid says for every output pixel where it comes from: the inverse rotation, with y pointing down.
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], dtype=images.dtype)
    grid = affine_grid(theta[None], [1, *images.shape[1:]], align_corners=False)
    pieces = torch.split(images, ROTATED_AT_ONCE)
    return torch.cat([grid_sample(p, grid.expand(len(p), -1, -1, -1), padding_mode="zeros", align_corners=False) for p in pieces])


def _of_classes(x: Tensor, y: Tensor, labels: Tensor, *, local: bool) -> tuple[Tensor, Tensor]:
    """The samples of these classes, in their order; targets count the classes from 0 if ``local``."""
    matches = y[:, None] == labels
    found = matches.any(1)
    return x[found], matches[found].long().argmax(1) if local else y[found]
