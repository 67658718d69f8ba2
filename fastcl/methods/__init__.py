"""Continual-learning methods: state and the order of calls; the arithmetic is in fastcl.ops."""

from fastcl.methods.agem import AGEM
from fastcl.methods.child_tuning import ChildTuning
from fastcl.methods.ewc import EWC
from fastcl.methods.gem import GEM
from fastcl.methods.joint import Joint
from fastcl.methods.kfac_ewc import KFAC_EWC
from fastcl.methods.naive import Naive
from fastcl.methods.ncl import NCL
from fastcl.methods.owm import OWM
from fastcl.methods.replay import Replay
from fastcl.methods.spg import SPG

__all__ = ["AGEM", "EWC", "GEM", "KFAC_EWC", "NCL", "OWM", "SPG", "ChildTuning", "Joint", "Naive", "Replay"]
