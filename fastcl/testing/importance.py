"""Importance: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import decode, encode, gradients, importances


def _emax_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return importances(shapes, stored, device, seed), importances(shapes, dtype, device, seed + 1)


def _emax_official(importance: list[Tensor], new: list[Tensor]) -> None:
    for n, i in enumerate(importance):
        importance[n].copy_(encode(torch.max(decode(i), decode(new[n]).to(decode(i).dtype)), i.dtype))


def _emax_eager(importance: list[Tensor], new: list[Tensor]) -> None:
    for i, n in zip(importance, new, strict=True):
        if i.dtype == n.dtype:
            torch.maximum(i, n, out=i)
        else:
            i.copy_(encode(torch.maximum(decode(i), decode(n)), i.dtype))


def _emax_foreach(importance: list[Tensor], new: list[Tensor]) -> None:
    if all(i.dtype == n.dtype for i, n in zip(importance, new, strict=True)):
        torch._foreach_maximum_(importance, new)
    else:
        decoded = [decode(i).float() for i in importance]
        torch._foreach_maximum_(decoded, [decode(n).float() for n in new])
        torch._foreach_copy_(importance, [encode(d, i.dtype) for d, i in zip(decoded, importance, strict=True)])


def _spg_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0, heads: int = 1) -> Args:
    accumulated = [i // 4 if stored == torch.uint8 else i / 4 for i in importances(shapes, stored, device, seed)]
    return accumulated, [gradients(shapes, dtype, device, seed + 1 + h) for h in range(heads)]


def _spg_official(accumulated: list[Tensor], grads_by_head: list[list[Tensor]]) -> Tensor:
    for n, a in enumerate(accumulated):
        by_head = []
        for head in grads_by_head:
            g = head[n]
            by_head.append(torch.abs(torch.tanh((g - g.mean()) / g.std())) if bool((g != 0).any()) else torch.zeros_like(g))
        new = torch.stack(by_head).max(dim=0).values
        accumulated[n].copy_(encode(torch.max(decode(a), new), a.dtype))
    return torch.cat([decode(a).flatten() for a in accumulated]).mean()


def _spg_eager(accumulated: list[Tensor], grads_by_head: list[list[Tensor]]) -> Tensor:
    total = accumulated[0].new_zeros((), dtype=torch.float32)
    for n, a in enumerate(accumulated):
        value = decode(a)
        for head in grads_by_head:
            std, mean = torch.std_mean(head[n])
            value = torch.maximum(value, head[n].sub(mean).div_(std).tanh_().abs_())
        a.copy_(encode(value, a.dtype))
        total += value.sum()
    return total / sum(a.numel() for a in accumulated)


# Clips nothing, and costs the same: the official code clips the gradients in place, and all providers share them.
MAX_NORM = 1e6


def _fisher_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    return importances(shapes, stored, device, seed), gradients(shapes, dtype, device, seed + 1), 0.125, MAX_NORM


def _fisher_official(fisher: list[Tensor], grads: list[Tensor], weight: float = 1.0, max_norm: float = MAX_NORM) -> None:
    for n, g in enumerate(grads):
        parameter = torch.nn.Parameter(g)  # its values are not looked at
        parameter.grad = g
        torch.nn.utils.clip_grad_norm_(parameter, max_norm)
        fisher[n] += g**2 / (1 / weight)


def _fisher_eager(fisher: list[Tensor], grads: list[Tensor], weight: float = 1.0, max_norm: float = MAX_NORM) -> None:
    for f, g in zip(fisher, grads, strict=True):
        x = g * (max_norm / (torch.linalg.vector_norm(g) + 1e-6)).clamp(max=1)
        f.add_(x * x, alpha=weight)


def _fisher_foreach(fisher: list[Tensor], grads: list[Tensor], weight: float = 1.0, max_norm: float = MAX_NORM) -> None:
    norms = torch.stack(torch._foreach_norm(grads))
    clipped = torch._foreach_mul(grads, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())
    torch._foreach_mul_(clipped, clipped)
    torch._foreach_add_(fisher, clipped, alpha=weight)


CASES = (
    OpCase(
        name="emax_",
        call=ops.emax_,
        reference=reference.emax_,
        make=_emax_args,
        providers={"official": _emax_official, "eager": _emax_eager, "foreach": _emax_foreach},
        bytes_per_element=lambda new, stored: new + 2 * stored,
        bitwise=True,
        broadcasts=True,
    ),
    OpCase(
        name="spg_importance_",
        call=ops.spg_importance_,
        reference=reference.spg_importance_,
        make=_spg_args,
        providers={"official": _spg_official, "eager": _spg_eager},
        bytes_per_element=lambda gradient, stored: 2 * gradient + 2 * stored,  # with one head
        bitwise=False,
        read_first=lambda gradient, stored: gradient,  # noqa: ARG005
    ),
    OpCase(
        name="fisher_add_",
        call=ops.fisher_add_,
        reference=reference.fisher_add_,
        make=_fisher_args,
        providers={"official": _fisher_official, "eager": _fisher_eager, "foreach": _fisher_foreach},
        bytes_per_element=lambda gradient, stored: 2 * gradient + 2 * stored,
        bitwise=True,
        read_first=lambda gradient, stored: gradient,  # noqa: ARG005
        uint8=False,
    ),
)
