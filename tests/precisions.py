"""Models, factors and the dense definition for the tests of what is built on precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastcl import KroneckerPrecision

F64 = torch.float64
Factors = dict[str, tuple[Tensor, Tensor]]


def mlp(dtype: torch.dtype = F64, sizes: Sequence[int] = (5, 7, 4)) -> nn.Sequential:
    """Linear layers, the last without a bias; the same weights at every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.Linear(a, b, bias=n < len(sizes) - 2), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def spd(n: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """A well-conditioned symmetric positive definite matrix."""
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (root @ root.T / n + 0.3 * torch.eye(n, dtype=F64)).to(dtype)


def linear(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers with factors."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def factors(model: nn.Module, dtype: torch.dtype = F64) -> Factors:
    """``(A, G)`` for every layer, ``A`` with the bias last."""
    return {
        name: (spd(m.in_features + (m.bias is not None), 10 * n, dtype), spd(m.out_features, 10 * n + 1, dtype))
        for n, (name, m) in enumerate(linear(model).items())
    }


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[W | b]``."""
    return weight.detach().clone() if bias is None else torch.cat([weight.detach(), bias.detach()[:, None]], 1)


def anchors(model: nn.Module, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """A ``mu`` for every layer that is not where its parameters are."""
    found = {}
    for n, (name, m) in enumerate(linear(model).items()):
        shape = joined(m.weight, m.bias).shape
        found[name] = (0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 + n), dtype=F64)).to(dtype)
    return found


def precision(model: nn.Module, n_data: float = 20, dtype: torch.dtype = F64) -> KroneckerPrecision:
    """With factors and an anchor that are none of a first task."""
    return KroneckerPrecision.from_factors(model, factors(model, dtype), anchor=anchors(model, dtype), n_data=n_data)


def give(model: nn.Module, step: int, missing: Sequence[str] = (), scale: float = 1.0) -> None:
    """Gradients that depend on the step and the parameter's place alone."""
    for n, (name, p) in enumerate(model.named_parameters()):
        g = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n), dtype=F64)
        p.grad = None if name in missing else g.to(p.dtype)


class Dense:
    """The definition, layer by layer with ``numpy.kron``-like matrices, in float64: what :class:`fastcl.optim.NCL` says it does."""

    def __init__(self, model: nn.Module, by_name: Factors, mu: Mapping[str, Tensor], lr: float, momentum: float, strength: float) -> None:
        self.lr, self.momentum, self.strength = lr, momentum, strength
        self.w = {name: joined(m.weight, m.bias).double() for name, m in linear(model).items()}
        self.mu = {name: t.double() for name, t in mu.items()}
        # Rows of X one after another: G stands left in the Kronecker product.
        self.matrix = {name: torch.kron(G.double(), A.double()) for name, (A, G) in by_name.items()}
        self.m = {name: torch.zeros_like(w) for name, w in self.w.items()}

    def step(self, grads: Mapping[str, Tensor], radius: float | None = None) -> Tensor:
        """One step; the norm of its direction."""
        directions, squared = {}, torch.zeros((), dtype=F64)
        for name, g in grads.items():
            pull = (self.matrix[name] @ (self.w[name] - self.mu[name]).flatten()).view_as(g)
            self.m[name] = self.momentum * self.m[name] + g.double() + self.strength * pull
            directions[name] = torch.linalg.solve(self.matrix[name], self.m[name].flatten()).view_as(g)
            squared += (self.m[name] * directions[name]).sum()
        size = self.lr if radius is None else min(self.lr, radius / float(squared.sqrt()))
        for name, v in directions.items():
            self.w[name] = self.w[name] - size * v
        return squared.sqrt()


def layer_grads(model: nn.Module, missing: Sequence[str] = ()) -> dict[str, Tensor]:
    """``[dW | db]`` of the layers that have a gradient; one that is missing beside another is 0."""
    found = {}
    for name, m in linear(model).items():
        own = [m.weight] + ([m.bias] if m.bias is not None else [])
        if name not in missing and any(p.grad is not None for p in own):
            weight, *bias = (torch.zeros_like(p) if p.grad is None else p.grad for p in own)
            found[name] = joined(weight, *(bias or [None]))
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """``[W | b]`` of every layer."""
    return {name: joined(m.weight, m.bias) for name, m in linear(model).items()}
