"""What the optimizers' operators accept: exactly what the compiled modules' gate accepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _transforms
from fastcl.ops._transforms import Transform

Named = tuple[str, Sequence[Tensor]]
Compact = tuple[Sequence[Tensor], Sequence[Tensor]]
RANK_BLOCK = 2048


def swept(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Named],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float | Tensor,
    compact: Compact | None = None,
) -> None:
    """Everything that both optimizers share. Raises TypeError or ValueError naming the argument."""
    _check_gradients(params, grads)
    _checks.not_recorded("params", params)
    for name, state in states:
        _checks.dense(name, state, _checks.FLOATING[:2])
        _checks.same_length(name, state, "params", params)
        _checks.same_device(name, state, "params", params)
        _check_state(name, state, params, compact)
    if steps or any(kind == "child_mask" for kind, *_ in transforms) or len(states) == 2:
        _check_steps(steps, params)
    read = _transforms.check(transforms, params)
    if compact is not None:
        read += _check_compact(compact, params)
    read += _check_numbers_on_device(scale, found_inf)
    if isinstance(lr, Tensor):
        read.append(("lr", [lr]))
    _apart([("params", params), *states, ("steps", steps)], [("grads", grads), *read])


def read(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    transforms: Sequence[Transform],
    scale: Tensor | None,
    reference: Sequence[Tensor],
) -> None:
    """What a product behind the transforms takes. Raises TypeError or ValueError naming the argument."""
    _check_gradients(params, grads)
    if steps or any(kind == "child_mask" for kind, *_ in transforms):
        _check_steps(steps, params)
    _transforms.check(transforms, params)
    _check_numbers_on_device(scale, None)
    _checks.dense("reference", reference, _checks.FLOATING)
    _checks.same_length("reference", reference, "params", params)
    _checks.same_shape("reference", reference, "params", params)
    _checks.one_device(("params", params), ("reference", reference))


def _check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    _checks.dense("params", params, _checks.FLOATING)
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.same_length("grads", grads, "params", params)
    _checks.same_device("grads", grads, "params", params)
    _checks.same_shape("grads", grads, "params", params)


def _check_numbers_on_device(scale: Tensor | None, found_inf: Tensor | None) -> list[Named]:
    read: list[Named] = []
    for name, t, dtypes in (("scale", scale, _checks.FLOATING[:2]), ("found_inf", found_inf, (torch.float32,))):
        if t is not None:
            _checks.dense(name, [t], dtypes)
            if t.numel() != 1 or (name == "scale" and t.dim()):
                raise ValueError(f"{name} must be {'0-d' if name == 'scale' else 'of one element'}, got shape {tuple(t.shape)}")
            read.append((name, [t]))
    return read


def _check_state(name: str, state: Sequence[Tensor], params: Sequence[Tensor], compact: Compact | None) -> None:
    for i, (t, p) in enumerate(zip(state, params, strict=True)):
        _check_state_dtype(f"{name}[{i}]", t, f"params[{i}]", p)
        if compact is not None and compact[0][i].numel():
            if t.dim() != 1 or not t.is_contiguous() or t.numel() > p.numel():
                raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}; compact state is contiguous, one value per set bit of its mask")
            continue
        _check_state_layout(f"{name}[{i}]", t, f"params[{i}]", p)


def check_state(label: str, t: Tensor, p: Tensor) -> None:
    """Moments of one parameter, dense. Raises TypeError or ValueError beginning with the label."""
    _check_state_dtype(label, t, "the parameter", p)
    _check_state_layout(label, t, "the parameter", p)


def _check_state_dtype(label: str, t: Tensor, owner: str, p: Tensor) -> None:
    wanted = torch.float64 if p.dtype == torch.float64 else torch.float32
    if t.dtype != wanted:
        raise TypeError(f"{label} has dtype {t.dtype}; the state of {owner} of {p.dtype} is {wanted}")


def _check_state_layout(label: str, t: Tensor, owner: str, p: Tensor) -> None:
    if t.shape != p.shape:
        raise ValueError(f"{label} has shape {tuple(t.shape)}, {owner} has shape {tuple(p.shape)}; they must be equal")
    if t.stride() != p.stride() and not _same_order(t, p):
        raise ValueError(
            f"{label} is non-contiguous state: its strides are {t.stride()}, those of {owner} {p.stride()}; they must be equal"
        )


def _same_order(t: Tensor, p: Tensor) -> bool:
    """Whether strides differ only where there is nothing to step over."""
    return p.numel() == 0 or all(a == b for a, b, n in zip(t.stride(), p.stride(), p.shape, strict=True) if n > 1)


def _check_steps(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    _checks.dense("steps", steps, (torch.float32,))
    _checks.same_length("steps", steps, "params", params)
    _checks.same_device("steps", steps, "params", params)
    for i, t in enumerate(steps):
        if t.dim():
            raise ValueError(f"steps[{i}] has shape {tuple(t.shape)}; a step is 0-d")


def _check_compact(compact: Compact, params: Sequence[Tensor]) -> list[Named]:
    bits, ranks = compact
    _checks.dense("compact bits", bits, (torch.uint8,))
    _checks.dense("compact ranks", ranks, (torch.int64,))
    _checks.same_length("compact bits", bits, "params", params)
    _checks.same_length("compact ranks", ranks, "params", params)
    _checks.same_device("compact bits", bits, "params", params)
    _checks.same_device("compact ranks", ranks, "params", params)
    _transforms.check_bits("compact bits", bits, params)
    for i, (b, r, p) in enumerate(zip(bits, ranks, params, strict=True)):
        if not b.numel():
            continue
        blocks = -(-p.numel() // RANK_BLOCK)
        if r.shape != (blocks,) or not (r.is_contiguous() and p.is_contiguous()):
            raise ValueError(
                f"compact ranks[{i}] has shape {tuple(r.shape)}; params[{i}] of shape {tuple(p.shape)} must be contiguous and takes "
                f"contiguous ranks [{blocks}]"
            )
    return [("compact bits", bits), ("compact ranks", ranks)]


def hyper_parameters(lr: float | Tensor, betas: tuple[float, ...] = (), **at_least_zero: float) -> None:
    """The numbers of a step. Raises TypeError or ValueError naming the number."""
    if isinstance(lr, Tensor):
        _checks.dense("lr", [lr], _checks.FLOATING[:2])
        if lr.dim():
            raise ValueError(f"lr has shape {tuple(lr.shape)}; a tensor lr is 0-d")
    else:
        _checks.at_least_zero("lr", lr)
    for i, beta in enumerate(betas):
        if _checks.unit_interval(f"beta{i + 1}", beta) == 1:
            raise ValueError(f"beta{i + 1} must be in [0, 1), got 1")
    for name, value in at_least_zero.items():
        _checks.at_least_zero(name, value)


def _apart(written: Sequence[Named], read: Sequence[Named]) -> None:
    """No written tensor shares memory with any other."""
    labels = [f"{name}[{i}]" for name, tensors in written for i, _ in enumerate(tensors)]
    others = [f"{name}[{i}]" for name, tensors in read for i, _ in enumerate(tensors)]
    flat, rest = [t for _, tensors in written for t in tensors], [t for _, tensors in read for t in tensors]
    _checks.no_overlap("written", flat, "read", rest, partners_may_be_equal=False, labels=(labels, others))
