"""OWM: orthogonal weights modification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcl import optim
from fastcl.methods._laplace import Laplace
from fastcl.methods._memory import Scaler
from fastcl.methods._passes import Forward
from fastcl.ops._checks import positive
from fastcl.precision._statistics import Sums
from fastcl.precision.kronecker import KroneckerPrecision


class InputPrecision(KroneckerPrecision):
    """``Lambda = I x (I + sum of tasks' E[a a^T] / alpha)``: a precision that knows the inputs of layers and nothing of gradients."""

    _format = "fastcl.input-precision"

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__(model, 1.0)  # every factor is the identity
        self.alpha = alpha

    @torch.no_grad()
    def _merge(self, sums: Sums, rule: str, weight: float) -> None:  # noqa: ARG002 (the sum of the inputs' factors is exact)
        pairs = {}
        for i, f in enumerate(self._factors):
            if (found := sums.factors(f.layer)) is not None:
                A, G = f.matrices.factors
                # An embedding's rows are its inputs.
                side = f.layer.kind == "embedding"
                more = (found[side].double() * weight / self.alpha).to(f.dtype)
                pairs[i] = (A, G + more) if side else (A + more, G)
        self._install(pairs, self._damping)

    def _kept(self) -> dict[str, Any]:
        return {**super()._kept(), "alpha": self.alpha}

    def _check(self, state: Any) -> None:
        super()._check(state)
        if state.get("alpha") != self.alpha:
            raise ValueError(f"state was made with alpha={state.get('alpha')!r}, this object has {self.alpha!r}; they must be equal")


class OWM(Laplace):
    """Orthogonal weights modification: weights move only in directions to which the inputs of earlier tasks are blind.

    Zeng, Chen, Cui and Yu, "Continual learning of context-dependent processing in neural networks", Nature Machine Intelligence 1 (2019),
    arXiv 1810.01256, eq. 1 and 2, with one exact projector in place of the recursion over batches.

    With the inputs ``a`` of a layer (a last 1 for the bias), its weights ``[W | b]`` and the tasks that have ended::

        P = alpha (alpha I + sum of tasks' E[a a^T])^-1
        M <- momentum M + g
        W <- W - lr M P

    For inputs ``a`` that earlier tasks have used much, ``M P a`` is near 0: their outputs stay. ``P = I`` in the first task. It is
    :class:`NCL`'s step with ``strength=0``, ``G = I`` and ``A = I + sum of E[a a^T] / alpha``: what a direction matters for the loss is not
    asked. Inputs of convolutions are their windows, a mean over samples of the sum over positions; of embeddings, how often each token
    occurs. Parameters of other modules, those of normalisations among them, have no projector and are not protected.

    Example::

        owm = OWM(model, alpha=0.1)
        optimizer = owm.optimizer(lr=0.05)
        for loader in loaders:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            owm.end_task(loader)

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` (FSDP2) or neither. With several processes
            every rank calls every method.
        alpha: number > 0 that the mean squares of the inputs are compared with: the smaller, the less may change. The state depends on it.
        forward, train_mode, seed: as in :class:`NCL`.

    Raises:
        TypeError: a model, an alpha, a forward, a train_mode or a seed of a wrong kind.
        ValueError: an alpha or seed outside its range, a model without a trainable parameter.
    """

    _format = "fastcl.owm"

    def __init__(
        self, model: nn.Module, *, alpha: float = 0.1, forward: Forward | None = None, train_mode: bool = False, seed: int = 0
    ) -> None:
        # What KroneckerPrecision says of modules without a rule.
        super().__init__(model, InputPrecision(model, positive("alpha", alpha)), "sample", "kl", 1.0, forward, train_mode, seed)

    def projector(self, name: str) -> Tensor:
        """``P`` of the layer that is the module ``name``, [in + 1, in + 1] with a bias; of an embedding its diagonal, [tokens].

        Raises ValueError for another name.
        """
        found = {f.layer.name: f for f in self._inputs._factors}
        if name not in found:
            raise ValueError(f"name must be one of {', '.join(found)}; got {name!r}")
        inverse = found[name].matrices.inverse
        if inverse is None:
            raise ValueError("the precision has damping 'exact', with which no projector exists")
        return inverse[found[name].layer.kind == "embedding"].clone(memory_format=torch.contiguous_format)

    @property
    def _inputs(self) -> InputPrecision:
        own: Any = self._precision
        return own  # type: ignore[no-any-return]

    def optimizer(self, lr: float | Tensor, momentum: float = 0.0, radius: float | None = None) -> optim.NCL:
        """The optimizer with this projector; see :class:`fastcl.optim.NCL`, also for what it raises. ``radius`` is for M P in P's norm."""
        return optim.NCL(self._model, self._precision, lr, momentum, 0.0, radius)

    def after_backward(self, *, scaler: Scaler | None = None) -> None:
        """Leave the gradients as they are: the optimizer does all there is."""
