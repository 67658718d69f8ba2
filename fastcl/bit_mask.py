"""One bit per element: which parts of a parameter are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.reference.bit_mask import pack, set_bits, unpack

RANK_BLOCK = 2048  # elements


class BitMask:
    """A mask of 1 bit per element, for a tensor of one shape.

    Element e of the tensor, counted row by row, is bit ``e & 7`` of byte ``e >> 3`` of ``bits``; the spare bits of the last byte are zero.
    Of a DTensor it holds the bits of this rank's shard, with the mesh and the placements.

    Args:
        bits: uint8, contiguous, [ceil(n / 8)] for the n elements (of this rank's shard).
        shape: the whole tensor's shape.
        like: the DTensor whose mesh and placements the mask has; None for a plain tensor.

    Raises:
        TypeError: ``bits`` is no uint8 tensor.
        ValueError: ``bits`` does not fit the shape.
    """

    __hash__ = None  # type: ignore[assignment]  # compared by value, and its bits may change

    def __init__(self, bits: Tensor, shape: Sequence[int], *, like: Tensor | None = None) -> None:
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
            given = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
            raise TypeError(f"bits must be a uint8 tensor, got {given}; BitMask.from_bool takes a bool tensor")
        self._mesh: Any = None if like is None else like.device_mesh  # type: ignore[attr-defined]
        self._placements: Any = None if like is None else like.placements  # type: ignore[attr-defined]
        self._shape = torch.Size(shape)
        self._local_shape = self._shape if like is None else like._local_tensor.shape  # type: ignore[attr-defined]
        wanted = (-(-self._local_shape.numel() // 8),)
        if bits.shape != wanted or not bits.is_contiguous():
            raise ValueError(
                f"bits has shape {tuple(bits.shape)}; a mask for a tensor of shape {tuple(self._local_shape)} takes contiguous "
                f"bits of shape {wanted}"
            )
        self._bits = bits
        self._ranks: tuple[int, Tensor] | None = None

    @classmethod
    def from_bool(cls, mask: Tensor) -> BitMask:
        """Pack a bool tensor (or DTensor, each rank its own shard) of any strides.

        Raises:
            TypeError: ``mask`` is no dense bool tensor.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout != torch.strided:
            given = f"{mask.layout} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a dense bool tensor, got {given}")
        with torch.no_grad():
            return cls(pack(_local(mask)), mask.shape, like=mask if _is_dtensor(mask) else None)

    @property
    def bits(self) -> Tensor:
        """The packed bits, uint8 [ceil(n / 8)]: this rank's."""
        return self._bits

    @property
    def shape(self) -> torch.Size:
        """The masked tensor's shape: of a DTensor the whole one's."""
        return self._shape

    @property
    def local_shape(self) -> torch.Size:
        """The shape of what this rank holds of the masked tensor."""
        return self._local_shape

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self._bits.device

    @property
    def placements(self) -> tuple[Any, ...] | None:
        """The DTensor placements; None for the mask of a plain tensor."""
        return self._placements  # type: ignore[no-any-return]

    @property
    def device_mesh(self) -> Any:
        """The mesh of a DTensor's mask; None for the mask of a plain tensor."""
        return self._mesh

    @property
    def ranks(self) -> Tensor:
        """How many bits are set before each block of 2048 elements: int64 [ceil(n / 2048)], for this rank's bits.

        Kept until ``bits`` is written to.
        """
        if self._ranks is None or self._ranks[0] != self._version() or self._bits.is_inference():
            counts = set_bits(self._bits, RANK_BLOCK // 8)
            self._ranks = self._version(), counts.cumsum(0) - counts
        return self._ranks[1]

    def _version(self) -> int:
        return -1 if self._bits.is_inference() else self._bits._version

    def count(self) -> Tensor:
        """The number of set bits: 0-d, int64, on the device; no host sync. Of a DTensor's mask that of the whole one: one collective."""
        own = set_bits(self._bits, RANK_BLOCK // 8).sum()
        if self._mesh is None:
            return own
        from fastcl.ops import _sharded

        return _sharded.all_reduce_sum(own * _sharded.counted([self._dtensor(self._bits)], self._mesh)[0], self._mesh)

    def to_bool(self) -> Tensor:
        """The mask as a bool tensor: a DTensor if it was made of one."""
        own = unpack(self._bits, self._local_shape.numel()).view(self._local_shape)
        return own if self._mesh is None else self._dtensor(own)

    def _dtensor(self, own: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self._shape, device="meta").stride()
        return DTensor.from_local(own, self._mesh, self._placements, run_check=False, shape=self._shape, stride=stride)

    def to(self, device: torch.device | str) -> BitMask:
        """The mask on ``device``; itself if it is there.

        Raises:
            ValueError: the mask belongs to a DTensor, whose mesh says where it is.
        """
        moved = self._bits.to(device)
        if moved is self._bits:
            return self
        if self._mesh is not None:
            raise ValueError(f"device is {device} and the mask belongs to a DTensor on {self.device}: a mesh does not move")
        return BitMask(moved, self._shape)

    def clone(self) -> BitMask:
        """A mask with bits of its own."""
        other = copy.copy(self)
        other._bits, other._ranks = self._bits.clone(), None
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> BitMask:
        """A copy of the bits; the mesh is shared."""
        other = self.clone()
        memo[id(self)] = other
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is worked out again."""
        return {**self.__dict__, "_ranks": None}

    def __eq__(self, other: object) -> bool:
        """Whether shape, placements, device and all (of this rank's) bits are equal; waits for the device."""
        if not isinstance(other, BitMask):
            return NotImplemented
        same = self._shape == other._shape and self._placements == other._placements and self.device == other.device
        return same and torch.equal(self._bits, other._bits)

    def __repr__(self) -> str:
        placed = "" if self._mesh is None else f", placements={self._placements}"
        return f"BitMask(shape={tuple(self._shape)}, device={self.device}{placed})"

    def to_tensors(self, prefix: str = "mask") -> dict[str, Tensor]:
        """The mask as named tensors, for safetensors: ``<prefix>.bits`` and ``<prefix>.shape`` (int64). Views of the mask's own bits.

        Raises:
            ValueError: the mask belongs to a DTensor; save ``BitMask.from_bool(mask.to_bool().full_tensor())``.
        """
        if self._mesh is not None:
            raise ValueError("the mask belongs to a DTensor; save BitMask.from_bool(mask.to_bool().full_tensor())")
        return {f"{prefix}.bits": self._bits, f"{prefix}.shape": torch.tensor(self._shape, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "mask") -> BitMask:
        """What :meth:`to_tensors` has named, as a mask again.

        Raises:
            KeyError: a name is missing.
            TypeError, ValueError: the tensors are no mask, or spare bits are set.
        """
        for name in (f"{prefix}.bits", f"{prefix}.shape"):
            if name not in tensors:
                raise KeyError(f"tensors has no {name!r}; a mask is saved as '{prefix}.bits' and '{prefix}.shape'")
        shape = tensors[f"{prefix}.shape"]
        if shape.dtype != torch.int64 or shape.dim() != 1 or bool((shape < 0).any()):
            raise ValueError(f"tensors[{prefix + '.shape'!r}] must be a list of sizes, int64 [dimensions]")
        mask = cls(tensors[f"{prefix}.bits"], shape.tolist())
        spare = -mask._shape.numel() % 8
        if spare and bool(mask._bits[-1] >> (8 - spare)):
            raise ValueError(f"tensors[{prefix + '.bits'!r}] has bits set beyond the {mask._shape.numel()} elements of the shape")
        return mask


def _is_dtensor(t: Tensor) -> bool:
    from fastcl.ops import _sharded

    return _sharded.is_sharded([t])


def _local(t: Tensor) -> Tensor:
    if not _is_dtensor(t):
        return t
    from fastcl.ops import _sharded

    return _sharded.local("mask", [t])[0]
