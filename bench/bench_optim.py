"""An optimizer's whole step with the gradient transform inside it, next to the same work as it is done outside of fastcl.

Every provider has parameters and state of its own and shares the gradients, which are restored before each step: masking in place would
otherwise drive them into subnormal numbers. ``torch fused`` is torch's fused AdamW and nothing else: what the transform would cost if it
were free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import measure, yardstick
from fastcl import BitMask, optim
from fastcl.testing import SIZES, elements, gradients, importances

KEEP = 0.3
LR, DECAY = 1e-3, 1e-2
Step = Callable[[], object]
BARE = "torch fused"
ALLOCATIONS = 3


class Problem:
    """Gradients, and what the transforms read, of one list of shapes."""

    def __init__(self, size: str, device: str) -> None:
        self.size, self.device = size, device
        shapes = SIZES[size]
        self.grads = gradients(shapes, torch.float32, device, 0)
        self._pristine = [g.clone() for g in self.grads]
        self.made: list[list[nn.Parameter]] = []  # by every provider, in the order in which they were built

    def others(self, seed: int) -> list[Tensor]:
        """Another list of the same shapes."""
        return gradients(SIZES[self.size], torch.float32, self.device, seed)

    def opposed(self) -> list[Tensor]:
        """A memory gradient that these gradients violate."""
        return [-t for t in self.others(3)]

    def importance(self, stored: torch.dtype) -> list[Tensor]:
        """One importance per parameter."""
        return importances(SIZES[self.size], stored, self.device, 1)

    def chosen(self) -> list[Tensor]:
        """A boolean mask per parameter."""
        return [i < KEEP for i in importances(SIZES[self.size], torch.float32, self.device, 2)]

    def parameters(self) -> list[nn.Parameter]:
        """Parameters with these gradients, for one provider."""
        params = [nn.Parameter(g * 0.1) for g in self._pristine]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        self.made.append(params)
        return params

    def restore(self) -> None:
        """The gradients as they were."""
        torch._foreach_copy_(self.grads, self._pristine)


def _torch(problem: Problem, **kind: bool) -> Step:
    return torch.optim.AdamW(problem.parameters(), LR, weight_decay=DECAY, **kind).step


def _ours(problem: Problem, transforms: Sequence[Any] = (), **options: Any) -> Step:
    return optim.AdamW(problem.parameters(), LR, weight_decay=DECAY, transforms=transforms, **options).step


def _masked(problem: Problem, stored: torch.dtype, foreach: bool) -> Step:
    step, importance = _torch(problem, fused=True), problem.importance(stored)

    def run() -> None:
        decoded = [i.float() / 255 for i in importance] if stored == torch.uint8 else importance
        if foreach:
            torch._foreach_addcmul_(problem.grads, problem.grads, decoded, value=-1.0)
        else:
            for g, i in zip(problem.grads, decoded, strict=True):
                g.mul_(1 - i)
        step()

    return run


class ChildTuningStep:
    """AdamW with Child-Tuning's masks as their public implementation works: parameter by parameter, the mask sampled or kept as floats."""

    def __init__(self, problem: Problem, masks: Sequence[Tensor] | None) -> None:
        self.params, self.t = problem.parameters(), 0
        self.masks = None if masks is None else [m.float() for m in masks]
        self.first, self.second = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        self.t += 1
        rate = LR * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        for i, (p, m, v) in enumerate(zip(self.params, self.first, self.second, strict=True)):
            grad = p.grad
            if grad is None:
                raise RuntimeError("every parameter of the benchmark has a gradient")
            if self.masks is None:
                grad *= torch.distributions.Bernoulli(torch.full_like(grad, KEEP)).sample() / KEEP
            else:
                grad *= self.masks[i]
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-rate)
            p.add_(p, alpha=-LR * DECAY)


def _projected(problem: Problem) -> Step:
    step, reference = _torch(problem, fused=True), problem.opposed()

    def run() -> None:
        g, r = (torch.cat([t.flatten() for t in tensors]) for tensors in (problem.grads, reference))
        dot = torch.dot(g, r)
        if dot < 0:
            projected = g - dot / torch.dot(r, r) * r
            for own, part in zip(problem.grads, projected.split([t.numel() for t in problem.grads]), strict=True):
                own.copy_(part.view_as(own))
        step()

    return run


def _pulled(problem: Problem) -> Step:
    params = problem.parameters()
    step = torch.optim.AdamW(params, LR, weight_decay=DECAY, fused=True).step
    precision, anchor = problem.importance(torch.float32), problem.others(4)

    @torch.no_grad()
    def run() -> None:
        for p, a, c in zip(params, precision, anchor, strict=True):
            if p.grad is not None:
                p.grad += 2 * a * (p - c)
        step()

    return run


@dataclass(frozen=True)
class Row:
    """One optimizer with its transform: its rivals, and bytes per element beyond AdamW's 28 (less of them with compact state)."""

    providers: dict[str, Callable[[Problem], Step]]
    extra_bytes: float
    sizes: tuple[str, ...] = ("gpt2-small",)
    dtype: str = "fp32"


def _soft(stored: torch.dtype) -> dict[str, Callable[[Problem], Step]]:
    return {
        "eager": lambda p: _masked(p, stored, foreach=False),
        "foreach": lambda p: _masked(p, stored, foreach=True),
        "fastcl": lambda p: _ours(p, [optim.SoftMask(p.importance(stored))]),
    }


def _compact(p: Problem) -> Step:
    masks: list[Any] = [BitMask.from_bool(m) for m in p.chosen()]
    return _ours(p, [optim.FixedMask(masks)], compact_state=True)


ROWS: dict[str, Row] = {
    "AdamW": Row({"foreach": lambda p: _torch(p, foreach=True), "fastcl": _ours}, 0, ("gpt2-small", "10000x64")),
    "AdamW + SoftMask": Row(_soft(torch.float32), 4, ("gpt2-small", "10000x64")),
    "AdamW + SoftMask, uint8": Row(_soft(torch.uint8), 1, dtype="fp32+uint8"),
    "AdamW + ChildMask": Row(
        {"official": lambda p: ChildTuningStep(p, None), "fastcl": lambda p: _ours(p, [optim.ChildMask(KEEP, seed=0)])}, 0
    ),
    "AdamW + FixedMask, compact": Row({"official": lambda p: ChildTuningStep(p, p.chosen()), "fastcl": _compact}, 1 / 8 - 16 * (1 - KEEP)),
    "AdamW + Project": Row({"official": _projected, "fastcl": lambda p: _ours(p, [optim.Project(p.opposed())])}, 12),
    "AdamW + Pull": Row({"eager": _pulled, "fastcl": lambda p: _ours(p, [optim.Pull(p.importance(torch.float32), p.others(4), 1.0)])}, 8),
}


def pairs() -> list[tuple[str, str]]:
    """Every row with every size of it."""
    return [(name, size) for name, row in ROWS.items() for size in row.sizes]


def _traffic(row: Row, size: str) -> yardstick.Traffic:
    total = int((28 + row.extra_bytes) * elements(SIZES[size]))
    sweep = min(24 * elements(SIZES[size]), total // 12 * 12)  # as much of it in the sweep that writes as there is
    return yardstick.Traffic(total - sweep, sweep)


def build(name: str, problem: Problem) -> dict[str, Step]:
    """All providers of a row, ready to be timed."""
    row = ROWS[name]
    calls: dict[str, Step] = {BARE: _torch(problem, fused=True)}
    calls |= {provider: make(problem) for provider, make in row.providers.items()}
    return calls | {"yardstick": yardstick.build(_traffic(row, problem.size), problem.device)}


def measure_optimizer(name: str, size: str, device: str, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """One row's record, in the form of a cell's, over several allocations: which pages a tensor gets moves a step's time by a third."""
    row, total = ROWS[name], _traffic(ROWS[name], size).total
    fewest, most = -(-rounds[0] // ALLOCATIONS), max(1, rounds[1] // ALLOCATIONS)
    times: dict[str, list[float]] = {}
    to_bare: dict[str, list[float]] = {}
    for seed in range(ALLOCATIONS):
        problem = Problem(size, device)
        found = measure.interleave(
            build(name, problem), problem.restore, measure.clock(device), seconds=seconds / ALLOCATIONS, rounds=(fewest, most), seed=seed
        )
        for provider, by_round in found.items():
            times.setdefault(provider, []).extend(measure.flat(by_round))
            to_bare.setdefault(provider, []).extend(measure.ratios(by_round, found[BARE]))
    rows: dict[str, dict[str, Any]] = {}
    for provider, samples in times.items():
        spread = measure.Spread.of(samples)
        rows[provider] = {**spread.row(), "gb_per_s": total / spread.median / 1e6 if provider in ("fastcl", "yardstick") else None}
        rows[provider]["to_bare"] = measure.Spread.of([r / 1e3 for r in to_bare[provider]]).row()
    return {
        "op": name,
        "size": size,
        "dtype": row.dtype,
        "tensors": len(SIZES[size]),
        "elements": elements(SIZES[size]),
        "bytes": total,
        "rounds": len(times["fastcl"]),
        "providers": rows,
        "not_run": {},
    }


@pytest.mark.parametrize(("name", "size", "provider"), [(n, s, p) for n, s in pairs() for p in (BARE, *ROWS[n].providers)])
def test_optimizer(benchmark: Any, name: str, size: str, provider: str) -> None:
    """For pytest-benchmark: one row per provider, grouped by optimizer and size."""
    problem = Problem(size, "cpu")
    call = _torch(problem, fused=True) if provider == BARE else ROWS[name].providers[provider](problem)
    benchmark.group = f"{name}, {size}"
    benchmark.pedantic(call, setup=problem.restore, rounds=5, warmup_rounds=1)
