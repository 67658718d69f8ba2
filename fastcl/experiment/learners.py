"""The table of methods: a method that is to run from the command line gets a row here, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastcl.data import Batches, Buffer, ClassBalancedBuffer, ReservoirBuffer, TaskBalancedBuffer
from fastcl.experiment.model import Net
from fastcl.methods import AGEM, EWC, GEM, KFAC_EWC, NCL, OWM, SPG, ChildTuning, Joint, Naive, Replay
from fastcl.precision import KroneckerPrecision

if TYPE_CHECKING:
    from fastcl.experiment.config import Config


class Learner(Protocol):
    """What the runner asks of a method."""

    def after_backward(self) -> Any:
        """Change the gradients, between backward and the optimizer's step."""

    def state_dict(self) -> dict[str, Any]:
        """The state, copied."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""


def _plain_end(learner: Any, loader: Batches) -> None:
    learner.end_task(loader)


def _end_with_loss(learner: Any, loader: Batches) -> None:
    learner.end_task(loader, cross_entropy)


def _plain_start(learner: Any, loader: Batches) -> None:
    """Most methods begin a task without a word."""


def _start_with_loss(learner: Any, loader: Batches) -> None:
    learner.start_task(loader, cross_entropy)


def _sgd(learner: Any, net: Net, config: Config) -> torch.optim.Optimizer:  # noqa: ARG001 (for the methods that change gradients alone)
    return torch.optim.SGD(net.parameters(), lr=config.lr)


class Row(NamedTuple):
    """A method: one line of help, its settings with their defaults, how it is built, how tasks end and start.

    It is built from a model, the configuration and a generator and, if it counts ``per_datum``, from the number of training samples of the
    first task. ``at_once``: it trains on all tasks together, so that only the last row of the accuracy matrix exists. ``optimizer``: by
    default plain SGD, whatever the method.
    """

    description: str
    options: Mapping[str, Any]
    build: Callable[..., Learner]
    end_task: Callable[[Any, Batches], None] = _plain_end
    start_task: Callable[[Any, Batches], None] = _plain_start
    at_once: bool = False
    per_datum: bool = False
    optimizer: Callable[[Any, Net, Config], torch.optim.Optimizer] = _sgd


KEEP: dict[str, type[Buffer]] = {"task": TaskBalancedBuffer, "class": ClassBalancedBuffer, "reservoir": ReservoirBuffer}


def _with_head(model: Any, x: Any, task: int) -> Tensor:
    logits: Tensor = model(x, task)
    return logits


def _memory(net: Net, config: Config, generator: torch.Generator) -> dict[str, Any]:
    """The arguments that every method with a memory takes."""
    kind, capacity = KEEP[config.options["keep"]], config.options["buffer"]
    if kind is ClassBalancedBuffer:  # with targets local to their task a class is a pair of both
        buffer: Buffer = ClassBalancedBuffer(capacity, generator=generator, per_task=config.scenario == "task")
    else:
        buffer = kind(capacity, generator=generator)
    return {"model": net, "buffer": buffer, "loss_fn": cross_entropy, "forward": _with_head if len(net.heads) > 1 else None}


def _agem(net: Net, config: Config, generator: torch.Generator) -> Learner:
    return AGEM(**_memory(net, config, generator), batch_size=config.options["memory_batch"])


def _gem(net: Net, config: Config, generator: torch.Generator) -> Learner:
    o = config.options
    return GEM(**_memory(net, config, generator), margin=o["margin"], ridge=o["ridge"], batch_size=o["memory_batch"] or None)


def _replay(net: Net, config: Config, generator: torch.Generator) -> Learner:
    o = config.options
    return Replay(**_memory(net, config, generator), batch_size=o["memory_batch"], weight=o["weight"])


def _spg(net: Net, config: Config, generator: torch.Generator) -> Learner:  # noqa: ARG001 (SPG draws nothing)
    return SPG(net, net.heads, strength=config.options["strength"], shared=len(net.heads) == 1)


def _ewc(net: Net, config: Config, generator: torch.Generator) -> Learner:
    o = config.options
    forward = _with_head if len(net.heads) > 1 else None
    return EWC(net, strength=o["strength"], gamma=o.get("gamma"), forward=forward, seed=_drawn(generator))


def _child_tuning(variant: str, net: Net, config: Config, generator: torch.Generator) -> Learner:
    forward, competing = _with_head if len(net.heads) > 1 else None, "body" if variant == "D" else None
    seed, keep = _drawn(generator), config.options["child"]
    return ChildTuning(net, variant, keep=keep, seed=seed, competing=competing, mask_first_task=False, forward=forward)


def _precise(kind: Callable[..., Learner], net: Net, config: Config, generator: torch.Generator, samples: int) -> Learner:
    """The methods with a Kronecker-factored precision; the tasks of a stream have about as many samples each."""
    forward = _with_head if len(net.heads) > 1 else None
    own = {"strength": config.strength} if kind is KFAC_EWC else {"weight": config.weight}
    return kind(net, KroneckerPrecision(net, samples), forward=forward, seed=_drawn(generator), **own)


def _owm(net: Net, config: Config, generator: torch.Generator) -> Learner:  # noqa: ARG001 (OWM draws nothing)
    return OWM(net, alpha=config.options["alpha"], forward=_with_head if len(net.heads) > 1 else None)


def _natural(learner: NCL, net: Net, config: Config) -> torch.optim.Optimizer:  # noqa: ARG001 (the learner knows the model)
    o = config.options
    return learner.optimizer(config.lr, o["momentum"], o["strength"], o["radius"])


def _orthogonal(learner: OWM, net: Net, config: Config) -> torch.optim.Optimizer:  # noqa: ARG001
    return learner.optimizer(config.lr, config.options["momentum"])


def _drawn(generator: torch.Generator) -> int:
    """A seed for a method that draws by numbers of its own."""
    return int(torch.randint(2**62, (), generator=generator))


_MEMORY = {"buffer": 100, "keep": "task", "memory_batch": 64}

METHODS: dict[str, Row] = {
    "naive": Row("fine-tuning, nothing against forgetting", {}, lambda net, _, __: Naive(net)),
    "agem": Row("A-GEM, projection on one memory gradient", _MEMORY, _agem),
    "gem": Row("GEM, projection on one memory gradient per past task", _MEMORY | {"memory_batch": 0, "margin": 0.5, "ridge": 1e-3}, _gem),
    "replay": Row("experience replay", _MEMORY | {"weight": 1.0}, _replay),
    "spg": Row("soft-masking of gradients, defined for task-incremental learning", {"strength": 1.0}, _spg, _end_with_loss),
    "ewc": Row("EWC, a quadratic pull weighted by the Fisher information", {"strength": 20.0}, _ewc),
    "ewc-online": Row("EWC whose past fades by gamma at every task's end (1.0: not at all)", {"strength": 20.0, "gamma": 0.9}, _ewc),
    "child-tuning-f": Row(
        "from the second task on, a child network drawn anew in every step", {"child": 0.3}, functools.partial(_child_tuning, "F")
    ),
    "child-tuning-d": Row(
        "from the second task on, the child network with the largest Fisher information for the new task; heads are always trained",
        {"child": 0.3},
        functools.partial(_child_tuning, "D"),
        start_task=_start_with_loss,
    ),
    "kfac-ewc": Row(
        "online structured Laplace, EWC's pull with a Kronecker-factored precision",
        {"strength": 1.0},
        functools.partial(_precise, KFAC_EWC),
        per_datum=True,
    ),
    "owm": Row(
        "orthogonal weights modification, steps orthogonal to the inputs of earlier tasks",
        {"alpha": 0.1, "momentum": 0.0},
        _owm,
        optimizer=_orthogonal,
    ),
    "ncl": Row(
        "natural continual learning, steps in the metric of what earlier tasks have fixed",
        {"strength": 1.0, "weight": 1.0, "momentum": 0.0, "radius": None},
        functools.partial(_precise, NCL),
        per_datum=True,
        optimizer=_natural,
    ),
    "joint": Row("all tasks at once, the upper bound", {}, lambda net, _, __: Joint(net), at_once=True),
}
