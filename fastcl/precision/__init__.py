"""Precision matrices over a model's parameters: what natural continual learning and its rivals know of past tasks."""

from fastcl.precision._base import Precision
from fastcl.precision.diagonal import DiagonalPrecision
from fastcl.precision.kronecker import KroneckerPrecision

__all__ = ["DiagonalPrecision", "KroneckerPrecision", "Precision"]
