"""Child-Tuning-F: a random mask of the gradients, drawn anew in every step and stored nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _places, _sharded
from fastcl.reference.child_mask import Place

MOST_STEPS, MOST_SEEDS = 2**32, 2**64


def child_mask_(grads: Sequence[Tensor], keep: float, seed: int, step: int) -> None:
    """Keep each gradient element with probability ``keep`` and scale what is kept, in place: ``g <- g * Bernoulli(keep) / keep``.

    Child-Tuning-F (Xu et al., "Raise a Child in Large Language Model", EMNLP 2021, eq. 4). What is drawn depends on (seed, step, the
    tensor's position in ``grads``, the element's row-major index in the whole tensor) alone: the same on every device and backend, for
    any number of threads, any strides and any sharding. Nothing is stored; the same numbers give the same mask again.

    The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in counter mode. 16 random
    bits are spent on an element, and 32 more where these equal the leading bits of ``keep``: the probability is ``keep`` to 2^-48.

    Computed in float64 for a float64 tensor, else in float32: a multiplication by ``1 / keep``, rounded to that type, or by 0, rounded
    once to the tensor's dtype. NaN stays NaN, and Inf becomes NaN where it is left out. The op is not differentiable.

    DTensors (FSDP2, tensor parallelism) are masked on each rank's own shard, without communication.

    Args:
        grads: list of dense tensors, float64, float32, bfloat16 or float16, any strides; written. They may not share memory. Strides
            that do not ascend with the indices by one along a dimension cost a draw for each element.
        keep: number in (0, 1]: the probability of an element to be kept. 1 keeps all.
        seed: integer in [0, 2^64).
        step: integer in [0, 2^32): the number of this optimizer step.

    Raises:
        TypeError: not a list of dense tensors, a dtype that is not accepted, a number of another type, a Partial placement.
        ValueError: shared memory, numbers outside their ranges, a gradient that requires grad while autograd records, several meshes,
            shards that do not lie in one piece. Nothing has been written then.
    """
    child_mask_at_(grads, keep, seed, step, None)


def child_mask_at_(grads: Sequence[Tensor], keep: float, seed: int, step: int, places: Sequence[Place] | None) -> None:
    """:func:`child_mask_` with each tensor's place: (tensor index, offset, strides), see :mod:`fastcl.reference.child_mask`.

    None: a tensor's position in the list, and the whole tensor. Places of DTensors hold their index only: the rest follows from how they
    are sharded.
    """
    if not _dispatch.traced() and _gate(grads, keep, seed, step, places):
        return
    _checks.listed("grads", grads)
    keep = _checks.positive("keep", keep, 1)
    seed = _checks.integer("seed", seed, MOST_SEEDS)
    step = _checks.integer("step", step, MOST_STEPS)
    if _sharded.is_sharded(grads):
        _checks.not_recorded("grads", grads)
        _sharded.check_apart("grads", grads)
        where = _places.of_shards("grads", grads, None if places is None else [place[0] for place in places])
        child_mask_at_(_sharded.shards(grads), keep, seed, step, where)
        _sharded.bump_versions(grads)
        return
    torch.ops.fastcl.child_mask_(grads, keep, _places.signed(seed), step, _places.flat(places))


def _gate(grads: Sequence[Tensor], keep: float, seed: int, step: int, places: Sequence[Place] | None) -> bool:
    if places is None:
        return _dispatch.gate("child_mask_", grads, keep, seed, step) is not _dispatch.REFUSED
    return _dispatch.gate("child_mask_at_", grads, keep, seed, step, places) is not _dispatch.REFUSED


def _check(grads: Sequence[Tensor], keep: float, seed: int, step: int, places: Sequence[int] = ()) -> None:  # noqa: ARG001
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.not_recorded("grads", grads)
    _checks.positive("keep", keep, 1)
    _checks.integer("step", step, MOST_STEPS)
    _places.unflat(places, grads)
    _checks.no_overlap("grads", grads, "grads", ())


def _run(grads: Sequence[Tensor], keep: float, seed: int, step: int, places: Sequence[int] = ()) -> None:
    seed = _places.unsigned(seed)
    where = _places.unflat(places, grads)
    if _gate(grads, keep, seed, step, where):
        return
    _check(grads, keep, seed, step, places)
    devices = list(dict.fromkeys(g.device for g in grads))
    if len(devices) > 1 and where is None:
        where = _places.whole(grads)
    for device in devices:
        members = [i for i, g in enumerate(grads) if g.device == device]
        own = [_dispatch.plain(grads[i]) for i in members]
        if where is None:
            _dispatch.run("child_mask_", device, own, keep, seed, step)
        else:
            _dispatch.run("child_mask_at_", device, own, keep, seed, step, [where[i] for i in members])


_dispatch.define(
    "child_mask_",
    "child_mask",
    "(Tensor(a!)[] grads, float keep, int seed, SymInt step, int[] places=[]) -> ()",
    implementation=_run,
    fake=_check,
)
