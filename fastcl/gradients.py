"""The ops applied to the ``.grad`` of a model's parameters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import ops
from fastcl.ops import GemInfo, ProjectionInfo, _sharded
from fastcl.ops.child_mask import child_mask_at_
from fastcl.reference.child_mask import row_major

Params = nn.Module | Iterable[Tensor]
Importance = Mapping[str, Tensor] | Sequence[Tensor]


def pair_gradients(params: Params, importance: Importance) -> tuple[list[Tensor], list[Tensor], list[str | int]]:
    """The gradients that exist, the importance that belongs to each, and what the caller calls it (a name or an index).

    Raises:
        TypeError: ``params`` is a tensor or holds something else, or ``importance`` is a mapping while ``params`` has no names.
        ValueError: ``importance`` has another length than ``params``, or a name that is no parameter.
    """
    if isinstance(importance, Mapping):
        if not isinstance(params, nn.Module):
            raise TypeError("importance is a mapping of names, so params must be a Module; got " + type(params).__name__)
        named: dict[str, Tensor] = dict(params.named_parameters())
        for name, value in importance.items():
            if name not in named:
                raise ValueError(f"importance[{name!r}] belongs to no parameter of params; its parameters are {_some(list(named))}")
            if not isinstance(value, Tensor):
                raise TypeError(f"importance[{name!r}] must be a tensor, got {type(value).__name__}")
        rows: list[tuple[str | int, Tensor, Tensor]] = [(name, named[name], i) for name, i in importance.items()]
    else:
        listed: list[Tensor] = list(params.parameters()) if isinstance(params, nn.Module) else _listed("params", params)
        values = _listed("importance", importance)
        if len(values) != len(listed):
            raise ValueError(f"importance has {len(values)} tensors and params has {len(listed)}; pass one for each, in the same order")
        rows = [(index, p, i) for index, (p, i) in enumerate(zip(listed, values, strict=True))]
    kept = [(p.grad, i, label) for label, p, i in rows if p.grad is not None]
    return [g for g, _, _ in kept], [i for _, i, _ in kept], [label for _, _, label in kept]


def _listed(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a Module or an iterable of tensors, got {type(value).__name__}")
    listed = list(value)
    for index, t in enumerate(listed):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {type(t).__name__}")
    return listed


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def mask_gradients_(params: Params, importance: Importance, *, strength: float = 1.0) -> None:
    """Soft-mask the gradients of a model, in place: ``p.grad <- p.grad * (1 - strength * I)``. Call it between backward and step.

    Args:
        params: a Module or an iterable of parameters. Parameters whose ``.grad`` is None are skipped.
        importance: a mapping from parameter names to tensors when ``params`` is a Module (parameters without an entry are left as they
            are), or one tensor per parameter in the same order. Shapes, dtypes and devices as in :func:`fastcl.ops.soft_mask_`.
        strength: number in [0, 1].

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.soft_mask_`, and for names or lengths that do not fit. Nothing has been written then.
    """
    grads, values, labels = pair_gradients(params, importance)
    try:
        ops.soft_mask_(grads, values, strength)
    except (TypeError, ValueError) as error:
        # The op counts the gradients that exist; the caller knows names, or positions among all parameters.
        named = {str(position): label for position, label in enumerate(labels)}
        message = re.sub(r"\b(grads|importance)\[(\d+)\]", lambda m: f"{m[1]}[{named[m[2]]!r}]", str(error))
        raise type(error)(message) from None


def child_mask_gradients_(params: Params, keep: float, *, seed: int, step: int) -> None:
    """Child-Tuning-F's random mask of the gradients of a model, in place: ``p.grad <- p.grad * Bernoulli(keep) / keep``.

    Call it between backward and step; see :func:`fastcl.ops.child_mask_`. A tensor's index is its position among ``params``, whether or
    not the others have a gradient.

    Args:
        params: a Module or an iterable of parameters. Parameters whose ``.grad`` is None are skipped.
        keep: number in (0, 1].
        seed: integer in [0, 2^64).
        step: integer in [0, 2^32).

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.child_mask_`. Nothing has been written then.
    """
    listed: list[Tensor] = list(params.parameters()) if isinstance(params, nn.Module) else _listed("params", params)
    grads = [(i, p.grad) for i, p in enumerate(listed) if p.grad is not None]
    try:
        child_mask_at_([g for _, g in grads], keep, seed, step, [(i, 0, row_major(g.shape)) for i, g in grads])
    except (TypeError, ValueError) as error:
        message = re.sub(r"\bgrads\[(\d+)\]", lambda m: f"grads[{grads[int(m[1])][0]}]", str(error))
        raise type(error)(message) from None


def project_gradients_(params: Params, reference: Sequence[Tensor | None]) -> ProjectionInfo:
    """A-GEM's projection of a model's gradients, in place; call it between backward and step. See :func:`fastcl.ops.project_`.

    Args:
        params: a Module or an iterable of parameters. A ``.grad`` that is None counts as zero; where ``reference`` is not None it is
            made (zeros), since the projection may have to write to it.
        reference: the gradient of the loss on a memory batch, one tensor or None (zero) per parameter in the same order, as
            :func:`capture_gradients` gives it.

    Returns:
        ``dot``, ``reference_sq`` and ``violated``: 0-d tensors on the device; no host sync.

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.project_`, and for lengths that do not fit. Nothing has been written then.
    """
    grads, made = _gradients_to_write(params, {"reference": reference})
    info = ops.project_(grads, reference)
    for p, grad in made:
        p.grad = grad
    return info


def gem_project_gradients_(
    params: Params, memories: Sequence[Sequence[Tensor | None]], *, margin: float = 0.5, ridge: float = 1e-3
) -> GemInfo:
    """GEM's projection of a model's gradients, in place; call it between backward and step. See :func:`fastcl.ops.gem_project_`.

    Args:
        params: as in :func:`project_gradients_`.
        memories: K lists, 1 <= K <= 64: per past task the gradient of its loss on its memory, as ``reference`` there.
        margin: number >= 0, the least coefficient of every memory.
        ridge: number >= 0 added to the Gram matrix's diagonal.

    Returns:
        ``coefficients`` [K], ``dots`` [K] and ``violated`` (0-d): tensors on the device; no host sync.

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.gem_project_`, and for lengths that do not fit. Nothing has been written then.
    """
    named = {f"memories[{k}]": m for k, m in enumerate(memories)} if isinstance(memories, (list, tuple)) else {}
    grads, made = _gradients_to_write(params, named)
    info = ops.gem_project_(grads, memories, margin, ridge)
    for p, grad in made:
        p.grad = grad
    return info


def _gradients_to_write(
    params: Params, named: Mapping[str, Sequence[Tensor | None]]
) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """The gradients of ``params``, zeros where one is missing and has a counterpart; and the parameters that these zeros belong to."""
    listed: list[Tensor] = list(params.parameters()) if isinstance(params, nn.Module) else _listed("params", params)
    for name, value in named.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple with a tensor or None per parameter, got {type(value).__name__}")
        if len(value) != len(listed):
            raise ValueError(f"{name} has {len(value)} tensors and params has {len(listed)}; pass one, or None, for each in the same order")
    grads: list[Tensor | None] = [p.grad for p in listed]
    made = []
    for n, p in enumerate(listed):
        if grads[n] is None and any(value[n] is not None for value in named.values()):
            zeros = torch.zeros_like(p, requires_grad=False)
            grads[n] = zeros
            made.append((p, zeros))
    return grads, made


@contextlib.contextmanager
def capture_gradients(params: Params) -> Iterator[list[Tensor | None]]:
    """Take the gradients of a backward pass aside, without a copy: the parameters' own ``.grad`` is afterwards as it was.

    Example::

        loss_fn(model(x), y).backward()
        with fastcl.capture_gradients(model) as reference:
            loss_fn(model(memory_x), memory_y).backward()
        fastcl.project_gradients_(model, reference)
        optimizer.step()

    Within the block every ``.grad`` starts as None. The list is empty until the block ends, and then holds one gradient (or None) per
    parameter, in order; these are the tensors that autograd made. If the block raises, the parameters' own gradients are put back and the
    list stays empty. Gradients that are views into a buffer (DistributedDataParallel with ``gradient_as_bucket_view=True``) are the
    exception: a further backward writes over them, so the values of the own ones are set aside and copied back, and the captured ones are
    copies.

    Under ``fully_shard`` (FSDP2) the gradients are DTensors, under DistributedDataParallel the averages over the ranks; the block's forward
    pass has to go through the wrapped model.

    Args:
        params: a Module or an iterable of parameters (of an FSDP2 model as they are before a forward pass or after a backward).

    Raises:
        TypeError: ``params`` is a tensor or holds something else.
        RuntimeError: the block's backward wrote into the memory of the parameters' own gradients, or a parameter changed its shape, dtype
            or device in the block; all other gradients have been put back then.
    """
    if isinstance(params, nn.Module):
        _sharded.reshard(params)
    listed: list[Tensor] = list(params.parameters()) if isinstance(params, nn.Module) else _listed("params", params)
    own = [p.grad for p in listed]
    values = [_kept(grad) for grad in own]
    captured: list[Tensor | None] = []
    for p in listed:
        p.grad = None
    try:
        yield captured
        found = [_kept(p.grad) for p in listed]
    finally:
        lost = [n for n, (p, grad, value) in enumerate(zip(listed, own, values, strict=True)) if not _put_back(p, grad, value)]
    if lost:
        raise RuntimeError(f"params[{lost[0]}] changed its shape, dtype or device in the block, so that its own gradient no longer fits it")
    for n, (a, b) in enumerate(zip(values, found, strict=True)):
        if type(a) is Tensor and type(b) is Tensor and a.layout == b.layout == torch.strided and a.numel() and a.data_ptr() == b.data_ptr():
            raise RuntimeError(
                f"the backward pass wrote over the gradient of params[{n}], which lies in a buffer that is used again; with "
                "DistributedDataParallel set gradient_as_bucket_view=False"
            )
    captured.extend(found)


def _put_back(p: Tensor, grad: Tensor | None, value: Tensor | None) -> bool:
    """Make ``grad`` the parameter's own again, with the values that were set aside; False if it no longer fits."""
    try:
        p.grad = grad
    except RuntimeError:
        return False
    if grad is not value and grad is not None and value is not None:
        with torch.no_grad():
            grad.copy_(value)
    return True


def _kept(grad: Tensor | None) -> Tensor | None:
    """A gradient that a further backward pass cannot overwrite."""
    if grad is None or type(grad) is not Tensor or grad.layout != torch.strided:
        return grad
    # A buffer may hold one gradient only; what autograd makes is no view.
    return grad.clone() if grad._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size() else grad
