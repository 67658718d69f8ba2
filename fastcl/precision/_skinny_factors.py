"""The low-rank Kronecker factors of one layer, and the functions of them that steps need."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.precision._buffers import padded_copy
from fastcl.precision._factors import Damping, Factors
from fastcl.precision._layers import Layer
from fastcl.precision._low_rank_factor import LowRankFactor, identity
from fastcl.precision._low_rank_form import Form, form, moved
from fastcl.precision._low_rank_merge import Factor


class SkinnyFactors(Factors):
    """A layer, ``A = a I + U_A^T S_A U_A`` and ``G`` likewise (for an embedding a diagonal), and the anchor ``[W | b]``."""

    def __init__(self, layer: Layer, value: float, rank: int) -> None:
        self._place(layer)
        like = self.anchor
        # With one row less than columns any matrix is exact.
        A = identity(value, self.columns, min(rank, self.columns - 1), like, self.dtype)
        if layer.kind == "embedding":
            G: Factor = torch.full((self.rows,), value, dtype=torch.float64, device=like.device)
        else:
            G = identity(value, self.rows, min(rank, self.rows - 1), like, self.dtype)
        self.take(A, G, None)

    def take(self, A: LowRankFactor, G: Factor, damping: Damping | None) -> None:
        """Lambda <- G x A, damped."""
        self.A, self.G = A, G
        self.damp(damping)

    def damp(self, damping: Damping | None) -> None:
        """Work with ``G x A``, with ``(G + alpha / pi I) x (A + alpha pi I)``, or with ``G x A + alpha I``."""
        A, G, shift = self.A, self.G, 0.0
        if damping is not None and damping[0] == "exact":
            shift = damping[1]
        elif damping is not None:
            mean = float(G.mean()) if isinstance(G, Tensor) else G.trace() / self.rows
            pi = (A.trace() / self.columns / mean) ** 0.5
            A = A._replace(scale=A.scale + damping[1] * pi)
            G = G + damping[1] / pi if isinstance(G, Tensor) else G._replace(scale=G.scale + damping[1] / pi)
        self.product: Form = form(A, G, lambda x: x + shift)
        self.inverse: Form = form(A, G, lambda x: 1 / (x + shift))

    def follow(self) -> None:
        """Move to the device of the weight."""
        device = self.layer.weight.parameter().device
        if self.anchor.device == device:
            return
        self.A = self.A._replace(basis=self.A.basis.to(device))
        self.G = self.G.to(device) if isinstance(self.G, Tensor) else self.G._replace(basis=self.G.basis.to(device))
        self.product, self.inverse = moved(self.product, device), moved(self.inverse, device)
        self.anchor = padded_copy(self.anchor.to(device), self.dtype)
