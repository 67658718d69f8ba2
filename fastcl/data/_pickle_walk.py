"""A look at a pickle's instructions before they are carried out: what would make the unpickler itself run away is refused.

Hashing a tuple visits all that it holds, as often as it holds it, and by recursion: as keys of a dict, tuples that hold one another twice
take exponential time, and deep ones the interpreter's stack. So the walk follows the unpickler's stack and memo with one number per
object, and refuses a key that is no string or small int, and tuples nested deeper than any that these files have.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator

KEY = -1  # an object that may be a key; the others have the depth of the tuples in them
MARK = -2
DEEPEST = 16
KEYS = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    """.split()  # noqa: SIM905 (a table reads better than quoted names)
)
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OBJECTS = frozenset(("FLOAT", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "BYTEARRAY8", "EMPTY_LIST", "EMPTY_DICT", "GLOBAL"))


class Refused(pickle.UnpicklingError):
    """The file asks for something that a CIFAR file has no need of."""


class _Stack:
    def __init__(self) -> None:
        self.items: list[int] = []
        self.memo: dict[int, int] = {}

    def top(self, n: int = 1) -> list[int]:
        found = self.items[len(self.items) - n :] if 0 < n <= len(self.items) else []
        if len(found) != n or MARK in found:
            raise pickle.UnpicklingError("an instruction finds too little on the stack")
        return found

    def pop(self, n: int) -> list[int]:
        found = self.top(n) if n else []
        del self.items[len(self.items) - n :]
        return found

    def pop_mark(self) -> list[int]:
        found = []
        while self.items and self.items[-1] != MARK:
            found.append(self.items.pop())
        if not self.items:
            raise pickle.UnpicklingError("an instruction finds no mark on the stack")
        self.items.pop()
        return found[::-1]

    def follow(self, name: str, argument: object) -> None:
        """What one instruction does to stack and memo."""
        push = self.items.append
        if name in KEYS:
            push(KEY if not isinstance(argument, int) or -(2**63) <= argument < 2**64 else 0)
        elif name in OBJECTS:
            push(0)
        elif name in TUPLES:
            push(_tuple(self.pop(TUPLES[name])))
        elif name == "TUPLE":
            push(_tuple(self.pop_mark()))
        elif name == "MARK":
            push(MARK)
        elif name == "LIST":
            self.pop_mark()
            push(0)
        elif name == "DICT":
            _keys(self.pop_mark()[::2])
            push(0)
        elif name == "SETITEMS":
            _keys(self.pop_mark()[::2])
            self.top()
        elif name == "SETITEM":
            _keys(self.pop(2)[:1])
            self.top()
        elif name == "APPENDS":
            self.pop_mark()
            self.top()
        elif name in ("APPEND", "BUILD"):
            self.pop(1)
            self.top()
        elif name in ("REDUCE", "STACK_GLOBAL"):
            self.pop(2)
            # What may be called makes bytes, or an object that is hashed by its identity.
            push(KEY if name == "REDUCE" else 0)
        elif name == "DUP":
            push(self.top()[0])
        elif name == "POP":
            if not self.items:
                raise pickle.UnpicklingError("an instruction finds too little on the stack")
            self.items.pop()
        elif name == "POP_MARK":
            self.pop_mark()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else _number(argument)] = self.top()[0]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if _number(argument) not in self.memo:
                raise pickle.UnpicklingError(f"nothing is in the memo at {argument}")
            push(self.memo[_number(argument)])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"the instruction {name}")


def check_pickle(data: bytes) -> None:
    """Raises Refused for instructions that are none of these files', and another error for a pickle that is damaged."""
    stack = _Stack()
    for name, argument in _instructions(data):
        if name in ("PUT", "LONG_BINPUT") and _number(argument) > len(data):
            raise Refused("a memo larger than the file")
        stack.follow(name, argument)


def _instructions(data: bytes) -> Iterator[tuple[str, object]]:
    for opcode, argument, _ in pickletools.genops(data):
        yield opcode.name, argument


def _number(argument: object) -> int:
    if not isinstance(argument, int):
        raise pickle.UnpicklingError(f"{argument!r} is no place in the memo")
    return argument


def _tuple(parts: list[int]) -> int:
    depth = 1 + max([0, *parts])
    if depth > DEEPEST:
        raise Refused(f"tuples nested deeper than {DEEPEST}")
    return depth


def _keys(keys: list[int]) -> None:
    if any(key != KEY for key in keys):
        raise Refused("a key that is no string or small whole number")
