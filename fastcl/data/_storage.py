"""What all replay buffers share: the stored samples, reading them, their state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastcl.data._checks import dense, rows, whole

# Far above any count of samples: the remainder of a division by a count below 2^32 is uniform to within 1e-9.
RANDOM = 2**62
LAST_TASK = 2**63 - 1  # task numbers are stored as int64

Value = Tensor | int
Stored = tuple[Tensor, Tensor, Tensor]


class Buffer(ABC):
    """A memory of samples ``(x, y, task)`` of a stream. Subclasses differ in what they keep.

    Samples are copied in, without gradient history, and stay on the device of the first batch; which are kept and drawn is decided on the
    CPU by ``generator`` alone.

    Args:
        capacity: the largest number of samples that are kept, at least 1.
        generator: a CPU generator that decides; a new one, seeded from torch's default generator, if None.

    Raises:
        TypeError: a capacity that is no int, a generator that is none.
        ValueError: a capacity below 1, a generator of another device.
    """

    def __init__(self, capacity: int, *, generator: torch.Generator | None = None) -> None:
        self._capacity = whole("capacity", capacity, 1)
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        elif not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        elif generator.device.type != "cpu":
            raise ValueError(f"generator must be one of the CPU, got one of {generator.device}")
        self._generator = generator
        self._seen = 0
        self._length = 0
        self._x: Tensor | None = None  # [capacity, ...], of which the first _length are samples
        self._y: Tensor | None = None
        self._task = torch.zeros(self._capacity, dtype=torch.int64)

    @property
    def capacity(self) -> int:
        """The largest number of samples that are kept."""
        return self._capacity

    @property
    def seen(self) -> int:
        """Number of samples that were added, kept or not."""
        return self._seen

    @property
    def tasks(self) -> list[int]:
        """The tasks of the stored samples, in ascending order."""
        return sorted(set(self._task[: self._length].tolist()))

    @property
    def generator(self) -> torch.Generator:
        """What decides which samples are kept and drawn."""
        return self._generator

    def __len__(self) -> int:
        """Number of stored samples."""
        return self._length

    def add(self, x: Tensor, y: Tensor, task: int) -> None:
        """Offer a batch of samples of one task.

        Args:
            x: inputs, [n, ...]; shape of a sample, dtype and device as in the first batch.
            y: targets, [n, ...]; likewise.
            task: number of the task, from 0 to 2^63 - 1.

        Raises:
            TypeError: ``x`` or ``y`` is no tensor, ``task`` no int.
            ValueError: different lengths, other shapes, dtypes or devices than before, a tensor that is not dense or has no
                values (meta device), a task out of range.

        Nothing has been stored when it raises.
        """
        task = whole("task", task, 0, LAST_TASK)
        self._check("x", x, self._x)
        self._check("y", y, self._y)
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y has {len(y)}; pass one target per sample")
        if not len(x):
            return
        # The caller may hold inference mode; tensors made in it could never again be part of a training step.
        with torch.inference_mode(False), torch.no_grad():
            room_x, room_y = (self._room(t, stored) for t, stored in ((x, self._x), (y, self._y)))
            taken, slots, length = self._place(y, task)
            self._x, self._y = room_x, room_y
            for stored, batch in ((room_x, x), (room_y, y)):
                stored[slots.to(stored.device)] = batch[taken.to(batch.device)]
            self._task[slots] = task
            self._length = length
            self._seen += len(x)

    def add_task(self, loader: Iterable[tuple[Tensor, Tensor]], task: int) -> None:
        """Offer all samples of a task: one pass over a loader of batches ``(x, y)``. Raises as :meth:`add` does, or if there is no pair."""
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
                raise TypeError(f"loader must yield pairs (x, y), got {got}")
            self.add(batch[0], batch[1], task)

    def sample(self, n: int) -> Stored:
        """Draw ``n`` samples uniformly: without replacement while ``n <= len(buffer)``, otherwise with replacement.

        Returns:
            Copies ``x`` [n, ...], ``y`` [n, ...] and ``task`` [n], int64, on the CPU.

        Raises:
            TypeError: ``n`` is no int.
            ValueError: ``n`` below 1, an empty buffer.
        """
        n = whole("n", n, 1)
        x, y, task = self._samples()
        if n <= self._length:
            index = torch.randperm(self._length, generator=self._generator)[:n]
        else:
            index = torch.randint(self._length, (n,), generator=self._generator)
        with torch.inference_mode(False):
            return x[index.to(x.device)], y[index.to(y.device)], task[index]

    def of_task(self, k: int) -> tuple[Tensor, Tensor]:
        """Copies of all stored samples of task ``k``: ``x`` [m, ...] and ``y`` [m, ...].

        Raises TypeError if ``k`` is no int, ValueError if no sample of the task is stored.
        """
        k = whole("k", k, 0, LAST_TASK)
        index = (self._task[: self._length] == k).nonzero()[:, 0]
        if not len(index):
            raise ValueError(f"k is {k}, and no sample of that task is stored; stored are tasks {self.tasks}")
        x, y, _ = self._samples()
        with torch.inference_mode(False):
            return x[index.to(x.device)], y[index.to(y.device)]

    def state_dict(self) -> dict[str, Value]:
        """Copies of everything that decides about the future: samples, counts and the generator's state; tensors and ints."""
        empty = torch.empty(0)
        x, y = (empty if t is None else t[: self._length].clone() for t in (self._x, self._y))
        return {
            "capacity": self._capacity,
            "seen": self._seen,
            "x": x,
            "y": y,
            "task": self._task[: self._length].clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Value]) -> None:
        """Take over a state of :meth:`state_dict`: afterwards the same samples are drawn and kept as after the original.

        The samples are copied and lie on the devices of the state's tensors.

        Raises:
            TypeError: a state that is no mapping, an entry of a wrong type.
            ValueError: missing or unknown entries, another capacity, entries that contradict each other, tensors that are not dense or
                have no values (meta device).

        The buffer is as it was when it raises.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        expected = self.state_dict()
        if set(state) != set(expected):
            missing, unknown = sorted(set(expected) - set(state)), sorted(map(str, set(state) - set(expected)))
            raise ValueError(f"state is not that of a {type(self).__name__}: missing {missing}, unknown {unknown}")
        for name, value in expected.items():
            kind: type = int if isinstance(value, int) else Tensor
            if not isinstance(state[name], kind) or isinstance(state[name], bool):
                raise TypeError(f"state[{name!r}] must be of type {kind.__name__}, got {type(state[name]).__name__}")
        if state["capacity"] != self._capacity:
            raise ValueError(f"state is that of a buffer of capacity {state['capacity']}; this one has {self._capacity}")
        for name, value in state.items():
            if isinstance(value, Tensor):
                dense(f"state[{name!r}]", value)
        self._validate(state)
        self._restore(state)

    def _validate(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the entries contradict each other."""
        x, y, task, seen = state["x"], state["y"], state["task"], state["seen"]
        for name, t in (("x", x), ("y", y)):
            if not t.dim():
                raise ValueError(f"state[{name!r}] must be [n, ...], got a 0-d tensor")
        rows("task", task, len(x))
        if len(y) != len(x) or len(x) > min(self._capacity, seen):
            raise ValueError(f"state holds {len(x)} x and {len(y)} y of {seen} seen; capacity is {self._capacity}")
        if bool((task < 0).any()):
            raise ValueError("state['task'] has negative numbers")
        try:
            torch.Generator().set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"state['generator'] is no state of a CPU generator: {error}") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        n = len(state["x"])
        with torch.inference_mode(False), torch.no_grad():
            x, y = ((self._room(state[k], None) if n else None) for k in ("x", "y"))
            for room, name in ((x, "x"), (y, "y"), (self._task, "task")):
                if room is not None:
                    room[:n] = state[name]
        self._x, self._y, self._seen, self._length = x, y, state["seen"], n
        self._generator.set_state(state["generator"])

    @abstractmethod
    def _place(self, y: Tensor, task: int) -> tuple[Tensor, Tensor, int]:
        """Which samples of a batch are taken, the slots they go to (each at most once), and how many slots are then filled.

        Updates the subclass's own book-keeping; raises before it does.
        """

    def _room(self, t: Tensor, stored: Tensor | None) -> Tensor:
        return t.new_zeros((self._capacity, *t.shape[1:]), requires_grad=False) if stored is None else stored

    def _samples(self) -> Stored:
        if self._x is None or self._y is None or not self._length:
            raise ValueError("the buffer is empty; add samples first")
        return self._x[: self._length], self._y[: self._length], self._task[: self._length]

    def _check(self, name: str, t: Tensor, stored: Tensor | None) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if stored is None or not t.is_meta:  # after the first batch a meta tensor is one of another device
            dense(name, t)
        if not t.dim():
            raise ValueError(f"{name} must be a batch [n, ...], got a 0-d tensor")
        if stored is None:
            return
        for what, got, accepted in (
            ("samples of shape", tuple(t.shape[1:]), tuple(stored.shape[1:])),
            ("dtype", t.dtype, stored.dtype),
            ("device", t.device, stored.device),
        ):
            if got != accepted:
                raise ValueError(f"{name} must have {what} {accepted} as the samples before, got {got}")
