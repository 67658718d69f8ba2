"""AdamW and SGD with gradient transforms: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import ops
from fastcl.bit_mask import BitMask
from fastcl.reference import optimizers as definition
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import decode, gradients, importances

LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
KEEP = 0.3
STEPS = 3  # that were made before


def _adamw_args(shapes: Sequence[Shape], dtype: torch.dtype, other: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:  # noqa: ARG001
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params, grads = gradients(shapes, dtype, device, seed), gradients(shapes, dtype, device, seed + 1)
    moments = gradients(shapes, wide, device, seed + 2)
    squares = [t.square() for t in gradients(shapes, wide, device, seed + 3)]
    return params, grads, moments, squares, [torch.full((), float(STEPS), device=device) for _ in shapes]


def _soft_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return (*_adamw_args(shapes, dtype, stored, device, seed), [("soft_mask", importances(shapes, stored, device, seed + 4), 0.75)])


def _child_args(shapes: Sequence[Shape], dtype: torch.dtype, other: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return (*_adamw_args(shapes, dtype, other, device, seed), [("child_mask", KEEP, seed)])


def masks(shapes: Sequence[Shape], device: str, seed: int) -> list[BitMask]:
    """A random child of each tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    return [BitMask.from_bool(torch.rand(s, generator=generator, device=device) < KEEP) for s in shapes]


def _fixed_args(shapes: Sequence[Shape], dtype: torch.dtype, other: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return (*_adamw_args(shapes, dtype, other, device, seed), [("fixed_mask", [m.bits for m in masks(shapes, device, seed)])])


def _compact_args(shapes: Sequence[Shape], dtype: torch.dtype, other: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    params, grads, moments, squares, steps = _adamw_args(shapes, dtype, other, device, seed)
    children = masks(shapes, device, seed)
    own = [[t[m.to_bool()] for t, m in zip(column, children, strict=True)] for column in (moments, squares)]
    bits = [m.bits for m in children]
    return params, grads, *own, steps, [("fixed_mask", bits)], (bits, [m.ranks for m in children])


def _call(*args: Any) -> None:
    params, grads, moments, squares, steps, *rest = args
    transforms, compact = (*rest, None)[:2] if rest else ((), None)
    ops.adamw_(params, grads, moments, squares, steps, lr=LR, transforms=transforms, compact=compact)


def _reference(*args: Any) -> None:
    params, grads, moments, squares, steps, *rest = args
    transforms, compact = (*rest, None)[:2] if rest else ((), None)
    numbers = (LR, BETA1, BETA2, EPS, DECAY, False, False)
    definition.adamw_(params, grads, moments, squares, steps, transforms, None, compact, None, None, *numbers)


def _masked(transforms: Any, g: Tensor, n: int) -> Tensor:
    """The gradient as each method's public code masks it."""
    for kind, first, *_rest in transforms:
        if kind == "soft_mask":
            g = g * (1 - _rest[0] * decode(first[n]).to(g.dtype))
        elif kind == "child_mask":
            g = g * (torch.distributions.Bernoulli(g.new_full(g.size(), first)).sample() / first)  # type: ignore[no-untyped-call]
        else:
            g = g * _bools(first[n], g.shape)
    return g


def _bools(bits: Tensor, shape: Sequence[int]) -> Tensor:
    return BitMask(bits, shape).to_bool()


def _official(
    params: list[Tensor], grads: list[Tensor], moments: list[Tensor], squares: list[Tensor], steps: list[Tensor], transforms: Any = ()
) -> None:
    """The step of transformers' former optimizer with Child-Tuning's lines in it."""
    for n, p in enumerate(params):
        g = _masked(transforms, grads[n], n).to(moments[n].dtype)
        steps[n] += 1
        moments[n].mul_(BETA1).add_(g, alpha=1 - BETA1)
        squares[n].mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        step = steps[n].item()
        size = LR * math.sqrt(1 - BETA2**step) / (1 - BETA1**step)
        p.copy_(p.addcdiv(moments[n], squares[n].sqrt().add_(EPS), value=-size))
        p.add_(p, alpha=-LR * DECAY)


def _eager(
    params: list[Tensor], grads: list[Tensor], moments: list[Tensor], squares: list[Tensor], steps: list[Tensor], transforms: Any = ()
) -> None:
    for n, (p, m, v, t) in enumerate(zip(params, moments, squares, steps, strict=True)):
        g = _masked(transforms, grads[n], n).to(m.dtype)
        t += 1
        p.mul_(1 - LR * DECAY)
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        root = (v.sqrt() / (1 - torch.pow(BETA2, t)).sqrt()).add_(EPS)
        p.copy_(p - LR / (1 - torch.pow(BETA1, t)) * m / root)


def _foreach(
    params: list[Tensor], grads: list[Tensor], moments: list[Tensor], squares: list[Tensor], steps: list[Tensor], transforms: Any = ()
) -> None:
    """The mask as _foreach calls on the gradients, then torch's fused AdamW (where it has one: all of one dtype; else eager)."""
    for kind, first, *rest in transforms:
        if kind == "soft_mask":
            values = [decode(i).to(g.dtype) for i, g in zip(first, grads, strict=True)]
            torch._foreach_addcmul_(grads, grads, values, value=-rest[0])
        elif kind == "child_mask":
            torch._foreach_mul_(grads, [torch.empty_like(g).bernoulli_(first) for g in grads])
            torch._foreach_mul_(grads, 1 / first)
        else:
            torch._foreach_mul_(grads, [_bools(b, g.shape).to(g.dtype) for b, g in zip(first, grads, strict=True)])
    if any(p.dtype != m.dtype for p, m in zip(params, moments, strict=True)):
        _eager(params, grads, moments, squares, steps)
        return
    torch._foreach_add_(steps, 1)
    numbers: dict[str, Any] = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY, "eps": EPS}
    torch._fused_adamw_(params, grads, moments, squares, [], steps, amsgrad=False, maximize=False, **numbers)


def _case(name: str, make: Callable[..., Args], extra: Callable[[int], int] = lambda other: 0, *, uint8: bool = False) -> OpCase:  # noqa: ARG005
    return OpCase(
        name=name,
        call=_call,
        reference=_reference,
        make=make,
        providers={"official": _official, "eager": _eager, "foreach": _foreach},
        # The gradient, the parameter and two moments of four bytes that are read and written.
        bytes_per_element=lambda gradient, other: 3 * gradient + 16 + extra(other),
        bitwise=True,
        uint8=uint8,
        pairs=uint8,
        traces=False,
    )


CASES = (
    _case("adamw_", _adamw_args),
    _case("adamw_, soft mask", _soft_args, lambda stored: stored, uint8=True),
    _case("adamw_, child mask", _child_args),
    _case("adamw_, fixed mask", _fixed_args),
)
