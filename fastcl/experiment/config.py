"""What defines a run: a frozen dataclass, checked field by field, that is saved as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastcl.data import STREAMS
from fastcl.experiment.learners import KEEP, METHODS

Check = tuple[str, Callable[[Any], bool]]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(least: int, most: int = 2**31 - 1) -> Check:
    accepted = f"a whole number from {least} to {most if most < 2**63 - 1 else '2**63 - 1'}"
    return accepted, lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def _one_of(names: Mapping[str, Any]) -> Check:
    return f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names


_ABOVE_0: Check = ("a finite number above 0", lambda v: _number(v) and v > 0)
_FROM_0: Check = ("a finite number from 0", lambda v: _number(v) and v >= 0)
_UNIT: Check = ("a number in [0, 1]", lambda v: _number(v) and 0 <= v <= 1)
_BELOW_1: Check = ("a number in [0, 1)", lambda v: _number(v) and 0 <= v < 1)
_FLAG: Check = ("true or false", lambda v: isinstance(v, bool))


def _usable_device(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        device = torch.device(value)
    except RuntimeError:
        return False
    return device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())


def _setting(help: str, check: Check, default: Any = None, *, of_method: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "of_method": of_method})


def _option(help: str, check: Check) -> Any:
    """A setting that only some methods have; None for the others. Defaults stand in the table of methods."""
    return _setting(help, check, of_method=True)


@dataclass(frozen=True)
class Config:
    """Everything that the numbers of a run depend on, besides the versions and the machine, which are recorded beside it.

    Build it with :meth:`of`, which fills in what the stream and the method decide. Settings of other methods are None.

    Raises:
        ValueError: a value that is not accepted; the message begins with the setting's name and says what is.
    """

    stream: str = _setting("stream of tasks: " + ", ".join(STREAMS), _one_of(STREAMS))
    scenario: str = _setting(
        "class-, task- or domain-incremental; by default the stream's first", _one_of(dict.fromkeys(("class", "task", "domain")))
    )
    method: str = _setting("; ".join(f"{name}: {row.description}" for name, row in METHODS.items()), _one_of(METHODS))
    tasks: int = _setting("number of tasks; by default the stream's", _whole(1, 10_000))
    epochs: int = _setting("passes over each task's data", _whole(1), 20)
    batch_size: int = _setting("samples in a batch", _whole(1), 32)
    lr: float = _setting(
        "learning rate of plain SGD; ncl and owm: of their own steps, which on the first task are the same", _ABOVE_0, 0.05
    )
    width: int = _setting("units of a hidden layer", _whole(1, 65536), 256)
    depth: int = _setting("hidden layers", _whole(1, 100), 2)
    seeds: int = _setting("number of seeds, each a training of its own", _whole(1), 1)
    first_seed: int = _setting("the first seed", _whole(0, 2**63 - 1), 0)
    validation: bool = _setting("measure on held-out training images instead of the test images, for tuning", _FLAG, False)
    shuffle_classes: bool = _setting("draw the order of a split stream's classes from the seed", _FLAG, False)
    device: str = _setting("cpu, cuda or cuda:N", ("a device that torch sees here: cpu, cuda or cuda:N", _usable_device), "cpu")
    threads: int = _setting("threads of torch on the CPU; layers this small gain nothing from a second one", _whole(1, 1024), 1)
    root: str | None = _setting(
        "folder of MNIST or CIFAR; by default $FASTCL_DATA and torchvision's usual places",
        ("a path", lambda v: v is None or isinstance(v, str)),
    )
    buffer: int | None = _option("samples kept in memory", _whole(1))
    keep: str | None = _option("how the memory is shared out: the same number per task, per class, or a reservoir", _one_of(KEEP))
    memory_batch: int | None = _option("samples of a memory batch; gem takes one per past task, 0: all that it has", _whole(0))
    weight: float | None = _option("replay: factor of the memory's loss; ncl: of a task's Fisher information", _ABOVE_0)
    margin: float | None = _option("least coefficient of every memory in a projection", _FROM_0)
    ridge: float | None = _option("added to the diagonal of the memories' Gram matrix", _FROM_0)
    strength: float | None = _option(
        "spg: how much of the importance protects, from 0 to 1; ewc, kfac-ewc, ncl: of the pull, from 0", _FROM_0
    )
    gamma: float | None = _option("what is left of the past's Fisher information after another task; 1 fades nothing", _UNIT)
    child: float | None = _option(
        "fraction of the elements that a child network keeps", ("a number in (0, 1]", lambda v: _number(v) and 0 < v <= 1)
    )
    alpha: float | None = _option("what the mean square of the inputs is compared with: the smaller, the less may change", _ABOVE_0)
    momentum: float | None = _option(
        "of the method's own optimizer; 0, as SGD here has none: 0.9 makes steps ten times as long in the end", _BELOW_1
    )
    radius: float | None = _option(
        "the longest step, in the norm of the precision; none for no bound",
        ("a finite number above 0", lambda v: v is None or _ABOVE_0[1](v)),
    )

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            value, (accepted, ok) = getattr(self, name), field.metadata["check"]
            if field.metadata["of_method"] and name not in METHODS[self.method].options:
                if value is not None:
                    raise ValueError(f"{name} is no setting of the method {self.method}; got {value!r}")
            elif not ok(value):
                raise ValueError(f"{name} must be {accepted}; got {value!r}")
        if self.first_seed + self.seeds > 2**63:
            raise ValueError(f"first_seed must leave {self.seeds} seeds below 2**63; got {self.first_seed}")
        if self.memory_batch == 0 and self.method != "gem":
            raise ValueError(f"memory_batch must be a whole number from 1 for {self.method}; got 0")
        if self.method == "spg" and self.strength is not None and self.strength > 1:
            raise ValueError(f"strength must be a number in [0, 1] for spg; got {self.strength}")
        if self.scenario not in STREAMS[self.stream].scenarios:
            raise ValueError(f"scenario of {self.stream} must be one of {', '.join(STREAMS[self.stream].scenarios)}; got {self.scenario!r}")

    @classmethod
    def of(cls, **given: Any) -> Config:
        """The configuration with these settings; None and what is not named take their defaults.

        ``scenario`` and ``tasks`` come from the stream, ``stream`` is split-digits, ``method`` is naive, a method's own settings come from
        :data:`fastcl.experiment.METHODS`.

        Raises:
            TypeError: a name that is no setting.
            ValueError: a value that is not accepted, a setting that the method does not have.
        """
        settings = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(settings.keys() - FIELDS.keys()):
            raise TypeError(f"{unknown[0]} is no setting; the settings are {', '.join(FIELDS)}")
        settings = {"stream": "split-digits", "method": "naive"} | settings
        row, found = METHODS.get(settings["method"]), STREAMS.get(settings["stream"])
        if found is not None:  # an unknown name is refused by the checks
            settings = {"scenario": found.scenarios[0], "tasks": found.tasks} | settings
        return cls(**({} if row is None else dict(row.options)) | settings)

    @classmethod
    def from_json(cls, stated: Any) -> Config:
        """The configuration that :meth:`to_json` gave.

        Raises:
            ValueError: not such an object, a name that is no setting or a setting that lacks, a value that is not accepted.
        """
        if not isinstance(stated, dict):
            raise ValueError(f"the configuration must be a JSON object, got {type(stated).__name__}")
        if wrong := sorted(stated.keys() ^ FIELDS.keys()):
            raise ValueError(f"{wrong[0]} is {'no setting of this version' if wrong[0] in stated else 'missing'}")
        return cls(**stated)

    def to_json(self) -> dict[str, Any]:
        """Plain data, in the order of the fields."""
        return dataclasses.asdict(self)

    def differences(self, other: Config) -> list[str]:
        """What differs, ``name: mine, theirs``. Where the data lies (``root``) makes no difference."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{name}: {mine[name]!r}, {theirs[name]!r}" for name in FIELDS if name != "root" and mine[name] != theirs[name]]

    @property
    def options(self) -> dict[str, Any]:
        """The method's own settings."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}

    def all_seeds(self) -> range:
        """The seeds of the run."""
        return range(self.first_seed, self.first_seed + self.seeds)


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Config)}
