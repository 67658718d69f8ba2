"""Device functions that the kernels share: which tensor a program works on, addresses, precision, stored importance."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter truncates float32 to bfloat16 where the hardware rounds to nearest even; there the rounding is done on the bits.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

_FLAT = tl.constexpr(0)
_SCALAR = tl.constexpr(1)

# 1/255 in two floats. The first has 9 bits, so its product with a code is exact, and the sum rounds once: codes -1 .. 256 divided by 255
# come out as IEEE division gives them (the tests compare all of them), without the slow path of div.rn.
_HIGH_255TH = tl.constexpr(257 / 65536)
_LOW_255TH = tl.constexpr(1 / 255 - 257 / 65536)


@triton.jit  # type: ignore[untyped-decorator]
def pick(
    values: tl.tuple, starts: tl.tuple, code: tl.tensor, T: tl.constexpr, STEP: tl.constexpr = 1, OFFSET: tl.constexpr = 0
) -> tl.tensor:
    """``values[t * STEP + OFFSET]`` of the tensor ``t`` that a program works on: a chain of selects, so the body is compiled once."""
    value = values[OFFSET]
    for t in tl.static_range(1, T):
        value = tl.where(code >= starts[t], values[t * STEP + OFFSET], value)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def place(starts: tl.tuple, tails: tl.tuple, T: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """The program's encoded number, its block within its tensor, and how many elements of the block exist."""
    code = 2 * tl.program_id(0) + 3
    block = (code - pick(starts, starts, code, T)) >> 1
    last = pick(starts, starts, code, T, 1, 1) == code + 2
    valid = tl.where(last, (pick(tails, starts, code, T) - 3) >> 1, BLOCK)
    return code, block, valid


@triton.jit  # type: ignore[untyped-decorator]
def address(
    pointer: tl.tensor,
    block: tl.tensor,
    code: tl.tensor,
    starts: tl.tuple,
    sizes: tl.tuple,
    strides: tl.tuple,
    KIND: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMN: tl.constexpr = 0,
    GROUP: tl.constexpr = 1,
) -> tl.tensor:
    """Pointers to the elements of a block; one pointer if the tensor holds one value for all of them."""
    lane = tl.arange(0, BLOCK)
    if KIND == _SCALAR:
        at = pointer
    elif KIND == _FLAT:
        at = pointer + block.to(tl.int64) * BLOCK + lane
    else:
        # 32-bit arithmetic wherever it suffices: a 64-bit division per element and dim would cost more than the memory traffic.
        index = (block if BIAS == 3 else block.to(tl.int64)) * (BLOCK // GROUP) + lane // GROUP
        offset = index * 0
        for back in tl.static_range(D):
            stride = (pick(strides, starts, code, T, D, COLUMN * T * D + D - 1 - back) - BIAS) >> 1
            if back == D - 1:
                offset += index * stride
            else:
                size = (pick(sizes, starts, code, T, D, D - 1 - back) - BIAS) >> 1
                offset += index % size * stride
                index = index // size
        at = pointer + (offset * GROUP + lane % GROUP)
    return at


@triton.jit  # type: ignore[untyped-decorator]
def read(at: tl.tensor, valid: tl.tensor, KIND: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Load a block. A bound known at run time only loses vector loads, so whole blocks go without."""
    if MASKED and KIND != _SCALAR:
        return tl.load(at, mask=tl.arange(0, BLOCK) < valid, other=0)
    return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def write(at: tl.tensor, value: tl.tensor, valid: tl.tensor, MASKED: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Store a block."""
    if MASKED:
        tl.store(at, value, mask=tl.arange(0, BLOCK) < valid)
    else:
        tl.store(at, value)


@triton.jit  # type: ignore[untyped-decorator]
def from_code(code: tl.tensor) -> tl.tensor:
    """``code / 255`` correctly rounded, for whole numbers of at most 8 bits in float32 or float64."""
    if code.dtype == tl.float64:
        return code / 255
    return code * _HIGH_255TH + code * _LOW_255TH


@triton.jit  # type: ignore[untyped-decorator]
def decode(stored: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """What a stored importance (or a gradient) stands for, in the precision of computation."""
    if stored.dtype == tl.bfloat16 and _INTERPRETED:
        # The interpreter loses subnormal numbers on the way, and NaN and Inf on the direct one to float64.
        value = (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        value = stored.to(DTYPE)
    if stored.dtype == tl.uint8:
        return from_code(value)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def encode(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round to the stored dtype: to nearest even; uint8 up, by the rule of fastcl.reference._storage."""
    if dtype == tl.uint8:
        # NaN fails every comparison and is set in the end; clamping is written out, so that nothing depends on how a max treats NaN.
        clamped = tl.where(value > 0, tl.where(value < 1, value, 1.0), 0.0)
        code = tl.ceil(clamped * 255)
        code = tl.where(from_code(code - 1) >= value, code - 1, code)
        code = tl.where(from_code(code) < value, code + 1, code)
        code = tl.where(code > 0, tl.where(code < 255, code, 255.0), 0.0)
        # NaN would be converted to an arbitrary integer.
        return tl.where(value != value, 255.0, code).to(tl.int32).to(tl.uint8)
    if value.dtype == tl.float64 and dtype != tl.float64:
        # torch goes through float32 to the 16-bit dtypes, and so does the definition.
        return _to_half(value.to(tl.float32), dtype)
    return _to_half(value, dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _to_half(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    if dtype == tl.bfloat16 and _INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value != value, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.uint32)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def float64(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """The float64 whose halves ``_lists.halves`` has made: Triton passes Python's floats as float32."""
    return ((high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def total(partials: tl.tensor, count: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """The sum of ``count`` float64 partial sums, by one program and in a fixed order."""
    lane = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), tl.float64)
    # while, not range: with numpy >= 2.4 the interpreter of Triton 3.6 cannot iterate over a range whose bounds are tensors.
    at = count * 0
    while at < count:
        sums += tl.load(partials + at + lane, mask=at + lane < count, other=0)
        at += CHUNK
    return tl.sum(sums, 0)


@triton.jit  # type: ignore[untyped-decorator]
def divide(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The correctly rounded quotient; of float32 the operator's is not."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit  # type: ignore[untyped-decorator]
def root(a: tl.tensor) -> tl.tensor:
    """The correctly rounded square root; tl.sqrt's of float32 is not."""
    if a.dtype == tl.float64:
        result = tl.sqrt(a)
    else:
        result = tl.sqrt_rn(a)
    return result


@triton.constexpr_function  # type: ignore[untyped-decorator]
def precision(a: tl.constexpr, b: tl.constexpr) -> tl.constexpr:
    """float64 if either dtype is, else float32."""
    if a == tl.float64 or b == tl.float64:
        return tl.float64
    return tl.float32


@triton.jit  # type: ignore[untyped-decorator]
def maximum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Element-wise maximum in which NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def tanh_abs(z: tl.tensor) -> tl.tensor:
    """``|tanh z|`` within a few units in the last place, of exp alone, so that it runs everywhere; NaN stays."""
    a = tl.abs(z)
    a = tl.where(a > 20, 20.0, a)  # 1 in either precision, and exp stays finite
    w = a * a
    # Below 0.6 the formula by exp cancels. In float32 the least-error polynomial of degree 4 of (tanh(a) - a) / a^3 in a^2 on [0, 0.6];
    # in float64 Lambert's continued fraction a / (1 + a^2 / (3 + a^2 / (5 + ...))) cut after 15, whose error there is 2e-18.
    if z.dtype == tl.float64:
        over = 2027025 + w * (270270 + w * (6930 + w * 36))
        under = 2027025 + w * (945945 + w * (51975 + w * (630 + w)))
        small = a * (over / under)
    else:
        p = -0.006254811305552721 * w + 0.021101869642734528
        p = p * w - 0.05387217923998833
        p = p * w + 0.13332904875278473
        p = p * w - 0.3333333134651184
        small = a + a * (w * p)
    return tl.where(a < 0.6, small, 1 - 2 / (tl.exp(2 * a) + 1))
