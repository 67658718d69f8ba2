"""SGD and AdamW whose one sweep over memory carries the gradient transforms of continual learning, and natural continual learning."""

from fastcl.optim.adamw import AdamW
from fastcl.optim.ncl import NCL
from fastcl.optim.sgd import SGD
from fastcl.optim.transforms import ChildMask, FixedMask, Project, Pull, SoftMask

__all__ = ["NCL", "SGD", "AdamW", "ChildMask", "FixedMask", "Project", "Pull", "SoftMask"]
