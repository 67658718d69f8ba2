"""EWC's penalty as a term of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _sharded


def ewc_pull_(
    grads: Sequence[Tensor], params: Sequence[Tensor], precision: Sequence[Tensor], anchor: Sequence[Tensor], strength: float
) -> None:
    """Add the gradient of EWC's penalty ``strength * sum A (theta - c)^2``, in place: ``g <- g + 2 * strength * A (theta - c)``.

    Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017, eq. 3, whose lambda / 2 is ``strength``). With the sum of all tasks'
    Fisher information as ``A`` and their weighted mean of parameters as ``c`` one call serves any number of tasks.

    Computed in float64 if one of the four is a float64 tensor, else in float32, as ``g + (2 * strength) * (A * (theta - c))`` without
    contraction, and rounded once to ``g``'s dtype. NaN and Inf propagate. The op is not differentiable.

    DTensors (FSDP2, tensor parallelism) are worked on by each rank's own shards, without communication; all four have to be placed alike.

    Args:
        grads: list of dense tensors, float64, float32, bfloat16 or float16, any strides; written. They may not share memory.
        params: theta: one tensor per gradient, of its shape, on its device; the same dtypes.
        precision: A, as ``params``; not negative, which is not checked (that would cost a sweep and a device sync).
        anchor: c, as ``params``.
        strength: finite number >= 0.

    Raises:
        TypeError: not lists of dense tensors, a dtype that is not accepted, a strength that is not a number, a plain tensor beside a
            DTensor, a Partial placement.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, a strength outside its range, a
            gradient that requires grad while autograd records. Nothing has been written then.
    """
    if _dispatch.traced() or _dispatch.gate("ewc_pull_", grads, params, precision, anchor, strength) is _dispatch.REFUSED:
        named = (("params", params), ("precision", precision), ("anchor", anchor))
        _checks.listed("grads", grads)
        for name, value in named:
            _checks.listed(name, value)
        strength = _checks.at_least_zero("strength", strength)
        if _sharded.is_sharded(grads, params, precision, anchor):
            _checks.not_recorded("grads", grads)
            _sharded.check_apart("grads", grads)
            for name, value in named:
                _checks.same_length(name, value, "grads", grads)
                _checks.same_shape(name, value, "grads", grads)
                _sharded.check_matching(name, value, "grads", grads, one_element=False)
            g, p, a, c = (_sharded.shards(value) for value in (grads, params, precision, anchor))
            ewc_pull_(g, p, a, c, strength)
            _sharded.bump_versions(grads)
            return
        torch.ops.fastcl.ewc_pull_(grads, params, precision, anchor, strength)


def _check(
    grads: Sequence[Tensor], params: Sequence[Tensor], precision: Sequence[Tensor], anchor: Sequence[Tensor], strength: float
) -> None:
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.not_recorded("grads", grads)
    for name, value in (("params", params), ("precision", precision), ("anchor", anchor)):
        _checks.dense(name, value, _checks.FLOATING)
        _checks.same_length(name, value, "grads", grads)
        _checks.same_device(name, value, "grads", grads)
        _checks.same_shape(name, value, "grads", grads)
        _checks.no_overlap("grads", grads, name, value)
    _checks.at_least_zero("strength", strength)


def _run(grads: Sequence[Tensor], params: Sequence[Tensor], precision: Sequence[Tensor], anchor: Sequence[Tensor], strength: float) -> None:
    if _dispatch.gate("ewc_pull_", grads, params, precision, anchor, strength) is not _dispatch.REFUSED:
        return
    _check(grads, params, precision, anchor, strength)
    for device, (g, p, a, c) in _dispatch.by_device(grads, params, precision, anchor):
        _dispatch.run("ewc_pull_", device, g, p, a, c, strength)


_dispatch.define(
    "ewc_pull_",
    "pull",
    "(Tensor(a!)[] grads, Tensor[] params, Tensor[] precision, Tensor[] anchor, float strength) -> ()",
    implementation=_run,
    fake=_check,
)
