"""What fastcl promises on the CPU, and whether a run kept it. A miss is shown as a miss; what was not measured is not called met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
VERDICTS = ("reached", "met", "missed", "not measured")


@dataclass(frozen=True)
class Target:
    """One promise: ``kind`` of fastcl ``against`` a provider of the same cell.

    ``speed``: the other's time over fastcl's, at least ``must``. ``time``: fastcl's time over the other's, at most ``must``.
    ``memory``: extra bytes over the gradients' bytes, at most ``must``.
    ``overhead``: of the training step ``size`` with the method ``op``, relative to ``against``, at most ``must``.
    """

    op: str
    size: str
    dtype: str
    kind: str
    against: str
    must: float
    reach: float

    def value(self, cell: Record) -> float | None:
        """The measured value, or None if the cell lacks what it needs."""
        if self.kind == "overhead":
            percent: float = cell["variants"]["fastcl"]["overhead_percent"]["median"]
            return percent / 100
        times = cell["providers"]
        ours, other = times.get("fastcl"), times.get(self.against)
        if self.kind == "memory":
            extra = None if ours is None else ours.get("extra_bytes")
            return None if extra is None else extra / (4 * cell["elements"])
        if ours is None or other is None:
            return None
        ratio: float = ours["median_ms"] / other["median_ms"]
        return 1 / ratio if self.kind == "speed" else ratio

    def verdict(self, value: float | None) -> str:
        """One of VERDICTS. Judged on the number as measured, never as rounded for a table."""
        if value is None:
            return "not measured"
        at_least = self.kind == "speed"
        for limit, name in ((self.reach, "reached"), (self.must, "met")):
            if value >= limit if at_least else value <= limit:
                return name
        return "missed"


AGEM, KEPT = ("project_", "gpt2-small", "fp32"), ("project_, not violated", "gpt2-small", "fp32")
GEM = ("gem_project_", "resnet18", "fp32")
CHILD, FISHER = ("child_mask_", "gpt2-small", "fp32"), ("fisher_add_", "gpt2-small", "fp32")
GPT, SPG = ("soft_mask_", "gpt2-small", "fp32"), ("spg_importance_", "gpt2-small", "fp32")
QUANTILE = ("quantile", "gpt2-small", "fp32")
STEP = "fp32 step"
MEMORY_RESOLUTION = 0.001  # "none at all" is less than what the measurement can see: 0.1 % of 124 M parameters is 0.5 MB
TARGETS = (
    Target(*GPT, "speed", "yardstick", 0.90, 1.00),
    Target(*GPT, "speed", "compile", 0.95, 1.05),
    Target(*GPT, "speed", "eager", 2.0, 2.5),
    Target("soft_mask_", "gpt2-small", "fp32+uint8", "speed", "fp32 importance", 1.2, 1.33),
    Target(*SPG, "time", "yardstick", 1.5, 1.15),
    Target(*SPG, "speed", "official", 6.0, 10.0),
    Target("soft_mask_", "10000x64", "fp32", "speed", "foreach", 4.0, 6.0),
    Target("soft_mask_", "10000x64", "fp32", "speed", "eager", 15.0, 30.0),
    Target("soft_mask_", "400x64", "fp32", "time", "foreach", 0.45, 0.30),
    Target(*AGEM, "time", "yardstick", 1.15, 1.0),
    Target(*AGEM, "speed", "official", 4.0, 6.0),
    Target(*AGEM, "speed", "compile", 1.0, 1.2),
    Target(*KEPT, "time", "yardstick", 1.15, 1.0),
    Target(*GEM, "speed", "official", 10.0, 20.0),
    Target("project_", "10000x64", "fp32", "speed", "official", 5.0, 15.0),
    Target(*QUANTILE, "speed", "official", 8.0, 20.0),
    Target(*CHILD, "time", "yardstick", 2.5, 1.4),
    Target(*CHILD, "speed", "official", 12.0, 25.0),
    Target(*FISHER, "time", "yardstick", 1.2, 1.0),
    Target("A-GEM's projection", "ResNet-18, batch 32 of 64 x 64", STEP, "overhead", "none", 0.05, 0.02),
    Target(*AGEM, "memory", "P", 0.01, MEMORY_RESOLUTION),
    Target(*GEM, "memory", "P", 0.01, MEMORY_RESOLUTION),
    Target(*GPT, "memory", "P", 0.01, MEMORY_RESOLUTION),
    Target(*SPG, "memory", "P", 0.01, MEMORY_RESOLUTION),
    Target(*CHILD, "memory", "P", 0.01, MEMORY_RESOLUTION),
    Target(*FISHER, "memory", "P", 0.01, MEMORY_RESOLUTION),
)


FUSED = "torch fused"
CHILD, COMPACT = ("AdamW + ChildMask", "gpt2-small", "fp32"), ("AdamW + FixedMask, compact", "gpt2-small", "fp32")
OPTIMIZERS = (
    Target("AdamW", "gpt2-small", "fp32", "speed", FUSED, 1.0, 1.2),
    Target("AdamW + SoftMask", "gpt2-small", "fp32", "time", FUSED, 1.20, 1.14),
    Target("AdamW + SoftMask, uint8", "gpt2-small", "fp32+uint8", "time", FUSED, 1.08, 1.04),
    Target(*CHILD, "time", FUSED, 1.30, 1.10),
    Target(*CHILD, "speed", "official", 6.0, 10.0),
    Target(*COMPACT, "time", FUSED, 0.80, 0.65),
    Target("AdamW + SoftMask", "10000x64", "fp32", "speed", "foreach", 2.0, 4.0),
)

NCL, LAYERS, MERGE = "MLP 784-400-400-10", "64 of 32x33, 16 of 64x65", ("kron_merge, kl", "n = m = 400", "fp32")
PRECISION = (
    Target("ncl_step_", NCL, "fp32", "speed", "official", 5.0, 10.0),
    Target("ncl_step_", NCL, "fp32", "speed", "torch", 1.15, 1.4),
    Target("ncl_step_", LAYERS, "fp32", "speed", "torch.bmm", 1.5, 3.0),
    Target("NCL's step over SGD's", f"{NCL}, batch 256", STEP, "overhead", "none", 0.60, 0.35),
    *(
        target
        for size in ("10 M, r = 16", "124 M, r = 8")
        for target in (
            Target("low_rank_step_", size, "fp32", "time", "yardstick", 1.25, 1.05),
            Target("low_rank_step_", size, "fp32", "speed", "torch [r, P]", 1.5, 2.5),
            Target("low_rank_step_", size, "fp32", "speed", "torch [P, r]", 1.5, 2.5),
        )
    ),
    Target(*MERGE, "speed", "official", 50.0, 200.0),
    Target("ncl_step_", NCL, "fp32", "memory", "P", 0.5, MEMORY_RESOLUTION),
    Target("low_rank_step_", "124 M, r = 8", "fp32", "memory", "P", 0.01, MEMORY_RESOLUTION),
)


@dataclass(frozen=True)
class Outcome:
    """A target and what a run says about it."""

    target: Target
    value: float | None
    verdict: str
    reason: str = ""


def of(result: Mapping[str, Any]) -> list[Outcome]:
    """Every target's outcome in a whole result."""
    return evaluate([*result["cells"], *result["optimizers"], *result["precision"]], result["steps"])


def evaluate(
    records: Sequence[Record], steps: Sequence[Record] = (), targets: Sequence[Target] = (*TARGETS, *OPTIMIZERS, *PRECISION)
) -> list[Outcome]:
    """Hold a run's cells and training steps against the targets, in their order; every target has an outcome."""
    by_cell = {(r["op"], r["size"], r["dtype"]): r for r in records} | {(s["method"], s["model"], STEP): s for s in steps}
    out = []
    for target in targets:
        record = by_cell.get((target.op, target.size, target.dtype))
        value = None if record is None else target.value(record)
        reason = (
            ""
            if value is not None
            else "the cell is not in the run"
            if record is None
            else record.get("not_run", {}).get(target.against, "")
        )
        out.append(Outcome(target, value, target.verdict(value), reason))
    return out
