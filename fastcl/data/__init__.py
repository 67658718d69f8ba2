"""Streams of tasks from data that needs no download."""

from fastcl.data._task import Batches, Task
from fastcl.data.digits import permuted_digits

__all__ = ["Batches", "Task", "permuted_digits"]
