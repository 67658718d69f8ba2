"""Whether all of a parameter's gradient came by calls of its modules, which are what hooks see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastcl._model import Slot
from fastcl.precision import _rows
from fastcl.precision._layers import FACTORED, compute_dtype
from fastcl.precision._squares import Squares
from fastcl.precision._statistics import Call, _kept

MATRICES = (*FACTORED, "grouped")


class Watch:
    """Compares, pass by pass, what arrives at a parameter with what the calls of its modules gave.

    Without any call a gradient has come by another way alone: squares of the batch's gradient, if labels were drawn, or ``direct``. With
    calls the two are compared for weights that are matrices, as products with a vector of random signs (Freivalds' check), which costs
    two passes over inputs and gradients and no product of matrices: ``partly``, a 0-d tensor, so that no pass waits for the device.

    Args:
        slot: the parameter's place.
        kind: of its modules.
        role: "weight" or "bias".
        modules: those whose calls are seen.
        squares: the statistic that takes whole batches' gradients, None where there is none.
    """

    def __init__(self, slot: Slot, kind: str, role: str, modules: Sequence[nn.Module], squares: Squares | None) -> None:
        p = slot.parameter()
        self.slot, self.kind, self.modules, self.squares = slot, kind, modules, squares
        self.signs: Tensor | None = None
        # Gradients that are scaled by tokens' counts within a batch are no sums over samples.
        if role == "weight" and kind in MATRICES and not any(getattr(m, "scale_grad_by_freq", False) for m in modules):
            signs = torch.randint(2, p.shape[1:], generator=torch.Generator().manual_seed(p.dim())).mul_(2).sub_(1)
            self.signs = signs.to(p.device, compute_dtype(p))
        self.direct = False
        self.partly = torch.zeros((), dtype=torch.bool, device=p.device)
        self.called = False  # in the last pass
        self.drop()

    def trust(self, hooks: Mapping[int, object], own: type) -> None:
        """A hook of somebody else at the parameter may change what arrives: then it is not compared."""
        if not all(isinstance(hook, own) for hook in hooks.values()):
            self.signs = None

    def drop(self) -> None:
        """Forget the running pass."""
        self._calls, self._eps = 0, 0.0
        self._whole: list[Tensor] = []  # gradients that came before any call
        self._expected: Tensor | None = None
        self._squared: Tensor | float = 0.0
        self._arrived: Tensor | None = None
        self._size: Tensor | float = 0.0

    def see(self, call: Call, grad: Tensor) -> None:
        """The gradient at the output of a call, as autograd has it."""
        self._calls += 1
        if self.signs is None or not grad.numel():
            return
        self._eps = max(self._eps, _eps(call.x), _eps(grad))
        expected, squared = self._products(call, _rows.wide(grad).to(self.signs.dtype), self.signs)
        self._expected = expected if self._expected is None else self._expected + expected
        self._squared = self._squared + squared

    def _products(self, call: Call, g: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """What the call adds to the products of the weight's rows with the signs, and the sum of squares of its terms."""
        if self.kind == "embedding":
            tokens, g = call.x.flatten(), g.reshape(-1, g.shape[-1]) * _kept(call).reshape(-1, 1)
            return g.new_zeros(self.slot.parameter().shape[0]).index_add_(0, tokens, g @ signs), g.square().sum()
        x = _rows.wide(call.x).to(signs.dtype)
        if self.kind == "linear":
            g, inner = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]) @ signs
            return inner @ g, inner.square() @ g.square().sum(1)
        module = cast(nn.Conv2d, call.module)
        if x.dim() == signs.dim():
            x, g = x.unsqueeze(0), g.unsqueeze(0)
        inner = module._conv_forward(x, signs.expand(module.groups, *signs.shape), None).flatten(2)  # [N, groups, positions]
        parts = torch.unflatten(g.flatten(2), 1, (module.groups, -1))
        squared = (parts.square().sum(2) * inner.square()).sum()
        return (parts @ inner.unsqueeze(3)).sum(0).flatten(), squared

    def arrived(self, grad: Tensor) -> None:
        """The gradient at the parameter, or a part of it: checkpoints that are run again within the pass have theirs on their own."""
        if not self._calls:
            self._whole.append(grad.detach().clone())
        if self.signs is None:
            return
        self._eps = max(self._eps, _eps(grad))
        matrix = _rows.wide(grad).to(self.signs.dtype).flatten(1)
        found = matrix @ self.signs.flatten()
        self._arrived = found if self._arrived is None else self._arrived + found
        self._size = self._size + matrix.norm() + matrix.numel() * torch.finfo(grad.dtype).tiny

    def close(self) -> None:
        """The pass is over."""
        self.called = self._calls > 0
        if not self.called:
            for grad in self._whole:
                self.bypassed(grad)
        elif self._expected is not None and self._arrived is not None:
            off = (self._arrived - self._expected).norm()
            # Roundings of the terms are independent of each other; those of sums over calls are not.
            allowed = self._eps * (16 + self._calls) * (self._size + torch.as_tensor(self._squared).sqrt())
            self.partly = self.partly | (off.isfinite() & (off > allowed))
        self.drop()

    def bypassed(self, grad: Tensor) -> None:
        """A gradient of a pass that had no call of the modules."""
        if self.squares is not None and self.squares.independent:
            self.squares.take(0, grad)
        else:
            self.direct = True


def _eps(t: Tensor) -> float:
    """The relative error of products with such a tensor."""
    if not t.is_floating_point():
        return 0.0
    if t.dtype != torch.float32:
        return 2.0**-42 if t.dtype == torch.float64 else torch.finfo(t.dtype).eps
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return 2.0**-8
    return 2.0**-10 if t.is_cuda or precision == "high" else 2.0**-17
