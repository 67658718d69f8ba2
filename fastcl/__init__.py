"""fastcl: fused operators for continual learning in PyTorch."""

from fastcl import ops, optim, reference
from fastcl._version import __version__
from fastcl.backends import BackendUnavailable, use_backend
from fastcl.bit_mask import BitMask
from fastcl.gradients import capture_gradients, child_mask_gradients_, gem_project_gradients_, mask_gradients_, project_gradients_
from fastcl.masks import apply_gradient_mask_, top_fraction_mask
from fastcl.precision import DiagonalPrecision, KroneckerPrecision

__all__ = [
    "BackendUnavailable",
    "BitMask",
    "DiagonalPrecision",
    "KroneckerPrecision",
    "__version__",
    "apply_gradient_mask_",
    "capture_gradients",
    "child_mask_gradients_",
    "gem_project_gradients_",
    "mask_gradients_",
    "ops",
    "optim",
    "project_gradients_",
    "reference",
    "top_fraction_mask",
    "use_backend",
]
