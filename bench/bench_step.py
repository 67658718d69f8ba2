"""A whole training step with and without a method's work on the gradients: what a user of the method waits for.

SPG's mask: forward, backward, mask, SGD step on random images. A-GEM: the same with a second forward and backward on a memory batch of the
same size, whose gradients are captured and projected against; the step without is the one with both backward passes and no projection.
The parameters are put back between steps, outside the timed region, so that every step does the same work and no gradient shrinks into
subnormal numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastcl
from bench import measure
from fastcl.testing import CASES, importances

METHODS = {"SPG's mask": "soft_mask_", "A-GEM's projection": "project_"}  # and the case whose providers do its work
VARIANTS = ("none", "official", "eager", "foreach", "compile", "fastcl")


def mlp() -> tuple[nn.Module, Tensor]:
    """10 M parameters, a batch of 128: few operations per parameter, so that the mask weighs most."""
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    ), torch.randn(128, 784)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of both paths' sum."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> tuple[nn.Module, Tensor]:
    """ResNet-18 (He et al., 2016) with the ImageNet stem and 100 classes, a batch of 32 images of 64 x 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for out in (64, 128, 256, 512):
        layers += [Block(width, out, 1 if out == 64 else 2), Block(out, out, 1)]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100)), torch.randn(32, 3, 64, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP 784-2048-2048-2048-10, batch 128": mlp,
    "ResNet-18, batch 32 of 64 x 64": resnet18,
}


class Step:
    """One model's training step under every variant of a method."""

    def __init__(self, model: str, device: str, method: str = "SPG's mask") -> None:
        torch.manual_seed(0)
        built, images = MODELS[model]()
        self.method = method
        self.model, self.images = built.to(device), images.to(device)
        self.labels = torch.randint(0, 10, (len(images),), device=device)
        self.memory_labels = torch.randint(0, 10, (len(images),), device=device)
        self.params = list(self.model.parameters())
        self.start = [p.detach().clone() for p in self.params]
        self.importance = importances([p.shape for p in self.params], torch.float32, device, 0)
        self.optimizer = torch.optim.SGD(self.params, lr=0.01)
        case = CASES[METHODS[method]]
        torch._dynamo.reset()
        self.rivals = {name: case.provider(name) for name in VARIANTS if name not in ("none", "fastcl")}

    def reset(self) -> None:
        """The starting parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)

    def change(self, name: str) -> None:
        """Mask or project the gradients through one provider."""
        if self.method == "SPG's mask":
            if name == "fastcl":
                fastcl.mask_gradients_(self.params, self.importance)
            elif name != "none":
                self.rivals[name]([p.grad for p in self.params], self.importance, 1.0)
            return
        with fastcl.capture_gradients(self.params) as reference:
            self.loss(self.memory_labels).backward()
        if name == "fastcl":
            fastcl.project_gradients_(self.params, reference)
        elif name != "none":
            self.rivals[name]([p.grad for p in self.params], reference)

    def loss(self, labels: Tensor) -> Tensor:
        """Of one batch."""
        return functional.cross_entropy(self.model(self.images), labels)

    def step(self, name: str) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.labels).backward()
        self.change(name)
        self.optimizer.step()


def measure_step(model: str, method: str, device: str, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """Times and overhead of every variant; the overhead is the median over rounds of (with - without), over the median step without."""
    work = Step(model, device, method)
    calls: dict[str, measure.Call] = {name: (lambda name=name: work.step(name)) for name in VARIANTS}
    times = measure.interleave(calls, work.reset, measure.clock(device), seconds=seconds, rounds=rounds)
    bare = statistics.median(measure.flat(times["none"]))
    rows: dict[str, Any] = {}
    peaks = {name: measure.extra_bytes(call, work.reset, device) for name, call in calls.items()}
    for name, by_round in times.items():
        more = [with_[0] - without[0] for with_, without in zip(by_round, times["none"], strict=False)]
        spread = measure.Spread.of(more)
        peak, without = peaks[name], peaks["none"]
        rows[name] = {
            **measure.Spread.of(measure.flat(by_round)).row(),
            "overhead_percent": {"median": spread.median / bare / 10, "low": spread.low / bare / 10, "high": spread.high / bare / 10},
            "peak_bytes_over_none": None if peak is None or without is None else max(0, peak - without),
        }
    return {
        "model": model,
        "method": method,
        "parameters": sum(p.numel() for p in work.params),
        "rounds": len(times["none"]),
        "variants": rows,
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark: Any, model: str, method: str, variant: str) -> None:
    """For pytest-benchmark: one row per variant, grouped by model and method."""
    work = Step(model, "cpu", method)
    benchmark.group = f"training step, {model}, {method}"
    benchmark.pedantic(work.step, args=(variant,), setup=work.reset, rounds=10, warmup_rounds=1)
