"""SGD and AdamW of which one sweep over memory carries the gradient transforms of continual learning."""

from fastcl.optim.adamw import AdamW
from fastcl.optim.sgd import SGD
from fastcl.optim.transforms import ChildMask, FixedMask, Project, Pull, SoftMask

__all__ = ["SGD", "AdamW", "ChildMask", "FixedMask", "Project", "Pull", "SoftMask"]
