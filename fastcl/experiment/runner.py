"""Runs a configuration seed by seed; a process that is killed at any moment leaves a folder from which the same call goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcl.experiment.config import Config
from fastcl.experiment.environment import environment
from fastcl.experiment.files import load_state, read_json, save_state, write_json
from fastcl.experiment.folder import FolderError, opened, seed_folder
from fastcl.experiment.results import fault
from fastcl.experiment.training import Training, tasks_of
from fastcl.metrics import AccuracyMatrix

FORMAT, VERSION = "fastcl.result", 1


class TrainingError(RuntimeError):
    """The training cannot go on: it has diverged. What was saved before stays."""


class Progress:
    """What the runner tells while it works; this one keeps silent. Subclasses show it."""

    def begin(self, config: Config, seed: int, stages: int, done: int) -> None:
        """A seed begins, or goes on after ``done`` of ``stages``: a stage is a task, or all of them for joint training."""

    def epoch(self) -> None:
        """An epoch ended."""

    def task(self, number: int, accuracies: list[float]) -> None:
        """A stage ended, and is saved; the accuracies on all tasks."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Result:
    """What a seed gave.

    ``matrix`` [tasks, tasks] has None where nothing was measured, ``baseline`` the accuracies of the untrained model. ``seconds`` is the
    time of all ``steps`` training steps, without evaluation; ``seconds_at_ends`` that of the methods' work before and after each task.
    ``environments`` lists on what it was computed, in turn; more than one if it was resumed elsewhere.
    """

    seed: int
    matrix: list[list[float | None]]
    baseline: list[float]
    steps: int
    seconds: float
    seconds_at_ends: float
    environments: list[dict[str, Any]]

    @property
    def accuracy(self) -> AccuracyMatrix:
        """The accuracy matrix."""
        return AccuracyMatrix.of([[math.nan if v is None else v for v in row] for row in self.matrix])

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a training step."""
        return self.seconds / self.steps


def run(config: Config, folder: str | Path, *, force: bool = False, progress: Progress | None = None) -> list[Result]:
    """Train every seed of a configuration, or what is left of it, and return all results.

    ``folder`` gets ``config.json`` (the configuration, versions, device), and for each seed ``seed<N>/checkpoint.pt`` (everything the
    training depends on, after the last task that ended) and ``seed<N>/result.json``. Each is replaced at once or not at all. A call with
    the same configuration goes on after the last task that ended, to the same bits on the CPU; if all is done it trains nothing.
    torch's number of threads is ``config.threads`` meanwhile, and its random generators are afterwards as before.

    Args:
        config: what to run.
        folder: new, empty, or that of the same run.
        force: train anew in the folder of a run, whatever its configuration.
        progress: is told what happens.

    Raises:
        FolderError: the folder is a file, holds something else or a run with another configuration, is in use or cannot be written.
        ValueError: settings that do not fit the stream, a damaged file in the folder.
        FileNotFoundError: the stream's data set is not on this machine.
        ImportError: a package that the stream needs.
        BackendUnavailable: ``FASTCL_BACKEND`` names a backend that cannot serve the device.
        TrainingError: the training has diverged; the message names method, seed and task.

    Nothing has been written if the configuration or ``FASTCL_BACKEND`` is at fault.
    """
    told = progress or Progress()
    tasks_of(config, config.first_seed)
    environment(config)  # raises if the backend that FASTCL_BACKEND names cannot serve
    with _settings_of_torch(config), opened(Path(folder), config, force=force):
        return [_train(config, seed, seed_folder(Path(folder), seed), told) for seed in config.all_seeds()]


def read_result(path: Path, config: Config, seed: int) -> Result:
    """The ``result.json`` of a configuration's seed.

    Raises:
        OSError: it cannot be read.
        FolderError: it is of another configuration or seed; the message names the path.
        ValueError: it is damaged; the message names the path.
    """
    found = read_json(path, FORMAT, VERSION)
    if wrong := fault(found, config):
        raise ValueError(f"{path} is damaged: {wrong}")
    _must_be_of(path, found, config, seed)
    return Result(**{field.name: found[field.name] for field in dataclasses.fields(Result)})


def _must_be_of(path: Path, found: dict[str, Any], config: Config, seed: int) -> None:
    """A file that was copied here from another run, or from another seed, is not gone on with."""
    stated, wanted = found.get("config"), config.to_json()
    if not isinstance(stated, dict):
        raise FolderError(f"{path} does not state its configuration; give a new folder, or --force")
    other = [f"{n}: {stated.get(n)!r}, {wanted.get(n)!r}" for n in {**wanted, **stated} if n != "root" and stated.get(n) != wanted.get(n)]
    if found.get("seed") != seed:
        other.append(f"seed: {found.get('seed')!r}, {seed}")
    if other:
        raise FolderError(f"{path} is of another run (there, here: {'; '.join(other)}); give a new folder, or --force")


def _train(config: Config, seed: int, folder: Path, told: Progress) -> Result:
    finished, checkpoint = folder / "result.json", folder / "checkpoint.pt"
    if finished.exists():
        return read_result(finished, config, seed)
    folder.mkdir(exist_ok=True)
    of = {"config": config.to_json(), "seed": seed}
    training, environments = Training(config, seed), [environment(config)]
    if checkpoint.exists():
        state = load_state(checkpoint, training.device)
        _must_be_of(checkpoint, state, config, seed)
        training.load_state_dict(state["training"])
        if state["environments"][-1] != environments[0]:
            told.note(f"seed {seed} began elsewhere ({_changes(state['environments'][-1], environments[0])}): the last bits may differ")
            environments = [*state["environments"], *environments]
        else:
            environments = state["environments"]
    told.begin(config, seed, training.stages, training.done)
    while training.done < training.stages:
        try:
            accuracies = training.stage(told.epoch)
        except ValueError as error:  # the settings have been checked: what a method refuses now is what the training has become
            levers = "a smaller --strength or --lr" if config.strength is not None else "a smaller --lr"
            where = "all tasks at once" if training.row.at_once else f"task {training.done}"
            raise TrainingError(f"{config.method}, seed {seed}, {where}: {error}. Try {levers}") from error
        save_state(checkpoint, {**of, "training": training.state_dict(), "environments": environments})
        told.task(training.done - 1, accuracies)
    result = Result(seed, training.rows(), training.baseline, training.steps, training.seconds, training.seconds_at_ends, environments)
    write_json(finished, {"format": FORMAT, "version": VERSION, **of, **dataclasses.asdict(result)})
    return result


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name])


@contextmanager
def _settings_of_torch(config: Config) -> Iterator[None]:
    threads, device = torch.get_num_threads(), torch.device(config.device)
    devices = [device.index or 0] if device.type == "cuda" else []
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads(threads)
