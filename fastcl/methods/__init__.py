"""Continual-learning methods: state and the order of calls; the arithmetic is in fastcl.ops."""

from fastcl.methods.spg import SPG

__all__ = ["SPG"]
