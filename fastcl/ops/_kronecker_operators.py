"""The kronecker family in torch's dispatcher, and the way past it for plain tensors that a compiled module serves."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import backends
from fastcl.ops import _dispatch, _kronecker_checks, _kronecker_steps
from fastcl.ops._kronecker_layers import Layers, accepted, nested, paired
from fastcl.ops._kronecker_steps import Stage
from fastcl.reference import kronecker as definition

Tensors = Sequence[Tensor]
SOLVED_WITHOUT = ("weight_grads", "bias_grads", "M", "H", "V")


def solve_now(layers: Layers) -> bool:
    """Do it at once; False: nothing was done."""
    if _native(layers) and len(layers.small()) == len(layers.A):
        done = _dispatch.gate("kron_small_", layers.weights, layers.biases, layers.A, layers.G) is not _dispatch.REFUSED
        if done:
            _dispatch.bump_versions(layers.biases)
        return done
    stage = _ready(layers, (layers.weights, layers.biases), SOLVED_WITHOUT)
    if stage is None:
        return False
    with _kronecker_steps.exact_products(layers.A[0].device):
        _kronecker_steps.solve_(layers, stage)
    return True


def quadratic_now(layers: Layers) -> Tensor | None:
    """The result; None: nothing was done."""
    stage = _ready(layers, (), SOLVED_WITHOUT)
    if stage is None:
        return None
    with _kronecker_steps.exact_products(layers.A[0].device):
        return _kronecker_steps.quadratic(layers, stage)


def step_now(layers: Layers, lr: float | Tensor, momentum: float, strength: float, radius: float | None) -> bool:
    """Do it at once; False: nothing was done."""
    if not _native(layers):
        return False
    if radius is None and len(layers.small()) == len(layers.A):
        grads = layers.weight_grads, layers.bias_grads
        args = (layers.biases, *grads, layers.M, layers.H, layers.A, layers.G, lr, momentum, strength)
        if not layers.V and _dispatch.gate("ncl_small_step_", layers.weights, *args) is not _dispatch.REFUSED:
            _dispatch.bump_versions([*layers.biases, *layers.M, *layers.H])
            return True
    numbers = [momentum, strength, 1.0 if radius is None else radius, *([] if isinstance(lr, Tensor) else [lr])]
    if radius == 0 or not all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in numbers):
        return False
    if isinstance(lr, Tensor) and (type(lr) is not Tensor or lr.dim() or lr.device != layers.A[0].device):
        return False
    if isinstance(lr, Tensor) and (lr.dtype not in (torch.float64, torch.float32) or lr.is_neg()):
        return False
    stage = _ready(layers, (layers.weights, layers.biases, layers.M, layers.H, layers.V), () if layers.V else ("V",))
    if stage is None:
        return False
    with _kronecker_steps.exact_products(layers.A[0].device):
        _kronecker_steps.step_(layers, lr, momentum, strength, radius, stage)
    return True


def direction_now(layers: Layers, momentum: float, strength: float) -> Tensor | None:
    """The result; None: nothing was done."""
    if not all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in (momentum, strength)):
        return None
    stage = _ready(layers, (layers.M, layers.V))
    if stage is None:
        return None
    with _kronecker_steps.exact_products(layers.A[0].device):
        return _kronecker_steps.direction_(layers, momentum, strength, stage)


def apply_now(weights: Tensors, biases: Tensors, H: Tensors, V: Tensors, M: Tensors, step: Tensor) -> bool:
    """Do it at once; False: nothing was done."""
    if _dispatch.gate("ncl_apply_", weights, biases, H, V, M, step) is _dispatch.REFUSED:
        return False
    _dispatch.bump_versions([*biases, *H])
    return True


def _native(layers: Layers) -> bool:
    """Whether a compiled module serves the layers' device."""
    return len(layers.A) > 0 and backends.serving(getattr(layers.A[0].device, "type", "cpu")) in backends.NATIVE


def _ready(layers: Layers, written: Sequence[list[Tensor]], absent: Sequence[str] = ()) -> Stage | None:
    """The stages of the compiled module, where it serves and the quick look at all tensors finds nothing to ask."""
    if _native(layers) and accepted(layers, written, torch.is_grad_enabled(), absent):
        return _stages(layers.A[0].device)
    return None


def _stages(device: torch.device) -> Stage:
    return functools.partial(backends.implementation, device=device)


def _device(tensors: Tensors) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _plain(layers: Layers) -> Layers:
    return Layers(**{name: [_dispatch.plain(t) for t in value] for name, value in vars(layers).items()})


def _by_definition(layers: Layers) -> bool:
    """Whether the backend is the reference, whose ops are whole."""
    return not layers.A or backends.serving(layers.A[0].device.type) == "reference"


def _check_solve(weights: Tensors, biases: Tensors, A: Tensors, G: Tensors) -> Layers:
    layers = Layers(weights=list(weights), biases=list(biases), A=list(A), G=list(G))
    _kronecker_checks.solved(layers, "grads", "inverse_factors", writes=True)
    return layers


def _fake_solve(*args: Tensors) -> None:
    _check_solve(*args)


def _run_solve(*args: Tensors) -> None:
    layers = _plain(_check_solve(*args))
    with _writing(layers.weights, _device(layers.weights)):
        if _by_definition(layers):
            definition.kron_solve_(nested(layers.weights, layers.biases), paired(layers.A, layers.G))
        else:
            _kronecker_steps.solve_(layers, _stages(_device(layers.A)))


def _check_quadratic(weights: Tensors, biases: Tensors, A: Tensors, G: Tensors) -> Layers:
    layers = Layers(weights=list(weights), biases=list(biases), A=list(A), G=list(G))
    _kronecker_checks.solved(layers, "deltas", "factors", writes=False)
    return layers


def _fake_quadratic(*args: Tensors) -> Tensor:
    layers = _check_quadratic(*args)
    return torch.empty((), dtype=torch.float64, device=_device(layers.weights))


def _run_quadratic(*args: Tensors) -> Tensor:
    layers = _plain(_check_quadratic(*args))
    with _kronecker_steps.exact_products(_device(layers.A)):
        if _by_definition(layers):
            return definition.kron_quadratic(nested(layers.weights, layers.biases), paired(layers.A, layers.G))
        return _kronecker_steps.quadratic(layers, _stages(_device(layers.A)))


def _check_step(
    weights: Tensors,
    biases: Tensors,
    weight_grads: Tensors,
    bias_grads: Tensors,
    M: Tensors,
    H: Tensors,
    V: Tensors,
    A: Tensors,
    G: Tensors,
    lr_tensor: Tensor | None,
    lr: float,
    momentum: float,
    strength: float,
    radius: float | None,
) -> tuple[Layers, float | Tensor]:
    rate = lr if lr_tensor is None else lr_tensor
    _kronecker_checks.learning_rate(rate, weights)
    _kronecker_checks.numbers(momentum, strength, radius)
    layers = Layers(*(list(t) for t in (weights, biases, weight_grads, bias_grads, M, H, V, A, G)))
    _kronecker_checks.stepped(layers)
    return layers, rate


def _fake_step(*args: Any) -> None:
    _check_step(*args)


def _run_step(*args: Any) -> None:
    layers, rate = _check_step(*args)
    layers, numbers = _plain(layers), args[-3:]
    with _writing(layers.weights, _device(layers.weights)):
        if _by_definition(layers):
            params, grads = nested(layers.weights, layers.biases), nested(layers.weight_grads, layers.bias_grads)
            definition.ncl_step_(params, grads, layers.M, layers.H, paired(layers.A, layers.G), rate, *numbers)
        else:
            momentum, strength, radius = numbers
            _kronecker_steps.step_(layers, rate, momentum, strength, radius, _stages(_device(layers.A)))


def _check_direction(
    M: Tensors,
    V: Tensors,
    weight_grads: Tensors,
    bias_grads: Tensors,
    H: Tensors,
    A: Tensors,
    G: Tensors,
    momentum: float,
    strength: float,
) -> Layers:
    _kronecker_checks.numbers(momentum, strength)
    grads = list(weight_grads), list(bias_grads)
    layers = Layers(*grads, *grads, list(M), list(H), list(V), list(A), list(G))
    _kronecker_checks.direction(layers)
    return layers


def _fake_direction(M: Tensors, *args: Any) -> Tensor:
    _check_direction(M, *args)
    return torch.empty((), dtype=torch.float64, device=_device(M))


def _run_direction(*args: Any) -> Tensor:
    layers, numbers = _plain(_check_direction(*args)), args[-2:]
    with _writing(layers.M, _device(layers.M)):
        if _by_definition(layers):
            grads = nested(layers.weights, layers.biases)
            return definition.ncl_direction_(grads, layers.M, layers.V, layers.H, paired(layers.A, layers.G), *numbers)
        momentum, strength = numbers
        return _kronecker_steps.direction_(layers, momentum, strength, _stages(_device(layers.A)))


def _check_apply(weights: Tensors, biases: Tensors, H: Tensors, V: Tensors, M: Tensors, step: Tensor) -> Layers:
    layers = Layers(weights=list(weights), biases=list(biases), H=list(H), V=list(V), M=list(M))
    _kronecker_checks.applied(layers)
    _kronecker_checks.step_size(layers, step)
    return layers


def _fake_apply(*args: Any) -> None:
    _check_apply(*args)


def _run_apply(*args: Any) -> None:
    layers, step = _plain(_check_apply(*args)), args[-1]
    with _writing(layers.weights, _device(layers.weights)):
        _kronecker_steps.apply_(layers, step, _stages(_device(layers.weights)))


def _writing(written: Tensors, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Torch's own ops write inference tensors in inference mode only."""
    if any(t.is_inference() for t in written):
        return torch.inference_mode()
    return _kronecker_steps.exact_products(device)


LISTS = "Tensor[] A, Tensor[] G"
_dispatch.define(
    "kron_solve_",
    "kronecker",
    f"(Tensor(a!)[] weights, Tensor(b!)[] biases, {LISTS}) -> ()",
    implementation=_run_solve,
    fake=_fake_solve,
)
_dispatch.define(
    "kron_quadratic",
    "kronecker",
    f"(Tensor[] weights, Tensor[] biases, {LISTS}) -> Tensor",
    implementation=_run_quadratic,
    fake=_fake_quadratic,
)
_dispatch.define(
    "ncl_step_",
    "kronecker",
    "(Tensor(a!)[] weights, Tensor(b!)[] biases, Tensor[] weight_grads, Tensor[] bias_grads, Tensor(c!)[] M, Tensor(d!)[] H, "
    f"Tensor(e!)[] V, {LISTS}, Tensor? lr_tensor, float lr, float momentum, float strength, float? radius) -> ()",
    implementation=_run_step,
    fake=_fake_step,
)
_dispatch.define(
    "ncl_direction_",
    "kronecker",
    f"(Tensor(a!)[] M, Tensor(b!)[] V, Tensor[] weight_grads, Tensor[] bias_grads, Tensor[] H, {LISTS}, float momentum, float strength) "
    "-> Tensor",
    implementation=_run_direction,
    fake=_fake_direction,
)
_dispatch.define(
    "ncl_apply_",
    "kronecker",
    "(Tensor(a!)[] weights, Tensor(b!)[] biases, Tensor(c!)[] H, Tensor[] V, Tensor[] M, Tensor step) -> ()",
    implementation=_run_apply,
    fake=_fake_apply,
)
