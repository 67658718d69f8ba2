"""Streams of tasks, from data that is already on the machine, and replay buffers."""

from fastcl.data._task import Batches, Dataset, Task
from fastcl.data.buffer import Buffer, ClassBalancedBuffer, ReservoirBuffer, TaskBalancedBuffer
from fastcl.data.compose import permuted, rotated, split_by_class
from fastcl.data.digits import load_digits, permuted_digits
from fastcl.data.image_files import load_cifar10, load_cifar100, load_mnist
from fastcl.data.streams import STREAMS, Stream, stream

__all__ = [
    "STREAMS",
    "Batches",
    "Buffer",
    "ClassBalancedBuffer",
    "Dataset",
    "ReservoirBuffer",
    "Stream",
    "Task",
    "TaskBalancedBuffer",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_mnist",
    "permuted",
    "permuted_digits",
    "rotated",
    "split_by_class",
    "stream",
]
