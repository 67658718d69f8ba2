"""How exact a solve with explicit inverses is: writes docs/conditioning.md.

    python bench/conditioning.py [--print]

Layers of 64 x 65 (both products in one sweep) and 200 x 201 (the vendor's products) whose factors have condition numbers of 1e2 to 1e8.
Every error is that of ``V = G^-1 M A^-1`` relative to the largest element of a solve in float64, the median of five seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor

from fastcl import ops
from fastcl.testing import kronecker as cases

FILE = Path(__file__).resolve().parents[1] / "docs" / "conditioning.md"
CONDITIONS = tuple(10.0**k for k in range(2, 9))
SIZES = ((64, 64), (200, 200))
SEEDS = range(5)
COLUMNS = {
    "op": "float32 inverses, made in float64",
    "own": "float32 inverses, made in float32",
    "triangular": "float32 triangular solves",
    "double": "float64 inverses",
}
TEXT = """# Solving with explicit inverses

`ncl_step_` and `kron_solve_` multiply with inverses that are made once per task in float64 and stored in the parameters' precision. Is that
exact enough? Both factors of a layer have eigenvalues from 1 down to one over the condition number, spaced evenly in their logarithms. The
errors are those of V = G^-1 M A^-1, relative to the largest element of a solve in float64 from the same float64 factors (the median of
five seeds; `python bench/conditioning.py` writes this page).

"""


def errors(m: int, n: int, condition: float, seed: int) -> dict[str, float]:
    """The relative error of each way to solve, for a random right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    A, G = (cases.spd(k, torch.float64, generator, condition) for k in (n + 1, m))
    M = torch.randn(m, n + 1, generator=generator, dtype=torch.float64)
    exact = _triangular(M, A, G)
    narrow = M.float()
    results = {
        "op": _product(narrow, *(torch.linalg.inv(x).float() for x in (A, G))),
        "own": _product(narrow, *(torch.linalg.inv(x.float()) for x in (A, G))),
        "triangular": _triangular(narrow, A.float(), G.float()),
        "double": _product(M, *(torch.linalg.inv(x) for x in (A, G))),
    }
    return {name: float((v.double() - exact).abs().max() / exact.abs().max()) for name, v in results.items()}


def _product(M: Tensor, A_inverse: Tensor, G_inverse: Tensor) -> Tensor:
    W, b = M[:, :-1].clone(), M[:, -1].clone()
    ops.kron_solve_([(W, b)], [(A_inverse.contiguous(), G_inverse.contiguous())])
    return cases.joined((W, b))


def _triangular(M: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """Two Cholesky factors and four triangular solves; NaN where a factor is not positive definite in its own precision."""
    (left, failed), (right, too) = torch.linalg.cholesky_ex(G), torch.linalg.cholesky_ex(A)
    if int(failed) or int(too):
        return torch.full_like(M, torch.nan)
    return torch.cholesky_solve(torch.cholesky_solve(M, left).mT.contiguous(), right).mT


def table(m: int, n: int) -> str:
    """The errors of one size as a table in Markdown."""
    lines = ["| condition of A and of G | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for condition in CONDITIONS:
        runs = [errors(m, n, condition, seed) for seed in SEEDS]
        cells = [_cell([run[name] for run in runs]) for name in COLUMNS]
        lines.append(f"| {condition:.0e} | " + " | ".join(cells) + " |")
    return f"## A layer of {m} x {n + 1}\n\n" + "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    lost = sum(v != v for v in values)
    return f"fails ({lost} of {len(values)})" if lost else f"{statistics.median(values):.1e}"


def main() -> None:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the page and write nothing")
    page = TEXT + "\n".join(table(m, n) for m, n in SIZES)
    if parser.parse_args().print:
        print(page)
    else:
        FILE.write_text(page)


if __name__ == "__main__":
    main()
