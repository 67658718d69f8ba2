"""Joint training on all tasks at once: the upper bound that continual learning is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastcl.data import Task
from fastcl.methods.naive import Naive


class Joint(Naive):
    """Training on the data of all tasks at once; no call touches a gradient.

    With one head for all tasks (class- and domain-incremental) the stream becomes one task, :meth:`stream`, and the usual loop trains it::

        for task in Joint.stream(tasks):
            ...

    With a head per task :meth:`batches` gives batches of one task each, in an order that mixes the tasks::

        for x, y, t in Joint.batches(tasks, 32, generator):
            loss_fn(model(x, t), y).backward()

    Args:
        model: the module that is trained.

    Raises:
        TypeError: a model that is no Module.
    """

    _format = "fastcl.joint"

    @staticmethod
    def stream(tasks: Sequence[Task]) -> list[Task]:
        """One task with the training and test data of all ``tasks``, which share one head.

        Its targets are those of the tasks: right where they are the same labels everywhere (class- and domain-incremental streams), wrong
        where each task counts its classes from 0; use :meth:`batches` there.

        Raises:
            TypeError: not a sequence of tasks.
            ValueError: no task, or tasks whose heads or inputs differ.
        """
        first = _checked(tasks)[0]
        for t, task in enumerate(tasks):
            if task.classes != first.classes:
                raise ValueError(f"tasks[{t}] has {task.classes} classes and tasks[0] {first.classes}: one head cannot serve both")
            if task.train_x.shape[1:] != first.train_x.shape[1:]:
                shapes = f"{tuple(task.train_x.shape[1:])} and those of tasks[0] {tuple(first.train_x.shape[1:])}"
                raise ValueError(f"the inputs of tasks[{t}] have shape {shapes}; they must be equal")
        labels = tuple(sorted({label for task in tasks for label in task.labels}))
        train_x, train_y, test_x, test_y = (
            torch.cat([getattr(task, part) for task in tasks]) for part in ("train_x", "train_y", "test_x", "test_y")
        )
        return [Task("joint", first.classes, train_x, train_y, test_x, test_y, labels)]

    @staticmethod
    def batches(tasks: Sequence[Task], batch_size: int, generator: torch.Generator | None = None) -> Interleaved:
        """Batches ``(x, y, task)`` of every task's training data, each of one task; can be iterated any number of times.

        Args:
            tasks: the stream; targets may be local to their task.
            batch_size: at least 1; the last batch of a task may be smaller.
            generator: draws the order of the samples and that in which the tasks take turns, anew for every pass; None keeps the samples'
                order and goes round the tasks.

        Raises:
            TypeError: not a sequence of tasks.
            ValueError: no task, a batch size below 1.
        """
        return Interleaved(tasks, batch_size, generator)


class Interleaved:
    """What :meth:`Joint.batches` returns."""

    def __init__(self, tasks: Sequence[Task], batch_size: int, generator: torch.Generator | None) -> None:
        self._loaders = [task.train(batch_size, generator) for task in _checked(tasks)]
        self._generator = generator

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        # Turns of all tasks: sorted by round without a generator, shuffled with one.
        turns = sorted((turn, task) for task, loader in enumerate(self._loaders) for turn in range(len(loader)))
        if self._generator is not None:
            turns = [turns[i] for i in torch.randperm(len(turns), generator=self._generator).tolist()]
        passes = [iter(loader) for loader in self._loaders]
        for _, task in turns:
            x, y = next(passes[task])
            yield x, y, task


def _checked(tasks: Sequence[Task]) -> Sequence[Task]:
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Task) for task in tasks):
        raise TypeError(f"tasks must be a list of fastcl.data.Task, got {type(tasks).__name__}")
    if not tasks:
        raise ValueError("tasks is empty")
    return tasks
