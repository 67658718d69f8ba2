"""What every precision matrix of a model offers: its blocks, the Fisher information of a task, and products with Lambda."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastcl import _distributed
from fastcl._model import check_unchanged, some
from fastcl._state import Stateful
from fastcl.precision import _saved
from fastcl.precision._blocks import Block
from fastcl.precision._collect import Collection
from fastcl.precision._factors import Damping, Pair
from fastcl.precision._labels import checked_words
from fastcl.precision._layers import discover
from fastcl.precision._numbers import at_least_zero, positive
from fastcl.precision._squares import of as squares_of
from fastcl.precision._statistics import FactorSums, Statistic, Sums
from fastcl.precision._vectors import named_copies


class Common(NamedTuple):
    """The part of a state that all forms have."""

    n_data: float
    changes: int
    damping: Damping | None
    anchors: list[Tensor]


Values = TypeVar("Values", bound=Mapping[str, Tensor] | Sequence[Tensor | None])
RULES = ("kl", "pi", "frobenius")


class Precision(Stateful, abc.ABC):
    """Lambda, the precision of a Gaussian posterior N(mu, Lambda^-1) over the trainable parameters.

    Everything is per datum: the prior is ``Lambda_0 = I / n_data`` with ``mu_0 = 0``, and a task adds its Fisher information, a mean over
    samples. See :meth:`collect` for what a sample's part is.
    """

    def __init__(self, model: nn.Module, n_data: float, layers: Sequence[str] | None) -> None:
        self._n_data = positive("n_data", n_data)
        _distributed.prepare(model)
        self._model = model
        self._layout = discover(_distributed.unwrapped(model), layers)
        found = [*(slot for layer in self._layout.layers for slot in layer.slots), *(d.slot for d in self._layout.diagonal)]
        by_name = {slot.name: slot for slot in found}
        self._slots = [by_name[name] for name in self._layout.report]
        if empty := [slot.name for slot in self._slots if not slot.parameter().numel()]:
            raise ValueError(f"{some(empty)} of the model: no elements; freeze or remove parameters of size 0")
        self._version = 0
        self._damping: Damping | None = None
        self._sums: Sums | None = None
        self._collecting = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: it is outside of any block of :meth:`collect`."""
        return {**self.__dict__, "_collecting": False}

    @property
    def model(self) -> nn.Module:
        """The module whose parameters this is about."""
        return self._model

    @property
    def n_data(self) -> float:
        """The number of data of a task, N."""
        return self._n_data

    @property
    def version(self) -> int:
        """Counts the changes of Lambda and mu, which an optimizer's state depends on."""
        return self._version

    @property
    def report(self) -> dict[str, str]:
        """What happens to each trainable parameter, by its name: whose Kronecker factors it has, or why a diagonal."""
        return dict(self._layout.report)

    @property
    @abc.abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """What optimizers step through: every trainable parameter is in exactly one block."""

    @abc.abstractmethod
    def _merge(self, sums: Sums, rule: str, weight: float) -> None:
        """Lambda <- Lambda + weight F, or raise and change nothing."""

    @abc.abstractmethod
    def _damp(self, damping: Damping | None) -> None:
        """Solve with this damping from now on, or raise and change nothing."""

    @property
    def damping(self) -> Damping | None:
        """What is added to Lambda before it is inverted, None or a pair.

        * ``("exact", alpha)``: ``Lambda + alpha I``, for a layer solved in the eigenbasis of its two factors.
        * ``("pi", alpha)``: ``A + alpha pi I`` and ``G + alpha / pi I`` with ``pi = sqrt((tr A / n) / (tr G / m))`` (Martens and Grosse
          2015, arXiv 1503.05671, section 6.3, whose ``sqrt(lambda + eta)`` is this alpha). The two differ, directions included.

        A diagonal becomes ``D + alpha`` with either. Products and norms are those of the damped matrix; merging starts from the undamped
        one. Setting it factorises, as :meth:`merge_` does; it raises ValueError, and changes nothing, if that fails.
        """
        return self._damping

    @damping.setter
    def damping(self, value: Damping | None) -> None:
        checked = _damping(value)
        self._follow()
        self._damp(checked)
        self._damping = checked
        self._version += 1

    @contextlib.contextmanager
    def collect(
        self, fisher: str = "sample", *, sequence: str = "expand", reduction: str = "sum", seed: int | None = None
    ) -> Iterator[Collection]:
        """Forward and backward passes within the block feed the Fisher information of the task, which :meth:`merge_` then adds.

        Example::

            model.eval()
            with precision.collect() as fisher:
                for x, _ in loader:
                    fisher.backward(model(x))
            precision.merge_()
            precision.anchor_()

        One backward pass per batch. Per datum, for N samples with T positions each (of a sequence, of a convolution's output, calls of a
        module within one forward pass; a Linear layer on [N, in] has T = 1), inputs ``a`` with a last 1 for the bias, and gradients ``g``
        of a sample's own loss with respect to the layer's output before any activation function:

        * ``sequence="expand"``: ``A = 1/N sum_{n,t} a a^T``, ``G = 1/(N T) sum_{n,t} g g^T``;
        * ``sequence="reduce"``: ``A = 1/N sum_n a_n a_n^T``, ``G = 1/N sum_n g_n g_n^T`` with ``a_n`` the mean over t and ``g_n`` the sum

        (Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", NeurIPS 2023, arXiv
        2311.00636). With T = 1 both are those of Martens and Grosse 2015. Diagonals are means over samples of squared gradients.

        * ``fisher="sample"``: labels are drawn from the model's softmax;
        * ``fisher="exact"``: the expectation over the labels, as many backward passes per batch as there are classes;
        * ``fisher="empirical"``: the true labels, which is not the Fisher information of the model's distribution.

        Use a mode in which samples do not meet: batch normalisation in train mode mixes them (and a batch of one raises). What a block that
        raises has collected is dropped; blocks before it keep theirs, and so does Lambda. With several processes the sums over all
        ranks' samples are taken when the block ends.

        Args:
            fisher: "sample", "exact" or "empirical".
            sequence: "expand" or "reduce".
            reduction: whether a loss whose ``backward()`` is called by hand is the "sum" or the "mean" over the samples of the batch.
                :meth:`Collection.backward` needs no such word.
            seed: of the drawn labels; None takes a seed from torch's global generator.

        Raises:
            TypeError, ValueError: other words; a model that has changed since; at the end of the block a NaN or Inf in an activation or
                a gradient, whose layer is named.
            RuntimeError: within another such block of this precision.
        """
        if self._collecting:
            raise RuntimeError("collect() is running already; one block after the other")
        _distributed.prepare(self._model)
        check_unchanged(_distributed.unwrapped(self._model), self._slots)
        self._follow()
        checked_words(fisher, sequence, reduction)
        statistics = self._statistics(fisher, sequence)
        collection = Collection(self._model, self._layout, self._slots, statistics, fisher, reduction, seed)
        self._collecting = True
        try:
            with collection.hooked():
                yield collection
            sums = collection.sums()
        finally:
            self._collecting = False
        if self._sums is not None:
            sums = self._sums.plus(sums)
        self._sums = sums

    def _statistics(self, fisher: str, sequence: str) -> list[Statistic]:
        """What :meth:`collect` accumulates."""
        self._check_others(fisher)
        factors: list[Statistic] = [FactorSums(layer, sequence) for layer in self._layout.layers]
        return factors + [squares_of(d, fisher == "sample") for d in self._layout.diagonal]

    def _check_others(self, fisher: str) -> None:
        """Raise ValueError if there are parameters of which only drawn labels tell the squares."""
        others = [d.slot.name for d in self._layout.diagonal if d.kind == "other"]
        if others and fisher != "sample":
            raise ValueError(
                f"fisher={fisher!r} needs gradients of single samples, which cannot be told apart for {some(others)}; use "
                "fisher='sample', or freeze them"
            )

    def fisher(self) -> tuple[dict[str, Pair], dict[str, Tensor]]:
        """What was collected since the last :meth:`merge_`: ``(A, G)`` by module name, and the diagonals by parameter name; float64.

        Layers that no pass has used are missing. Raises RuntimeError if nothing was collected.
        """
        sums = self._collected()
        found = {layer.name: pair for layer in self._layout.layers if (pair := sums.factors(layer)) is not None}
        return found, {d.slot.name: sums.squares(d.slot.name) for d in self._layout.diagonal}

    def _collected(self) -> Sums:
        if self._sums is None or not self._sums.samples:
            raise RuntimeError("nothing was collected since the last merge_(); run forward and backward passes within collect()")
        return self._sums

    def merge_(self, rule: str = "kl", weight: float = 1.0) -> None:
        """Lambda <- Lambda + weight * F for the F that was collected since the last merge, and factorise.

        A Kronecker-factored layer stays one product, by the rule of :func:`fastcl.ops.kron_merge`: "kl", "pi" or "frobenius". A layer that
        no pass has used has F = 0 and stays as it is. One whose merged factors cannot be inverted (see :attr:`damping`) keeps the
        factors and inverses that it had, and a warning names it.

        Raises:
            TypeError: ``weight`` is no number.
            ValueError: another rule, a weight that is not > 0.
            RuntimeError: nothing was collected; or a layer could not be factorised for the third time in a row. Lambda is then as it was.
        """
        if rule not in RULES:
            raise ValueError(f"rule must be 'kl', 'pi' or 'frobenius', got {rule!r}")
        weight = positive("weight", weight)
        sums = self._collected()
        self._follow()
        self._merge(sums, rule, weight)
        self._sums = None
        self._version += 1

    def anchor_(self) -> None:
        """Mu <- the parameters that the model has now."""
        self._follow()
        for block in self.blocks:
            block.anchor_()
        self._version += 1

    @property
    def anchor(self) -> dict[str, Tensor]:
        """Mu by parameter name, not copied."""
        return {name: t for block in self.blocks for name, t in zip(block.names, block.anchors(), strict=True)}

    def solve(self, grads: Values) -> Values:
        """Lambda^-1 X: new tensors of the dtypes of ``grads``.

        Args:
            grads: a mapping from parameter names to tensors, or a list with one tensor or None per trainable parameter in the order of
                ``model.parameters()``. What is missing or None counts as 0, and has no result.

        Raises:
            TypeError, ValueError: neither, an unknown name, another number of tensors, another shape.
        """
        return self._product("grads", grads, lambda block, own: block.solve_(own))

    def multiply(self, deltas: Values) -> Values:
        """Lambda X, as :meth:`solve`."""
        return self._product("deltas", deltas, lambda block, own: block.multiply_(own))

    def quadratic(self, deltas: Mapping[str, Tensor] | Sequence[Tensor | None]) -> Tensor:
        """X^T Lambda X: float64, 0-d, on the device; arguments as :meth:`solve`."""
        found = self._named("deltas", deltas)
        return torch.stack([block.quadratic([found.get(name) for name in block.names]) for block in self.blocks]).sum()

    def _product(self, argument: str, values: Values, function: Callable[[Block, list[Tensor | None]], None]) -> Values:
        found = self._named(argument, values)
        for block in self.blocks:
            function(block, [found.get(name) for name in block.names])
        result: Any
        if isinstance(values, Mapping):
            result = {name: found[name].to(t.dtype) for name, t in values.items()}
        else:
            result = [None if t is None else found[slot.name].to(t.dtype) for slot, t in zip(self._slots, values, strict=True)]
        return cast(Values, result)

    def _named(self, argument: str, values: Any) -> dict[str, Tensor]:
        self._follow()
        return named_copies(argument, values, self._slots, self._on_shards)

    def _kept(self) -> dict[str, Any]:
        damping = None if self._damping is None else list(self._damping)
        return {"n_data": self._n_data, "changes": self._version, "damping": damping, "anchor": _saved.copied(self.anchor)}

    def _common(self, state: Mapping[str, Any]) -> Common:
        """What every form's state holds, checked."""
        self._follow()
        changes = state.get("changes")
        if not isinstance(changes, int) or isinstance(changes, bool) or changes < 0:
            raise ValueError(f"changes is {changes!r}; accepted is a whole number from 0")
        anchors = _saved.tensors(state, "anchor", self.anchor)
        return Common(positive("n_data", state.get("n_data")), changes, _damping(state.get("damping")), anchors)

    def _adopt(self, common: Common) -> None:
        """Take over what :meth:`_common` has checked. What was collected and not merged is dropped."""
        for block in self.blocks:
            block.set_anchors(common.anchors[: len(block.names)])
            del common.anchors[: len(block.names)]
        self._n_data, self._damping, self._sums = common.n_data, common.damping, None
        # An optimizer whose state belongs to another Lambda sees it by the number.
        self._version = max(self._version, common.changes) + 1

    @property
    def _on_shards(self) -> bool:
        """Whether blocks work on each rank's shards of sharded parameters, or on whole ones."""
        return False

    def _follow(self) -> None:
        """Move to the model's device."""
        for block in self.blocks:
            block.follow()

    def _device(self) -> torch.device:
        return self._slots[0].parameter().device


def _damping(value: Any) -> Damping | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"damping must be None or a pair ('exact' | 'pi', alpha), got {value!r}")
    kind, alpha = value
    if kind not in ("exact", "pi"):
        raise ValueError(f"damping must be of the kind 'exact' or 'pi', got {kind!r}")
    return kind, at_least_zero("the alpha of damping", alpha)
