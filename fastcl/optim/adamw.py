"""AdamW."""

from __future__ import annotations

import numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import ops
from fastcl.ops import _sharded
from fastcl.ops.optimizers import ORDERS
from fastcl.optim import _compact, _saved
from fastcl.optim._base import Swept
from fastcl.optim._binding import Bound
from fastcl.optim._numbers import check_numbers, device_lr
from fastcl.optim._rows import Rows, State
from fastcl.optim.transforms import Transform


class AdamW(Swept):
    r"""AdamW (Loshchilov and Hutter, ICLR 2019) in one sweep, with gradient transforms inside of it.

    A torch.optim.Optimizer with torch.optim.AdamW's state and, without transforms, the operations of its default on the CPU (the loop and
    foreach, which agree; ``fused=True`` has another order), in float32 and float64: the moments' bits are equal, and a step's parameters
    are within one ulp of the update, because torch's own square root is not correctly rounded on every processor, and this one is.
    :func:`fastcl.ops.adamw_` has the formulas.
    State is float32 beside half-precision parameters. A run can change between the two in the middle, by state_dict.

    Not offered: amsgrad, sparse and complex gradients, tensor betas, differentiable steps. Under torch.compile the step runs as it is,
    between two graphs; ``fullgraph=True`` therefore refuses it.

    With GradScaler the step unscales and skips on the device. It may be followed by another step before the host knows.

    Args:
        params: parameters, named parameters, or groups of them, as in torch.optim.
        lr: number >= 0, or a float tensor of one element, which is read on the device and not rounded to the parameters' type.
        betas: two numbers in [0, 1).
        eps: number >= 0; above 0 with ``compact_state``.
        weight_decay: number >= 0.
        decay: "torch", or "hf" for the order of transformers' former AdamW, which Child-Tuning's authors use.
        transforms: of :mod:`fastcl.optim`, applied in their order to the gradient after unscaling and clipping; ``maximize`` comes last.
        compact_state: keep moments only for the elements that the :class:`FixedMask` among the transforms selects: keep times the memory,
            the same bits. It needs exactly one FixedMask, without Project or Pull behind it, whose masks then stay as they are.
            Parameters that are not contiguous keep whole moments. state_dict() has whole moments again, and loads into either form.
        maximize: ascend.
        clip_norm: the gradients are scaled by ``min(1, clip_norm / (norm + 1e-6))``, as torch's clip_grad_norm_ does, with the norm of all
            of them in float64: one sweep that reads, and ``.grad`` itself stays.

    Raises:
        TypeError, ValueError: arguments outside of their ranges; transforms that do not fit the parameters.
    """

    _state_names = frozenset({"step", "exp_avg", "exp_avg_sq"})
    _needed_state = ("step", "exp_avg", "exp_avg_sq")
    _group_keys = ("lr", "betas", "eps", "weight_decay")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decay: str = "torch",
        transforms: Iterable[Transform] = (),
        compact_state: bool = False,
        *,
        maximize: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        if not isinstance(compact_state, bool):
            raise TypeError(f"compact_state must be True or False, got {compact_state!r}")
        self._compact_state = compact_state
        self._children: list[_compact.Child | None] | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "maximize": maximize,
            # torch.optim.AdamW's, which loads our groups
            "amsgrad": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, transforms, clip_norm)

    @property
    def compact_state(self) -> bool:
        """Whether moments are kept for the elements of the masks alone."""
        return self._compact_state

    @compact_state.setter
    def compact_state(self, value: object) -> None:  # noqa: ARG002
        raise AttributeError("compact_state cannot be changed; build a new optimizer with it and load this one's state_dict()")

    def _check_masks(self) -> None:
        if self._children is not None:
            _compact.check_not_written(self._children)

    def _whole_state(self, r: Rows) -> list[bool]:
        return super()._whole_state(r) if self._children is None else [child is None for child in r.pick(self._children)]

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(group, eps="epsilon value", weight_decay="weight_decay value")
        if self.compact_state and group["eps"] == 0:
            raise ValueError("eps must be above 0 with compact_state; 0 gives 0/0 outside of the masks, where whole moments stay zero")
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or any(isinstance(b, Tensor) for b in betas):
            raise TypeError("betas must be a pair of numbers")
        for i, beta in enumerate(betas):
            value: Any = beta  # numbers.Real has no comparisons for the type checker
            if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
                raise TypeError(f"betas[{i}] must be a number, got {type(beta).__name__}")
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        decay = group.get("decay", "torch")
        if not isinstance(decay, str) or decay not in ORDERS:
            raise ValueError(f"decay must be one of {', '.join(ORDERS)}, got {group['decay']!r}")

    def _accept(self, bound: Sequence[Bound], params: Sequence[Tensor]) -> None:
        if self.compact_state:
            known = self._children
            made = _compact.children(self.transforms, bound, params)
            if known is not None:
                _compact.check_not_written(known)
                _compact.check_unchanged(known, made)
            self._children = made

    def _check_loaded(self, states: Mapping[Any, tuple[Tensor, Mapping[str, Any]]]) -> None:
        if self._children is None:
            return
        self._check_masks()
        children = {id(p): child for p, child in zip(self._all(), self._children, strict=True)}
        for key, (p, state) in states.items():
            child = children[id(p)]
            for name in _compact.MOMENTS if child is not None and state else ():
                _compact.check_inside(f"state[{key}][{name!r}] of the state_dict", state[name], child)

    def _incomplete(self, group: dict[str, Any], states: Sequence[State]) -> bool:  # noqa: ARG002
        return not all(states)

    def _begin(
        self,
        group: dict[str, Any],  # noqa: ARG002
        params: Sequence[Tensor],
        local: Sequence[Tensor],
        positions: Sequence[int],
    ) -> None:
        for p, own, at in zip(params, local, positions, strict=True):
            state = self.state[p]
            if state:
                continue
            child = self._children[at] if self._children is not None else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=own.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _saved.zeros(p) if child is None else child.zeros(own)

    def _update(self, rows: Rows, transforms: list[Any], places: list[Any] | None, scale: Tensor | None, found_inf: Tensor | None) -> None:
        group, states = rows.group, rows.states
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        if rows.local is not rows.params:
            first, second = _sharded.shards(first), _sharded.shards(second)
        compact = None
        if self._children is not None:
            children = rows.pick(self._children)
            compact = _compact.lists(children, rows.local)
        beta1, beta2 = group["betas"]
        ops.adamw_(
            rows.local,
            rows.local_grads,
            first,
            second,
            [s["step"] for s in states],
            lr=device_lr(group, rows.local[0]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decay=group["decay"],
            maximize=group["maximize"],
            transforms=transforms,
            places=places,
            compact=compact,
            scale=scale,
            found_inf=found_inf,
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, with whole moments: it loads them. Transforms are not part of it.

        Raises:
            ValueError: with ``compact_state``, a mask has been written to.
        """
        if self._children is None:
            return super().state_dict()
        self._check_masks()
        own = self.state
        places = {id(p): n for n, p in enumerate(self._all())}
        self.state = defaultdict(dict, {p: _compact.spread(s, self._children[places[id(p)]], p) for p, s in own.items()})
        try:
            return super().state_dict()
        finally:
            self.state = own

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: torch's, the transforms, and whether state is compact."""
        return {**super().__getstate__(), "compact_state": self.compact_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle, deepcopy and load_state_dict."""
        self.__dict__.setdefault("_children", None)
        own = dict(state)
        self._compact_state = own.pop("compact_state", self.__dict__.get("_compact_state", False))
        super().__setstate__(own)
        if self._children is not None:
            for p, child in zip(self._all(), self._children, strict=True):
                if child is not None and p in self.state:
                    _compact.gather(self.state[p], child)
