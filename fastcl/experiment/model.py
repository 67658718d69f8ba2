"""The network of the experiments: a multi-layer perceptron with one head for all tasks or a head for each."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Net(nn.Module):
    """``depth`` hidden layers of ``width`` units with ReLU, shared by all tasks, and linear heads.

    Args:
        inputs: elements of one input; inputs are flattened.
        width: units of a hidden layer.
        depth: hidden layers.
        classes: outputs of a head.
        heads: 1 for a head that all tasks share, else the number of tasks.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int, heads: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """Logits [n, classes] of the task's head."""
        logits: Tensor = self.heads[task if len(self.heads) > 1 else 0](self.body(x))
        return logits
