"""What can happen to a gradient inside an optimizer's sweep: settings and the tensors that belong to parameters, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fastcl.bit_mask import BitMask
from fastcl.ops import _checks

# One value per parameter in the optimizer's order, or a mapping from parameters or their names.
Values: TypeAlias = Sequence[Any] | Mapping[Any, Any]


class Transform:
    """What SoftMask, ChildMask, FixedMask, Project and Pull have in common.

    The values that belong to parameters are a sequence with one entry per parameter, in the order of all parameters over all groups, or a
    mapping from parameters (or their names, where the optimizer was given ``named_parameters()``); a parameter that is not in the mapping
    is left out of the transform. The entries are taken when they are assigned: writing *into* the tensors is seen by the next step (but
    for bool masks, which are packed then), replacing entries of the list is not; assign the attribute again for that. Names are those that
    the optimizer was built with: a state_dict does not change them. One transform may serve several optimizers.
    """

    kind: ClassVar[str]
    operands: ClassVar[tuple[str, ...]] = ()  # attributes with a value per parameter
    missing: ClassVar[bool] = False  # None may stand in a sequence

    def __init__(self) -> None:
        self.version = 0  # counts assignments, so that optimizers know when to look again
        self._values: dict[str, Values] = {}

    def values(self, operand: str) -> Values:
        """The entries of an attribute, as they were assigned."""
        return self._values[operand]

    @property
    def active(self) -> bool:
        """Whether there is something to do."""
        return True

    def entry(self, lists: Sequence[list[Tensor]]) -> tuple[Any, ...]:
        """The transform as :func:`fastcl.ops.adamw_` takes it, of lists with one tensor per parameter."""
        return (self.kind, *lists)

    def _assign(self, operand: str, value: object) -> None:
        if isinstance(value, Mapping):
            entries: Any = {key: self._taken(f"{operand}[{key if isinstance(key, str) else 'parameter'}]", t) for key, t in value.items()}
        elif isinstance(value, (list, tuple)):
            entries = tuple(self._taken(f"{operand}[{i}]", t) for i, t in enumerate(value))
        else:
            raise TypeError(f"{operand} must be a list with one entry per parameter or a mapping, got {type(value).__name__}")
        self._values[operand] = entries
        self.version += 1

    def _taken(self, name: str, value: Any) -> Any:
        if value is None and self.missing:
            return None
        if not isinstance(value, Tensor):
            remedy = "; a mapping may leave parameters out" if value is None else ""
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{remedy}")
        return value

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _Operand:
    """An attribute with a value per parameter."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, transform: Any, owner: type | None = None) -> Any:
        return self if transform is None else transform._values[self._name]

    def __set__(self, transform: Any, value: object) -> None:
        transform._assign(self._name, value)


class SoftMask(Transform):
    """``g <- g (1 - strength * I)``, as :func:`fastcl.ops.soft_mask_`.

    Args:
        importance: per parameter a tensor of a shape that broadcasts to it, float64, float32, bfloat16, float16, or uint8 (``u / 255``).
        strength: number in [0, 1].
    """

    kind = "soft_mask"
    operands = ("importance",)
    importance = _Operand()

    def __init__(self, importance: Values, strength: float = 1.0) -> None:
        super().__init__()
        self.importance = importance
        self.strength = strength

    @property
    def strength(self) -> float:
        """How much of the importance counts."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _checks.unit_interval("strength", value)

    def entry(self, lists: Sequence[list[Tensor]]) -> tuple[Any, ...]:
        """As :meth:`Transform.entry`."""
        return (self.kind, *lists, self._strength)


class ChildMask(Transform):
    """``g <- g * Bernoulli(keep) / keep``, as :func:`fastcl.ops.child_mask_`: Child-Tuning-F (Xu et al., EMNLP 2021).

    The draw depends on the seed, the parameter's position among all parameters of the optimizer, the element's index in the whole parameter
    and the number of steps made with it (0 in the first one), and on nothing else.

    Args:
        keep: number in (0, 1].
        seed: integer in [0, 2^64).
    """

    kind = "child_mask"

    def __init__(self, keep: float, seed: int) -> None:
        super().__init__()
        self.keep = keep
        self.seed = seed

    @property
    def keep(self) -> float:
        """The probability of an element to be kept."""
        return self._keep

    @keep.setter
    def keep(self, value: float) -> None:
        self._keep = _checks.positive("keep", value, 1)

    @property
    def seed(self) -> int:
        """What the draws begin with."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = _checks.integer("seed", value, 1 << 64)

    def entry(self, lists: Sequence[list[Tensor]]) -> tuple[Any, ...]:
        """As :meth:`Transform.entry`."""
        return (self.kind, *lists, self._keep, self._seed)


class FixedMask(Transform):
    """``g <- g`` where the mask is set, else 0, as :func:`fastcl.ops.bit_mask_`: Child-Tuning-D (Xu et al., EMNLP 2021).

    Args:
        masks: per parameter a :class:`fastcl.BitMask` or a bool tensor of its shape, or None for a parameter that is always updated.
    """

    kind = "fixed_mask"
    operands = ("masks",)
    missing = True
    masks = _Operand()

    def __init__(self, masks: Values) -> None:
        super().__init__()
        self.masks = masks

    def _taken(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, BitMask):
            return value
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a BitMask, a bool tensor or None, got {given}")
        return BitMask.from_bool(value)


class Project(Transform):
    """A-GEM's projection: ``g <- g - (g.r)/(r.r) r`` if ``g.r < 0``, as :func:`fastcl.ops.project_`, jointly over all parameters.

    One sweep makes both products; the rest rides on the optimizer's. A missing gradient whose reference is there counts as zero and is
    updated, as by :func:`fastcl.project_gradients_`.

    Args:
        reference: per parameter a tensor of its shape or None for zero, as :func:`fastcl.capture_gradients` gives it; None: no projection.
            Assign ``reference`` before each step.
    """

    kind = "project"
    operands = ("reference",)
    missing = True

    def __init__(self, reference: Values | None = None) -> None:
        super().__init__()
        self.reference = reference

    @property
    def reference(self) -> Values | None:
        """The gradient on the memory."""
        return self._values.get("reference")

    @reference.setter
    def reference(self, value: Values | None) -> None:
        if value is None:
            self._values.pop("reference", None)
            self.version += 1
        else:
            self._assign("reference", value)

    @property
    def active(self) -> bool:
        """Whether there is a reference."""
        return "reference" in self._values


class Pull(Transform):
    """``g <- g + 2 * strength * A (p - c)``, as :func:`fastcl.ops.ewc_pull_`: EWC's quadratic pull towards ``c``.

    Args:
        precision: per parameter ``A``, a tensor of its shape.
        anchor: per parameter ``c``, a tensor of its shape.
        strength: finite number >= 0.
    """

    kind = "pull"
    operands = ("precision", "anchor")
    precision = _Operand()
    anchor = _Operand()

    def __init__(self, precision: Values, anchor: Values, strength: float) -> None:
        super().__init__()
        self.precision = precision
        self.anchor = anchor
        self.strength = strength

    @property
    def strength(self) -> float:
        """How hard it pulls."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _checks.at_least_zero("strength", value)

    def entry(self, lists: Sequence[list[Tensor]]) -> tuple[Any, ...]:
        """As :meth:`Transform.entry`."""
        return (self.kind, *lists, self._strength)
