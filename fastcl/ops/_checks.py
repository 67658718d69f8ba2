"""Argument checks that several families share. Each raises before anything is written and names the argument."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STORED = (*FLOATING, torch.uint8)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def listed(name: str, value: object, *, missing: bool = False) -> None:
    """A list or tuple of tensors of any kind: what can be handed to the dispatcher. With ``missing``, None may stand among them."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(value).__name__}")
    for i, t in enumerate(value):
        if missing and t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(t).__name__}")
        if t.is_nested:  # the dispatcher has no fallback for them and says so in 200 lines
            raise TypeError(f"{name}[{i}] must be a dense tensor, got a nested one; pass its .unbind() tensors")
        if t.is_complex() and not torch.compiler.is_compiling() and t.is_conj():
            raise TypeError(f"{name}[{i}] has dtype {_names([t.dtype])}; accepted are {_names(FLOATING)}")
        # Before the dispatcher sees it, whose own error names no argument. torch.compile cannot ask, and materialises such views.
        if not torch.compiler.is_compiling():
            _not_negated(name, i, t)


def _not_negated(name: str, i: int, t: Tensor) -> None:
    if t.is_neg():
        raise TypeError(f"{name}[{i}] is a lazily negated view, whose memory does not hold its value; pass {name}[{i}].resolve_neg()")


def dense(name: str, value: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Dense tensors of the given dtypes."""
    for i, t in enumerate(value):
        if t.layout != torch.strided or t.is_quantized or t.is_nested:
            kind = "quantized" if t.is_quantized else "nested" if t.is_nested else str(t.layout)
            raise TypeError(f"{name}[{i}] must be a dense tensor, got {kind}; convert it with .to_dense() or .dequantize()")
        if t.dtype not in dtypes:
            raise TypeError(f"{name}[{i}] has dtype {_names([t.dtype])}; accepted are {_names(dtypes)}")
        _not_negated(name, i, t)
        if type(t) in (Tensor, torch.nn.Parameter) and (t.is_cpu or t.is_cuda):
            _in_memory(name, i, t)


def _in_memory(name: str, i: int, t: Tensor) -> None:
    """Whether a tensor has memory, at addresses that its elements' size divides.

    A view into a storage that was resized to nothing (as sharded training does) reports its offset as its address; asking every storage
    for its size would cost more than the op. A storage that was shrunk to something is not noticed, here and in torch's own ops.
    """
    address = t.data_ptr()
    if address >> 38 == 0 and t.numel() and not t.untyped_storage().nbytes():
        raise ValueError(f"{name}[{i}] has no memory behind it: its storage was resized to 0 bytes after the view was made")
    if address % t.element_size():
        raise ValueError(
            f"{name}[{i}] starts at an address that is no multiple of its element size {t.element_size()}; pass a .clone() of it"
        )


def not_recorded(name: str, written: Sequence[Tensor]) -> None:
    """No written tensor is part of an autograd graph that is being recorded."""
    if torch.is_grad_enabled():
        for i, t in enumerate(written):
            if t.requires_grad:
                remedy = f"pass {name}[{i}].detach() or call it under torch.no_grad()"
                raise ValueError(f"{name}[{i}] requires grad, and this op is not differentiable; {remedy}")


def same_length(name: str, value: Sequence[object], other_name: str, other: Sequence[object]) -> None:
    """One element of ``value`` for each of ``other``."""
    if len(value) != len(other):
        raise ValueError(f"{name} has {len(value)} tensors and {other_name} has {len(other)}; pass one for each")


def same_device(name: str, value: Sequence[Tensor], other_name: str, other: Sequence[Tensor]) -> None:
    """Tensors of a pair live on one device."""
    for i, (a, b) in enumerate(zip(value, other, strict=True)):
        if a.device != b.device:
            raise ValueError(f"{name}[{i}] is on {a.device} and {other_name}[{i}] is on {b.device}; move it with .to('{b.device}')")


def same_shape(name: str, value: Sequence[Tensor], other_name: str, other: Sequence[Tensor]) -> None:
    """Tensors of a pair have one shape."""
    for i, (a, b) in enumerate(zip(value, other, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(a.shape)}, {other_name}[{i}] has shape {tuple(b.shape)}; they must be equal")


def broadcasts(name: str, value: Sequence[Tensor], other_name: str, other: Sequence[Tensor]) -> None:
    """Each ``value`` broadcasts to ``other`` without enlarging it."""
    for i, (a, b) in enumerate(zip(value, other, strict=True)):
        if a.shape == b.shape:
            continue
        fits = a.dim() <= b.dim() and all(x in (1, y) for x, y in zip(reversed(a.shape), reversed(b.shape), strict=False))
        if not fits:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(a.shape)}, which does not broadcast to {other_name}[{i}] of shape {tuple(b.shape)}; "
                "accepted are the same shape, one value per row [m, 1, ...], per column [1, n], or 0-d"
            )


def unit_interval(name: str, value: object) -> float:
    """A Python number in [0, 1]."""
    return _number(name, value, "a number in [0, 1]", "in [0, 1]", 1)


def at_least_zero(name: str, value: object) -> float:
    """A finite Python number that is not negative."""
    return _number(name, value, "a number >= 0", "a finite number >= 0", sys.float_info.max)


def positive(name: str, value: object, most: float = sys.float_info.max) -> float:
    """A finite Python number in (0, most]."""
    accepted = "a finite number > 0" if most == sys.float_info.max else f"in (0, {most:g}]"
    number = _number(name, value, "a number > 0" if most == sys.float_info.max else f"a number in (0, {most:g}]", accepted, most)
    if number == 0:
        raise ValueError(f"{name} must be {accepted}, got {number}")
    return number


def integer(name: str, value: object, below: int) -> int:
    """A Python integer (or one of its symbols under torch.compile) in [0, below), a power of two."""
    accepted = f"an integer in [0, 2^{below.bit_length() - 1})"
    if isinstance(value, torch.SymInt):
        number: int = value  # type: ignore[assignment]
    elif isinstance(value, Tensor) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}")
    else:
        number = int(value)
    if number < 0 or number >= below:
        raise ValueError(f"{name} must be {accepted}, got {number}")
    return number


def _number(name: str, value: object, kind: str, accepted: str, most: float) -> float:
    if isinstance(value, Tensor) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {accepted}, got a number too large for a float") from None
    if not 0 <= number <= most:  # a NaN is not
        raise ValueError(f"{name} must be {accepted}, got {number}")
    return number


def one_device(*named: tuple[str, Sequence[Tensor]]) -> None:
    """All tensors of all lists live on one device: the op's result does."""
    first: tuple[str, torch.device] | None = None
    for name, value in named:
        for i, t in enumerate(value):
            first = first or (f"{name}[{i}]", t.device)
            if t.device != first[1]:
                raise ValueError(f"{name}[{i}] is on {t.device} and {first[0]} is on {first[1]}; one call takes the tensors of one device")


def _span(t: Tensor) -> tuple[int, int]:
    """The half-open range of addresses that a tensor can touch."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _overlaps_itself(t: Tensor) -> bool:
    """Whether two indices may share an element; exact for every view that slicing, transposing and expanding can make."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def no_overlap(
    written_name: str,
    written: Sequence[Tensor],
    read_name: str,
    read: Sequence[Tensor],
    *,
    partners_may_be_equal: bool = True,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """No written tensor shares memory with another tensor, except with its own partner element for element if that is allowed.

    ``labels`` are the names of the tensors of both lists where these are joined from several.

    Views that interleave in one buffer count as sharing: telling them apart would cost a look at every element.
    """
    if any(isinstance(t, FakeTensor) or t.is_meta for t in (*written, *read)):
        return

    def name(writes: bool, i: int) -> str:
        if labels is not None:
            return labels[not writes][i]
        return f"{written_name if writes else read_name}[{i}]"

    spans = []
    for i, w in enumerate(written):
        if not w.numel():
            continue
        if _overlaps_itself(w):
            raise ValueError(f"{name(True, i)} has elements that share memory (strides {w.stride()}); pass a .contiguous() copy")
        spans.append((*_span(w), True, i))
    for i, r in enumerate(read):
        if r.numel() and not (partners_may_be_equal and i < len(written) and _same_view(written[i], r)):
            spans.append((*_span(r), False, i))
    spans.sort()
    # A sweep over the sorted ranges needs the furthest end of writes and of reads seen so far, and nothing else.
    ends: dict[bool, tuple[int, int]] = {}
    for begin, end, writes, i in spans:
        for other_writes, (other_end, j) in ends.items():
            if begin < other_end and (writes or other_writes):
                raise ValueError(
                    f"{name(writes, i)} and {name(other_writes, j)} share memory or interleave in it, so the result could depend on the "
                    "order of writes; pass a copy of one"
                )
        ends[writes] = max(ends.get(writes, (0, 0)), (end, i))


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
