"""What each form of precision keeps, from the shapes of a model's layers: the tables of docs/precision.md.

``python -m bench.precision_memory`` writes them; ``--check`` only says whether they are up to date.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "precision.md"
BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
RANK, SKINNY, GATHER = 16, 32, 8  # LowRankPrecision's rows and columns that wait, LowRankKroneckerPrecision's rank: the defaults


@dataclass(frozen=True)
class Layer:
    """``[W | b]`` is [m, n]; ``tokens``: an embedding, whose G is a diagonal."""

    m: int
    n: int
    tokens: bool = False


@dataclass(frozen=True)
class Model:
    """Kronecker-factored layers, and the number of all other elements."""

    layers: tuple[Layer, ...]
    others: int

    @property
    def elements(self) -> int:
        """P."""
        return sum(layer.m * layer.n for layer in self.layers) + self.others


def mlp(*sizes: int) -> Model:
    """Linear layers with biases."""
    return Model(tuple(Layer(m, n + 1) for n, m in itertools.pairwise(sizes)), 0)


def resnet18() -> Model:
    """Convolutions without biases, normalisations, a linear layer."""
    convolutions = [(64, 3 * 49), *[(64, 64 * 9)] * 4]
    norms = [64] * 5
    for before, width in ((64, 128), (128, 256), (256, 512)):
        convolutions += [(width, before * 9), *[(width, width * 9)] * 3, (width, before)]
        norms += [width] * 5
    return Model((*(Layer(m, n) for m, n in convolutions), Layer(1000, 513)), 2 * sum(norms))


def gpt2_small(depth: int = 12, width: int = 768) -> Model:
    """Token and position embeddings, linear layers, normalisations; without a head of its own."""
    block = (Layer(3 * width, width + 1), Layer(width, width + 1), Layer(4 * width, width + 1), Layer(width, 4 * width + 1))
    embeddings = (Layer(50257, width, tokens=True), Layer(1024, width, tokens=True))
    return Model(embeddings + block * depth, (2 * depth + 1) * 2 * width)


MODELS = {"MLP 784-400-400-10": mlp(784, 400, 400, 10), "ResNet-18": resnet18(), "GPT-2 small": gpt2_small()}


@dataclass(frozen=True)
class Bytes:
    """Of float32 parameters: Lambda and mu between tasks, the optimizer's state, and what is there in addition while data is collected."""

    kept: int
    optimizer: int
    collecting: int


def diagonal(model: Model) -> Bytes:
    """D, mu; V; squares."""
    P = model.elements
    return Bytes(8 * P, 4 * P, 4 * P)


def kronecker(model: Model) -> Bytes:
    """Factors and inverses, mu; M and H; the sums of both sides."""
    squares = sum(layer.n**2 + (layer.m if layer.tokens else layer.m**2) for layer in model.layers)
    P, d = model.elements, model.others
    return Bytes(4 * (2 * squares + P + d), 4 * (2 * (P - d) + d), 4 * (squares + d))


def low_rank(model: Model, rank: int = RANK) -> Bytes:
    """D, Q, mu; V; a second D and Q, and the columns that wait."""
    P = model.elements
    return Bytes(4 * (2 + rank) * P, 4 * P, 4 * (1 + rank + GATHER) * P)


def low_rank_kronecker(model: Model, rank: int = SKINNY) -> Bytes:
    """Bases, mu; M and H; float64 sketches of 2 rank + 8 rows."""
    sides = [layer.n for layer in model.layers] + [layer.m for layer in model.layers if not layer.tokens]
    bases = sum(min(rank, size - 1) * size for size in sides)
    # An embedding's diagonal, in float64, and its forms: a base and the rows of D_A, for products and for solves.
    bases += sum(layer.m * (2 + 2 * (1 + min(rank, layer.n - 1))) for layer in model.layers if layer.tokens)
    sketches = sum(2 * min(2 * rank + 8, size) * size for size in sides) + sum(layer.m for layer in model.layers if layer.tokens)
    P, d = model.elements, model.others
    return Bytes(4 * (bases + P + d), 4 * (2 * (P - d) + d), 4 * (sketches + d))


FORMS: dict[str, Callable[[Model], Bytes]] = {
    "DiagonalPrecision": diagonal,
    "KroneckerPrecision": kronecker,
    f"LowRankPrecision, rank {RANK}": low_rank,
    f"LowRankKroneckerPrecision, rank {SKINNY}": low_rank_kronecker,
}


def amount(count: int) -> str:
    """In MB (10^6 bytes)."""
    return f"{count / 1e6:,.1f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def table() -> str:
    """Markdown: a row per form, a column per model."""
    head = " | ".join(f"{name} ({model.elements / 1e6:.1f} M)" for name, model in MODELS.items())
    lines = [f"| MB in float32: kept / optimizer / collecting | {head} |", "|---" * (len(MODELS) + 1) + "|"]
    for name, form in FORMS.items():
        cells = [form(model) for model in MODELS.values()]
        lines.append(
            f"| {name} | " + " | ".join(f"{amount(b.kept)} / {amount(b.optimizer)} / {amount(b.collecting)}" for b in cells) + " |"
        )
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table of now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> int:
    """Write the page, or check it."""
    old = PAGE.read_text()
    new = page(old)
    if "--check" in arguments:
        return int(old != new)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
