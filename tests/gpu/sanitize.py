"""Every kernel and path once, small: what compute-sanitizer watches. Run by gpu/check.py."""

from __future__ import annotations

import itertools

import torch

from fastcl import _native, ops, top_fraction_mask, use_backend
from fastcl.ops.child_mask import child_mask_at_
from fastcl.testing import CASES

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STORED = (*FLOATING, torch.uint8)
SHAPES = [(), (3,), (300, 65), (9001,), (0, 2)]


def variants(t: torch.Tensor) -> list[torch.Tensor]:
    """The same values contiguous, misaligned and, for matrices, transposed."""
    out = [t.clone(), torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)]
    return [*out, t.t().contiguous().t()] if t.dim() == 2 else out


def pairs() -> None:
    for op, dtype, stored in itertools.product(("soft_mask_", "emax_"), FLOATING, STORED):
        written, read, *rest = CASES[op].make(SHAPES, dtype, stored, "cuda", 0)
        a = [v for t in written for v in variants(t)]
        b = [v for t in read for v in reversed(variants(t))]
        CASES[op].call(a, b, *rest)
        CASES[op].call([w.clone() for w in written if w.dim() == 2], [r[:, :1].clone() for r in read if r.dim() == 2], *rest)
        CASES[op].call([w.clone() for w in written if w.dim() == 2], [r[:1].clone() for r in read if r.dim() == 2], *rest)
        CASES[op].call([w[:, :64] for w in written if w.dim() == 2], [r[:1, :64].clone() for r in read if r.dim() == 2], *rest)
        CASES[op].call([w.clone() for w in written], [r.flatten()[0].clone() if r.numel() else r.sum().to(r.dtype) for r in read], *rest)


def spg() -> None:
    for dtype, stored in itertools.product(FLOATING, STORED):
        for heads in (0, 1, 9):
            accumulated, grads = CASES["spg_importance_"].make([*SHAPES, (17000,)], dtype, stored, "cuda", 0, heads=heads)
            ops.spg_importance_(accumulated, grads)
            ops.spg_importance_(
                [v for a in accumulated for v in variants(a)], [[v for g in h for v in reversed(variants(g))] for h in grads]
            )


def many() -> None:
    for n in (150, 1000):
        grads = [torch.randn(5, device="cuda") for _ in range(n)]
        importance = [torch.rand(5, device="cuda") for _ in range(n)]
        ops.soft_mask_(grads, importance)
        ops.emax_(importance, grads)
        ops.spg_importance_(importance, [grads])
        ops.ewc_pull_(grads, importance, importance, importance, 0.1)
        ops.fisher_add_(importance, grads, 1.0, 1.0)
        zeros = [[torch.zeros_like(g) for g in grads] for _ in range(2)]
        steps = [torch.zeros((), device="cuda") for _ in grads]
        ops.adamw_(importance, grads, *zeros, steps, lr=1e-3, transforms=[("child_mask", 0.5, 3)])


def projections() -> None:
    for dtype, other in itertools.product(FLOATING, FLOATING):
        grads, memory = CASES["project_"].make([*SHAPES, (17000,)], dtype, other, "cuda", 0)
        a = [v for t in grads for v in variants(t)]
        b = [v for t in memory for v in reversed(variants(t))]
        for reference in (b, [t.flatten()[:1].sum().to(other).expand(t.shape) for t in b], [-t for t in b]):
            ops.grad_dot(a, reference)
            ops.grad_dot(reference, a)
            ops.project_([t.clone() for t in a], reference)
        for count in (1, 2, 10):
            memories = [b if k % 2 else [t.neg() for t in b] for k in range(count)]
            ops.gram([a, *memories])
            ops.gem_project_([t.clone() for t in a], memories)
    for count, n in ((64, 5000), (64, 3), (3, 1)):
        ops.gem_project_([torch.randn(n, device="cuda")], [[torch.randn(n, device="cuda")] for _ in range(count)])
    for n in (150, 1000):
        grads = [torch.randn(5, device="cuda") for _ in range(n)]
        ops.project_(grads, [-g for g in grads])
        ops.gem_project_(grads, [[-g for g in grads], [torch.randn_like(g) for g in grads]])


def sweeps() -> None:
    """Masks, Fisher, pull and quantiles: operands whose dtypes differ from tensor to tensor."""
    for dtype, layout in itertools.product(FLOATING, range(3)):
        tensors = [variants(torch.randn(s, device="cuda").to(dtype)) for s in [*SHAPES, (17000,)]]
        grads = [v[layout % len(v)] for v in tensors]
        others = [[v[n % len(v)].to(FLOATING[(k + n) % 4]) for k, v in enumerate(tensors)] for n in range(3)]
        ops.child_mask_(grads, 0.3, 5, 2)
        child_mask_at_(grads, 0.3, 5, 2, [(k, 3, tuple(2 * n for n in g.stride())) for k, g in enumerate(grads)])
        ops.ewc_pull_(grads, *others, 0.2)
        ops.fisher_add_(grads, others[0], 0.5)
        ops.fisher_add_(grads, others[1], 0.5, 1.0)
        masks = top_fraction_mask(others[2], 0.3)
        ops.bit_mask_(grads, [m.bits for m in masks])
        ops.quantile(grads, 0.3)


def optimizers() -> None:
    for dtype, layout in itertools.product(FLOATING, range(3)):
        tensors = [variants(torch.randn(s, device="cuda").to(dtype)) for s in [*SHAPES, (17000,)]]
        params = [v[layout % len(v)] for v in tensors]
        grads = [v[0].to(FLOATING[k % 4], copy=True) for k, v in enumerate(tensors)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moments, squares = ([torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2))
        steps = [torch.zeros((), device="cuda") for _ in params]
        masks = top_fraction_mask([g.abs() for g in grads], 0.3)
        bits = [m.bits for m in masks]
        coefficient = torch.ones(1, dtype=torch.float64, device="cuda")
        reference = [g.clone() for g in grads]
        transforms = [
            ("soft_mask", [torch.rand(p.shape[:1] + (1,) * (p.dim() - 1), device="cuda") for p in params], 0.5),
            ("child_mask", 0.5, 3),
            ("fixed_mask", bits),
            ("project", grads, coefficient),
            ("pull", grads, reference, 0.1),
        ]
        ops.adamw_(params, grads, moments, squares, steps, lr=1e-3)
        ops.adamw_(params, grads, moments, squares, steps, lr=1e-3, transforms=transforms)
        ops.sgd_(params, grads, moments, steps, lr=1e-3, momentum=0.9, transforms=transforms)
        ops.sgd_(params, grads, lr=torch.tensor(1e-3, device="cuda"))
        ops.optimizers.transformed_dot(params, grads, steps, transforms, None, None, reference)
        whole = [p.contiguous() for p in params]
        own = [[t[m.to_bool()] if t.numel() else t for t, m in zip(column, masks, strict=True)] for column in (moments, squares)]
        compact = (bits, [m.ranks for m in masks])
        ops.adamw_(whole, grads, *own, steps, lr=1e-3, transforms=transforms[2:3], compact=compact)


def padded(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, -(-n // 16) * 16, device="cuda").to(dtype)[:, :n]


def layers() -> None:
    """Every tile of the small layers, at their limits and inside, and large layers, whose rows are padded."""
    sizes = [(1, 1), (32, 32), (64, 64), (65, 30), (128, 128), (127, 7), (130, 20), (40, 300)]
    for dtype, own, layout in itertools.product(FLOATING, (torch.float64, torch.float32), range(2)):
        weights = [variants(torch.randn(s, device="cuda").to(dtype))[2 * layout] for s in sizes]
        params = [(w, torch.randn(len(w), device="cuda").to(dtype)) if k % 4 else w for k, w in enumerate(weights)]
        grads = [(p[0].clone(), p[1].clone()) if isinstance(p, tuple) else p.clone() for p in params]
        columns = [n + (k % 4 > 0) for k, (_, n) in enumerate(sizes)]
        m, h, v = ([padded(rows, n, own) for (rows, _), n in zip(sizes, columns, strict=True)] for _ in range(3))
        factors = [(padded(n, n, own), padded(rows, rows, own)) for (rows, _), n in zip(sizes, columns, strict=True)]
        ops.ncl_step_(params, grads, m, h, factors, 0.01)
        ops.ncl_step_(params, grads, m, h, factors, 0.01, radius=1.0, workspace=v)
        ops.kron_quadratic(params, factors)
        ops.kron_solve_(params, factors)


def low_rank() -> None:
    shapes = [*SHAPES, (17000,)]
    for dtype, own, rank in itertools.product(FLOATING, (torch.float64, torch.float32), (0, 5, 70)):
        whole = [torch.randn(s, device="cuda") for s in shapes]
        params, grads = ([variants(t.to(dtype))[(k + n) % (3 if t.dim() == 2 else 2)] for k, t in enumerate(whole)] for n in range(2))
        momenta, anchors, diagonal = ([t.abs().add(0.5).to(own) for t in whole] for _ in range(3))
        basis = [torch.randn(rank, *s, device="cuda").to(own) / 100 for s in shapes]
        sigma = torch.linspace(1, 0.1, rank, dtype=torch.float64, device="cuda")
        ops.low_rank_step_(params, grads, momenta, anchors, diagonal, basis, sigma, 0.01, radius=1.0)
        ops.low_rank_step_(params, grads, [], [], diagonal, basis, sigma, 0.01, 0.0, 0.0)
        ops.low_rank_quadratic(params, diagonal, basis, sigma)
        ops.low_rank_solve_(grads, diagonal, basis, sigma)
        ops.low_rank_append_(diagonal, basis, sigma, [[t.to(FLOATING[k]) for t in whole] for k in range(3)])


def yardsticks() -> None:
    module = _native.module("_C_cuda")
    for n in (16, 1003, 100_000):
        a, b = (torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda") for _ in range(2))
        for result in (module.yardstick_([a], [b]), module.yardstick_read([a])):
            if isinstance(result, str):
                raise SystemExit(f"the yardstick was refused: {result}")


if __name__ == "__main__":
    with use_backend("cuda"):
        for part in (pairs, spg, projections, sweeps, optimizers, layers, low_rank, many, yardsticks):
            part()
            torch.cuda.synchronize()
            print(part.__name__, "done", flush=True)
