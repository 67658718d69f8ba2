"""GEM: gradient episodic memory."""

from __future__ import annotations

from torch import Tensor, nn

from fastcl import capture_gradients, gem_project_gradients_
from fastcl.data import Buffer
from fastcl.methods._memory import MemoryMethod, Scaler, check_whole, count
from fastcl.methods._passes import Forward, Loss
from fastcl.ops import GemInfo
from fastcl.ops._checks import at_least_zero


class GEM(MemoryMethod):
    """GEM: a step may not raise the loss on the memory of any past task, to first order.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, arXiv 1706.08840, eq. 11 and 12.

    With ``G_k`` the gradient of the mean loss on the remembered samples of past task ``k``, over all parameters that require grad
    jointly, between backward and the optimizer's step: if some ``G_k . g < 0``::

        v = argmin 1/2 v^T (G G^T + ridge I) v + (G g)^T v   subject to  v >= margin
        g <- g + G^T v

    A missing gradient counts as zero; ``.grad`` is made where the projection needs one. The first task is not touched. Every step costs a
    forward and backward pass and a gradient's memory per past task, of which there may be 64.

    The memory passes are normal forward passes in the model's present mode, as in the authors' code: in train mode batch normalisation's
    running statistics move for each. The authors fill the memory with the last samples that they see and restrict the logits of a memory
    pass to its task's classes; here the buffer decides what is kept, and ``forward`` which logits the loss gets.

    The loop is that of :class:`fastcl.methods.AGEM`.

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` (FSDP2) or neither. Only ``.grad`` of its
            parameters is touched. FullyShardedDataParallel, whose parts have no names, is refused.
            Under data parallelism each rank has a buffer of its own, every one with samples of the same tasks.
        buffer: the memory, as in :mod:`fastcl.data`. Past tasks of which it has no sample left put no constraint.
        loss_fn: ``loss_fn(logits, y)``, the mean loss of a batch.
        forward: ``forward(model, x, task) -> logits`` for a model with a head per task. By default ``model(x)``.
        margin: number >= 0, the least coefficient of every memory in a projection; the authors' ``memory_strength``.
        ridge: number >= 0 added to the diagonal of ``G G^T``.
        batch_size: samples of each past task to draw anew for every step; by default all that are kept.

    Raises:
        TypeError: an argument of a wrong kind, a model under FullyShardedDataParallel.
        ValueError: a batch size below 1, a margin or ridge below 0 or infinite.
    """

    _format = "fastcl.gem"

    def __init__(
        self,
        model: nn.Module,
        buffer: Buffer,
        loss_fn: Loss,
        *,
        forward: Forward | None = None,
        margin: float = 0.5,
        ridge: float = 1e-3,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, buffer, loss_fn, forward)
        check_whole(model)
        self._margin, self._ridge = at_least_zero("margin", margin), at_least_zero("ridge", ridge)
        self._batch_size = None if batch_size is None else count("batch_size", batch_size)

    def after_backward(self, *, scaler: Scaler | None = None) -> GemInfo | None:
        """Project the gradients; call it once between the last ``backward()`` and the optimizer's step, before any clipping.

        When gradients of several micro-batches accumulate, call it after the last one.

        Under autocast call it inside the same autocast context as the forward pass; its backward pass leaves it. With a
        ``torch.amp.GradScaler`` pass ``scaler`` and call it before ``scaler.unscale_`` and ``scaler.step``, as
        :meth:`fastcl.methods.AGEM.after_backward` shows. ``ridge`` is meant for gradients without the scale and follows it: that reads the
        scale, one host sync. Without a scaler there is none.

        Args:
            scaler: the scaler that scaled the loss, or None.

        Returns:
            What :func:`fastcl.gem_project_gradients_` returns, on the device, for the past tasks in order; ``dots`` are of the gradients
            as they are, scaled or not. None in the first task and while the buffer has no sample of a past task.

        Raises:
            RuntimeError: tasks have ended and the buffer is empty.
            TypeError, ValueError: a scaler that is none; logits that are no tensor; a loss that is no tensor, has more than one element or
                carries no gradient; gradients that the op does not take (sparse, complex); more than 64 past tasks. The gradients are
                then as they were.
        """
        if not self.tasks_seen:
            return None
        params = self._trained()
        memories: list[list[Tensor | None]] = []
        for task in self._past():
            x, y = self._of_task(task, self._batch_size)
            with capture_gradients(params) as gradient:
                self._backward(x, y, task, scaler)
            memories.append(gradient)
        if not memories:
            return None
        ridge = self._ridge if scaler is None else self._ridge * scaler.get_scale() ** 2
        return gem_project_gradients_(params, memories, margin=self._margin, ridge=ridge)
