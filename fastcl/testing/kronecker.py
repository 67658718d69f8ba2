"""Layers with Kronecker-factored precision: inputs, and the rivals as code outside fastcl writes them.

No rows of the general table: an op of this family takes layers, whose shapes say how large its factors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastcl import ops

LR, MOMENTUM, STRENGTH = 1e-3, 0.9, 1.0
# Outputs and inputs of layers with a bias.
SIZES: dict[str, list[tuple[int, int]]] = {
    "MLP 784-400-400-10": [(400, 784), (400, 400), (10, 400)],
    "64 of 32x33, 16 of 64x65": [(32, 32)] * 64 + [(64, 64)] * 16,
}


@dataclass
class Bucket:
    """Layers of one shape as batches, whose slices the step's lists are."""

    members: list[int]
    M: Tensor
    H: Tensor
    A: Tensor
    G: Tensor


@dataclass
class Step:
    """What one step of NCL reads and writes, and what its rivals keep besides."""

    params: list[tuple[Tensor, Tensor]]
    grads: list[tuple[Tensor, Tensor]]
    anchors: list[tuple[Tensor, Tensor]]
    factors: list[tuple[Tensor, Tensor]]
    inverse_factors: list[tuple[Tensor, Tensor]]
    M: list[Tensor]
    H: list[Tensor]
    buckets: list[Bucket] = field(default_factory=list)


def spd(size: int, dtype: torch.dtype, generator: torch.Generator, condition: float = 100.0) -> Tensor:
    """A random symmetric matrix with eigenvalues from 1 down to ``1 / condition``, float64 inside."""
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64, device=generator.device))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)), size, dtype=torch.float64, device=generator.device)
    product: Tensor = (q * values) @ q.mT
    return ((product + product.mT) / 2).to(dtype)


def padded(m: int, n: int, like: Tensor, pad: int = 16) -> Tensor:
    """Zeros [m, n] whose rows start at multiples of ``pad`` elements."""
    return like.new_zeros(m, -(-n // pad) * pad)[:, :n]


def make(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    *,
    narrow: torch.dtype | None = None,
    pad: bool = False,
) -> Step:
    """Layers at random parameters around random anchors, M random and ``H = Lambda (X - anchor)``.

    ``narrow`` is the dtype of parameters and gradients, ``dtype`` that of everything else. With ``pad`` the rows of M, H and the inverses
    are padded as fastcl.optim.NCL pads them; without it equal shapes lie in one batch, as torch.bmm wants them.
    """
    gen = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64, device=device)

    out = Step([], [], [], [], [], [], [])
    for m, n in shapes:
        pairs = [(draw(m, n) / n**0.5, draw(m) / n**0.5) for _ in range(3)]
        out.params.append(_to(pairs[0], narrow or dtype))
        out.grads.append(_to(pairs[1], narrow or dtype))
        out.anchors.append(_to(pairs[2], dtype))
        A, G = spd(n + 1, torch.float64, gen), spd(m, torch.float64, gen)
        out.factors.append(_to((A, G), dtype))
        inverses = _to((torch.linalg.inv(A), torch.linalg.inv(G)), dtype)
        x = joined(out.params[-1]).to(dtype) - joined(out.anchors[-1])
        matrices = [draw(m, n + 1).to(dtype), out.factors[-1][1] @ x @ out.factors[-1][0]]
        rows = [_rows(t, pad) for t in (*inverses, *matrices)]
        out.inverse_factors.append((rows[0], rows[1]))
        out.M.append(rows[2])
        out.H.append(rows[3])
    if not pad:
        _batch(out, shapes)
    return out


def _to(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return pair[0].to(dtype), pair[1].to(dtype)


def _rows(t: Tensor, pad: bool) -> Tensor:
    if not pad:
        return t.contiguous()
    out = padded(t.shape[0], t.shape[1], t)
    out.copy_(t)
    return out


def _batch(step: Step, shapes: Sequence[tuple[int, int]]) -> None:
    for shape in dict.fromkeys(shapes):
        members = [i for i, s in enumerate(shapes) if s == shape]
        inverses = [step.inverse_factors[i] for i in members]
        M, H = (torch.stack([t[i] for i in members]) for t in (step.M, step.H))
        bucket = Bucket(members, M, H, torch.stack([a for a, _ in inverses]), torch.stack([g for _, g in inverses]))
        for k, i in enumerate(members):
            step.M[i], step.H[i], step.inverse_factors[i] = bucket.M[k], bucket.H[k], (bucket.A[k], bucket.G[k])
        step.buckets.append(bucket)


def joined(pair: tuple[Tensor, Tensor]) -> Tensor:
    """``[W | b]``."""
    return torch.cat([pair[0].flatten(1), pair[1][:, None]], dim=1)


@torch.no_grad()
def fastcl(step: Step) -> None:
    """The op."""
    ops.ncl_step_(step.params, step.grads, step.M, step.H, step.inverse_factors, LR, MOMENTUM, STRENGTH)


@torch.no_grad()
def eager(step: Step) -> None:
    """The four lines of the step in torch, inverses kept."""
    for (w, b), gradient, m, h, (a, g) in zip(step.params, step.grads, step.M, step.H, step.inverse_factors, strict=True):
        m.mul_(MOMENTUM).add_(joined(gradient)).add_(h, alpha=STRENGTH)
        v = g @ m @ a
        w.sub_(v[:, :-1].view_as(w), alpha=LR)
        b.sub_(v[:, -1], alpha=LR)
        h.sub_(m, alpha=LR)


@torch.no_grad()
def bmm(step: Step) -> None:
    """The same for each bucket of layers, which torch.bmm multiplies at once."""
    for bucket in step.buckets:
        own = [step.params[i] for i in bucket.members]
        gradient = torch.stack([joined(step.grads[i]) for i in bucket.members])
        bucket.M.mul_(MOMENTUM).add_(gradient).add_(bucket.H, alpha=STRENGTH)
        v = torch.bmm(torch.bmm(bucket.G, bucket.M), bucket.A)
        torch._foreach_add_([w for w, _ in own], list(v[:, :, :-1].unbind()), alpha=-LR)
        torch._foreach_add_([b for _, b in own], list(v[:, :, -1].unbind()), alpha=-LR)
        bucket.H.sub_(bucket.M, alpha=LR)


def official(step: Step) -> None:
    """Two inverses per layer and step, and a penalty whose gradient autograd makes, only for the inverses to undo it."""
    leaves = [(w.detach().requires_grad_(), b.detach().requires_grad_()) for w, b in step.params]
    with torch.enable_grad():
        penalty = torch.zeros((), dtype=step.M[0].dtype, device=step.M[0].device)
        for leaf, anchor, (a, g) in zip(leaves, step.anchors, step.factors, strict=True):
            x = joined(leaf) - joined(anchor)
            penalty = penalty + STRENGTH / 2 * (x * (g @ x @ a)).sum()
        penalty.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for (w, b), leaf, gradient, m, (a, g) in zip(step.params, leaves, step.grads, step.M, step.factors, strict=True):
            pulls: Any = (leaf[0].grad, leaf[1].grad)
            m.mul_(MOMENTUM).add_(joined(gradient) + joined(pulls))
            v = torch.linalg.inv(g) @ m @ torch.linalg.inv(a)
            w -= LR * v[:, :-1].view_as(w)
            b -= LR * v[:, -1]


PROVIDERS: dict[str, Callable[[Step], None]] = {"official": official, "eager": eager, "bmm": bmm, "fastcl": fastcl}


def merge_official(B_L: Tensor, B_R: Tensor, C_L: Tensor, C_R: Tensor, rounds: int = 1000) -> tuple[Tensor, Tensor]:
    """The fixed point on whole matrices, damped, from the rule "pi" on, until their mean square changes by less than 1e-7 of itself.

    Six eigendecompositions in a round: one to floor each matrix's eigenvalues, and two in each inverse, which floors once more.
    """
    E, F = ops.kron_merge(B_L, B_R, C_L, C_R, "pi")
    for _ in range(rounds):
        E, F = _floored(E), _floored(F)
        E_inverse, F_inverse = _inverse(E), _inverse(F)
        d_E = ((B_R @ F_inverse).trace() * B_L + (C_R @ F_inverse).trace() * C_L) / len(F) - E
        d_F = ((B_L @ E_inverse).trace() * B_R + (C_L @ E_inverse).trace() * C_R) / len(E) - F
        E, F = E + 0.3 * d_E, F + 0.3 * d_F
        if all(bool((d * d).mean() < 1e-7 * (x * x).mean()) for d, x in ((d_E, E), (d_F, F))):
            break
    return E, F


def _floored(X: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(X)
    floored: Tensor = (vectors * values.clamp(min=0)) @ vectors.mT
    return floored


def _inverse(X: Tensor) -> Tensor:
    scale = X.trace() / len(X)
    values, vectors = torch.linalg.eigh(_floored(X) / scale)
    inverse: Tensor = (vectors / values.clamp(min=1e-8)) @ vectors.mT / scale
    return inverse


def flops(shapes: Sequence[tuple[int, int]]) -> int:
    """Of both products of a step."""
    return sum(2 * m * (n + 1) * (m + n + 1) for m, n in shapes)


def bytes_per_step(shapes: Sequence[tuple[int, int]], itemsize: int = 4) -> int:
    """The fewest: gradients and inverses read once; parameters, M and H read and written."""
    return itemsize * sum(7 * m * (n + 1) + (n + 1) ** 2 + m * m for m, n in shapes)
