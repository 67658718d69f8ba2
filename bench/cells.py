"""What is measured: the cells (op, size, dtypes) and each one's providers."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import yardstick
from fastcl import backends
from fastcl.testing import CASES, SIZES, Args, clone, elements, low_rank, optimizers

DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32+uint8": (torch.float32, torch.uint8),  # fp32 gradients, importance stored as uint8
}
ORDER = ("official", "eager", "foreach", "compile", "fastcl", "yardstick")
LARGEST = "gpt2-small"
LONG = {("spg_importance_", "fp32+uint8"), ("project_, not violated", "bf16"), ("quantile", "bf16")}  # a minute for one line
TOO_LARGE = {("gem_project_", "gpt2-small")}  # ten memories of it, and copies of them as doubles: 20 GB
UNTRACED = {
    "gem_project_": "it waits for the device in the middle, to solve the quadratic programme",
    "quantile": "it is calls of kthvalue, which nothing fuses with",
    "bit_mask_": "its masks are unpacked in the first call and kept",
}
COMPILED = {("soft_mask_", "fp32"), ("project_", "fp32")}  # worth minutes: torch.compile is the peer to beat
# bench_optim and bench_ncl time their whole steps.
STEPPED = {case.name for module in (low_rank, optimizers) for case in module.CASES}
MANY = 1000  # tensors: torch.compile unrolls a list, so its compile time grows with every one
FEW = 200  # tensors
COMPILE_LIMIT_S = 60  # but for COMPILED
LONG_COMPILE_LIMIT_S = 240
SMALL = 1 << 21  # elements: below this a call takes microseconds and one turn takes several samples


@dataclass(frozen=True)
class Cell:
    """One line of the results."""

    op: str
    size: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.size} {self.dtype}"

    @property
    def amount(self) -> yardstick.Traffic:
        """Bytes that one call must move."""
        return yardstick.traffic(CASES[self.op], elements(SIZES[self.size]), *DTYPES[self.dtype])

    @property
    def burst(self) -> int:
        """Samples of one turn."""
        return 5 if elements(SIZES[self.size]) < SMALL else 1


def cells(ops: Sequence[str] = (), sizes: Sequence[str] = (), dtypes: Sequence[str] = (), everything: bool = False) -> list[Cell]:
    """The cells of the named ops, sizes and dtypes. An empty list means all of them: of the dtypes with ``everything`` only, since the
    default run measures the narrow ones on the largest model alone, to stay within about six minutes on two cores.
    """
    named_ops = ops or [name for name in CASES if name not in STEPPED]
    named = [Cell(o, s, d) for o in named_ops for s in (sizes or SIZES) for d in (dtypes or DTYPES)]
    fitting = [c for c in named if (CASES[c.op].uint8 or DTYPES[c.dtype][1] != torch.uint8) and (c.op, c.size) not in TOO_LARGE]
    return [c for c in fitting if everything or dtypes or c.dtype == "fp32" or (c.size == LARGEST and (c.op, c.dtype) not in LONG)]


class CompileTimeout(BaseException):
    """Not an Exception: the compiler wraps those into errors of its own."""


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise :class:`CompileTimeout` in the main thread after ``seconds``."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise CompileTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _foreach_addcmul(grads: list[Tensor], importance: list[Tensor], strength: float) -> None:
    torch._foreach_addcmul_(grads, grads, importance, value=-strength)


@dataclass
class Workload:
    """A cell's inputs and its providers as calls without arguments. All providers share the inputs; ``reset`` restores them."""

    cell: Cell
    device: str
    everything: bool = False  # compile every list that compiles at all
    args: Args = field(init=False)
    calls: dict[str, Callable[[], object]] = field(init=False, default_factory=dict)
    not_run: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Make the inputs."""
        dtype, stored = DTYPES[self.cell.dtype]
        self.args = CASES[self.cell.op].make(SIZES[self.cell.size], dtype, stored, self.device, 0)
        self._pristine = clone(self.args[0])

    def reset(self) -> None:
        """Put the written list back to what it was."""
        torch._foreach_copy_(self.args[0], self._pristine)

    def add(self, name: str) -> None:
        """Make a provider ready, or note why it is not run."""
        reason = self._why_not(name)
        if reason is None:
            try:
                self.calls[name] = self._call(name)
            except CompileTimeout:
                reason = f"compiling took longer than {self._compile_limit} s"
        if reason is not None:
            self.not_run[name] = reason

    @property
    def _compile_limit(self) -> int:
        return LONG_COMPILE_LIMIT_S if (self.cell.op, self.cell.dtype) in COMPILED else COMPILE_LIMIT_S

    def _why_not(self, name: str) -> str | None:
        case, tensors = CASES[self.cell.op], len(SIZES[self.cell.size])
        if name == "foreach" and name not in case.providers:
            return "torch has no _foreach function for it"
        if name == "compile" and not case.traces:
            return UNTRACED[self.cell.op]
        if name == "compile" and tensors >= MANY:
            return f"torch.compile unrolls the list: {tensors:,} tensors take too long to compile"
        if name == "compile" and tensors > FEW and not self.everything and (self.cell.op, self.cell.dtype) not in COMPILED:
            return f"{tensors} tensors compile for up to a minute; --all does it"
        return None

    def _call(self, name: str) -> Callable[[], object]:
        case, (dtype, stored) = CASES[self.cell.op], DTYPES[self.cell.dtype]
        if name == "yardstick":
            return yardstick.build(self.cell.amount, self.device)
        if name == "foreach" and self.cell.op == "soft_mask_" and dtype == stored:
            # The bare call: with equal dtypes nobody would pay for the conversions of the table's row.
            return functools.partial(_foreach_addcmul, *self.args)
        if name == "fp32 importance":
            grads, importance, *rest = self.args
            return functools.partial(case.call, grads, [i.float() / 255 for i in importance], *rest)
        if name == "triton":
            return self._with_backend(name)
        call = functools.partial(case.provider(name), *self.args)
        if name == "compile":
            torch._dynamo.reset()  # each cell is another specialisation of the same function, and dynamo keeps only a few
            with deadline(self._compile_limit):
                call()
        return call

    def _with_backend(self, backend: str) -> Callable[[], object]:
        call = functools.partial(CASES[self.cell.op].call, *self.args)

        def run() -> None:
            with backends.use_backend(backend):
                call()

        return run


def providers(cell: Cell, device: str) -> tuple[str, ...]:
    """The providers of a cell, in the tables' order."""
    names = ORDER
    if cell.op == "soft_mask_" and cell.dtype == "fp32+uint8":
        names = (*names, "fp32 importance")
    if device == "cuda" and backends.serving("cuda") == "cuda" and backends.why_not("triton", "cuda") is None:
        names = (*names, "triton")
    return names


def rows(*ops: str) -> list[Any]:
    """Parameters for pytest: every cell of some ops with every provider of it on the CPU."""
    return [pytest.param(c, p, id=f"{c}-{p}".replace(" ", "-")) for c in cells(ops) for p in providers(c, "cpu")]
