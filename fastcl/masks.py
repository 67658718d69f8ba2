"""Fixed masks over the parameters of a model: how they are chosen, and the gradients that they mask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import ops
from fastcl.bit_mask import BitMask
from fastcl.ops import _checks, _dispatch, _sharded

Mask = BitMask | Tensor | None


@_sharded.outside_graphs
def top_fraction_mask(tensors: Sequence[Tensor], keep: float) -> list[BitMask]:
    """The largest elements of all tensors jointly, as masks: ``bit = F >= percentile(F, 100 (1 - keep))``.

    Child-Tuning-D's choice (Xu et al., EMNLP 2021, section 2.2): one threshold over all tensors, :func:`fastcl.ops.quantile`'s. Elements
    equal to the threshold are kept, so ties keep more than ``keep``; in particular a threshold of 0, where more than ``1 - keep`` of a
    Fisher information is zero, keeps everything. A NaN anywhere keeps nothing, nor does a quantile next to an Inf, which is NaN.

    Args:
        tensors: as in :func:`fastcl.ops.quantile`; DTensors give masks of DTensors.
        keep: number in (0, 1], the share to keep.

    Returns:
        One mask per tensor; no host sync.

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.quantile`, and for ``keep`` outside (0, 1].
    """
    keep = _checks.unit_interval("keep", keep)
    if keep == 0:
        raise ValueError("keep must be in (0, 1], got 0: a mask that keeps nothing trains nothing")
    threshold = ops.quantile(tensors, (100 * (1 - keep)) / 100)
    own = [_dispatch.plain(t) for t in (_sharded.shards(tensors) if _sharded.is_sharded(tensors) else tensors)]
    bits = [torch.empty(-(-t.numel() // 8), dtype=torch.uint8, device=t.device) for t in own]
    members = [i for i, t in enumerate(own) if t.numel()]
    if members:
        _dispatch.run("threshold_bits_", own[0].device, [bits[i] for i in members], [own[i] for i in members], threshold)
    return [BitMask(b, t.shape, like=t if _sharded.is_sharded([t]) else None) for b, t in zip(bits, tensors, strict=True)]


def apply_gradient_mask_(params: nn.Module | Iterable[Tensor], masks: Mapping[str, Mask] | Sequence[Mask]) -> None:
    """Set the gradient elements that a mask leaves out to 0, in place; call it between backward and step. See :func:`fastcl.ops.bit_mask_`.

    Args:
        params: a Module or an iterable of parameters. Parameters whose ``.grad`` is None are skipped.
        masks: a mapping from parameter names when ``params`` is a Module (parameters without an entry are left as they are), or one mask
            per parameter in the same order: a :class:`fastcl.BitMask` of its shape, a bool tensor (packed in every call: pass a BitMask
            where the mask is kept), or None for a parameter whose gradient stays as it is.

    Raises:
        TypeError, ValueError: as :func:`fastcl.ops.bit_mask_`, and for names or lengths that do not fit. Nothing has been written then.
    """
    rows = [(label, p.grad, mask) for label, p, mask in _paired(params, masks) if p.grad is not None and mask is not None]
    chosen = [m if isinstance(m, BitMask) else _packed(label, m) for label, _, m in rows]
    try:
        ops.bit_mask_([g for _, g, _ in rows], chosen)
    except (TypeError, ValueError) as error:
        # The op counts the gradients that are masked; the caller knows names, or positions among all parameters.
        named = {str(position): label for position, (label, _, _) in enumerate(rows)}
        message = re.sub(r"\b(grads|masks)\[(\d+)\]", lambda m: f"{m[1]}[{named.get(m[2], m[2])!r}]", str(error))
        raise type(error)(message) from None


def _packed(label: str | int, mask: Any) -> BitMask:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"masks[{label!r}] must be a BitMask, a bool tensor or None, got {given}")
    return BitMask.from_bool(mask)


def _paired(params: nn.Module | Iterable[Tensor], masks: Any) -> list[tuple[str | int, Tensor, Mask]]:
    if isinstance(masks, Mapping):
        if not isinstance(params, nn.Module):
            raise TypeError("masks is a mapping of names, so params must be a Module; got " + type(params).__name__)
        named = dict(params.named_parameters())
        for name in masks:
            if name not in named:
                shown = ", ".join(list(named)[:8]) + (", ..." if len(named) > 8 else "")
                raise ValueError(f"masks[{name!r}] belongs to no parameter of params; its parameters are {shown}")
        return [(name, named[name], mask) for name, mask in masks.items()]
    if isinstance(params, Tensor) or not isinstance(params, (nn.Module, Iterable)):
        raise TypeError(f"params must be a Module or an iterable of tensors, got {type(params).__name__}")
    listed = list(params.parameters()) if isinstance(params, nn.Module) else list(params)
    for i, p in enumerate(listed):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}] must be a tensor, got {type(p).__name__}")
    if isinstance(masks, Tensor) or not isinstance(masks, Sequence):
        raise TypeError(f"masks must be a mapping or a sequence with a mask or None per parameter, got {type(masks).__name__}")
    if len(masks) != len(listed):
        raise ValueError(f"masks has {len(masks)} entries and params has {len(listed)}; pass one, or None, for each in the same order")
    return [(i, p, mask) for i, (p, mask) in enumerate(zip(listed, masks, strict=True))]
