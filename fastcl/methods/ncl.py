"""NCL: natural continual learning."""

from __future__ import annotations

from torch import Tensor, nn

from fastcl import optim
from fastcl.methods._laplace import Laplace
from fastcl.methods._memory import Scaler
from fastcl.methods._passes import Forward
from fastcl.precision._base import Precision


class NCL(Laplace):
    """Natural continual learning: steps measured by the precision of what earlier tasks have learned.

    Kao, Jensen et al., "Natural continual learning: success is a journey, not (just) a destination", NeurIPS 2021, arXiv 2106.08085.

    After a task the parameters ``W`` have the Gaussian ``N(mu, Lambda^-1)``: ``mu`` is where its training ended, ``Lambda`` the sum of the
    prior and of the Fisher information of all tasks. The next task's steps, by :class:`fastcl.optim.NCL`, are::

        M <- momentum M + g + strength Lambda (W - mu)
        W <- W - lr / n_data Lambda^-1 M

    The gradient is divided by how certain the past is of each direction, so that the first step of a task, at ``W = mu``, does least harm.
    :class:`KFAC_EWC` has the same pull and steps without ``Lambda^-1``: it has the same optimum, and comes elsewhere.

    Example::

        ncl = NCL(model, fastcl.KroneckerPrecision(model, n_data=len(dataset)))
        optimizer = ncl.optimizer(lr=0.05)
        for loader in loaders:
            for epoch in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    optimizer.step()
            ncl.end_task(loader)
            ncl.save("ncl.safetensors")

    The state holds the tasks seen and the precision. Momenta are in the optimizer's ``state_dict``; load this object's state first.

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` (FSDP2) or neither. With several processes
            every rank calls every method.
        precision: a precision of this model: :class:`fastcl.KroneckerPrecision`, :class:`fastcl.LowRankPrecision` and others.
        fisher: ``"sample"``, ``"exact"`` or ``"empirical"``: with labels drawn from the model, all labels by their probability, or the true
            ones; see :meth:`fastcl.KroneckerPrecision.collect`.
        rule: how a sum of two Kronecker products becomes one: ``"kl"``, ``"pi"`` or ``"frobenius"``; see
            :func:`fastcl.ops.kron_merge`.
        weight: number > 0, how much a task's Fisher information counts; 1 is Bayes' rule for tasks of ``n_data`` samples.
        forward: ``forward(model, x, task) -> logits``; by default ``model(x)``. A model with a head per task needs it.
        train_mode: whether the Fisher information is computed in train mode (dropout on, batch statistics), or in eval mode.
        seed: a whole number >= 0 from which labels are drawn; the global generators are left alone.

    Raises:
        TypeError: a model, a precision, a forward, a train_mode or a seed of a wrong kind.
        ValueError: a precision of another model, an unknown fisher or rule, a weight or seed outside its range.
    """

    _format = "fastcl.ncl"

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        *,
        fisher: str = "sample",
        rule: str = "kl",
        weight: float = 1.0,
        forward: Forward | None = None,
        train_mode: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, precision, fisher, rule, weight, forward, train_mode, seed)

    def optimizer(
        self,
        lr: float | Tensor,
        momentum: float = 0.9,
        strength: float = 1.0,
        radius: float | None = None,
        *,
        refresh: int = 100,
    ) -> optim.NCL:
        """The optimizer of this model in this precision; see :class:`fastcl.optim.NCL`, also for what it raises."""
        return optim.NCL(self._model, self._precision, lr, momentum, strength, radius, refresh=refresh)

    def after_backward(self, *, scaler: Scaler | None = None) -> None:
        """Leave the gradients as they are: the optimizer does all there is."""
