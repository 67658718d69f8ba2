"""The operators: functions over lists of tensors, as in torch._foreach_*, one call and one sweep."""

from fastcl.ops.importance import emax_, spg_importance_
from fastcl.ops.soft_mask import soft_mask_

__all__ = ["emax_", "soft_mask_", "spg_importance_"]
