"""Experiments that can be repeated: a configuration, a runner that survives being killed, and tables of several runs."""

from fastcl.experiment.compare import Run, compare, load_run
from fastcl.experiment.config import Config
from fastcl.experiment.learners import METHODS
from fastcl.experiment.runner import Progress, Result, run

__all__ = ["METHODS", "Config", "Progress", "Result", "Run", "compare", "load_run", "run"]
