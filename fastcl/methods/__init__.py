"""Continual-learning methods: state and the order of calls; the arithmetic is in fastcl.ops."""

from fastcl.methods.agem import AGEM
from fastcl.methods.gem import GEM
from fastcl.methods.joint import Joint
from fastcl.methods.naive import Naive
from fastcl.methods.replay import Replay
from fastcl.methods.spg import SPG

__all__ = ["AGEM", "GEM", "SPG", "Joint", "Naive", "Replay"]
