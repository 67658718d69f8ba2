"""A-GEM and GEM: inputs, and the rivals as code outside fastcl writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import ops, reference
from fastcl.reference._quadratic import nonnegative_qp
from fastcl.reference.projection import gem_coefficients
from fastcl.testing._case import Args, OpCase, Shape
from fastcl.testing._inputs import gradients

MEMORIES = 10  # of GEM's case


def _memory(grads: Sequence[Tensor], sign: float, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Gradients that have ``sign`` as the sign of their dot product with ``grads``."""
    noise = gradients([tuple(g.shape) for g in grads], torch.float32, grads[0].device.type if grads else "cpu", seed)
    return [(sign * g.float() + 0.5 * n).to(dtype) for g, n in zip(grads, noise, strict=True)]


def _violated_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    grads = gradients(shapes, dtype, device, seed)
    return grads, _memory(grads, -1.0, stored, seed + 1)


def _kept_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    grads = gradients(shapes, dtype, device, seed)
    return grads, _memory(grads, 1.0, stored, seed + 1)


def _gem_args(shapes: Sequence[Shape], dtype: torch.dtype, stored: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
    grads = gradients(shapes, dtype, device, seed)
    return grads, [_memory(grads, (-1.0) ** k, stored, seed + 1 + k) for k in range(MEMORIES)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _copy_back(grads: Sequence[Tensor], flat: Tensor) -> None:
    at = 0
    for g in grads:
        g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


def _agem_official(grads: list[Tensor], memory: list[Tensor]) -> None:
    gradient, kept = _flat(grads), _flat(memory)
    dot = torch.dot(gradient, kept)
    if dot < 0:
        _copy_back(grads, gradient - (dot / torch.dot(kept, kept)) * kept)


def _agem_eager(grads: list[Tensor], memory: list[Tensor]) -> None:
    dot = torch.stack([(g * r).sum() for g, r in zip(grads, memory, strict=True)]).sum()
    square = torch.stack([(r * r).sum() for r in memory]).sum()
    coefficient = torch.where(dot < 0, dot / square, 0)
    for g, r in zip(grads, memory, strict=True):
        g.sub_(coefficient * r)


def _agem_foreach(grads: list[Tensor], memory: list[Tensor]) -> None:
    dot = torch.stack([p.sum() for p in torch._foreach_mul(grads, memory)]).sum()
    square = torch.stack(torch._foreach_norm(memory)).square().sum()
    torch._foreach_sub_(grads, torch._foreach_mul(memory, torch.where(dot < 0, dot / square, 0)))


def _gem_official(grads: list[Tensor], memories: list[list[Tensor]], margin: float = 0.5, ridge: float = 1e-3) -> None:
    """One matrix [P, K] of all memory gradients; Gram matrix and programme on the host in double."""
    matrix = torch.stack([_flat(m) for m in memories], dim=1)
    gradient = _flat(grads)
    if not bool((gradient[None] @ matrix < 0).any()):
        return
    rows, own = matrix.cpu().t().double().contiguous(), gradient.cpu().double()
    quadratic = rows @ rows.T
    quadratic = 0.5 * (quadratic + quadratic.T) + ridge * torch.eye(len(memories), dtype=torch.float64)
    v = margin + nonnegative_qp(quadratic, rows @ own + margin * quadratic.sum(dim=1))
    _copy_back(grads, (v @ rows + own).to(gradient))


def _gem_eager(grads: list[Tensor], memories: list[list[Tensor]], margin: float = 0.5, ridge: float = 1e-3) -> None:
    """Tensor by tensor, in float, with one wait for the device."""
    products = torch.zeros(len(memories) + 1, len(memories) + 1, dtype=torch.float64, device=grads[0].device)
    for g, *rest in zip(grads, *memories, strict=True):
        rows = _rows([*rest, g])
        products += rows @ rows.T
    values = gem_coefficients(products, margin, ridge)
    if not bool(values[0]):
        return
    v = values[1 : 1 + len(memories)].float()
    for g, *rest in zip(grads, *memories, strict=True):
        g.copy_((g.reshape(-1).float() + v @ _rows(rest)).view_as(g))


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.reshape(-1).float() for t in tensors])


CASES = (
    OpCase(
        name="project_",
        call=ops.project_,
        reference=reference.project_,
        make=_violated_args,
        providers={"official": _agem_official, "eager": _agem_eager, "foreach": _agem_foreach},
        bytes_per_element=lambda gradient, memory: 3 * gradient + 2 * memory,
        bitwise=False,
        read_first=lambda gradient, memory: gradient + memory,
        uint8=False,
    ),
    OpCase(
        name="project_, not violated",
        call=ops.project_,
        reference=reference.project_,
        make=_kept_args,
        providers={"official": _agem_official, "eager": _agem_eager, "foreach": _agem_foreach},
        bytes_per_element=lambda gradient, memory: gradient + memory,
        bitwise=False,
        read_first=lambda gradient, memory: gradient + memory,
        uint8=False,
    ),
    OpCase(
        name="gem_project_",
        call=ops.gem_project_,
        reference=reference.gem_project_,
        make=lambda *args, **kwargs: (*_gem_args(*args, **kwargs), 0.5, 1e-3),
        providers={"official": _gem_official, "eager": _gem_eager},
        bytes_per_element=lambda gradient, memory: 3 * gradient + 2 * MEMORIES * memory,
        bitwise=False,
        read_first=lambda gradient, memory: gradient + (2 * MEMORIES - 1) * memory,
        uint8=False,
        traces=False,
    ),
)
