"""The table of cases: for each op its inputs, reference, rival implementations and bytes.

One table drives the correctness tests, opcheck, torch.compile, the Triton interpreter, the GPU suite and the benchmarks. A new op is a new
row. The rivals are written the way code outside fastcl does it: ``official`` as the methods' public code, ``eager`` with in-place torch
ops, ``foreach`` with torch._foreach_*. ``compile`` (torch.compile of ``eager``) is made from the row by :meth:`OpCase.provider`.
"""

from fastcl.testing import bit_mask, child_mask, importance, low_rank, optimizers, projection, pull, quantile, soft_mask
from fastcl.testing._case import Args, OpCase, Shape, clone, largest_error, unit_roundoff
from fastcl.testing._inputs import SIZES, elements, gradients, importances

FAMILIES = (soft_mask, importance, projection, child_mask, pull, quantile, bit_mask, low_rank, optimizers)
CASES: dict[str, OpCase] = {case.name: case for family in FAMILIES for case in family.CASES}

__all__ = ["CASES", "SIZES", "Args", "OpCase", "Shape", "clone", "elements", "gradients", "importances", "largest_error", "unit_roundoff"]
