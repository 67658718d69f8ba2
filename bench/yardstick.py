"""The yardstick: as many bytes as an op must move, and nothing else.

One flat buffer stands for the op's written list and one for its read list. A sweep reads both and writes the first (xor of raw words, so
that nothing can be skipped and no value can become slow). An op that reads before it sweeps gets a read-only sweep of those bytes first,
and one that writes nothing gets only that. The two buffers are equally long: where an op mixes dtypes the yardstick moves the same number
of bytes, a third of the sweep's written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcl import _native, backends
from fastcl.testing import OpCase

WORD = 64  # bytes: buffers are whole cache lines


@dataclass(frozen=True)
class Traffic:
    """Bytes that one call must move: read without writing, and in the sweep that reads two streams and writes one."""

    read: int
    sweep: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.read + self.sweep


def traffic(case: OpCase, elements: int, dtype: torch.dtype, stored: torch.dtype) -> Traffic:
    """The fewest bytes of one call."""
    sizes = dtype.itemsize, stored.itemsize
    read = case.read_first(*sizes) * elements
    return Traffic(read, int(case.bytes_per_element(*sizes) * elements) - read)


def _words(size: int, device: str) -> Tensor:
    length = -(-size // WORD) * WORD
    # Written once here: the kernel backs untouched pages with one shared page of zeros, which would make reading them free.
    return torch.randint(0, 2**31 - 1, (length // 4,), dtype=torch.int32, device=device)


def native(device: str) -> Any | None:
    """The compiled module that has the yardstick for this device, or None."""
    module = _native.load(backends.NATIVE["cuda" if device == "cuda" else "cpp"])
    return None if isinstance(module, str) or not hasattr(module, "yardstick_") else module


def source(device: str) -> str:
    """Which code sweeps: goes into the results, since a weak yardstick would flatter every op."""
    return "compiled" if native(device) is not None else "torch.bitwise_xor_"


def build(amount: Traffic, device: str) -> Callable[[], object]:
    """A call that moves ``amount`` on ``device``."""
    written, other = _words(amount.sweep // 3, device), _words(amount.sweep // 3, device)
    return over([_words(amount.read, device)] if amount.read else [], written, other)


def over(read: Sequence[Tensor], written: Tensor, other: Tensor, passes: int = 1) -> Callable[[], object]:
    """A call that reads ``read``, ``passes`` times, and then ``other`` and ``written``, which it writes: contiguous, of whole words."""
    module = native(written.device.type)
    bytes_written, bytes_other = [written.view(torch.uint8).view(-1)], [other.view(torch.uint8).view(-1)]
    bytes_read = [t.view(torch.uint8).view(-1) for t in read]

    def compiled() -> None:
        for _ in range(passes if bytes_read else 0):
            module.yardstick_read(bytes_read)
        if written.numel():
            module.yardstick_(bytes_written, bytes_other)

    def plain() -> None:
        for _ in range(passes):
            for t in read:
                t.amax()
        if written.numel():
            bytes_written[0].bitwise_xor_(bytes_other[0])

    if module is None:
        return plain
    _prove(module, bytes_written, bytes_other, bytes_read)
    return compiled


def _prove(module: Any, written: list[Tensor], other: list[Tensor], read: list[Tensor]) -> None:
    """A compiled function answers a refusal instead of raising: a yardstick that refused would look infinitely fast."""
    expected = written[0][:WORD] ^ other[0][:WORD]
    refusals = [module.yardstick_(written, other), module.yardstick_read(read) if read else None]
    refused = [r for r in refusals if isinstance(r, str)]
    if refused or not torch.equal(written[0][:WORD], expected):
        raise RuntimeError(f"the yardstick did not sweep its buffers: {'; '.join(refused) or 'wrong bits'}")
