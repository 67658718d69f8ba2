"""Every kind of tensor through the gate: the right result, or an error that names the argument and has written nothing."""

from __future__ import annotations

import mmap
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import _native, ops

if isinstance(_native.load("_C"), str):
    pytest.skip(str(_native.load("_C")), allow_module_level=True)
C = _native.module("_C")
warnings.filterwarnings("ignore", message=".*(beta|prototype|not writable|deprecated|quantiz).*")
SHAPE = (4, 6)


class Plain(Tensor):
    """A subclass without a behaviour of its own."""


class Overriding(Tensor):
    """A subclass that forbids every function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("forbidden by __torch_function__")


class Wrapper(Tensor):
    """A wrapper without memory of its own, which forwards operators to the tensor that it holds."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        self: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else [unwrap(v) for v in x] if isinstance(x, (list, tuple)) else x

        return func(*[unwrap(a) for a in args], **(kwargs or {}))


class OwnParameter(nn.Parameter):
    """A subclass of Parameter."""


def base(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def resized(offset: int, to: int) -> Tensor:
    t = torch.ones(100)[offset : offset + 24].view(SHAPE)
    t.untyped_storage().resize_(to)
    return t


def misaligned(itemsize: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(24 * itemsize + 1), dtype=dtype, offset=1, count=24).view(SHAPE)


def mapped() -> Tensor:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(4096))
        file.flush()
        memory = mmap.mmap(file.fileno(), 4096)
    return torch.frombuffer(memory, dtype=torch.float32, count=24).view(SHAPE).copy_(base())


def read_only_file() -> Tensor:
    with tempfile.NamedTemporaryFile() as file:
        file.write(base().numpy().tobytes())
        file.flush()
        return torch.from_numpy(np.memmap(file.name, np.float32, "r", shape=SHAPE))


def fake() -> Tensor:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        return torch.ones(SHAPE)


def leaked(transform: Callable[..., Any]) -> Tensor:
    """A functorch wrapper after its transform has ended: its type is exactly torch.Tensor."""
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    transform(function)(torch.ones(2, *SHAPE) if transform is torch.vmap else torch.ones(SHAPE))
    return kept[0]


def inference(shape: tuple[int, ...] = SHAPE) -> Tensor:
    with torch.inference_mode():
        return base(shape).clone()


def uninitialised_lazy() -> Tensor:
    weight: Tensor = LAZY.weight
    return weight


def cow() -> Tensor:
    return torch._lazy_clone(base())


def quantized() -> Tensor:
    return torch.quantize_per_tensor(base(), 0.1, 0, torch.qint8)


BITS = torch.tensor([0xFF, 0, 0x55], dtype=torch.uint8)  # of SHAPE
LAZY = nn.LazyLinear(3)
complex_base = torch.complex(base(), base() + 1)
# name: (make, outcome where it is written, outcome where it is read). "right": the result is right. A type: what the op raises.
KINDS: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "contiguous": (base, "right", "right"),
    "float64": (lambda: base().double(), "right", "right"),
    "bfloat16": (lambda: base().bfloat16(), "right", "right"),
    "float16": (lambda: base().half(), "right", "right"),
    "uint8": (lambda: (base() * 255).to(torch.uint8), TypeError, "right"),
    **{str(d): ((lambda d=d: torch.ones(SHAPE).to(d)), TypeError, TypeError) for d in (
        torch.bool, torch.int8, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)},
    "transposed": (lambda: base((6, 4)).t(), "right", "right"),
    "every second column": (lambda: base((4, 12))[:, ::2], "right", "right"),
    "expanded": (lambda: base((4, 1)).expand(SHAPE), ValueError, "right"),
    "overlapping as_strided": (lambda: base((64,)).as_strided(SHAPE, (3, 1)), ValueError, "right"),
    "26 dims": (lambda: base((1,) * 24 + SHAPE), "right", ValueError),
    "0-dim": (lambda: base(()), ValueError, "right"),
    "empty": (lambda: torch.empty(0, 6), ValueError, ValueError),
    "offset 1": (lambda: base((25,))[1:].view(SHAPE), "right", "right"),
    "float32 in uint8 storage": (lambda: torch.zeros(100, dtype=torch.uint8)[4:].view(torch.float32).view(4, 6), "right", "right"),
    "misaligned float32": (lambda: misaligned(4, torch.float32), ValueError, ValueError),
    "misaligned bfloat16": (lambda: misaligned(2, torch.bfloat16), ValueError, ValueError),
    "misaligned float16": (lambda: misaligned(2, torch.float16), ValueError, ValueError),
    "requires grad": (lambda: base().requires_grad_(), ValueError, "right"),
    "non-leaf": (lambda: base().requires_grad_() * 1, ValueError, "right"),
    "Parameter": (lambda: nn.Parameter(base()), ValueError, "right"),
    "Parameter without grad": (lambda: nn.Parameter(base(), requires_grad=False), "right", "right"),
    "Parameter subclass": (lambda: OwnParameter(base(), requires_grad=False), "right", "right"),
    "Buffer": (lambda: nn.Buffer(base()), "right", "right"),
    "plain subclass": (lambda: base().as_subclass(Plain), "right", "right"),
    "__torch_function__ forbids": (lambda: base().as_subclass(Overriding), RuntimeError, RuntimeError),
    "wrapper subclass": (lambda: Wrapper(base()), "right", "right"),
    "UninitializedParameter": (lambda: nn.UninitializedParameter(requires_grad=False), Exception, Exception),
    "lazy module": (uninitialised_lazy, Exception, Exception),
    "FakeTensor": (fake, Exception, Exception),
    "dead vmap tensor": (lambda: leaked(torch.vmap), Exception, Exception),
    "dead grad tensor": (lambda: leaked(torch.func.grad), "right", "right"),
    "functionalised": (lambda: torch._to_functional_tensor(base()), Exception, Exception),
    "meta": (lambda: base().to("meta"), ValueError, ValueError),
    "sparse COO": (lambda: base().to_sparse(), TypeError, TypeError),
    "sparse CSR": (lambda: base().to_sparse_csr(), TypeError, TypeError),
    "quantized": (quantized, TypeError, TypeError),
    "mkldnn": (lambda: base().to_mkldnn(), TypeError, TypeError),
    "nested strided": (lambda: torch.nested.nested_tensor([base(), base()]), TypeError, TypeError),
    "nested jagged": (lambda: torch.nested.nested_tensor([base(), base()], layout=torch.jagged), TypeError, TypeError),
    "zero tensor": (lambda: torch._efficientzerotensor(SHAPE), RuntimeError, "right"),  # immutable, says torch
    "conj().imag": (lambda: complex_base.conj().imag, TypeError, TypeError),
    "one element of conj().imag": (lambda: torch.complex(torch.ones(()), torch.ones(())).conj().imag.reshape(1), TypeError, TypeError),
    "imag": (lambda: complex_base.clone().imag, "right", "right"),
    "freed storage": (lambda: resized(0, 0), ValueError, ValueError),
    "freed storage behind an offset": (lambda: resized(5, 0), ValueError, ValueError),
    "shared": (lambda: base().share_memory_(), "right", "right"),
    "copy on write": (cow, "right", "right"),
    "numpy": (lambda: torch.from_numpy(base().numpy().copy()), "right", "right"),
    "mapped file": (mapped, "right", "right"),
    "read-only mapped file": (read_only_file, None, "right"),  # written to, it kills torch's own ops as well
    "inference": (inference, "right", "right"),
    "numpy array": (lambda: base().numpy().copy(), TypeError, TypeError),
    "None": (lambda: None, TypeError, TypeError),
    "number": (lambda: 1.5, TypeError, TypeError),
    "nested list": (lambda: [base()], TypeError, TypeError),
    "type": (lambda: Tensor, TypeError, TypeError),
}  # fmt: skip
RAW = (torch.uint8, torch.int16, torch.int32, torch.int64)


def raw(value: Any) -> bytes | None:
    """The bytes of a tensor that has them."""
    if isinstance(value, Wrapper):
        return raw(value.inner)
    if type(value) not in (Tensor, nn.Parameter, Plain, OwnParameter, Overriding) or without_bytes(value):
        return None
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return value.detach().as_subclass(Tensor).resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def without_bytes(value: Tensor) -> bool:
    try:
        with torch._C.DisableTorchFunctionSubclass():
            if value.layout != torch.strided or value.is_quantized or value.is_nested or value._is_zerotensor():
                return True
            return value.untyped_storage().nbytes() == 0 or value.device.type != "cpu"
    except (RuntimeError, NotImplementedError):
        return True


def plain(value: Any) -> Tensor:
    inner = value.inner if isinstance(value, Wrapper) else value
    with torch._C.DisableTorchFunctionSubclass():
        return inner.detach().as_subclass(Tensor).clone().resolve_neg()


def lists(kind: str, place: str) -> tuple[list[Any], list[Any]]:
    odd = KINDS[kind][0]()
    try:
        other = torch.ones(odd.shape) * 0.5 if kind == "26 dims" and place == "grads" else base() + 0.25
    except (RuntimeError, AttributeError):
        other = base() + 0.25
    ordinary = [base((5,)) + 1, base((7, 2)) + 2]
    grads: list[Any] = [ordinary[0].clone(), other, ordinary[1].clone()]
    importance: list[Any] = [base((5,)), other.clone(), base((7, 2))]
    (grads if place == "grads" else importance)[1] = odd
    return grads, importance


def expected(grads: list[Any], importance: list[Any]) -> list[Tensor]:
    copies = [plain(g) for g in grads]
    fastcl.reference.soft_mask_(copies, [plain(i) for i in importance], 0.5)
    return copies


def outcome_of(kind: str, place: str) -> Any:
    return KINDS[kind][1 if place == "grads" else 2]


def same(a: Any, b: Tensor) -> bool:
    return torch.equal(plain(a), b)


def odd_is_counted_by_others(kind: str) -> bool:
    return kind in ("None", "type")


PLACES = ("grads", "importance")
ALL = [(k, p) for k in KINDS for p in PLACES if outcome_of(k, p) is not None]


@pytest.mark.parametrize(("kind", "place"), ALL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_op_is_right_or_says_what_is_wrong(kind: str, place: str, backend: str) -> None:
    grads, importance = lists(kind, place)
    outcome = outcome_of(kind, place)
    before = [raw(t) for t in (*grads, *importance)]
    with fastcl.use_backend(backend):
        if outcome == "right":
            want = expected(grads, importance)
            ops.soft_mask_(grads, importance, 0.5)
            assert all(same(g, w) for g, w in zip(grads, want, strict=True))
            assert [raw(t) for t in importance] == before[3:]
            return
        with pytest.raises(outcome) as caught:
            ops.soft_mask_(grads, importance, 0.5)
    if outcome is not Exception and outcome is not RuntimeError:
        assert f"{place}[1]" in str(caught.value) or "importance[1]" in str(caught.value), str(caught.value)
    assert [raw(t) for t in (*grads, *importance)] == before


@pytest.mark.parametrize(("kind", "place"), ALL)
@pytest.mark.parametrize("grad_mode", [False, True])
def test_the_gate_itself_is_right_or_refuses(kind: str, place: str, grad_mode: bool) -> None:
    grads, importance = lists(kind, place)
    before = [raw(t) for t in (*grads, *importance)]
    counts = [sys.getrefcount(t) for t in (*grads, *importance)], sys.getrefcount(grads), sys.getrefcount(importance)
    want = expected(grads, importance) if outcome_of(kind, place) == "right" else None
    refusal = C.soft_mask_(grads, importance, 0.5, grad_mode)
    assert refusal is None or isinstance(refusal, str)
    if refusal is not None:
        assert [raw(t) for t in (*grads, *importance)] == before
        assert refusal.startswith((f"{place}[1]", "importance[1]", "a written tensor"))
    elif want is not None:
        assert all(same(g, w) for g, w in zip(grads, want, strict=True))
    else:
        assert not grad_mode, "only what requires grad may pass, when nothing records"
        assert kind in ("requires grad", "non-leaf", "Parameter")
    if odd_is_counted_by_others(kind):
        return
    assert counts == ([sys.getrefcount(t) for t in (*grads, *importance)], sys.getrefcount(grads), sys.getrefcount(importance))


@pytest.mark.parametrize("kind", ["freed storage", "misaligned float32", "conj().imag", "expanded", "nested strided", "FakeTensor", "None"])
def test_the_other_ops_have_the_same_gate(kind: str) -> None:
    odd = KINDS[kind][0]()
    for refusal in (
        C.emax_([base(), odd], [base(), base()], True),
        C.spg_importance_([base(), odd], [[base(), base()]], True),
        C.yardstick_([base(), odd], [base(), base()]),
        C.project_([base(), odd], [base(), base()], True),
        C.gem_project_([base(), odd], [[base(), base()]], 0.5, 1e-3, True),
        C.combine_([base(), odd], [[base(), base()]], torch.ones(1, dtype=torch.float64), True),
        C.bit_mask_([base(), odd], [BITS, BITS], True),
        C.bit_mask_([base(), base()], [BITS, odd], True),
        C.threshold_bits_([BITS.clone(), odd], [base(), base()], torch.zeros((), dtype=torch.float64), True),
        C.child_mask_([base(), odd], 0.5, 0, 0, True),
        C.child_mask_at_([base(), odd], 0.5, 0, 0, [(0, 0, (6, 1))] * 2, True),
        C.fisher_add_([base(), odd], [base(), base()], 1.0, 1.0, True),
        C.fisher_update_([base(), odd], [base(), base()], 1.0, torch.ones(2, dtype=torch.float64), True),
        C.ewc_pull_([base(), odd], *[[base(), base()]] * 3, 1.0, True),
        C.low_rank_update_([base(), odd], [base(), base()], [torch.ones(1, *SHAPE)] * 2, torch.ones(1).double(), True),
        C.low_rank_products([base(), base()], [base(), odd], [torch.ones(1, *SHAPE)] * 2, True, True),
        C.low_rank_products([base(), base()], [base(), base()], [torch.ones(1, *SHAPE), odd], True, True),
        C.low_rank_rotate_([torch.ones(1, *SHAPE), odd], torch.ones(1, 1).double(), True),
    ):
        assert isinstance(refusal, str)
    if kind != "expanded":
        assert isinstance(C.emax_([base(), base()], [base(), odd], True), str)
        assert isinstance(C.spg_importance_([base(), base()], [[base(), odd]], True), str)
        assert isinstance(C.project_([base(), base()], [base(), odd], True), str)
        assert isinstance(C.gem_project_([base(), base()], [[base(), base()], [base(), odd]], 0.5, 1e-3, True), str)
        assert isinstance(C.grad_dot([base(), odd], [base(), base()], True), str)
        assert isinstance(C.grad_dot([base(), base()], [base(), odd], True), str)
        assert isinstance(C.gram([[base(), base()], [base(), odd]], True), str)
        assert isinstance(C.quantile([base(), odd], 0.5, True), str)
        assert isinstance(C.radix_counts([base(), odd], torch.zeros(2, dtype=torch.int64), 0, False, True), str)
        assert isinstance(C.threshold_bits_([BITS.clone(), BITS.clone()], [base(), odd], torch.zeros(()).double(), True), str)
        assert isinstance(C.fisher_squares([base(), odd], True), str)
        assert isinstance(C.fisher_add_([base(), base()], [base(), odd], 1.0, None, True), str)
        for place in range(3):
            read = [[base(), base()] for _ in range(3)]
            read[place][1] = odd
            assert isinstance(C.ewc_pull_([base(), base()], *read, 1.0, True), str)
    assert isinstance(C.yardstick_read([base(), odd]), str)


def test_what_the_gate_of_quantiles_and_masks_refuses() -> None:
    a, bits, two = base(), BITS.clone(), torch.zeros(2, dtype=torch.int64)
    limit = torch.zeros((), dtype=torch.float64)
    before = raw(a), raw(bits)
    for refusal in (
        C.quantile([], 0.5, False),
        C.quantile([a[:0]], 0.5, False),
        C.quantile([a], 1.5, False),
        C.quantile([a], float("nan"), False),
        C.quantile([a], "0.5", False),
        C.quantile(a, 0.5, False),
        C.quantile([bits], 0.5, False),
        C.radix_counts([a], two[:1], 0, False, False),
        C.radix_counts([a], two.int(), 0, False, False),
        C.radix_counts([a], torch.zeros(4, dtype=torch.int64)[::2], 0, False, False),
        C.radix_counts([a], [0, 0], 0, False, False),
        C.radix_counts([a], two.to("meta"), 0, False, False),
        C.radix_counts([a], two, 3, False, False),
        C.radix_counts([a], two, 6, True, False),
        C.radix_counts([a], two, -1, False, False),
        C.radix_counts([a.double()], two, 0, False, False),
        C.bit_mask_([a], [bits[:2]], False),
        C.bit_mask_([a], [torch.zeros(4, dtype=torch.uint8)], False),
        C.bit_mask_([a], [bits.view(3, 1)], False),
        C.bit_mask_([a], [torch.zeros(6, dtype=torch.uint8)[::2]], False),
        C.bit_mask_([a], [torch.zeros(3)], False),
        C.bit_mask_([a], [bits, bits], False),
        C.bit_mask_([a], [a.view(-1).view(torch.uint8)[:3]], False),
        C.threshold_bits_([bits], [a], limit.float(), False),
        C.threshold_bits_([bits], [a], torch.zeros(2, dtype=torch.float64), False),
        C.threshold_bits_([bits, bits], [a, a], limit, False),
        C.threshold_bits_([bits], [bits], limit, False),
    ):
        assert isinstance(refusal, str)
    assert (raw(a), raw(bits)) == before


def test_gradients_that_nothing_opposes_are_not_written() -> None:
    g = read_only_file()  # a write would end the process
    assert not ops.project_([g], [base()]).violated
    assert not ops.gem_project_([g], [[base()], [base()]]).violated


def test_what_the_projections_gate_refuses() -> None:
    a, b, coefficients = base(), base() + 1, torch.ones(1, dtype=torch.float64)
    before = raw(a)
    for refusal in (
        C.project_([a], [a], False),
        C.project_([a], [b, b], False),
        C.project_([a], [b[:2]], False),
        C.project_([a], b, False),
        C.gem_project_([a], [], 0.5, 1e-3, False),
        C.gem_project_([a], [[b]] * 65, 0.5, 1e-3, False),
        C.gem_project_([a], [b], 0.5, 1e-3, False),
        C.gem_project_([a], [[a]], 0.5, 1e-3, False),
        C.gem_project_([a], [[b]], -1.0, 1e-3, False),
        C.gem_project_([a], [[b]], float("nan"), 1e-3, False),
        C.gem_project_([a], [[b]], 0.5, float("inf"), False),
        C.gem_project_([a], [[b]], "0.5", 1e-3, False),
        C.gram([], False),
        C.gram([[a]] * 66, False),
        C.gram([[a], [b, b]], False),
        C.grad_dot([a], [b.int()], False),
        C.combine_([a], [[b]], coefficients.float(), False),
        C.combine_([a], [[b]], torch.ones(2, dtype=torch.float64), False),
        C.gem_coefficients(torch.eye(3), 0.5, 1e-3, False),
        C.gem_coefficients(torch.eye(3, 2, dtype=torch.float64), 0.5, 1e-3, False),
        C.gem_coefficients(torch.eye(1, dtype=torch.float64), 0.5, 1e-3, False),
    ):
        assert isinstance(refusal, str)
    assert raw(a) == before


def test_what_the_masks_gate_refuses() -> None:
    a, b = base(), base() + 1
    before = raw(a)
    whole = (0, 0, (6, 1))
    numbers: list[Any] = [-1.0, float("nan"), float("inf"), "1", None, torch.tensor(0.5)]
    places: list[Any] = [[], [whole, whole], whole, "places", 3, [None], [[0, 0, (6, 1)]], [(0, 0)], [(0, 0, (6,))], [(0, 0, 6)]]
    places += [[(-1, 0, (6, 1))], [(2**32, 0, (6, 1))], [(0, -1, (6, 1))], [(0, 2**63, (6, 1))], [(0, 0, (-6, 1))]]
    places += [[(0, 0, (2**62, 1))], [(0, 2**62, (6, 1))], [(0, 0.0, (6, 1))], [(0, 0, (6, "1"))]]
    for refusal in (
        *[C.child_mask_([a], keep, 0, 0, False) for keep in (0.0, 1.5, *numbers)],
        *[C.child_mask_([a], 0.5, seed, 0, False) for seed in (-1, 2**64, 1.0, True, *numbers)],
        *[C.child_mask_([a], 0.5, 0, step, False) for step in (-1, 2**32, 1.0, True, *numbers)],
        C.child_mask_([a, a], 0.5, 0, 0, False),
        *[C.child_mask_at_([a], 0.5, 0, 0, p, False) for p in places],
        *[C.fisher_add_([a], [b], weight, None, False) for weight in numbers],
        *[C.fisher_add_([a], [b], 1.0, norm, False) for norm in (0.0, *numbers) if norm is not None],
        C.fisher_add_([a], [b, b], 1.0, None, False),
        C.fisher_add_([a], [b[:2]], 1.0, None, False),
        C.fisher_add_([a, b], [b, a], 1.0, 1.0, False),
        C.fisher_update_([a], [b], 1.0, torch.ones(2, dtype=torch.float64), False),
        C.fisher_update_([a], [b], 1.0, torch.ones(1), False),
        C.fisher_update_([a], [b], 1.0, None, False),
        *[C.ewc_pull_([a], [b], [b], [b], strength, False) for strength in numbers],
        C.ewc_pull_([a], [b], [b[:1]], [b], 1.0, False),
        C.ewc_pull_([a], [b], [b], [], 1.0, False),
        C.ewc_pull_([a], [b.t()], [b], [b], 1.0, False),
    ):
        assert isinstance(refusal, str)
    assert raw(a) == before


def low_rank() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    return [base() + 1], [torch.ones(2, *SHAPE)], torch.ones(2, dtype=torch.float64)


def test_what_the_low_rank_gate_refuses() -> None:
    a, g = base(), base() + 2
    d, q, sigma = low_rank()
    c, step, mix = torch.ones(2, dtype=torch.float64), torch.ones((), dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    before = [raw(t) for t in (a, g, *d, *q, sigma)]
    forms: list[Any] = [(d, []), (d, [q[0][0]]), (d, [q[0].double()]), (d, [q[0].half()]), ([d[0].half()], [q[0].half()]), (d, [q[0].mT])]
    forms += [([d[0].t()], q), (d, [torch.ones((257, *SHAPE))]), (d, [torch.ones(())]), (d, None), (None, q)]
    numbers: list[Any] = [-1.0, float("nan"), float("inf"), "1", None, torch.tensor(0.5)]
    step_lists: list[Any] = [([], [d[0]]), ([d[0]], []), ([d[0].double()], [d[0]]), ([d[0]], [d[0].t()]), ([d[0], d[0]], [d[0]])]
    for refusal in (
        *[C.low_rank_products([a], *form, True, False) for form in forms],
        *[C.low_rank_update_([a], *form, c, False) for form in forms],
        *[C.low_rank_step_products([a], [g], [], [], *form, 0.0, 0.0, False) for form in forms],
        *[C.low_rank_step_update_([a], [g], [], [], *form, c, step, 0.0, 0.0, False) for form in forms],
        *[C.low_rank_gram(*form, sigma, [[g]], False) for form in forms],
        *[C.low_rank_compress_(*form, sigma, [[g]], mix, False) for form in forms],
        *[C.low_rank_step_update_([a], [g], *two, d, q, c, step, 0.5, 0.5, False) for two in step_lists],
        *[C.low_rank_step_products([a], [g], *two, d, q, 0.5, 0.5, False) for two in step_lists],
        *[C.low_rank_step_products([a], [g], [], [], d, q, n, 0.0, False) for n in numbers],
        *[C.low_rank_step_products([a], [g], [], [], d, q, 0.0, n, False) for n in numbers],
        C.low_rank_step_update_([a], [g], [d[0].clone()], [], d, q, c, step, 0.0, 0.0, False),
        C.low_rank_step_update_([a], [g], [], [d[0].clone()], d, q, c, step, 0.0, 0.0, False),
        C.low_rank_step_update_([a], [a], [], [], d, q, c, step, 0.0, 0.0, False),
        C.low_rank_step_update_([a], [g], [a], [], d, q, c, step, 0.5, 0.0, False),
        C.low_rank_step_update_([a], [g], [d[0]], [], d, q, c, step, 0.5, 0.0, False),
        C.low_rank_step_update_([a], [g], [], [], d, q, c, torch.ones(2, dtype=torch.float64), 0.0, 0.0, False),
        C.low_rank_step_update_([a], [g], [], [], d, q, c, torch.ones(()), 0.0, 0.0, False),
        C.low_rank_update_([d[0]], d, q, c, False),
        C.low_rank_update_([q[0][1]], d, q, c, False),
        C.low_rank_update_([a], d, q, c[:1], False),
        C.low_rank_update_([a], d, q, c.float(), False),
        C.low_rank_update_([a, g], d, q, c, False),
        C.low_rank_gram(d, q, sigma, [], False),
        C.low_rank_gram(d, q, sigma, [[g]] * 255, False),
        C.low_rank_gram(d, q, sigma[:1], [[g]], False),
        C.low_rank_compress_(d, q, sigma, [[g]], mix[:2], False),
        C.low_rank_compress_(d, q, sigma, [d], mix, False),
        C.low_rank_compress_(d, q, sigma, [[g[:2]]], mix, False),
        C.low_rank_rotate_(q, mix, False),
        C.low_rank_rotate_([q[0], q[0]], mix[:2, :2].contiguous(), False),
        C.low_rank_rotate_([q[0], torch.ones(3, 4)], mix[:2, :2].contiguous(), False),
    ):
        assert isinstance(refusal, str)
    assert [raw(t) for t in (a, g, *d, *q, sigma)] == before


def test_copy_on_write_leaves_the_original_alone() -> None:
    original = base()
    copy = torch._lazy_clone(original)
    ops.soft_mask_([copy], [torch.ones(SHAPE)], 1.0)
    assert torch.equal(original, base())
    assert not copy.any()
