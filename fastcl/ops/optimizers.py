"""AdamW and SGD whose one sweep carries gradient transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _optimizer_checks, _places, _sharded, _transforms
from fastcl.ops._optimizer_checks import Compact
from fastcl.ops._optimizer_operators import pairs
from fastcl.ops._transforms import Transform
from fastcl.reference.child_mask import Place

ORDERS = ("torch", "hf")


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay: str = "torch",
    maximize: bool = False,
    transforms: Sequence[Transform] = (),
    places: Sequence[Place] | None = None,
    compact: Compact | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of AdamW, in place, with every transform of the gradient in the same sweep.

    With ``x`` the transformed gradient, ``t`` the number of this step, ``m`` and ``v`` the moments (Loshchilov and Hutter, "Decoupled
    Weight Decay Regularization", ICLR 2019)::

        m <- m + (1 - beta1)(x - m)      v <- beta2 v + (1 - beta2) x^2
        decay="torch": p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        decay="hf":    p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), then p <- p - lr weight_decay p

    ``"torch"`` is torch.optim.AdamW's default on the CPU (the loop and foreach, which agree) in float32 and float64: moments have its
    bits, and parameters differ by the square root alone, which is correctly rounded here and within one ulp in torch (its vector
    library's, by processor). ``"hf"`` is the order of transformers' former AdamW, which Child-Tuning's authors use (Xu et al., EMNLP 2021).

    The gradient becomes ``x = g`` in the type that its parameter is computed in (float64 for float64, else float32), times ``scale``,
    then goes through ``transforms`` in their order, never rounded to its own type in between, and changes its sign if ``maximize``. Each
    is a tuple with one tensor per parameter in its lists:

    * ``("soft_mask", importance, strength)``: :func:`fastcl.ops.soft_mask_`.
    * ``("child_mask", keep, seed)``: :func:`fastcl.ops.child_mask_`, whose step is the value of ``steps`` before this one.
    * ``("fixed_mask", bits)``: :func:`fastcl.ops.bit_mask_`; uint8 bits.
    * ``("project", reference, coefficient)``: ``x <- x + coefficient * r`` in float64; the coefficient is float64, one element, on the
      device, and with 0 ``x`` keeps its bits.
    * ``("pull", precision, anchor, strength)``: :func:`fastcl.ops.ewc_pull_` with the parameter before this step.

    A tensor without elements in place of an importance, bits, reference or precision leaves its parameter out of the transform.

    DTensors are for :class:`fastcl.optim.AdamW`, which hands each rank's own shards to this function.

    Args:
        params: list of dense tensors, float64, float32, bfloat16 or float16, any strides; written.
        grads: one per parameter, of its shape; the same dtypes, any strides; read.
        exp_avgs, exp_avg_sqs: ``m`` and ``v``: one per parameter, float64 for float64 and else float32, of its shape and strides; written.
        steps: one 0-d float32 tensor per parameter, the number of steps made; written.
        lr: number >= 0, or a 0-d float32 or float64 tensor, read on the device.
        beta1, beta2: numbers in [0, 1).
        eps, weight_decay: numbers >= 0.
        decay: "torch" or "hf".
        maximize: ascend.
        transforms: the transforms, in order.
        places: per parameter ``(index, offset, strides)``, where a child mask finds its elements in the whole parameter; None: each is
            whole and its index is its position.
        compact: ``(bits, ranks)``, a list of each: where a parameter's bits (as a fixed mask's) have elements, its moments hold only the
            set ones, [number of set bits] in row-major order, and the parameter is contiguous; all other elements decay alone. ``ranks``,
            int64 [ceil(n / 2048)], is the number of set bits before each block of 2048 elements. The caller sees to it that gradients are
            zero outside of the bits and that there are as many moments as set bits.
        scale: multiplies every gradient: float32 or float64, 0-d, on the device.
        found_inf: float32, one element, on the device: unless it is 0, nothing is written and no step counted. No host sync.

    Raises:
        TypeError: not lists of dense tensors, a dtype that is not accepted, a number that is none, an unknown transform.
        ValueError: lengths, shapes, strides or devices that do not fit, non-contiguous state, shared memory, a number outside its range, a
            parameter that requires grad while autograd records. Nothing has been written then.
    """
    if decay not in ORDERS:
        raise ValueError(f"decay must be one of {', '.join(ORDERS)}, got {decay!r}")
    hf = decay == "hf"
    written = (params, exp_avgs, exp_avg_sqs, steps)
    if not _dispatch.traced():
        front = (grads, exp_avgs, exp_avg_sqs, steps, transforms, places, compact, scale, found_inf)
        if _gate("adamw_", written, *front, lr, beta1, beta2, eps, weight_decay, hf, maximize):
            return
    _listed(transforms, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    _optimizer_checks.hyper_parameters(lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    flat = (*_transforms.flatten(transforms), _places.flat(places))
    torch.ops.fastcl.adamw_(
        *written[:1], grads, *written[1:], *flat, pairs(compact), scale, found_inf, *rate, beta1, beta2, eps, weight_decay, hf, maximize
    )


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    transforms: Sequence[Transform] = (),
    places: Sequence[Place] | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of stochastic gradient descent, in place, with every transform of the gradient in the same sweep.

    With ``x`` the transformed gradient (see :func:`adamw_`) and ``b`` the momentum buffer, as in torch.optim.SGD::

        x <- x + weight_decay p
        b <- x if first else momentum b + (1 - dampening) x        x <- x + momentum b if nesterov else b
        p <- p - lr x

    The bits are those of torch.optim.SGD's default on the CPU, in float32 and float64.

    Args:
        params, grads, lr, maximize, transforms, places, scale, found_inf: as in :func:`adamw_`.
        momentum_buffers: one per parameter, float64 for float64 and else float32, of its shape and strides; written. None without momentum.
        steps: one 0-d float32 tensor per parameter, the number of steps made; written. Needed by a child mask alone.
        momentum, weight_decay: numbers >= 0.
        dampening: number >= 0.
        nesterov: Nesterov's momentum.
        first: the buffers hold nothing yet.

    Raises:
        TypeError, ValueError: as :func:`adamw_`. Nothing has been written then.
    """
    written = (params, momentum_buffers, steps)
    if not _dispatch.traced():
        front = (grads, momentum_buffers, steps, transforms, places, scale, found_inf)
        if _gate("sgd_", written, *front, lr, momentum, dampening, weight_decay, nesterov, maximize, first):
            return
    _listed(transforms, params=params, grads=grads, momentum_buffers=momentum_buffers, steps=steps)
    _optimizer_checks.hyper_parameters(lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    flat = (*_transforms.flatten(transforms), _places.flat(places))
    torch.ops.fastcl.sgd_(
        params, grads, *written[1:], *flat, scale, found_inf, *rate, momentum, dampening, weight_decay, nesterov, maximize, first
    )


def _gate(op: str, written: Sequence[Sequence[Tensor]], *args: object) -> bool:
    if _dispatch.gate(op, written[0], *args) is _dispatch.REFUSED:
        return False
    for tensors in written[1:]:
        _dispatch.bump_versions(tensors)
    return True


def _listed(transforms: Sequence[Transform], **lists: Sequence[Tensor]) -> None:
    for name, value in lists.items():
        _checks.listed(name, value)
        if _sharded.is_sharded(value):
            raise TypeError(f"{name} has DTensors: the optimizers of fastcl.optim take them; here pass each rank's own .to_local()")
    _transforms.listed(transforms, lists["params"])


def transformed_dot(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    places: Sequence[Place] | None,
    scale: Tensor | None,
    reference: Sequence[Tensor],
) -> Tensor:
    """``[T(g).r, r.r]``, float64 [2], with the transforms ``T`` as :func:`adamw_` applies them; steps are read. A stage, not exported."""
    args = (grads, steps, transforms, places, scale, reference)
    result: Any = _dispatch.REFUSED if _dispatch.traced() else _dispatch.gate_reading("transformed_dot", params, params, *args)
    if result is _dispatch.REFUSED:
        flat = (*_transforms.flatten(transforms), _places.flat(places))
        result = torch.ops.fastcl.transformed_dot(params, grads, steps, *flat, scale, reference)
    total: Tensor = result
    return total
