"""fastcl: fused operators for continual learning in PyTorch."""

from fastcl import ops, reference
from fastcl._version import __version__
from fastcl.backends import BackendUnavailable, use_backend
from fastcl.gradients import mask_gradients_

__all__ = ["BackendUnavailable", "__version__", "mask_gradients_", "ops", "reference", "use_backend"]
