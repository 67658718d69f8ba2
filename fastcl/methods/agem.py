"""A-GEM: averaged gradient episodic memory."""

from __future__ import annotations

from torch import nn

from fastcl import capture_gradients, project_gradients_
from fastcl.data import Buffer
from fastcl.methods._memory import MemoryMethod, Scaler, check_whole, count
from fastcl.methods._passes import Forward, Loss
from fastcl.ops import ProjectionInfo


class AGEM(MemoryMethod):
    """A-GEM: a step may not raise the loss on a batch of remembered samples, to first order.

    Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv 1812.00420, eq. 11.

    With ``r`` the gradient of the mean loss on a batch drawn from the buffer, over all parameters that require grad jointly, between
    backward and the optimizer's step::

        g <- g                       if g . r >= 0
        g <- g - (g . r)/(r . r) r   otherwise

    A missing gradient counts as zero; ``.grad`` is made where the projection needs one. The first task is not touched. The guarantee is
    about the gradient: momentum, weight decay and Adam's scaling change the direction afterwards.

    The memory pass is a normal forward pass in the model's present mode, as in the authors' code: in train mode batch normalisation's
    running statistics move for it as well. The paper draws from past tasks only; with a training loop that fills the buffer itself,
    samples of the present task are drawn too.

    Example::

        agem = AGEM(model, ClassBalancedBuffer(500), loss_fn)
        for loader in loaders:
            for epoch in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    agem.after_backward()
                    optimizer.step()
            agem.end_task(loader)
            agem.save("agem.safetensors")

    Args:
        model: the module that is trained, in DistributedDataParallel, under ``fully_shard`` (FSDP2) or neither. Only ``.grad`` of its
            parameters is touched. FullyShardedDataParallel, whose parts have no names, is refused.
            Under data parallelism each rank has a buffer of its own, and ``r`` is the mean over ranks, as ``g`` is.
        buffer: the memory, as in :mod:`fastcl.data`. Its generator is the only source of randomness that the method itself uses.
        loss_fn: ``loss_fn(logits, y)``, the mean loss of a batch.
        forward: ``forward(model, x, task) -> logits`` for a model with a head per task; a memory batch is then split by task, one forward
            and backward pass each; under DistributedDataParallel or FSDP the batches of all ranks must hold equally many tasks. By
            default ``model(x)``, in one pass.
        batch_size: samples of a memory batch; while the buffer has fewer, each of them once.

    Raises:
        TypeError: an argument of a wrong kind, a model under FullyShardedDataParallel.
        ValueError: a batch size below 1.
    """

    _format = "fastcl.agem"

    def __init__(self, model: nn.Module, buffer: Buffer, loss_fn: Loss, *, forward: Forward | None = None, batch_size: int = 64) -> None:
        super().__init__(model, buffer, loss_fn, forward)
        check_whole(model)
        self._batch_size = count("batch_size", batch_size)

    def after_backward(self, *, scaler: Scaler | None = None) -> ProjectionInfo | None:
        """Project the gradients; call it once between the last ``backward()`` and the optimizer's step, before any clipping.

        When gradients of several micro-batches accumulate, call it after the last one.

        Under autocast call it inside the same autocast context as the forward pass; its backward pass leaves it. With a
        ``torch.amp.GradScaler`` pass ``scaler`` and call it before ``scaler.unscale_`` and ``scaler.step``. The projection is the same at
        any scale of either gradient; the scale keeps the memory's from vanishing in float16, and one that overflows makes the scaler skip
        the step::

            scaler.scale(loss).backward()
            with torch.autocast("cuda", torch.float16):
                agem.after_backward(scaler=scaler)
            scaler.step(optimizer)
            scaler.update()

        Without a host sync. A buffer on the GPU needs one when ``forward`` is given, to learn which tasks a batch holds.

        Args:
            scaler: the scaler that scaled the loss, or None.

        Returns:
            What :func:`fastcl.project_gradients_` returns, on the device; ``dot`` and ``reference_sq`` are of the gradients as they are,
            scaled or not. None in the first task.

        Raises:
            RuntimeError: tasks have ended and the buffer is empty.
            TypeError, ValueError: a scaler that is none; logits that are no tensor; a loss that is no tensor, has more than one element or
                carries no gradient; gradients that the op does not take (sparse, complex). The gradients are then as they were.
        """
        if not self.tasks_seen:
            return None
        batch = self._draw(self._batch_size)
        params = self._trained()
        with capture_gradients(params) as reference:
            self._backward(*batch, scaler)
        return project_gradients_(params, reference)
