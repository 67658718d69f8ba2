"""The low_rank ops as sweeps over memory and small float64 algebra between them, for whole tensors and for shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcl.ops import _dispatch

Tensors = Sequence[Tensor]


class Refused(Exception):
    """The compiled module refused a stage before anything was written."""


class Gate:
    """Stages straight to the compiled module, whose gate looks at every tensor."""

    def read(self, op: str, first: Tensors, *args: Any) -> Tensor:
        result = _dispatch.gate_reading(op, first, *args)
        if result is _dispatch.REFUSED:
            raise Refused
        found: Tensor = result
        return found

    def write(self, op: str, written: Sequence[Tensors], *args: Any) -> Any:
        """``written[0]`` is the op's first argument; the others are among ``args`` too."""
        result = _dispatch.gate(op, written[0], *args)
        if result is _dispatch.REFUSED:
            raise Refused
        for tensors in written[1:]:
            _dispatch.bump_versions(tensors)
        return result


class Checked:
    """Stages of arguments that have been checked, on the implementation that serves their device."""

    def read(self, op: str, first: Tensors, *args: Any) -> Tensor:
        result: Tensor = _dispatch.run_reading(op, first[0].device, *args)
        return result

    def write(self, op: str, written: Sequence[Tensors], *args: Any) -> Any:
        result = _dispatch.run(op, written[0][0].device, list(written[0]), *args)
        for tensors in written[1:]:
            _dispatch.bump_versions(tensors)
        return result


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Place:
    """Where the tensors are: ``counted`` of them this process counts in sums, which ``reduce`` adds up over all processes.

    None: all tensors, as they are. Tensors without elements are in no list of indices.
    """

    call: Gate | Checked
    device: torch.device
    members: Sequence[int] | None = None
    counted: Sequence[int] | None = None
    reduce: Callable[[Tensor], Tensor] = _alone

    def sums(self, op: str, size: tuple[int, ...], *lists: Tensors, rest: Sequence[Any]) -> Tensor:
        """A stage that only reads, on what is counted, summed over all processes."""
        own = [pick(tensors, self.counted) for tensors in lists]
        first = next((tensors for tensors in own if tensors), None)
        none = torch.zeros(size, dtype=torch.float64, device=self.device)
        return self.reduce(none if first is None else self.call.read(op, first, *own, *rest))


def pick(tensors: Tensors, members: Sequence[int] | None) -> Tensors:
    # A list that a factor of 0 leaves out stays empty.
    return tensors if members is None or not tensors else [tensors[i] for i in members]


def products(place: Place, vectors: Tensors, diagonal: Tensors, basis: Tensors, rank: int, inverse: bool) -> Tensor:
    return place.sums("low_rank_products", (rank + 1,), vectors, diagonal, basis, rest=(inverse,))


def shrunk(sigma: Tensor, along: Tensor) -> Tensor:
    """What the inverse takes away along each row of the basis."""
    square = sigma * sigma
    return along * (square / (1 + square))


def solve_(place: Place, grads: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> None:
    rank = len(sigma)
    along = products(place, grads, diagonal, basis, rank, True)[:rank] if rank else sigma
    g, d, b = (pick(tensors, place.members) for tensors in (grads, diagonal, basis))
    if g:
        place.call.write("low_rank_update_", [g], d, b, shrunk(sigma, along))


def quadratic(place: Place, deltas: Tensors, diagonal: Tensors, basis: Tensors, sigma: Tensor) -> Tensor:
    along = products(place, deltas, diagonal, basis, len(sigma), False)
    return along[-1] + (sigma * along[:-1]).square().sum()


def step_(
    place: Place,
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    anchors: Tensors,
    diagonal: Tensors,
    basis: Tensors,
    sigma: Tensor,
    lr: float | Tensor,
    momentum: float,
    strength: float,
    radius: float | None,
) -> None:
    rank = len(sigma)
    step = lr.double() if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=place.device)
    lists = (params, grads, momenta, anchors, diagonal, basis)
    if radius is not None:
        found = place.sums("low_rank_step_products", (2 * rank + 3,), *lists, rest=(momentum, strength))
        step = torch.minimum(step, radius / direction_square(found, sigma).sqrt())
        along = found[:rank]
    else:
        along = products(place, grads, diagonal, basis, rank, True)[:rank] if rank else sigma
    p, g, v, mu, d, b = (pick(tensors, place.members) for tensors in lists)
    if p:
        place.call.write("low_rank_step_update_", [p, v], g, v, mu, d, b, shrunk(sigma, along), step, momentum, strength)


def direction_square(found: Tensor, sigma: Tensor) -> Tensor:
    """``V^T Lambda V`` of ``V = u + Lambda^-1 g`` from the first sweep's sums: ``g^T Lambda^-1 g + 2 g.u + u^T Lambda u``.

    The first term is split into what lies in the basis and the rest, which rounding may not make negative.
    """
    rank = len(sigma)
    square = sigma * sigma
    in_basis = found[:rank].square()
    inverse = (found[2 * rank] - in_basis.sum()).clamp(min=0) + (in_basis / (1 + square)).sum()
    kept = found[2 * rank + 2] + (square * found[rank : 2 * rank].square()).sum()
    return (inverse + 2 * found[2 * rank + 1] + kept).clamp(min=0)
