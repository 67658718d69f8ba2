"""docs/precision.md's table is that of today's formulas, and the formulas are what the objects hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import precision_memory
from fastcl import DiagonalPrecision, KroneckerPrecision, LowRankKroneckerPrecision, LowRankPrecision
from fastcl.testing import SIZES, elements


def held(value: Any, found: dict[int, int], seen: set[int]) -> dict[int, int]:
    """Bytes by storage of all tensors that an object of fastcl holds, parameters excepted."""
    if id(value) in seen or isinstance(value, (nn.Module, nn.Parameter)):
        return found
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for v in value.values():
            held(v, found, seen)
    elif isinstance(value, (list, tuple)):
        for v in value:
            held(v, found, seen)
    elif type(value).__module__.startswith("fastcl.precision"):
        held(vars(value), found, seen)
    return found


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (DiagonalPrecision, precision_memory.diagonal),
        (KroneckerPrecision, precision_memory.kronecker),
        (lambda model, n: LowRankPrecision(model, n, rank=3), lambda model: precision_memory.low_rank(model, 3)),
        (lambda model, n: LowRankKroneckerPrecision(model, n, rank=4), lambda model: precision_memory.low_rank_kronecker(model, 4)),
    ],
)
@pytest.mark.parametrize("tokens", [False, True])
def test_formulas_are_what_is_held(kind, formula, tokens):
    # Multiples of 16 columns, which padding leaves alone, bias included.
    model = nn.Sequential(nn.Linear(63, 80), nn.LayerNorm(80), nn.Linear(80, 95, bias=False), nn.Linear(95, 40))
    layers = [precision_memory.Layer(80, 64), precision_memory.Layer(95, 80), precision_memory.Layer(40, 96)]
    if tokens:
        model.append(nn.Embedding(300, 32))
        layers.append(precision_memory.Layer(300, 32, tokens=True))
    precision = kind(model, 100)
    expected = formula(precision_memory.Model(tuple(layers), 160))
    assert sum(held(precision, {}, set()).values()) == pytest.approx(expected.kept, rel=0.03)
    total = {}
    for block in precision.blocks:
        states: list[dict[str, Any]] = [{} for _ in block.params]
        block.begin(states)
        held(states, total, set())
    assert sum(total.values()) == pytest.approx(expected.optimizer, rel=0.01)


def test_collecting():
    model = nn.Sequential(nn.Linear(63, 80), nn.Linear(80, 40))
    layers = (precision_memory.Layer(80, 64), precision_memory.Layer(40, 81))
    for precision, formula in [
        (LowRankKroneckerPrecision(model, 100, rank=4), lambda m: precision_memory.low_rank_kronecker(m, 4)),
        (LowRankPrecision(model, 100, rank=3, gather=precision_memory.GATHER), lambda m: precision_memory.low_rank(m, 3)),
    ]:
        before = held(precision, {}, set())
        with precision.collect() as collection:
            for _ in range(precision_memory.GATHER - 1):
                collection.backward(model(torch.randn(5, 63)))
            now = held(collection._statistics, {}, set())
        more = sum(size for place, size in now.items() if place not in before)
        columns = 4 * sum(layer.m * layer.n for layer in layers) if isinstance(precision, LowRankPrecision) else 0  # one does not wait yet
        assert more + columns == pytest.approx(formula(precision_memory.Model(layers, 0)).collecting, rel=0.03)


def test_models_are_those_of_the_benchmarks():
    assert precision_memory.MODELS["ResNet-18"].elements == elements(SIZES["resnet18"])
    assert precision_memory.MODELS["GPT-2 small"].elements == elements(SIZES["gpt2-small"])
    assert precision_memory.MODELS["MLP 784-400-400-10"].elements == 785 * 400 + 401 * 400 + 401 * 10


def test_the_page_has_the_table_of_now():
    assert precision_memory.main(["--check"]) == 0, "run python -m bench.precision_memory"
