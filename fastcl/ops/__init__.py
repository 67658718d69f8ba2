"""The operators: functions over lists of tensors, as in torch._foreach_*, one call and one sweep."""

from fastcl.ops.bit_mask import bit_mask_
from fastcl.ops.importance import emax_, spg_importance_
from fastcl.ops.projection import GemInfo, ProjectionInfo, gem_project_, grad_dot, gram, project_
from fastcl.ops.quantile import quantile
from fastcl.ops.soft_mask import soft_mask_

__all__ = [
    "GemInfo",
    "ProjectionInfo",
    "bit_mask_",
    "emax_",
    "gem_project_",
    "grad_dot",
    "gram",
    "project_",
    "quantile",
    "soft_mask_",
    "spg_importance_",
]
