from __future__ import annotations

import copy
import itertools
import math
import pickle

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import fastcl
from fastcl import BitMask, ops, reference
from fastcl.bit_mask import RANK_BLOCK
from fastcl.ops import _dispatch
from fastcl.testing import CASES, clone, gradients
from layouts import FLOATING, INTERPRETED, LAYOUTS, SHAPES, identical

CASE = CASES["bit_mask_"]
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 5000)


def random_masks(shapes, device, keep=0.4, seed=7):
    gen = torch.Generator(device).manual_seed(seed)
    return [torch.rand(s, generator=gen, device=device) < keep for s in shapes]


def check(grads, masks):
    """Against the selection itself, bit for bit, with BitMask and with raw bits."""
    expected = [torch.where(m, g, torch.zeros_like(g)) for g, m in zip(grads, masks, strict=True)]
    packed = [BitMask.from_bool(m) for m in masks]
    raw, strides = clone(grads), [g.stride() for g in grads]
    before = [b.bits.clone() for b in packed]
    assert ops.bit_mask_(grads, packed) is None
    ops.bit_mask_(raw, [b.bits for b in packed])
    for n, (g, r, e) in enumerate(zip(grads, raw, expected, strict=True)):
        assert identical(g, e), f"tensor {n} of {g.dtype}, {tuple(g.shape)}, strides {g.stride()}"
        assert identical(r, e)
    assert [g.stride() for g in grads] == strides
    assert all(torch.equal(p.bits, b) for p, b in zip(packed, before, strict=True))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_shapes(device, shapes, keep):
    check(gradients(shapes, torch.float32, device, 0), random_masks(shapes, device, keep))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes_and_every_length(device, dtype):
    shapes = [(n,) for n in SIZES]
    check(gradients(shapes, dtype, device, 0), random_masks(shapes, device))


def test_mixed_dtypes_in_one_list(device):
    shapes = [(37,), (6, 9), (), (300,)]
    check([gradients([s], d, device, 0)[0] for s, d in zip(shapes, FLOATING, strict=True)], random_masks(shapes, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides(device, layout, dtype):
    shapes = [(6, 10), (2, 3, 4, 5), (33,), (), (65, 130), (3, 1, 5)]
    check([LAYOUTS[layout](g) for g in gradients(shapes, dtype, device, 0)], random_masks(shapes, device))


def test_what_is_left_out_is_not_looked_at(device):
    for dtype in FLOATING:
        g = torch.full((40,), math.nan, dtype=dtype, device=device)
        g[1::2], g[20] = -1, math.inf
        mask = torch.arange(40, device=device) % 2 == 1
        check([g.clone()], [mask])
        ops.bit_mask_([g], [BitMask.from_bool(mask)])
        assert torch.equal(g, mask.to(dtype) * -1)
        assert not torch.signbit(g[::2]).any()


def test_what_is_kept_keeps_its_bits(device):
    patterns = torch.tensor([0x7F800001, 0x7FC00123, 1, 0x007FFFFF], dtype=torch.int32, device=device).repeat(9)
    g = patterns.clone().view(torch.float32)
    ops.bit_mask_([g], [torch.full((5,), 255, dtype=torch.uint8, device=device)])
    assert torch.equal(g.view(torch.int32), patterns)


def test_spare_bits_are_not_looked_at(device):
    g = torch.ones(11, device=device)
    ops.bit_mask_([g], [torch.tensor([1, 0xF8 | 2], dtype=torch.uint8, device=device)])
    assert g.nonzero().flatten().tolist() == [0, 9]


def test_threads_and_runs_are_bitwise_equal(device):
    shapes = [(70_001,), (33, 1000), (5,), (999,)]
    results = []
    for threads in (1, 2, 3, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            g = gradients(shapes, torch.float32, device, 0)
            check(clone(g), random_masks(shapes, device))
            bits = [torch.empty(-(-t.numel() // 8), dtype=torch.uint8, device=device) for t in g]
            _dispatch.run("threshold_bits_", g[0].device, bits, g, torch.zeros((), dtype=torch.float64, device=device))
        finally:
            torch.set_num_threads(before)
        results.append(bits)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_writes_are_seen_by_autograd(device):
    x = torch.ones(4, device=device, requires_grad=True)
    y = x.exp()
    with torch.no_grad():
        ops.bit_mask_([y.detach()], [torch.zeros(1, dtype=torch.uint8, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors(device):
    with torch.inference_mode():
        g, m = [torch.ones(9, device=device)], random_masks([(9,)], device)
        check(clone(g), m)
        assert BitMask.from_bool(m[0]).ranks.tolist() == [0]
    check([torch.ones(3, device=device), *g], [*random_masks([(3,)], device), *m])


def test_opcheck(device):
    g, bits = CASE.make([(4, 5), (7,)], torch.float32, torch.float32, device)
    torch.library.opcheck(torch.ops.fastcl.bit_mask_.default, (g, bits))


def test_compile_fullgraph(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda g, b: ops.bit_mask_(g, b), fullgraph=True)
    g, bits = CASE.make([(6, 10), (7,)], torch.float32, torch.float32, device)
    expected = clone(g)
    reference.bit_mask_(expected, bits)
    compiled(g, bits)
    assert all(identical(a, b) for a, b in zip(g, expected, strict=True))


@hypothesis.given(
    st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=4), st.sampled_from(FLOATING), st.sampled_from(list(LAYOUTS))), max_size=4),
    st.integers(0, 99),
)
@hypothesis.settings(max_examples=15 if INTERPRETED else 40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_list(device, drawn, seed):
    torch.manual_seed(seed)
    grads = [LAYOUTS[layout](torch.randn(shape, device=device).to(dtype)) for shape, dtype, layout in drawn]
    check(grads, random_masks([g.shape for g in grads], device, seed=seed))


class TestThreshold:
    def check(self, tensors, threshold):
        at = tensors[0].device
        bits = [torch.full((-(-t.numel() // 8),), 0xAA, dtype=torch.uint8, device=at) for t in tensors]
        limit = torch.tensor(threshold, dtype=torch.float64, device=at)
        _dispatch.run("threshold_bits_", at, bits, tensors, limit)
        for b, t in zip(bits, tensors, strict=True):
            expected = np.packbits((t.double() >= limit).cpu().numpy().ravel(), bitorder="little")
            assert np.array_equal(b.cpu().numpy(), expected), (t.dtype, t.shape, t.stride(), threshold)

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_every_length_and_layout(self, device, dtype):
        tensors = [(torch.rand(n, device=device) * 255).to(dtype) for n in SIZES]
        shapes = [(6, 10), (2, 3, 4, 5), (33,), (), (65, 130)]
        tensors += [layout((torch.rand(s, device=device) * 255).to(dtype)) for layout in LAYOUTS.values() for s in shapes]
        for threshold in (0.0, 100.0, 0.4, 255.0, 256.0, -math.inf, math.inf):
            self.check(tensors, threshold)

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_neighbours_of_the_threshold(self, device, dtype):
        """In float64: a threshold between two stored numbers is not rounded to either."""
        x = torch.tensor([0.1, -0.1, 0.0, -0.0, 1.0], dtype=dtype).repeat(20).to(device)
        for value in (0.1, -0.1, 0.0, 1.0):
            exact = torch.tensor(value, dtype=dtype).double()
            for limit in (exact, exact.nextafter(torch.tensor(math.inf).double()), exact.nextafter(torch.tensor(-math.inf).double())):
                self.check([x], float(limit))

    def test_nan_on_either_side_gives_zero(self, device):
        x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 1.0] * 30, device=device)
        self.check([x, x.double(), x.half()], 0.5)
        self.check([x, x.double(), x.half()], -math.inf)
        self.check([x, x.double(), x.half()], math.nan)


class TestBitMask:
    @pytest.mark.parametrize("n", SIZES)
    def test_against_numpy(self, device, n):
        for mask in (*random_masks([(n,)] * 2, device), torch.ones(n, dtype=torch.bool, device=device)):
            packed = BitMask.from_bool(mask)
            flat = mask.cpu().numpy()
            assert np.array_equal(packed.bits.cpu().numpy(), np.packbits(flat, bitorder="little"))
            assert torch.equal(packed.to_bool(), mask)
            assert packed.count().dtype == torch.int64
            assert packed.count().shape == ()
            assert int(packed.count()) == flat.sum()
            assert packed.ranks.dtype == torch.int64
            assert packed.ranks.tolist() == [int(flat[: k * RANK_BLOCK].sum()) for k in range(-(-n // RANK_BLOCK))]
            assert packed.ranks is packed.ranks
            assert packed.device == mask.device

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_any_strides(self, device, layout):
        for mask in random_masks([(6, 10), (2, 3, 4, 5), (33,), (), (0, 3), (65, 70)], device):
            other = LAYOUTS[layout](mask)
            assert BitMask.from_bool(other) == BitMask.from_bool(mask)
            assert torch.equal(BitMask.from_bool(other).to_bool(), mask)
            assert BitMask.from_bool(other).shape == mask.shape
        every = torch.ones(1, 1, dtype=torch.bool, device=device).expand(5, 9)
        assert BitMask.from_bool(every).to_bool().all()

    def test_ranks_follow_the_bits(self, device):
        mask = BitMask.from_bool(torch.zeros(5000, dtype=torch.bool, device=device))
        assert mask.ranks.tolist() == [0, 0, 0]
        mask.bits.fill_(0xFF)
        assert mask.ranks.tolist() == [0, 2048, 4096]

    def test_copies(self, device):
        mask = BitMask.from_bool(random_masks([(7, 9)], device)[0])
        for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.clone()):
            assert other == mask
            assert other.shape == mask.shape
            other.bits.zero_()
            assert int(mask.count())
            assert other != mask
        assert copy.deepcopy([mask, mask])[0] == mask
        assert mask.to(device).bits is mask.bits
        assert mask.to("meta").device.type == "meta"

    def test_equality(self, device):
        mask = torch.ones(2, 4, dtype=torch.bool, device=device)
        assert BitMask.from_bool(mask) == BitMask.from_bool(mask.clone())
        assert BitMask.from_bool(mask) != BitMask.from_bool(mask.view(4, 2))
        assert BitMask.from_bool(mask) != mask
        with pytest.raises(TypeError, match="unhashable"):
            hash(BitMask.from_bool(mask))

    def test_safetensors(self, device, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        masks = [BitMask.from_bool(m) for m in random_masks([(5, 7), (), (0, 3), (4097,)], device)]
        tensors = {}
        for n, mask in enumerate(masks):
            tensors |= mask.to_tensors(f"layer.{n}")
        safetensors.save_file(tensors, str(tmp_path / "masks.safetensors"))
        read = safetensors.load_file(str(tmp_path / "masks.safetensors"))
        assert [BitMask.from_tensors(read, f"layer.{n}").to(device) for n in range(len(masks))] == masks

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: BitMask(torch.zeros(2), (9,)), TypeError, "bits must be a uint8 tensor, got torch.float32"),
            (lambda: BitMask([1], (9,)), TypeError, "bits must be a uint8 tensor, got list"),
            (lambda: BitMask(torch.zeros(3, dtype=torch.uint8), (9,)), ValueError, r"bits has shape \(3,\).* shape \(2,\)"),
            (lambda: BitMask(torch.zeros(4, dtype=torch.uint8)[::2], (9,)), ValueError, "contiguous"),
            (lambda: BitMask.from_bool(torch.ones(3)), TypeError, "mask must be a dense bool tensor, got .*float32"),
            (lambda: BitMask.from_bool([True]), TypeError, "mask must be a dense bool tensor, got list"),
            (lambda: BitMask.from_bool(torch.ones(3, dtype=torch.bool).to_sparse()), TypeError, "dense bool tensor"),
            (lambda: BitMask.from_tensors({}), KeyError, "tensors has no 'mask.bits'"),
            (lambda: BitMask.from_tensors({"mask.bits": torch.zeros(1)}), KeyError, "tensors has no 'mask.shape'"),
            (lambda: tampered(shape=torch.tensor([-1])), ValueError, "must be a list of sizes"),
            (lambda: tampered(shape=torch.tensor([2.0])), ValueError, "must be a list of sizes"),
            (lambda: tampered(shape=torch.tensor([17])), ValueError, "bits has shape"),
            (lambda: tampered(bits=torch.tensor([0, 2], dtype=torch.uint8)), ValueError, "bits set beyond the 9 elements"),
            (lambda: tampered(bits=torch.tensor([0.0, 1.0])), TypeError, "bits must be a uint8 tensor"),
        ],
    )
    def test_bad_input(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


def tampered(**changed):
    tensors = BitMask.from_bool(torch.ones(9, dtype=torch.bool)).to_tensors()
    return BitMask.from_tensors(tensors | {f"mask.{k}": v for k, v in changed.items()})


class TestTopFraction:
    @pytest.mark.parametrize("keep", [0.3, 0.01, 0.5, 1.0])
    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_is_the_percentile_over_all_tensors(self, device, dtype, keep):
        shapes = [(50, 70), (3000,), (), (0, 2), (33, 5, 3)]
        tensors = [g.abs() for g in gradients(shapes, dtype, device, 0)]
        tensors[0] = tensors[0].t()
        masks = fastcl.top_fraction_mask(tensors, keep)
        flat = np.concatenate([t.double().cpu().numpy().ravel() for t in tensors])
        threshold = np.percentile(flat, 100 * (1 - keep))
        for mask, t in zip(masks, tensors, strict=True):
            assert mask.shape == t.shape
            assert torch.equal(mask.to_bool().cpu(), t.double().cpu() >= threshold)
        if dtype in (torch.float32, torch.float64):
            assert sum(int(m.count()) for m in masks) == pytest.approx(keep * len(flat), abs=1)

    def test_a_threshold_of_zero_keeps_everything(self, device):
        f = [torch.zeros(100, device=device), torch.cat([torch.zeros(50, device=device), torch.ones(10, device=device)])]
        assert sum(int(m.count()) for m in fastcl.top_fraction_mask(f, 0.3)) == 160
        assert sum(int(m.count()) for m in fastcl.top_fraction_mask(f, 0.05)) == 10

    def test_a_nan_keeps_nothing(self, device):
        f = [torch.rand(100, device=device)]
        f[0][3] = math.nan
        assert int(fastcl.top_fraction_mask(f, 0.5)[0].count()) == 0

    @pytest.mark.parametrize(
        ("keep", "error"),
        [(0, ValueError), (0.0, ValueError), (-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("1", TypeError)],
    )
    def test_keep(self, device, keep, error):
        with pytest.raises(error, match="keep must be"):
            fastcl.top_fraction_mask([torch.rand(3, device=device)], keep)

    def test_nothing_to_choose_from(self, device):
        with pytest.raises(ValueError, match="tensors has no element"):
            fastcl.top_fraction_mask([], 0.5)


BAD = {
    "length": (lambda g, m: (g, m[:1]), ValueError, "masks has 1 tensors and grads has 2"),
    "shape": (lambda g, m: (g, [m[0], BitMask(m[1].bits, (4, 3))]), ValueError, r"masks\[1\] is for the shape \(4, 3\)"),
    "bits": (lambda g, m: (g, [m[0], m[1].bits[:1]]), ValueError, r"masks\[1\] has shape \(1,\); for grads\[1\] .* \[2\]"),
    "bits in two dimensions": (lambda g, m: (g, [m[0], m[1].bits[None]]), ValueError, r"masks\[1\] has shape \(1, 2\)"),
    "strided bits": (lambda g, m: (g, [m[0], torch.stack([m[1].bits] * 2, 1)[:, 0]]), ValueError, r"masks\[1\]"),
    "bool": (lambda g, m: (g, [m[0].to_bool(), m[1]]), TypeError, r"masks\[0\] has dtype bool; accepted are uint8"),
    "kind": (lambda g, m: (g, [m[0], None]), TypeError, r"masks\[1\] must be a BitMask or a uint8 tensor of bits, got NoneType"),
    "one mask": (lambda g, m: (g, m[0]), TypeError, "masks must be a list or tuple of BitMask"),
    "grad dtype": (lambda g, m: ([g[0], g[1].int()], m), TypeError, r"grads\[1\] has dtype int32"),
    "one tensor": (lambda g, m: (g[0], m), TypeError, "grads must be a list or tuple of tensors, got Tensor"),
    "None": (lambda g, m: ([g[0], None], m), TypeError, r"grads\[1\] must be a tensor, got NoneType"),
    "device": (lambda g, m: (g, [m[0], m[1].to("meta")]), ValueError, r"masks\[1\] is on meta and grads\[1\] is on"),
    "same gradient twice": (lambda g, m: ([g[0], g[0]], [m[0], m[0]]), ValueError, r"grads\[1\] and grads\[0\] share memory"),
    "expanded": (lambda g, m: ([g[0][:1].expand(5), g[1]], m), ValueError, r"grads\[0\] has elements that share memory"),
    "records": (lambda g, m: ([g[0].clone().requires_grad_(), g[1]], m), ValueError, r"grads\[0\] requires grad"),
    "own bits": (lambda g, m: ([g[0]], [g[0].view(torch.uint8)[:1]]), ValueError, "share memory"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(device, kind):
    make, error, message = BAD[kind]
    grads = [torch.randn(5, device=device), torch.randn(3, 4, device=device)]
    masks = [BitMask.from_bool(m) for m in random_masks([(5,), (3, 4)], device)]
    before = clone(grads), [m.bits.clone() for m in masks]
    with pytest.raises(error, match=message):
        ops.bit_mask_(*make(grads, masks))
    assert all(identical(a, b) for a, b in zip(grads, before[0], strict=True))
    assert all(torch.equal(m.bits, b) for m, b in zip(masks, before[1], strict=True))


class TestApply:
    def model(self, device):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Linear(2, 2)).to(device)
        model[2](model[:2](torch.randn(8, 4, device=device))).square().sum().backward()
        return model, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def test_mapping_and_list(self, device):
        for by_name, packed in itertools.product((True, False), repeat=2):
            model, before = self.model(device)
            chosen = {"0.weight": torch.rand(3, 4, device=device) < 0.5, "2.bias": torch.tensor([True, False], device=device)}
            given = {n: BitMask.from_bool(m) if packed else m for n, m in chosen.items()}
            names = [n for n, _ in model.named_parameters()]
            masks = given if by_name else [given.get(n) for n in names]
            fastcl.apply_gradient_mask_(model if by_name else model.parameters(), masks)
            for name, p in model.named_parameters():
                if name in before:
                    expected = torch.where(chosen[name], before[name], 0.0) if name in chosen else before[name]
                    assert identical(p.grad, expected), name
                else:
                    assert p.grad is None

    def test_missing_gradients_and_no_masks(self, device):
        model, before = self.model(device)
        fastcl.apply_gradient_mask_(model, {"3.weight": torch.zeros(2, 2, dtype=torch.bool, device=device)})
        fastcl.apply_gradient_mask_(model, [None] * 6)
        assert all(identical(p.grad, before[n]) for n, p in model.named_parameters() if n in before)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda m: (m, {"wieght": None}), ValueError, "masks.'wieght'. belongs to no parameter of params; its parameters are 0.weight"),
            (lambda m: (m.parameters(), {"0.weight": None}), TypeError, "params must be a Module"),
            (lambda m: (m, [None]), ValueError, "masks has 1 entries and params has 6"),
            (lambda m: (m, torch.ones(6, dtype=torch.bool)), TypeError, "masks must be a mapping or a sequence"),
            (lambda m: (m[0].weight, [None]), TypeError, "params must be a Module or an iterable"),
            (lambda m: (["a"], [None]), TypeError, r"params\[0\] must be a tensor, got str"),
            (
                lambda m: (m, {"2.bias": torch.ones(2)}),
                TypeError,
                "masks.'2.bias'. must be a BitMask, a bool tensor or None, got",
            ),
            (
                lambda m: (m, {"0.bias": torch.ones(3, dtype=torch.bool), "2.bias": torch.ones(3, dtype=torch.bool)}),
                ValueError,
                r"masks.'2.bias'. is for the shape \(3,\) and grads.'2.bias'.",
            ),
            (lambda m: (m, [None, None, None, torch.ones(1, dtype=torch.bool), None, None]), ValueError, r"masks\[3\] is for the shape"),
        ],
    )
    def test_bad_input(self, device, make, error, message):
        model, before = self.model(device)
        with pytest.raises(error, match=message):
            fastcl.apply_gradient_mask_(*make(model))
        assert all(identical(p.grad, before[n]) for n, p in model.named_parameters() if n in before)
