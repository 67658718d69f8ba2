"""Precision matrices over a model's parameters: what natural continual learning and its rivals know of past tasks."""

from fastcl.precision._base import Precision
from fastcl.precision.diagonal import DiagonalPrecision
from fastcl.precision.kronecker import KroneckerPrecision
from fastcl.precision.low_rank import LowRankPrecision
from fastcl.precision.low_rank_kronecker import LowRankKroneckerPrecision

__all__ = ["DiagonalPrecision", "KroneckerPrecision", "LowRankKroneckerPrecision", "LowRankPrecision", "Precision"]
