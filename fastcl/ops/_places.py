"""Where tensors lie in their whole parameters: (tensor index, offset, strides) for each, see :mod:`fastcl.reference.child_mask`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastcl.ops import _sharded
from fastcl.reference.child_mask import Place, row_major


def whole(tensors: Sequence[Tensor]) -> list[Place]:
    """Each is a parameter, and its position is its index."""
    return [(i, 0, row_major(t.shape)) for i, t in enumerate(tensors)]


def flat(places: Sequence[Place] | None) -> list[int]:
    """As the dispatcher takes them: index, offset and strides one after the other; nothing for None."""
    return [n for index, offset, strides in places or () for n in (index, offset, *strides)]


def unflat(numbers: Sequence[int], tensors: Sequence[Tensor]) -> list[Place] | None:
    """The reverse of :func:`flat`. Raises ValueError where the numbers are not those of the tensors."""
    if not numbers:
        return None
    if len(numbers) != sum(2 + t.dim() for t in tensors):
        raise ValueError(f"places has {len(numbers)} numbers; a tensor index, an offset and the strides of each tensor were expected")
    out: list[Place] = []
    at = 0
    for t in tensors:
        index, offset, *strides = numbers[at : at + 2 + t.dim()]
        if not 0 <= index < 2**32 or offset < 0 or any(s < 0 for s in strides):
            raise ValueError(
                f"places holds ({index}, {offset}, {strides}); accepted are an index below 2^32 and numbers that are not negative"
            )
        out.append((index, offset, strides))
        at += 2 + t.dim()
    return out


def signed(seed: int) -> int:
    """The dispatcher's integers are signed."""
    return seed - 2**64 if seed >= 2**63 else seed


def unsigned(seed: int) -> int:
    """The reverse of :func:`signed`."""
    return seed % 2**64


def of_shards(name: str, tensors: Sequence[Tensor], indices: Sequence[int] | None = None) -> list[Place]:
    """The places of this rank's memory of every tensor; a plain tensor is whole. Indices: by default the positions in the list.

    Raises:
        TypeError: a Partial placement.
        ValueError: two meshes, this process is not part of the mesh, or a shard that does not lie in one piece (FSDP2 over tensor
            parallelism along the same dimension).
    """
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if _sharded.is_sharded(tensors):
        _sharded.mesh_of((name, tensors))
    out: list[Place] = []
    for i, t in enumerate(tensors):
        index = i if indices is None else indices[i]
        strides = row_major(t.shape)
        offset = 0
        if isinstance(t, DTensor):
            for p in t.placements:
                if not p.is_replicate() and type(p) is not Shard:
                    raise ValueError(
                        f"{name}[{i}] has the placements {t.placements}; accepted are Shard and Replicate: where in the parameter the "
                        f"elements of a {type(p).__name__} lie is not one piece; call it on {name}[{i}].redistribute(placements=[...])"
                    )
            _, starts = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
            offset = sum(start * stride for start, stride in zip(starts, strides, strict=True)) if _holds(t) else 0
        out.append((index, offset, strides))
    return out


def _holds(t: Tensor) -> bool:
    return _sharded.shards([t])[0].numel() > 0
