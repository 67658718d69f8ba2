"""Accumulated importance: element-wise maximum, and SPG's importance from gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _checks, _dispatch, _sharded
from fastcl.reference.importance import fisher_coefficients


def emax_(importance: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Accumulate importance by element-wise maximum, in place: ``I <- max(I, new)``.

    SPG's and DAS's EMax (Konishi et al., ICML 2023, eq. 3; Ke et al., ICLR 2023, eq. 5). NaN propagates, as in torch.maximum.
    Floating storage rounds to nearest. uint8 stores the smallest ``u`` with ``u / 255 >= max(I, new)``, so that protection never
    weakens; it saturates at 0 and 255, and NaN is stored as 255. DTensors as in :func:`fastcl.ops.soft_mask_`.

    Args:
        importance: list of dense tensors, float64, float32, bfloat16, float16 or uint8 (``I = u / 255``), any strides; written.
        new: one tensor per element of ``importance``, on its device, of its shape or broadcasting to it; the same dtypes.

    Raises:
        TypeError: not a list of dense tensors, a dtype that is not accepted, a plain tensor beside a DTensor, a Partial placement.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, a written tensor that requires grad
            while autograd records. Nothing has been written then.
    """
    if _dispatch.traced() or _dispatch.gate("emax_", importance, new) is _dispatch.REFUSED:
        _checks.listed("importance", importance)
        _checks.listed("new", new)
        if _sharded.is_sharded(importance, new):
            _sharded.elementwise(emax_, "importance", importance, "new", new)
            return
        torch.ops.fastcl.emax_(importance, new)


def _check_emax(importance: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    _checks.dense("importance", importance, _checks.STORED)
    _checks.not_recorded("importance", importance)
    _checks.dense("new", new, _checks.STORED)
    _checks.same_length("new", new, "importance", importance)
    _checks.same_device("new", new, "importance", importance)
    _checks.broadcasts("new", new, "importance", importance)
    _checks.no_overlap("importance", importance, "new", new)


def _run_emax(importance: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    if _dispatch.gate("emax_", importance, new) is not _dispatch.REFUSED:
        return
    _check_emax(importance, new)
    for device, (i, n) in _dispatch.by_device(importance, new):
        _dispatch.run("emax_", device, i, n)


_dispatch.define("emax_", "importance", "(Tensor(a!)[] importance, Tensor[] new) -> ()", implementation=_run_emax, fake=_check_emax)


def fisher_add_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0, max_norm: float | None = None) -> None:
    """Accumulate the diagonal of the empirical Fisher information, in place: ``F <- F + weight * (c g)^2``.

    Child-Tuning-D's and EWC's estimate (Xu et al., EMNLP 2021, eq. 5; Kirkpatrick et al., PNAS 2017), with weight 1 / N over N examples or
    batches. With ``max_norm``, every tensor is clipped by its own norm first, as the authors of Child-Tuning do::

        c = min(1, max_norm / (||g|| + 1e-6))          the coefficient of torch.nn.utils.clip_grad_norm_

    The gradients are not written. The norm is summed in float64 in an order that does not depend on the number of threads; a tensor whose
    norm is NaN becomes NaN. The coefficient is computed in float64; elements in float64 if the pair holds a float64 tensor, else in
    float32, as ``x = g * c; F + weight * (x * x)`` without contraction, rounded once to ``F``'s dtype. The op is not differentiable.

    Of DTensors the norm is that of the whole tensor, over all ranks of the mesh: one collective with a number per tensor, which every rank
    has to call; without ``max_norm`` there is none. Gradients are placed as ``fisher`` is.

    Args:
        fisher: list of dense tensors, float64, float32, bfloat16 or float16, any strides; written. They may not share memory.
        grads: one tensor per element of ``fisher``, of its shape, on its device; the same dtypes.
        weight: finite number >= 0.
        max_norm: finite number > 0, or None: no clipping.

    Raises:
        TypeError: not lists of dense tensors, a dtype that is not accepted, a number of another type, a plain tensor beside a DTensor, a
            Partial placement.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, numbers outside their ranges, a written
            tensor that requires grad while autograd records. Nothing has been written then.
    """
    if _dispatch.traced() or _dispatch.gate("fisher_add_", fisher, grads, weight, max_norm) is _dispatch.REFUSED:
        _checks.listed("fisher", fisher)
        _checks.listed("grads", grads)
        weight = _checks.at_least_zero("weight", weight)
        if max_norm is not None:
            max_norm = _checks.positive("max_norm", max_norm)
        if _sharded.is_sharded(fisher, grads):
            if max_norm is None:
                _checks.same_length("grads", grads, "fisher", fisher)
                _checks.same_shape("grads", grads, "fisher", fisher)
                _sharded.elementwise(lambda f, g: fisher_add_(f, g, weight), "fisher", fisher, "grads", grads)
            else:
                _sharded_fisher(fisher, grads, weight, max_norm)
            return
        torch.ops.fastcl.fisher_add_(fisher, grads, weight, max_norm)


def _check_fisher(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0, max_norm: float | None = None) -> None:
    _checks.dense("fisher", fisher, _checks.FLOATING)
    _checks.not_recorded("fisher", fisher)
    _checks.dense("grads", grads, _checks.FLOATING)
    _checks.same_length("grads", grads, "fisher", fisher)
    _checks.same_device("grads", grads, "fisher", fisher)
    _checks.same_shape("grads", grads, "fisher", fisher)
    _checks.at_least_zero("weight", weight)
    if max_norm is not None:
        _checks.positive("max_norm", max_norm)
    _checks.no_overlap("fisher", fisher, "grads", grads)


def _run_fisher(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0, max_norm: float | None = None) -> None:
    if _dispatch.gate("fisher_add_", fisher, grads, weight, max_norm) is not _dispatch.REFUSED:
        return
    _check_fisher(fisher, grads, weight, max_norm)
    for device, (f, g) in _dispatch.by_device(fisher, grads):
        _dispatch.run("fisher_add_", device, f, g, weight, max_norm)


_dispatch.define(
    "fisher_add_",
    "importance",
    "(Tensor(a!)[] fisher, Tensor[] grads, float weight=1.0, float? max_norm=None) -> ()",
    implementation=_run_fisher,
    fake=_check_fisher,
)


@_sharded.outside_graphs
def _sharded_fisher(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, max_norm: float) -> None:
    """The op on shards: squares of what this rank counts, those of all ranks together, and with them this rank's own update."""
    _sharded.check_apart("fisher", fisher)
    _checks.not_recorded("fisher", fisher)
    _checks.same_length("grads", grads, "fisher", fisher)
    _checks.one_device(("fisher", fisher), ("grads", grads))
    _checks.same_shape("grads", grads, "fisher", fisher)
    _sharded.check_matching("grads", grads, "fisher", fisher, one_element=False)
    mesh = _sharded.mesh_of(("fisher", fisher), ("grads", grads))
    f, g = ([_dispatch.plain(t) for t in _sharded.shards(tensors)] for tensors in (fisher, grads))
    _check_fisher(f, g, weight, max_norm)
    counted = _sharded.counted(grads, mesh)
    squares = torch.zeros(len(g), dtype=torch.float64, device=g[0].device)
    members = [i for i, t in enumerate(g) if t.numel() and counted[i]]
    if members:
        squares[members] = _dispatch.run_reading("fisher_squares", squares.device, [g[i] for i in members])
    coefficients = fisher_coefficients(_sharded.all_reduce_sum(squares, mesh), max_norm)
    _dispatch.run("fisher_update_", squares.device, f, g, weight, coefficients)
    _sharded.bump_versions(fisher)


def spg_importance_(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:
    """Turn a task's gradients into SPG importance and accumulate it, in place.

    For every tensor and head, over all elements of that tensor (Konishi et al., ICML 2023, eqs. 1 to 3)::

        h   = | tanh((g - mean g) / std g) |        std unbiased (n - 1)
        a  <- max(a, max over heads of h)

    A tensor whose standard deviation is 0 (constant, all zero, one element) gets importance 0, where the authors' code divides 0 by 0;
    so does a float64 tensor whose variance leaves double's range (standard deviation below 1e-162 or above 1e154).
    A tensor with a NaN or an Inf gets NaN in all its elements. Mean and variance are accumulated in float64 in a fixed order: the
    result does not depend on the number of threads.

    Of DTensors mean, std and the returned mean are those of the whole tensors, over all ranks of the mesh, and do not depend on the number
    of ranks beyond float64's rounding; each rank updates its own shard. Of what is replicated (a plain tensor in such a list too) one rank
    counts. Two collectives, of some numbers per tensor; every rank of the mesh has to call the op, with gradients placed as
    ``accumulated`` is.

    Args:
        accumulated: list of dense tensors, float64, float32, bfloat16, float16 or uint8 (``a = u / 255``, rounded up), any strides;
            written.
        grads_by_head: for each head one list of gradients, each with the shapes and devices of ``accumulated``; float64, float32,
            bfloat16 or float16, any strides. No head leaves ``accumulated`` as it is.

    Returns:
        The mean of ``accumulated`` over all elements of all tensors after the update: 0-d, float64, on the device of its first tensor
        (0 if there is no element). SPG scales the heads' gradients by ``1 -`` this value; it can be passed to :func:`soft_mask_` as it
        is, without a host sync. A plain tensor with the same bits on all ranks where the list holds DTensors.

    Raises:
        TypeError: not lists of dense tensors, a dtype that is not accepted, a plain tensor beside a DTensor, a Partial placement.
        ValueError: lengths, shapes, devices, meshes or placements that do not fit, shared memory, a written tensor that requires grad
            while autograd records. Nothing has been written then.
    """
    _checks.listed("accumulated", accumulated)
    if not isinstance(grads_by_head, (list, tuple)):
        raise TypeError(f"grads_by_head must be a list with one list of tensors per head, got {type(grads_by_head).__name__}")
    for h, head in enumerate(grads_by_head):
        name = f"grads_by_head[{h}]"
        _checks.listed(name, head)
        _checks.same_length(name, head, "accumulated", accumulated)
    if _sharded.is_sharded(accumulated, *grads_by_head):
        return _sharded_spg(accumulated, grads_by_head)
    mean: Tensor = torch.ops.fastcl.spg_importance_(accumulated, [g for head in grads_by_head for g in head], len(grads_by_head))
    return mean


def _heads(accumulated: Sequence[Tensor], grads: Sequence[Tensor], heads: int) -> list[Sequence[Tensor]]:
    n = len(accumulated)
    return [grads[h * n : (h + 1) * n] for h in range(heads)]


def _check_spg(accumulated: Sequence[Tensor], grads: Sequence[Tensor], heads: int) -> list[Sequence[Tensor]]:
    _checks.dense("accumulated", accumulated, _checks.STORED)
    _checks.not_recorded("accumulated", accumulated)
    if heads < 0 or len(grads) != heads * len(accumulated):
        raise ValueError(f"grads has {len(grads)} tensors; {heads} heads of {len(accumulated)} tensors were announced")
    by_head = _heads(accumulated, grads, heads)
    for h, head in enumerate(by_head):
        name = f"grads_by_head[{h}]"
        _checks.dense(name, head, _checks.FLOATING)
        _checks.same_device(name, head, "accumulated", accumulated)
        _checks.same_shape(name, head, "accumulated", accumulated)
        # Not even its own partner: the heads are read after the first of them has been written.
        _checks.no_overlap("accumulated", accumulated, name, head, partners_may_be_equal=False)
    return by_head


def _run_spg(accumulated: Sequence[Tensor], grads: Sequence[Tensor], heads: int) -> Tensor:
    by_head = _check_spg(accumulated, grads, heads)
    count = max(1, sum(a.numel() for a in accumulated))
    mean = torch.zeros((), dtype=torch.float64, device=accumulated[0].device if accumulated else "cpu")
    for device, (a, *columns) in _dispatch.by_device(accumulated, *by_head):
        part = _dispatch.run("spg_importance_", device, a, columns)
        mean += (part * (sum(t.numel() for t in a) / count)).to(mean.device)
    return mean


def _fake_spg(accumulated: Sequence[Tensor], grads: Sequence[Tensor], heads: int) -> Tensor:
    _check_spg(accumulated, grads, heads)
    return torch.empty((), dtype=torch.float64, device=accumulated[0].device if accumulated else "cpu")


_dispatch.define(
    "spg_importance_",
    "importance",
    "(Tensor(a!)[] accumulated, Tensor[] grads, int heads) -> Tensor",
    implementation=_run_spg,
    fake=_fake_spg,
)


@_sharded.outside_graphs
def _sharded_spg(accumulated: Sequence[Tensor], grads_by_head: Sequence[Sequence[Tensor]]) -> Tensor:
    """The op on shards: moments of what this rank holds, those of all ranks together, and with them this rank's second sweep."""
    named = [(f"grads_by_head[{h}]", head) for h, head in enumerate(grads_by_head)]
    _sharded.check_apart("accumulated", accumulated, *named)
    mesh = _sharded.mesh_of(("accumulated", accumulated), *named)
    _checks.not_recorded("accumulated", accumulated)
    _checks.one_device(("accumulated", accumulated), *named)
    for name, head in named:
        _checks.same_shape(name, head, "accumulated", accumulated)
        _sharded.check_matching(name, head, "accumulated", accumulated, one_element=False)
    stored = [_dispatch.plain(t) for t in _sharded.shards(accumulated)]
    heads = [[_dispatch.plain(t) for t in _sharded.shards(head)] for name, head in named]
    _check_spg(stored, [g for head in heads for g in head], len(heads))
    device = stored[0].device
    counted = _sharded.counted(accumulated, mesh)
    moments = _own_moments(stored, heads, counted)
    if heads:
        moments = _whole_moments(_sharded.all_gather(moments, mesh))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for counts in (True, False):
        members = [i for i, t in enumerate(stored) if t.numel() and counted[i] == counts]
        if members:
            s, *columns = ([column[i] for i in members] for column in (stored, *heads))
            mean = _dispatch.run("spg_update_", device, s, columns, [_rows(moments, members)])
            if counts:
                total += mean * sum(t.numel() for t in s)
    _sharded.bump_versions(accumulated)
    return _sharded.all_reduce_sum(total, mesh) / max(1, sum(t.numel() for t in accumulated))


def _rows(moments: Tensor, members: Sequence[int]) -> Tensor:
    columns = moments.unbind(1)
    return torch.stack([columns[i] for i in members], 1)


def _own_moments(stored: Sequence[Tensor], heads: Sequence[Sequence[Tensor]], counted: Sequence[bool]) -> Tensor:
    """[heads, tensors, 4]; a row of zeros where this rank has nothing to count."""
    none = torch.zeros(len(heads), 4, dtype=torch.float64, device=stored[0].device)
    members = [i for i, t in enumerate(stored) if t.numel() and counted[i]]
    columns = [none] * len(stored)
    if members and heads:
        s, *h = ([column[i] for i in members] for column in (stored, *heads))
        rows = _dispatch.run_reading("spg_moments", none.device, s, h)
        for i, row in zip(members, rows.unbind(1), strict=True):
            columns[i] = row
    return torch.stack(columns, 1)


def _whole_moments(parts: Tensor) -> Tensor:
    """From the moments of every rank's part, [ranks, heads, tensors, 4], those of the whole tensors.

    They are relative to the first part's shift, as every part's are to its own: large means cancel before anything is squared.
    """
    shift, count, mean, m2 = parts.unbind(-1)
    there = count > 0
    first = there & (there.cumsum(0) == 1)
    base = shift.where(first, 0).sum(0)
    off = ((shift - base) + mean).where(there, 0)
    elements = count.sum(0)
    rest = (count * off).sum(0) / elements.clamp(min=1)
    squares = (m2 + count * (off - rest) ** 2).where(there, 0).sum(0)
    return torch.stack([base, elements, rest, squares], -1)
