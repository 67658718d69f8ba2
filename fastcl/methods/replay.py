"""Experience replay: the loss on remembered samples joins the loss of the batch."""

from __future__ import annotations

import math

from torch import nn

from fastcl.data import Buffer
from fastcl.methods._memory import MemoryMethod, Scaler, count
from fastcl.methods._passes import Forward, Loss


class Replay(MemoryMethod):
    """Experience replay (ER).

    Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr and Ranzato, "On Tiny Episodic Memories in Continual Learning", 2019,
    arXiv 1902.10486; Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal", 1995.

    Between backward and the optimizer's step the gradient of the loss on a memory batch is added::

        g <- g + weight * grad( mean loss on a batch from the buffer )

    The paper's mean over the concatenation of b new and m remembered samples is ``b / (b + m)`` times this at ``weight = m / b``; here the
    learning rate keeps its meaning for the new data, whatever the memory batch. The memory pass is a forward pass of its own in the
    model's present mode: in train mode batch normalisation normalises the memory batch by itself, and its running statistics move for it
    as for any batch.

    Memory is replayed as soon as the buffer holds samples: after the first task when :meth:`end_task` fills the buffer, in the first task
    already when the training loop does.

    Example::

        replay = Replay(model, ReservoirBuffer(500), loss_fn)
        for loader in loaders:
            for epoch in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    replay.after_backward()
                    optimizer.step()
            replay.end_task(loader)

    Args:
        model: the module that is trained, wrapped (DistributedDataParallel, FSDP) or not. Only ``.grad`` of its parameters is touched,
            by a backward pass.
        buffer: the memory, as in :mod:`fastcl.data`. Its generator is the only source of randomness that the method itself uses.
        loss_fn: ``loss_fn(logits, y)``, the mean loss of a batch.
        forward: ``forward(model, x, task) -> logits`` for a model with a head per task; a memory batch is then split by task, one forward
            and backward pass each; under DistributedDataParallel or FSDP the batches of all ranks must hold equally many tasks. By
            default ``model(x)``, in one pass.
        batch_size: samples of a memory batch; while the buffer has fewer, each of them once.
        weight: factor of the memory loss, above 0.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a batch size below 1, a weight that is not finite and above 0.
    """

    _format = "fastcl.replay"

    def __init__(
        self,
        model: nn.Module,
        buffer: Buffer,
        loss_fn: Loss,
        *,
        forward: Forward | None = None,
        batch_size: int = 64,
        weight: float = 1.0,
    ) -> None:
        super().__init__(model, buffer, loss_fn, forward)
        self._batch_size = count("batch_size", batch_size)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"weight must be a number, got {type(weight).__name__}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight must be finite and above 0, got {weight}")
        self._weight = float(weight)

    def after_backward(self, *, scaler: Scaler | None = None) -> None:
        """Add the memory's gradient; call it once between the last ``backward()`` and the optimizer's step.

        When gradients of several micro-batches accumulate, call it after the last one; the memory counts ``weight`` times beside their sum.

        Under autocast call it inside the same autocast context as the forward pass; its backward pass leaves it. With a
        ``torch.amp.GradScaler`` pass ``scaler`` and call it before ``scaler.unscale_`` and ``scaler.step``: the memory loss then has the
        scale of the gradients that it joins::

            scaler.scale(loss).backward()
            with torch.autocast("cuda", torch.float16):
                replay.after_backward(scaler=scaler)
            scaler.step(optimizer)
            scaler.update()

        Without a host sync. A buffer on the GPU needs one when ``forward`` is given, to learn which tasks a batch holds.

        Args:
            scaler: the scaler that scaled the loss, or None.

        Raises:
            RuntimeError: tasks have ended and the buffer is empty.
            TypeError, ValueError: a scaler that is none; logits that are no tensor; a loss that is no tensor, has more than one element or
                carries no gradient. The gradients have then changed at most by tasks of the memory batch that came before.
        """
        if self.tasks_seen or len(self._buffer):
            self._backward(*self._draw(self._batch_size), scaler, self._weight)
