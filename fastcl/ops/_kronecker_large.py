"""Large layers: the vendor's matrix products over blocks, so that no temporary has a layer's size.

All products run in the factors' dtype; under autocast too. A block has 2^18 elements, 128 rows (columns) or an eighth of all elements of
the call, whatever is most: smaller ones would slow the products down by more than the last sweep gains. Blocks are columns of M where that
is possible: on a CPU products of few rows are slower than ones of few columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastcl.ops._kronecker_layers import Layers

LEAST = 128
LEAST_ELEMENTS = 1 << 18
SHARE = 8
PAD = 16  # elements: rows of scratch start at a cache line

Block = tuple[int, int]


def padded(n: int) -> int:
    """The distance between rows of ``n`` elements."""
    return -(-n // PAD) * PAD


def buffer(m: int, n: int, like: Tensor) -> Tensor:
    """An uninitialised [m, n] with padded rows."""
    return like.new_empty(m, padded(n))[:, :n]


class Scratch:
    """Memory for some blocks of rows or columns of any of the layers, which follow one another in it."""

    def __init__(self, layers: Layers, blocks: int = 1) -> None:
        sizes = [(g.size(0), a.size(0)) for a, g in zip(layers.A, layers.G, strict=True)]
        self.total = sum(m * n for m, n in sizes)
        self.size = max((max(self.rows(m, n) * padded(n), m * padded(self.rows(n, m))) for m, n in sizes), default=0)
        self.memory = layers.A[0].new_empty(blocks * self.size)

    def rows(self, m: int, n: int) -> int:
        """How many of ``m`` rows (columns) of ``n`` elements are a block: about equally many in each."""
        most = max(LEAST, max(LEAST_ELEMENTS, self.total // SHARE) // max(n, 1))
        return m if most >= m else -(-m // -(-m // most) // PAD) * PAD

    def blocks(self, m: int, n: int) -> Iterator[Block]:
        """The blocks of ``m`` rows (columns) of ``n`` elements."""
        step = max(1, self.rows(m, n))
        return ((begin, min(m, begin + step)) for begin in range(0, m, step))

    def matrix(self, rows: int, columns: int, block: int = 0) -> Tensor:
        """[rows, columns] with padded rows."""
        return self.memory.as_strided((rows, columns), (padded(columns), 1), block * self.size)


def matrix_of(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weight as a matrix of ``dtype`` on the same memory, if it is one."""
    if weight.dtype != dtype:
        return None
    if weight.dim() == 2:
        return weight
    return weight.view(weight.size(0), -1) if weight.is_contiguous() and weight.numel() else None


def direction_(V: Tensor, M: Tensor, A: Tensor, G: Tensor, scratch: Scratch) -> None:
    """``V <- G M A``."""
    for columns, T in _left_by_columns(M, G, scratch):
        if A.dim() == 1:
            torch.mul(T, A[columns], out=V[:, columns])
        elif columns.start == 0:
            torch.mm(T, A[columns], out=V)
        else:
            V.addmm_(T, A[columns])


def step_(weight: Tensor, bias: Tensor, M: Tensor, A: Tensor, G: Tensor, lr: float, scratch: Scratch) -> None:
    """``W <- W - lr G M A`` for a matrix of the factors' dtype: the second product accumulates into it."""
    last = weight.size(1)  # the column of the bias
    for columns, T in _left_by_columns(M, G, scratch):
        if A.dim() == 1:
            own = weight[:, columns]
            own.addcmul_(T[:, : own.size(1)], A[columns][: own.size(1)], value=-lr)
            if bias.numel() and columns.stop > last:
                bias.addcmul_(T[:, -1], A[last], value=-lr)
        else:
            weight.addmm_(T, A[columns, :last], alpha=-lr)
            if bias.numel():
                bias.addmv_(T, A[columns, last], alpha=-lr)


def _left_by_columns(M: Tensor, G: Tensor, scratch: Scratch) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns of ``G M``."""
    m, n = M.shape
    for begin, end in scratch.blocks(n, m):
        T = scratch.matrix(m, end - begin)
        _left(T, M[:, begin:end], None, G, (0, m))
        yield slice(begin, end), T


def apply_by_blocks_(layers: Layers, i: int, step: Tensor, apply: Callable[..., None], scratch: Scratch) -> None:
    """The same for any weight and any step size: a block of V, then the sweep over its rows, H included."""
    M, H, W, b = layers.M[i], layers.H[i], layers.weights[i], layers.biases[i]
    for begin, end in scratch.blocks(*M.shape):
        T, V = (scratch.matrix(end - begin, M.size(1), block) for block in (0, 1))
        _left(T, M, None, layers.G[i], (begin, end))
        _right(V, T, layers.A[i])
        apply([W[begin:end]], [b[begin:end] if b.numel() else b], [H[begin:end]], [V], [M[begin:end]], step)


def solve_(weight: Tensor, bias: Tensor, A: Tensor, G: Tensor, scratch: Scratch) -> None:
    """``X <- G X A``. Weights that are no matrix of the factors' dtype take a temporary of their size."""
    W = matrix_of(weight, A.dtype)
    if W is None or bias.dtype != A.dtype:
        X = _copied(weight, bias, A)
        columns = X.size(1) - (1 if bias.numel() else 0)
        _solve_matrix_(X[:, :columns], X[:, columns] if bias.numel() else X.new_empty(0), A, G, scratch)
        weight.copy_(torch.unflatten(X[:, :columns], 1, weight.shape[1:]))
        if bias.numel():
            bias.copy_(X[:, columns])
    else:
        _solve_matrix_(W, bias, A, G, scratch)


def _solve_matrix_(W: Tensor, bias: Tensor, A: Tensor, G: Tensor, scratch: Scratch) -> None:
    m, columns, n = W.size(0), W.size(1), A.size(0)
    if A.dim() == 1:
        W.mul_(A[:columns])
        if bias.numel():
            bias.mul_(A[columns])
    else:
        for begin, end in scratch.blocks(m, n):
            T = scratch.matrix(end - begin, n)
            torch.mm(W[begin:end], A[:columns], out=T)
            if bias.numel():
                T.addr_(bias[begin:end], A[columns])
                bias[begin:end].copy_(T[:, columns])
            W[begin:end].copy_(T[:, :columns])
    if G.dim() == 1:
        W.mul_(G[:, None])
    else:
        for begin, end in scratch.blocks(columns, m):
            T = scratch.matrix(m, end - begin)
            torch.mm(G, W[:, begin:end], out=T)
            W[:, begin:end].copy_(T)
    if bias.numel():
        bias.copy_(G * bias if G.dim() == 1 else G @ bias)


def quadratic(weight: Tensor, bias: Tensor, A: Tensor, G: Tensor, dot: Callable[..., Tensor], scratch: Scratch) -> Tensor:
    """``<X, G X A>``, float64. Weights that are no matrix of the factors' dtype take a temporary of their size."""
    W = matrix_of(weight, A.dtype)
    if W is None or bias.dtype != A.dtype:
        X = _copied(weight, bias, A)
        columns = X.size(1) - (1 if bias.numel() else 0)
        W, bias = X[:, :columns], X[:, columns] if bias.numel() else X.new_empty(0)
    n = A.size(0)
    total = torch.zeros((), dtype=torch.float64, device=A.device)
    for begin, end in scratch.blocks(W.size(0), n):
        T, U = (scratch.matrix(end - begin, n, block) for block in (0, 1))
        _left(T, W, bias if bias.numel() else None, G, (begin, end))
        _right(U, T, A)
        columns = W.size(1)
        own, other = [W[begin:end]], [U[:, :columns]]
        if bias.numel():
            own.append(bias[begin:end])
            other.append(U[:, columns])
        total += dot(own, other)
    return total


def _copied(weight: Tensor, bias: Tensor, like: Tensor) -> Tensor:
    n = like.size(0)
    columns = n - 1 if bias.numel() else n
    X = buffer(weight.size(0), n, like)
    torch.unflatten(X[:, :columns], 1, weight.shape[1:]).copy_(weight)
    if bias.numel():
        X[:, columns].copy_(bias)
    return X


def _left(out: Tensor, X: Tensor, bias: Tensor | None, G: Tensor, block: Block) -> None:
    """``out <- (G [X | bias])[block]``."""
    begin, end = block
    columns = X.size(1)
    whole = end - begin == X.size(0)
    main = out if bias is None else out[:, :columns]
    if G.dim() == 1:
        torch.mul(G[begin:end, None], X if whole else X[begin:end], out=main)
        if bias is not None:
            torch.mul(G[begin:end], bias[begin:end], out=out[:, columns])
        return
    rows = G if whole else G[begin:end]
    torch.mm(rows, X, out=main)
    if bias is not None:
        out[:, columns].copy_(rows @ bias)


def _right(out: Tensor, T: Tensor, A: Tensor) -> None:
    """``out <- T A``."""
    if A.dim() == 1:
        torch.mul(T, A, out=out)
    else:
        torch.mm(T, A, out=out)
