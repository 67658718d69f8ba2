"""The definitions in plain PyTorch, with the names and signatures of fastcl.ops; they also run in float64."""

from fastcl.reference.bit_mask import bit_mask_
from fastcl.reference.child_mask import child_mask_
from fastcl.reference.gradients import child_mask_gradients_, mask_gradients_
from fastcl.reference.importance import emax_, fisher_add_, spg_importance_
from fastcl.reference.kronecker import kron_merge, kron_quadratic, kron_solve_, ncl_step_
from fastcl.reference.low_rank import low_rank_append_, low_rank_quadratic, low_rank_solve_, low_rank_step_
from fastcl.reference.projection import gem_project_, grad_dot, gram, project_
from fastcl.reference.pull import ewc_pull_
from fastcl.reference.quantile import quantile
from fastcl.reference.soft_mask import soft_mask_

__all__ = [
    "bit_mask_",
    "child_mask_",
    "child_mask_gradients_",
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
    "mask_gradients_",
    "ncl_step_",
    "project_",
    "quantile",
    "soft_mask_",
    "spg_importance_",
]
