"""Continual-learning methods: state and the order of calls; the arithmetic is in fastcl.ops."""

from fastcl.methods.agem import AGEM
from fastcl.methods.child_tuning import ChildTuning
from fastcl.methods.ewc import EWC
from fastcl.methods.gem import GEM
from fastcl.methods.joint import Joint
from fastcl.methods.naive import Naive
from fastcl.methods.replay import Replay
from fastcl.methods.spg import SPG

__all__ = ["AGEM", "EWC", "GEM", "SPG", "ChildTuning", "Joint", "Naive", "Replay"]
