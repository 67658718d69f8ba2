"""fastcl: fused operators for continual learning in PyTorch."""

from fastcl import ops, reference
from fastcl._version import __version__
from fastcl.backends import BackendUnavailable, use_backend
from fastcl.gradients import capture_gradients, child_mask_gradients_, gem_project_gradients_, mask_gradients_, project_gradients_

__all__ = [
    "BackendUnavailable",
    "__version__",
    "capture_gradients",
    "child_mask_gradients_",
    "gem_project_gradients_",
    "mask_gradients_",
    "ops",
    "project_gradients_",
    "reference",
    "use_backend",
]
