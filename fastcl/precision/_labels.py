"""The losses whose gradients make the Fisher information: with labels that are drawn, summed over, or given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

FISHERS = ("sample", "exact", "empirical")
SEQUENCES = ("expand", "reduce")
REDUCTIONS = ("sum", "mean")


def checked_words(fisher: str, sequence: str, reduction: str) -> None:
    """Raise ValueError for a word that is none."""
    for name, value, accepted in (("fisher", fisher, FISHERS), ("sequence", sequence, SEQUENCES), ("reduction", reduction, REDUCTIONS)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def losses(fisher: str, logits: Tensor, targets: Tensor | None, generator: torch.Generator, signed: bool) -> Iterator[Tensor]:
    """The summed losses of a batch that one backward pass each is for; see :meth:`Collection.backward`.

    ``signed``: each sample's loss gets a random sign, so that products of two samples' gradients have mean zero whatever the labels.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dim() < 2 or (logits.dim() > 2 and fisher == "exact"):
        wanted = "[samples, classes]" if fisher == "exact" else "[samples, ..., classes]"
        raise ValueError(f"logits must have shape {wanted} with fisher={fisher!r}, got {tuple(logits.shape)}")
    if not logits.requires_grad:
        raise ValueError("logits carry no gradient; the forward pass must not run under no_grad, nor its result be detached")
    if (targets is None) == (fisher == "empirical"):
        needed = "needs the targets" if targets is None else "draws or sums over labels and takes no targets"
        raise ValueError(f"fisher={fisher!r} {needed}")
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    log_p = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if fisher == "exact":
        # Squares of gradients are wanted: their weight p enters as its root.
        roots = (log_p.detach() / 2).exp()
        if signed:
            roots = roots * _signs(roots, generator)
        yield from (-(root * column).sum() for root, column in zip(roots.unbind(1), log_p.unbind(1), strict=True))
        return
    if targets is None:
        # The largest of log p plus Gumbel noise is a draw from p, and needs no look at the values on the host.
        noise = torch.empty_like(log_p).exponential_(generator=generator).log()
        targets = (log_p.detach() - noise).argmax(-1)
    dense = targets.is_floating_point()
    rows = logits.flatten(0, -2), targets.flatten(0, -2) if dense else targets.flatten()
    if signed:
        apart = cross_entropy(*rows, reduction="none").view(len(logits), logits.shape[1:-1].numel()).sum(1)
        yield (apart * _signs(apart, generator)).sum()
    else:
        yield cross_entropy(*rows, reduction="sum")


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, like.shape, device=like.device, generator=generator).to(like.dtype).mul_(2).sub_(1)
