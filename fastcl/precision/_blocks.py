"""What an optimizer drives: the parameters that one precision matrix couples, and the natural step with it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

from torch import Tensor

State = MutableMapping[str, Any]


class Block(Protocol):
    """A block of Lambda. Lists are in the order of ``params``; a gradient that is None leaves its layer as it is.

    ``states`` are the optimizer's dictionaries, one per parameter. The direction of a step is ``V = Lambda^-1 M`` with the dual momentum
    ``M <- momentum M + g + strength Lambda (W - mu)`` (Kao et al. 2021).
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names in the model."""

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The parameters that the model has now, a layer's weight before its bias."""

    def begin(self, states: Sequence[State]) -> None:
        """Make the state of parameters that have none; the momentum is 0, ``pull`` is Lambda (W - mu)."""

    def reset(self, states: Sequence[State]) -> None:
        """After a change of Lambda or mu: momentum 0, ``pull`` <- Lambda (W - mu)."""

    def refresh(self, states: Sequence[State]) -> None:
        """``pull`` <- Lambda (W - mu), after W was written to by others or many steps have rounded."""

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Raises ValueError if this block cannot step with these gradients, whose shapes and kinds fit."""

    def step(self, grads: Sequence[Tensor | None], states: Sequence[State], lr: float, momentum: float, strength: float) -> None:
        """W <- W - lr V."""

    def direction(self, grads: Sequence[Tensor | None], states: Sequence[State], momentum: float, strength: float) -> Tensor:
        """V^T Lambda V, float64 0-d on the device. V and the gradients are kept for :meth:`apply`."""

    def apply(self, states: Sequence[State], step: Tensor) -> None:
        """W <- W - step V, for the V of :meth:`direction`; ``step`` is a float64 0-d tensor on the device."""

    def anchor_(self) -> None:
        """Mu <- W."""

    def anchors(self) -> list[Tensor]:
        """Mu, one tensor per parameter, in its shape; not copied."""

    def set_anchors(self, values: Sequence[Tensor]) -> None:
        """Mu <- the given tensors of the parameters' shapes."""

    def solve_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- Lambda^-1 X, for contiguous tensors of the factors' dtype. None counts as 0."""

    def multiply_(self, tensors: Sequence[Tensor | None]) -> None:
        """X <- Lambda X, as :meth:`solve_`."""

    def quadratic(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """X^T Lambda X: float64, 0-d."""

    def follow(self) -> None:
        """Move to the device of the parameters."""
