"""Lambda as a Kronecker product per layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import _distributed, ops
from fastcl._model import some
from fastcl.precision import _saved
from fastcl.precision._base import Precision
from fastcl.precision._blocks import Block
from fastcl.precision._factors import Damping, Factors, Matrices, Pair, prepare
from fastcl.precision._layers import check_names
from fastcl.precision._sharded_blocks import diagonal_block, kronecker_block
from fastcl.precision._statistics import Sums

FAILURES = 3  # in a row


class KroneckerPrecision(Precision):
    """Kronecker-factored Laplace posterior of past tasks: for a layer ``Lambda vec(X) = vec(G X A)``, ``X = [W | b]``.

    Kao, Jensen et al., "Natural continual learning: success is a journey, not (just) a destination", NeurIPS 2021, arXiv 2106.08085;
    factors as in Martens and Grosse 2015, arXiv 1503.05671.

    Per datum: the prior is ``Lambda_0 = I / n_data`` (each factor ``I / sqrt(n_data)``) with ``mu_0 = 0``, and a task adds the Fisher
    information, a mean over samples, see :meth:`collect`. Everything is of the parameter's dtype, but float32 at least; factors are merged
    and inverted in float64.

    Layers: Linear, Conv1d/2d/3d (``groups=1``) and Embedding (whose G, over tokens, is a diagonal). A weight that several modules of a kind
    share is one layer, and the positions of all of them count. Biases and weights of LayerNorm, RMSNorm, BatchNorm, GroupNorm, and what
    ``layers`` leaves out, have diagonals; so has, with a warning that names it, every parameter of another kind of module. Parameters that
    are frozen when this object is made are left out. :attr:`report` says what became of each.

    Args:
        model: the module, also in DistributedDataParallel or under ``fully_shard``. Modules may not be replaced or added afterwards.
        n_data: number of data of a task, > 0.
        layers: names of the modules that get Kronecker factors; None: all that can have them.

    Raises:
        TypeError: an argument of a wrong kind, a parameter that is not floating point.
        ValueError: ``n_data`` that is not > 0, an unknown name in ``layers``, an embedding with ``sparse=True``, no trainable parameter.
    """

    _format = "fastcl.kronecker-precision"

    def __init__(self, model: nn.Module, n_data: float, *, layers: Sequence[str] | None = None) -> None:
        super().__init__(model, n_data, layers)
        self._factors = [Factors(layer, self._n_data**-0.5) for layer in self._layout.layers]
        self._kronecker = kronecker_block(self._factors) if self._factors else None
        slots = [d.slot for d in self._layout.diagonal]
        self._diagonal = diagonal_block(slots, 1 / self._n_data) if slots else None
        found: tuple[Block | None, ...] = (self._kronecker, self._diagonal)
        self._blocks = tuple(block for block in found if block is not None)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One for all Kronecker-factored layers, one for all diagonals."""
        return self._blocks

    @property
    def factors(self) -> dict[str, Pair]:
        """``(A, G)`` by module name, undamped, not copied: A [n, n] of the inputs, the bias last; G [m, m], of an embedding [m]."""
        return {f.layer.name: f.matrices.factors for f in self._factors}

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """D by parameter name, undamped, not copied."""
        return {} if self._diagonal is None else dict(zip(self._diagonal.names, self._diagonal.diagonal, strict=True))

    @classmethod
    def from_factors(
        cls, model: nn.Module, factors: Mapping[str, Pair], *, anchor: Mapping[str, Tensor] | None = None, n_data: float
    ) -> KroneckerPrecision:
        """A precision with factors from elsewhere.

        Args:
            model: as in :class:`KroneckerPrecision`.
            factors: the pair ``(A, G)`` of each Kronecker-factored layer by module name: A [in + 1, in + 1], the bias last (without a bias
                [in, in]; in: the inputs of ``weight.flatten(1)``), G [out, out]; of an Embedding A [dim, dim], G [tokens]. Copied. Modules
                that are not named have diagonals, those of the prior.
            anchor: mu, by module name: ``[W.flatten(1) | b]``, [out, in + 1]; None, and for parameters with diagonals: the parameters that
                the model has now.
            n_data: the number of data of a task, > 0; Lambda is per datum.

        Raises:
            TypeError: an argument of a wrong kind.
            ValueError: as :class:`KroneckerPrecision`; factors that are not square, not symmetric (to 1e-5 of the largest element), not
                finite, not positive definite beyond repair (a singular factor gets the smallest jitter or eigenvalue floor that makes it
                invertible), or not of the layer's sizes. The layer is named.
        """
        if not isinstance(factors, Mapping):
            raise TypeError(f"factors must be a mapping from module names to pairs (A, G), got {type(factors).__name__}")
        check_names("factors", factors, _distributed.unwrapped(model))
        precision = cls(model, n_data, layers=list(factors))
        own = {f.layer.name: f for f in precision._factors}
        _saved.names("factors", factors, own)  # of tied modules the first one's
        pairs = {i: _saved.factors(factors[name], own[name].layer) for i, name in enumerate(own)}
        if anchor is not None:
            _saved.names("anchor", anchor, own)
            for name, f in own.items():
                _saved.tensor(f"the anchor of layer {name!r}", anchor[name], (f.rows, f.columns), "that of [W | b]")
        with torch.no_grad():
            precision._replace(pairs, None)
            precision.anchor_()
            for name, value in (anchor or {}).items():
                own[name].anchor.copy_(value)
        return precision

    def _replace(self, pairs: Mapping[int, Pair], damping: Damping | None) -> None:
        """Take these factors for all layers, or raise and change nothing."""
        moved = {i: tuple(t.to(f.anchor.device, f.dtype) for t in pairs[i]) for i, f in enumerate(self._factors)}
        for i, matrices in self._prepared({i: (A, G) for i, (A, G) in moved.items()}, damping).items():
            self._factors[i].matrices, self._factors[i].failures = matrices, 0

    @torch.no_grad()
    def _merge(self, sums: Sums, rule: str, weight: float) -> None:
        pairs: dict[int, Pair | None] = {}
        for i, f in enumerate(self._factors):
            if (found := sums.factors(f.layer)) is not None:
                pairs[i] = _merged(f, found, rule, weight)
        self._install(pairs, self._damping)
        if self._diagonal is not None:
            self._diagonal.add_([sums.squares(name) * weight for name in self._diagonal.names])

    @torch.no_grad()
    def _damp(self, damping: Damping | None) -> None:
        self._replace({i: f.matrices.factors for i, f in enumerate(self._factors)}, damping)
        if self._diagonal is not None:
            self._diagonal.damp(0.0 if damping is None else damping[1])

    def _install(self, pairs: Mapping[int, Pair | None], damping: Damping | None) -> None:
        """Replace what can be inverted; a layer that cannot keeps what it has, for two times in a row."""
        sound = {i: pair for i, pair in pairs.items() if pair is not None}
        found = dict(zip(sound, prepare(list(sound.values()), damping), strict=True))
        failed = [self._factors[i] for i in pairs if found.get(i) is None]
        names = some(f.layer.name for f in failed)
        if any(f.failures + 1 >= FAILURES for f in failed):
            raise RuntimeError(f"the factors of {names} could not be inverted, {FAILURES} times in a row; Lambda is as it was")
        if failed:
            warnings.warn(
                f"the factors of {names} are not finite or not positive definite: these layers keep the factors and inverses that they had",
                UserWarning,
                stacklevel=4,
            )
        for i in pairs:
            matrices = found.get(i)
            self._factors[i].failures = self._factors[i].failures + 1 if matrices is None else 0
            self._factors[i].matrices = matrices or self._factors[i].matrices

    def _prepared(self, pairs: Mapping[int, Pair], damping: Damping | None) -> dict[int, Matrices]:
        """All of them inverted, or an error that names the layers."""
        found = prepare(list(pairs.values()), damping)
        failed = [self._factors[i].layer.name for i, matrices in zip(pairs, found, strict=True) if matrices is None]
        if failed:
            raise ValueError(f"the factors of {some(failed)} are not finite or not positive definite; nothing was changed")
        return {i: matrices for i, matrices in zip(pairs, found, strict=True) if matrices is not None}

    def _kept(self) -> dict[str, Any]:
        factors = {f.layer.name: [t.clone(memory_format=torch.contiguous_format) for t in f.matrices.factors] for f in self._factors}
        return {**super()._kept(), "factors": factors, "diagonal": _saved.copied(self.diagonal)}

    @torch.no_grad()
    def _take_over(self, state: Mapping[str, Any]) -> None:
        common = self._common(state)
        given = _saved.names("state['factors']", state.get("factors"), [f.layer.name for f in self._factors])
        pairs = {i: _saved.factors(given[f.layer.name], f.layer) for i, f in enumerate(self._factors)}
        diagonal = _saved.tensors(state, "diagonal", self.diagonal, positive=True)
        self._replace(pairs, common.damping)
        if self._diagonal is not None:
            self._diagonal.damp(0.0 if common.damping is None else common.damping[1])
            self._diagonal.replace(diagonal)
        self._adopt(common)


def _merged(f: Factors, found: Pair, rule: str, weight: float) -> Pair | None:
    """The layer's factors with those that were collected, or None if they cannot be merged."""
    A, G = (t.double() for t in f.matrices.factors)
    try:
        left, right = ops.kron_merge(G, A, found[1] * weight, found[0], rule)
    except ValueError:  # out of float64's range, or rounded to something indefinite
        return None
    return right.to(f.dtype), left.to(f.dtype)
