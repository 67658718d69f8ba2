"""Lambda as a Kronecker product per layer, each factor a multiple of the identity plus a low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.ops import _sharded
from fastcl.precision import _saved
from fastcl.precision._base import Precision
from fastcl.precision._blocks import Block
from fastcl.precision._diagonal_block import DiagonalBlock
from fastcl.precision._factors import Damping
from fastcl.precision._low_rank_factor import LowRankFactor
from fastcl.precision._low_rank_merge import Factor, merge
from fastcl.precision._numbers import whole
from fastcl.precision._sketches import SketchSums
from fastcl.precision._skinny_block import SkinnyBlock
from fastcl.precision._skinny_factors import SkinnyFactors
from fastcl.precision._squares import of as squares_of
from fastcl.precision._statistics import Statistic, Sums


class LowRankKroneckerPrecision(Precision):
    """As :class:`KroneckerPrecision`, for layers too wide for dense factors: ``A = a I + U_A^T S_A U_A`` and G likewise, of rank ``rank``.

    ``Lambda vec(X) = vec(G X A)``, ``X = [W | b]`` [m, n]. By Woodbury's identity, with ``M_A = M U_A^T`` and the other skinny products::

        G^-1 M A^-1 = (M - M U_A^T c_A U_A - U_G^T c_G U_G M + U_G^T c_G (U_G M U_A^T) c_A U_A) / (a g)        c = S / (scale + S)

    so that a step is two passes over M, one for the skinny products, after which the norm ``<M, V>`` is known, and one for the update:
    about ``4 (k_A + k_G)`` flops per parameter instead of ``2 (m + n)``, without a matrix of the layer's size. The same form holds for
    ``Lambda``, for both kinds of damping, and where G is a diagonal (an embedding's, over tokens).

    A factor keeps the ``rank`` largest principal directions of the data's; the trace of what is dropped is spread over all other directions
    (``a``, ``g``: probabilistic PCA, Tipping and Bishop 1999). While data is collected each factor is a sketch of ``2 rank + 8`` rows that
    a float64 Gram matrix compresses block by block: leading directions come out as exactly as the spectrum falls off. Merging works in the
    joint span of both factors, where the rules of :func:`fastcl.ops.kron_merge` hold exactly, and cuts back to ``rank``. ``rank = n - 1``
    is exact for any factor of size n. Other parameters have diagonals.

    Args:
        model: the module. Modules may not be replaced or added afterwards.
        n_data: the number of data of a task, > 0.
        rank: directions of each factor, from 0; at most one less than the factor's size is used.
        layers: names of the modules that get Kronecker factors; None: all that can have them.

    Raises:
        TypeError: an argument of a wrong kind, a parameter that is not floating point or is sharded.
        ValueError: a number outside its range, an unknown name in ``layers``, an embedding with ``sparse=True``, no trainable parameter.
    """

    _format = "fastcl.low-rank-kronecker-precision"

    def __init__(self, model: nn.Module, n_data: float, *, rank: int = 32, layers: Sequence[str] | None = None) -> None:
        super().__init__(model, n_data, layers)
        if _sharded.is_sharded([slot.parameter() for slot in self._slots]):
            raise TypeError(
                "LowRankKroneckerPrecision takes no DTensor parameters (fully_shard); KroneckerPrecision and LowRankPrecision do"
            )
        self._rank = whole("rank", rank, 0, 4096)
        self._factors = [SkinnyFactors(layer, self._n_data**-0.5, self._rank) for layer in self._layout.layers]
        self._skinny = SkinnyBlock(self._factors) if self._factors else None
        slots = [d.slot for d in self._layout.diagonal]
        self._diagonal = DiagonalBlock(slots, 1 / self._n_data) if slots else None
        found: tuple[Block | None, ...] = (self._skinny, self._diagonal)
        self._blocks = tuple(block for block in found if block is not None)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One for all Kronecker-factored layers, one for all diagonals."""
        return self._blocks

    @property
    def rank(self) -> int:
        """Directions of each factor."""
        return self._rank

    @property
    def factors(self) -> dict[str, tuple[LowRankFactor, Factor]]:
        """``(A, G)`` by module name, undamped, not copied: named tuples ``(scale, values, basis)``; the G of an embedding a tensor [m]."""
        return {f.layer.name: (f.A, f.G) for f in self._factors}

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """D by parameter name, undamped, not copied."""
        return {} if self._diagonal is None else dict(zip(self._diagonal.names, self._diagonal.diagonal, strict=True))

    def _statistics(self, fisher: str, sequence: str) -> list[Statistic]:
        self._check_others(fisher)
        found: list[Statistic] = [SketchSums(layer, sequence, self._rank) for layer in self._layout.layers]
        return found + [squares_of(d, fisher == "sample") for d in self._layout.diagonal]

    @torch.no_grad()
    def _merge(self, sums: Sums, rule: str, weight: float) -> None:
        merged = []
        for f in self._factors:
            if sums.rows[f.layer.name]:
                a, g = self._fisher(f, sums)
                a = a._replace(scale=a.scale * weight, values=a.values * weight)
                merged.append(
                    (f, *merge((f.A, a), (f.G, g), rule, (len(f.A.values), len(f.G.values) if isinstance(f.G, LowRankFactor) else 0)))
                )
        for f, A, G in merged:
            f.take(A, G, self._damping)  # type: ignore[arg-type]
        if self._diagonal is not None:
            self._diagonal.add_([sums.squares(name) * weight for name in self._diagonal.names])

    def _fisher(self, f: SkinnyFactors, sums: Sums) -> tuple[LowRankFactor, Factor]:
        """A and G of the data."""
        name, rows = f.layer.name, sums.rows[f.layer.name]
        gradients: Any = sums.parts["gradients", name]
        if f.layer.kind == "embedding":
            return gradients.factor(rows, len(f.A.values), f.dtype), sums.tensors["inputs", name].double() / sums.samples
        inputs: Any = sums.parts["inputs", name]
        ranks = [len(factor.values) for factor in (f.A, f.G) if isinstance(factor, LowRankFactor)]
        return inputs.factor(sums.samples, ranks[0], f.dtype), gradients.factor(rows, ranks[1], f.dtype)

    @torch.no_grad()
    def _damp(self, damping: Damping | None) -> None:
        for f in self._factors:
            f.damp(damping)
        if self._diagonal is not None:
            self._diagonal.damp(0.0 if damping is None else damping[1])

    def _kept(self) -> dict[str, Any]:
        factors = {f.layer.name: [_plain(f.A), _plain(f.G)] for f in self._factors}
        return {**super()._kept(), "rank": self._rank, "factors": factors, "diagonal": _saved.copied(self.diagonal)}

    @torch.no_grad()
    def _take_over(self, state: Mapping[str, Any]) -> None:
        common = self._common(state)
        if state.get("rank") != self._rank:
            raise ValueError(f"the state has rank {state.get('rank')!r}, this precision {self._rank}; they must be equal")
        given = _saved.names("state['factors']", state.get("factors"), [f.layer.name for f in self._factors])
        loaded = [(f, *_loaded(f, given[f.layer.name])) for f in self._factors]
        diagonal = _saved.tensors(state, "diagonal", self.diagonal, positive=True)
        for f, A, G in loaded:
            f.take(A, G, common.damping)
        if self._diagonal is not None:
            self._diagonal.damp(0.0 if common.damping is None else common.damping[1])
            self._diagonal.replace(diagonal)
        self._adopt(common)


def _plain(factor: Factor) -> Any:
    """A factor as a state can hold it."""
    if isinstance(factor, LowRankFactor):
        return {"scale": factor.scale, "values": factor.values.clone(), "basis": factor.basis.clone()}
    return factor.clone()


def _loaded(f: SkinnyFactors, given: Any) -> tuple[LowRankFactor, Factor]:
    """The factors of a layer from a state, checked."""
    what = f"layer {f.layer.name!r}"
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise TypeError(f"the factors of {what} must be a pair (A, G), got {type(given).__name__}")
    A = _low_rank(f"A of {what}", given[0], f.A)
    if isinstance(f.G, LowRankFactor):
        return A, _low_rank(f"G of {what}", given[1], f.G)
    _saved.tensor(f"G of {what}", given[1], tuple(f.G.shape), "that of its tokens")
    if not bool((given[1] > 0).all()):
        raise ValueError(f"G of {what} has values that are not > 0")
    return A, given[1].to(f.G.device, torch.float64, copy=True)


def _low_rank(what: str, given: Any, own: LowRankFactor) -> LowRankFactor:
    if not isinstance(given, Mapping) or set(given) != {"scale", "values", "basis"}:
        raise TypeError(f"{what} must be a mapping with scale, values and basis, got {type(given).__name__}")
    scale, values, basis = given["scale"], given["values"], given["basis"]
    if not isinstance(scale, float) or not 0 < scale < float("inf"):
        raise ValueError(f"the scale of {what} is {scale!r}; accepted is a finite number > 0")
    _saved.tensor(f"values of {what}", values, tuple(own.values.shape), "that of its rank")
    _saved.tensor(f"basis of {what}", basis, tuple(own.basis.shape), "that of its rank and size")
    used = (values > 0).double()
    gram = basis.double() @ basis.double().T * torch.outer(used, used).to(basis.device)
    if bool((values < 0).any()) or (len(used) and not float((gram - used.diag().to(gram.device)).abs().amax()) <= 1e-4):
        raise ValueError(f"values of {what} are below 0, or the rows of its basis are not orthonormal")
    return LowRankFactor(scale, values.to("cpu", torch.float64, copy=True), basis.to(own.basis.device, own.basis.dtype, copy=True))
