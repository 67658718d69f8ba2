"""The operators: functions over lists of tensors, as in torch._foreach_*, one call and one sweep."""

from fastcl.ops.bit_mask import bit_mask_
from fastcl.ops.child_mask import child_mask_
from fastcl.ops.importance import emax_, fisher_add_, spg_importance_
from fastcl.ops.kronecker import kron_merge, kron_quadratic, kron_solve_, ncl_step_
from fastcl.ops.low_rank import low_rank_append_, low_rank_quadratic, low_rank_solve_, low_rank_step_
from fastcl.ops.optimizers import adamw_, sgd_
from fastcl.ops.projection import GemInfo, ProjectionInfo, gem_project_, grad_dot, gram, project_
from fastcl.ops.pull import ewc_pull_
from fastcl.ops.quantile import quantile
from fastcl.ops.soft_mask import soft_mask_

__all__ = [
    "GemInfo",
    "ProjectionInfo",
    "adamw_",
    "bit_mask_",
    "child_mask_",
    "emax_",
    "ewc_pull_",
    "fisher_add_",
    "gem_project_",
    "grad_dot",
    "gram",
    "kron_merge",
    "kron_quadratic",
    "kron_solve_",
    "low_rank_append_",
    "low_rank_quadratic",
    "low_rank_solve_",
    "low_rank_step_",
    "ncl_step_",
    "project_",
    "quantile",
    "sgd_",
    "soft_mask_",
    "spg_importance_",
]
