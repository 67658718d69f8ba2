"""Small models, tasks and loops for the tests of methods with a memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.data import TaskBalancedBuffer

loss_fn = nn.functional.cross_entropy
TASKS = 3


class Net(nn.Module):
    """One head; a layer that is frozen and a parameter that no pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))
        return logits


class Heads(nn.Module):
    """A head per task; a pass with one task leaves the other heads' gradients missing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(7, 4) for _ in range(TASKS))

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits of one head."""
        logits: Tensor = self.heads[task](self.body(x))
        return logits


def with_head(model: nn.Module, x: Tensor, task: int) -> Tensor:
    """The argument ``forward`` for :class:`Heads`."""
    logits: Tensor = model(x, task)
    return logits


def make(kind: type[nn.Module] = Net, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with the same weights at every call."""
    torch.manual_seed(0)
    return kind().to(dtype)


def batches(task: int, dtype: torch.dtype = torch.float64, sizes: Iterable[int] = (8, 8, 5)) -> list[tuple[Tensor, Tensor]]:
    """A task of a few batches, whose inputs and labels depend on its number."""
    gen = torch.Generator().manual_seed(100 + task)
    centres = torch.randn(4, 5, generator=gen, dtype=torch.float64)
    drawn = []
    for n in sizes:
        y = torch.randint(4, (n,), generator=gen)
        drawn.append(((centres[y] + 0.3 * torch.randn(n, 5, generator=gen, dtype=torch.float64)).to(dtype), y))
    return drawn


def memory(capacity: int = 16, seed: int = 0) -> TaskBalancedBuffer:
    """A buffer with a generator of its own."""
    return TaskBalancedBuffer(capacity, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a method sees."""
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Iterable[Tensor | None], like: Iterable[Tensor]) -> Tensor:
    """One float64 vector; a missing tensor is zero."""
    parts = [(torch.zeros_like(p) if t is None else t).detach().double().flatten() for t, p in zip(tensors, like, strict=True)]
    return torch.cat(parts)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of a loss with respect to the trained parameters, as one vector, without touching ``.grad``."""
    params = trained(model)
    return flat(torch.autograd.grad(loss, params, allow_unused=True), params)


def grads(model: nn.Module) -> Tensor:
    """``.grad`` of the trained parameters as one vector."""
    params = trained(model)
    return flat([p.grad for p in params], params)


def fill(method: Any, tasks: int) -> None:
    """End tasks without training them."""
    for task in range(tasks):
        method.end_task(batches(task, next(method._model.parameters()).dtype))


def train(model: nn.Module, method: Any, loader: Iterable[tuple[Tensor, Tensor]], task: int | None = None, lr: float = 0.1) -> None:
    """One pass over a task's data with plain SGD; ``task`` chooses the head."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in loader:
        optimizer.zero_grad()
        loss_fn(model(x) if task is None else model(x, task), y).backward()
        method.after_backward()
        optimizer.step()
