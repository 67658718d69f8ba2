"""What the suites share: bf16 by integer arithmetic, the definitions in NumPy, and arrays with strides of every kind."""

from __future__ import annotations

import _fastcl_numpy as native
import numpy as np
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

STORAGE = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8, "i64": np.int64}
FLOATING = ("f64", "f32", "f16", "bf16")
STORED = (*FLOATING, "u8")


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even: to the neighbour whose distance is smaller, to the even one on a tie."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    below, dropped = bits >> 16, bits & 0xFFFF
    up = (dropped > 0x8000) | ((dropped == 0x8000) & (below & 1 == 1))
    return np.where(np.isnan(x), 0x7FC0, below + up).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str, compute: type) -> np.ndarray:
    if dtype == "bf16":
        return bf16_to_float(stored).astype(compute)
    return stored.astype(compute) / compute(255) if dtype == "u8" else stored.astype(compute)


def encode(value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "u8":
            return smallest_code(value)
        return float_to_bf16(value.astype(np.float32)) if dtype == "bf16" else narrow(value, dtype)


def narrow(value: np.ndarray, dtype: str) -> np.ndarray:
    """To half by way of float, as torch converts."""
    return value.astype(np.float32).astype(np.float16) if dtype == "f16" else value.astype(STORAGE[dtype])


def smallest_code(value: np.ndarray) -> np.ndarray:
    """The smallest u with u / 255 >= value in value's precision, by looking at all 256."""
    steps = np.arange(256, dtype=value.dtype) / value.dtype.type(255)
    return np.where(np.isnan(value), 255, np.minimum(np.searchsorted(steps, value, side="left"), 255)).astype(np.uint8)


def compute_type(*dtypes: str) -> type:
    return np.float64 if "f64" in dtypes else np.float32


def random_values(rng: np.random.Generator, count: int, dtype: str, special: bool = False) -> np.ndarray:
    if dtype == "u8":
        return rng.integers(0, 256, count, dtype=np.uint8)
    x = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3)
    if special and count:
        x[rng.integers(0, count, 1 + count // 7)] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-41, 6e4, 1e38], 1 + count // 7)
    return encode(x, dtype)


def same_bits(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    """Equal bit for bit, but for the payload of NaNs."""
    if dtype == "bf16":
        nan = np.isnan(bf16_to_float(a)) & np.isnan(bf16_to_float(b))
    else:
        nan = np.isnan(a) & np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    raw = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[a.itemsize]
    return bool(np.all((np.ascontiguousarray(a).view(raw) == np.ascontiguousarray(b).view(raw)) | nan))


def strided(values: np.ndarray, order: tuple[int, ...], gaps: tuple[int, ...], front: int) -> np.ndarray:
    """A copy of an array whose memory has its dimensions in the given order, with gaps between the steps of each."""
    strides, step = [0] * values.ndim, 1
    for d in order:
        step *= gaps[d]
        strides[d] = step
        step *= max(values.shape[d], 1)
    memory = np.zeros(step + front, values.dtype)
    out = as_strided(memory[front:], values.shape, [s * values.itemsize for s in strides])
    out[...] = values
    return out


@st.composite
def layouts(draw: st.DrawFn, max_dims: int = 5, max_side: int = 6) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """A shape, and an order, gaps and an offset for :func:`strided`."""
    shape = tuple(draw(st.lists(st.integers(0, max_side) | st.just(1), max_size=max_dims)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    gaps = tuple(draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=len(shape), max_size=len(shape))))
    return shape, order, gaps, draw(st.integers(0, 3))


@st.composite
def broadcastable(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to the given one."""
    dropped = draw(st.integers(0, len(shape)))
    return tuple(1 if draw(st.booleans()) else s for s in shape[dropped:])


def operand(array: np.ndarray, dtype: str) -> native.Operand:
    return native.of_array(array, dtype)
