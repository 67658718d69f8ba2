"""How a call reaches its implementation.

Plain tensors outside of any tracing go straight to the compiled module, whose own gate looks at every tensor before the first write and
refuses whatever it does not know. Everything else (subclasses, FakeTensors, torch.compile, dispatch modes, other backends, bad input)
goes through the operator in torch's dispatcher, whose implementation checks the arguments in Python and names what is wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from fastcl import _native, backends


def traced() -> bool:
    """Whether someone needs to see the call as an operator: torch.compile, a dispatch mode or the profiler.

    Raises RuntimeError where the result would silently be wrong: under torch.jit.trace, which drops operators that write into lists from
    its graph, and under torch.func transforms and forward-mode AD, which would not see that the values have changed.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace loses operators that write into lists of tensors; use torch.compile or torch.export")
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        raise RuntimeError("fastcl's ops are not differentiable: call them outside of torch.func transforms and forward-mode AD")
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled()


class Refused:
    """What :func:`gate` and :func:`gate_reading` return when nothing was done."""


REFUSED = Refused()


def gate(op: str, written: Sequence[Any], *args: Any) -> Any:
    """The result of the compiled implementation of the first tensor's device, or REFUSED, and then nothing was written."""
    if not isinstance(written, (list, tuple)):
        return REFUSED
    written = tuple(written)  # another thread may change the list while the compiled function runs
    result = gate_reading(op, written, written, *args)
    if result is not REFUSED:
        bump_versions(written)
    return result


def gate_reading(op: str, tensors: Sequence[Any], *args: Any) -> Any:
    """As :func:`gate`, for an op that writes nothing; the first of ``tensors`` says on which device."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        return REFUSED
    name = backends.NATIVE.get(backends.serving(getattr(getattr(tensors[0], "device", None), "type", "cpu")))
    if name is None:
        return REFUSED
    function = getattr(_native.module(name), op, None)
    if function is None:  # of an op that has stages alone there
        return REFUSED
    result = function(*args, torch.is_grad_enabled())
    return REFUSED if isinstance(result, str) else result


def bump_versions(written: Sequence[Tensor]) -> None:
    """Tell autograd about writes that it did not see, so that a later backward through an old value raises instead of being wrong."""
    try:
        torch.autograd.graph.increment_version(written)
    except RuntimeError:  # inference tensors keep no version
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def plain(t: Tensor) -> Tensor:
    """The same memory as an exact torch.Tensor: a subclass that arrives here has no dispatch of its own left."""
    return t if type(t) in (Tensor, torch.nn.Parameter) else t.as_subclass(Tensor)


def by_device(*lists: Sequence[Tensor]) -> list[tuple[torch.device, list[list[Tensor]]]]:
    """Split lists of equal length by the device of the first list's tensors, keeping their order."""
    groups: dict[torch.device, list[list[Tensor]]] = {}
    for row in zip(*lists, strict=True):
        columns = groups.setdefault(row[0].device, [[] for _ in lists])
        for column, t in zip(columns, row, strict=True):
            column.append(plain(t))
    return list(groups.items())


def run(op: str, device: torch.device, written: Sequence[Tensor], *args: Any) -> Any:
    """Run checked arguments of one device on the implementation that serves it."""
    # torch's own ops write inference tensors in inference mode only.
    with torch.inference_mode() if any(t.is_inference() for t in written) else torch.no_grad():
        result = backends.implementation(op, device)(written, *args)
    bump_versions(written)
    return result


def run_reading(op: str, device: torch.device, *args: Any) -> Any:
    """As :func:`run`, for an op that writes nothing."""
    with torch.no_grad():
        return backends.implementation(op, device)(*args)


def _opaque(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo out of an implementation that runs between two compiled graphs, without loading Dynamo where nobody compiles."""
    disabled = _disable_dynamo(implementation)

    @functools.wraps(implementation)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else implementation)(*args, **kwargs)

    return call


def define(op: str, family: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``fastcl::op``: one implementation for every device, and a fake for tracing. A stage is no op of its own to users."""
    if op not in backends.STAGES:
        backends.FAMILIES[op] = family
    torch.library.define(f"fastcl::{op}", schema)
    torch.library.impl(f"fastcl::{op}", "CompositeExplicitAutograd")(_opaque(implementation))
    torch.library.register_fake(f"fastcl::{op}")(fake)
