"""Statistics of random masks, and the reference's mask for elements in a row."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from fastcl.reference.child_mask import child

# Every test of a mask draws its numbers from a fixed seed: it passes always or never. 1e-4 for each p-value then only says how unlikely it
# was that a good generator had failed when the seeds were chosen.
ALPHA = 1e-4


def row(n: int, keep: float, seed: int, step: int, tensor: int, first: int = 0) -> np.ndarray:
    """The reference's mask of n elements from an index on."""
    return child(torch.arange(first, first + n), tensor, keep, seed, step).numpy()


def count_p(mask: np.ndarray, keep: float) -> float:
    """Of the number of kept elements, which is binomial."""
    return float(stats.binomtest(int(mask.sum()), mask.size, keep).pvalue)


def runs_p(mask: np.ndarray) -> float:
    """Wald and Wolfowitz's test: the number of runs, given how many are kept."""
    n1, n = int(mask.sum()), mask.size
    n0 = n - n1
    runs = 1 + int((mask[1:] != mask[:-1]).sum())
    mean = 1 + 2 * n0 * n1 / n
    variance = (mean - 1) * (mean - 2) / (n - 1)
    return float(2 * stats.norm.sf(abs(runs - mean) / variance**0.5))


def same_p(a: np.ndarray, b: np.ndarray, keep: float) -> float:
    """Of the number of places where two independent masks agree."""
    return float(stats.binomtest(int((a == b).sum()), a.size, keep**2 + (1 - keep) ** 2).pvalue)


def lag_p(mask: np.ndarray, lag: int, keep: float) -> float:
    """Of the pairs of elements a lag apart in which both are kept; every element in one pair only, so that the pairs are independent."""
    blocks = mask[: mask.size // (2 * lag) * 2 * lag].reshape(-1, 2, lag)
    both = (blocks[:, 0] & blocks[:, 1]).ravel()
    return float(stats.binomtest(int(both.sum()), both.size, keep**2).pvalue)


def bytes_p(mask: np.ndarray, keep: float) -> float:
    """chi^2 of the patterns of 8 neighbours, which one draw of the generator makes."""
    patterns = np.packbits(mask[: mask.size // 8 * 8].reshape(-1, 8), axis=1).ravel()
    kept = np.array([bin(p).count("1") for p in range(256)])
    expected = keep**kept * (1 - keep) ** (8 - kept) * patterns.size
    found = np.bincount(patterns, minlength=256)
    rare = expected < 10  # counted together: chi^2 is for many
    if rare.any():
        expected, found = (np.append(x[~rare], x[rare].sum()) for x in (expected, found))
    return float(stats.chisquare(found, expected).pvalue)


def failures(masks: dict[str, np.ndarray], keep: float) -> list[str]:
    """Which tests the masks fail; they are of one length, and independent."""
    found = {}
    names = list(masks)
    for name, mask in masks.items():
        found[f"count {name}"] = count_p(mask, keep)
        found[f"runs {name}"] = runs_p(mask)
        found[f"bytes {name}"] = bytes_p(mask, keep)
        for lag in (1, 2, 3, 4, 5, 7, 8, 15, 16, 64, 256, 4096):
            found[f"lag {lag} {name}"] = lag_p(mask, lag, keep)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found[f"same {a}, {b}"] = same_p(masks[a], masks[b], keep)
    return [name for name, p in found.items() if p < ALPHA]
