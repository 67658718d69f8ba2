"""Online structured Laplace: EWC's quadratic pull with Kronecker-factored precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastcl.methods._laplace import Laplace
from fastcl.methods._memory import Scaler
from fastcl.methods._passes import Forward
from fastcl.ops import _sharded
from fastcl.ops._checks import at_least_zero
from fastcl.precision._base import Precision


class KFAC_EWC(Laplace):
    """Online structured Laplace approximation: a quadratic pull towards the past with a Kronecker-factored precision.

    Ritter, Botev and Barber, "Online structured Laplace approximations for overcoming catastrophic forgetting", NeurIPS 2018,
    arXiv 1805.07810, eq. 6 and 10.

    With the Gaussian ``N(mu, Lambda^-1)`` of the tasks that have ended, per datum, the penalty and what it adds to the gradient of the mean
    loss are::

        strength / 2 (W - mu)^T Lambda (W - mu)
        g <- g + strength Lambda (W - mu)          for a layer: G (W - mu) A

    It is the objective of :class:`NCL`, minimised by any optimizer, without the division by ``Lambda``. ``strength = 1`` is Bayes' rule; the
    paper tunes it. The first task is not touched: the prior counts from the second one on, as part of ``Lambda``.

    Example::

        kfac = KFAC_EWC(model, fastcl.KroneckerPrecision(model, n_data=len(dataset)), strength=10.0)
        for loader in loaders:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                kfac.after_backward()
                optimizer.step()
            kfac.end_task(loader)

    Args:
        model, precision, fisher, rule, weight, forward, train_mode, seed: as in :class:`NCL`.
        strength: number >= 0, how strong the pull is: the lambda of both papers.

    Raises:
        TypeError: a model, a precision, a strength, a forward, a train_mode or a seed of a wrong kind.
        ValueError: a precision of another model, an unknown fisher or rule, a strength, weight or seed outside its range.
    """

    _format = "fastcl.kfac_ewc"

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        *,
        strength: float = 1.0,
        fisher: str = "sample",
        rule: str = "kl",
        weight: float = 1.0,
        forward: Forward | None = None,
        train_mode: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, precision, fisher, rule, weight, forward, train_mode, seed)
        self._strength = at_least_zero("strength", strength)

    @torch.no_grad()
    def after_backward(self, *, scaler: Scaler | None = None) -> None:
        """Add the pull to the gradients; call it once between the last ``backward()`` and the optimizer's step.

        Two matrix products for each layer, without a host sync. Gradients that are None are skipped. Does nothing in the first task. Clip
        gradients before it, if the loss' alone are to be clipped, or after it.

        Args:
            scaler: the ``torch.amp.GradScaler`` that scaled the loss and has not unscaled its gradients yet: the pull is scaled, too (its
                scale is read on the host). None when gradients are not scaled or were unscaled.
        """
        if not self.tasks_seen:
            return
        strength = self._strength if scaler is None else self._strength * scaler.get_scale()
        anchor: Any = self._precision.anchor
        params = {name: p for block in self._precision.blocks for name, p in zip(block.names, block.params, strict=True)}
        deltas = {name: p.detach().to(anchor[name].dtype) - anchor[name] for name, p in params.items()}
        pulls = self._precision.multiply(deltas)
        for name, p in params.items():
            if p.grad is not None:
                own, pull = _sharded.shards([p.grad, pulls[name]])
                own.add_(pull.to(own.dtype), alpha=strength)
