"""One seed's training: everything that changes meanwhile, and its state after each task."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastcl.data import Task, stream
from fastcl.experiment.config import Config
from fastcl.experiment.learners import METHODS
from fastcl.experiment.model import Net
from fastcl.methods import Joint
from fastcl.metrics import AccuracyMatrix

WARM_UP = 3


def tasks_of(config: Config, seed: int) -> list[Task]:
    """The stream of a seed, on the device.

    Raises:
        ValueError, FileNotFoundError, ImportError: what the stream says; a memory too small for it.
    """
    options = {"validation": config.validation, "root": config.root, "shuffle_classes": config.shuffle_classes}
    found = stream(config.stream, config.scenario, tasks=config.tasks, seed=seed, **options)  # type: ignore[arg-type]
    groups = {"task": len(found), "class": _classes(found, config)}.get(config.keep or "", 0)
    if config.buffer is not None and config.buffer < groups:
        raise ValueError(f"buffer must be at least {groups}, a sample for each {config.keep}, with keep={config.keep}; got {config.buffer}")
    device, parts = torch.device(config.device), ("train_x", "train_y", "test_x", "test_y")
    return [dataclasses.replace(task, **{part: getattr(task, part).to(device) for part in parts}) for task in found]


def _classes(tasks: list[Task], config: Config) -> int:
    """The groups of a class-balanced memory."""
    per_task = config.scenario == "task"
    return len({(t if per_task else 0, target) for t, task in enumerate(tasks) for target in set(task.train_y.tolist())})


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each purpose of a seed."""
    drawn = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") >> 1)


class Training:
    """A model on its way through the stream. ``done`` counts the stages that ended: a task each, or the one of joint training."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed, self.row = config, seed, METHODS[config.method]
        self.device = torch.device(config.device)
        self.tasks = tasks_of(config, seed)
        torch.manual_seed(seed)
        heads = len(self.tasks) if config.scenario == "task" else 1
        first = self.tasks[0]
        self.net = Net(first.train_x[0].numel(), config.width, config.depth, first.classes, heads).to(self.device)
        self.order = generator(seed, "order of the batches")
        samples = (len(first.train_y),) if self.row.per_datum else ()
        self.learner = self.row.build(self.net, config, generator(seed, "memory"), *samples)
        self.optimizer = self.row.optimizer(self.learner, self.net, config)
        self.matrix = AccuracyMatrix(len(self.tasks))
        self.baseline = [self._accuracy(j) for j in range(len(self.tasks))]
        self.stages = 1 if self.row.at_once else len(self.tasks)
        self.done = self.steps = 0
        self.seconds = self.seconds_at_ends = 0.0

    def stage(self, after_epoch: Callable[[], None]) -> list[float]:
        """Train the next stage, end its task and measure every task; the accuracies."""
        if not self.steps:
            self._warm_up()
        if not self.row.at_once:
            start = self._now()
            # Its own order of the batches: those of the training stay what they are for every method.
            order = generator(self.seed, f"order of the batches before task {self.done}")
            self.row.start_task(self.learner, self.tasks[self.done].train(self.config.batch_size, order))
            self.seconds_at_ends += self._now() - start
        for _ in range(self.config.epochs):
            start = self._now()
            for x, y, task in self._batches():
                self.optimizer.zero_grad()
                cross_entropy(self.net(x, task), y).backward()  # type: ignore[no-untyped-call]
                self.learner.after_backward()
                self.optimizer.step()
                self.steps += 1
            self.seconds += self._now() - start
            after_epoch()
        if not self.row.at_once:
            start = self._now()
            self.row.end_task(self.learner, self.tasks[self.done].train(self.config.batch_size, self.order))
            self.seconds_at_ends += self._now() - start
        accuracies = [self._accuracy(j) for j in range(len(self.tasks))]
        last = len(self.tasks) - 1 if self.row.at_once else self.done
        for j, value in enumerate(accuracies):
            self.matrix[last, j] = value
        self.done += 1
        return accuracies

    def _batches(self) -> Iterable[tuple[Tensor, Tensor, int]]:
        size, order = self.config.batch_size, self.order
        if not self.row.at_once:
            return ((x, y, self.done) for x, y in self.tasks[self.done].train(size, order))
        if len(self.net.heads) > 1:
            return Joint.batches(self.tasks, size, order)
        return ((x, y, 0) for x, y in Joint.stream(self.tasks)[0].train(size, order))

    @torch.no_grad()
    def _accuracy(self, task: int) -> float:
        right = sum((self.net(x, task).argmax(1) == y).sum().double() for x, y in self.tasks[task].test())
        return float(right) / len(self.tasks[task].test_y)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _warm_up(self) -> None:
        """What torch sets up in a process's first steps is not the method's time. On a copy, drawing nothing."""
        net, task = copy.deepcopy(self.net), self.tasks[0]
        optimizer = torch.optim.SGD(net.parameters(), lr=self.config.lr)
        for _ in range(WARM_UP):
            optimizer.zero_grad()
            cross_entropy(net(task.train_x[: self.config.batch_size]), task.train_y[: self.config.batch_size]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, and what was measured so far."""
        on_cuda = self.device.type == "cuda"
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.learner.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "matrix": self.matrix.values,
            "baseline": self.baseline,
            "counts": {"done": self.done, "steps": self.steps, "seconds": self.seconds, "seconds_at_ends": self.seconds_at_ends},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.net.load_state_dict(state["model"])
        self.learner.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])  # after the learner: its state may be in terms of the learner's
        self.order.set_state(state["order"].cpu())
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)
        self.matrix = AccuracyMatrix.of(state["matrix"].cpu())
        self.baseline = list(state["baseline"])
        for name, value in state["counts"].items():
            setattr(self, name, value)

    def rows(self) -> list[list[float | None]]:
        """The accuracy matrix as JSON can hold it."""
        return [[None if math.isnan(v) else v for v in row] for row in self.matrix.values.tolist()]
