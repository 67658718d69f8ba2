"""What a call of a module means: inputs and gradients as rows, [samples, positions, features], in float32 at least."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def wide(t: Tensor) -> Tensor:
    """Half precision is widened before anything is multiplied or summed."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def inputs(kind: str, module: nn.Module, x: Tensor) -> Tensor:
    """Rows [N, T, n] of what the weight is multiplied with; of a grouped convolution [N * groups, T, n]."""
    if kind == "linear":
        return wide(x).reshape(-1 if x.dim() > 1 else 1, _positions(x), x.shape[-1])
    return _patches(cast(Convolution, module), wide(x))


def gradients(kind: str, module: nn.Module, grad: Tensor) -> Tensor:
    """Rows [N, T, m] of the gradient at the output; of a grouped convolution [N * groups, T, m / groups]."""
    if kind in ("linear", "embedding"):
        return wide(grad).reshape(-1 if grad.dim() > 1 else 1, _positions(grad), grad.shape[-1])
    convolution = cast(Convolution, module)
    batched = wide(grad).unsqueeze(0) if grad.dim() == len(convolution.kernel_size) + 1 else wide(grad)
    rows = torch.unflatten(batched.flatten(2), 1, (convolution.groups, -1)).flatten(0, 1)
    return rows.transpose(1, 2)


def _positions(t: Tensor) -> int:
    return t.shape[1:-1].numel() if t.dim() > 1 else 1


def _patches(module: Convolution, x: Tensor) -> Tensor:
    """The windows that a convolution multiplies its weight with, in the order of ``weight.flatten(1)``."""
    dims = len(module.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    if any(padding := _padding(module)):
        x = functional.pad(x, padding, "constant" if module.padding_mode == "zeros" else module.padding_mode)
    for d, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = torch.unflatten(x, 1, (module.groups, -1)).flatten(0, 1)  # [N * groups, channels, *positions, *window]
    x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.reshape(x.shape[0], x.shape[1 : 1 + dims].numel(), -1)


def _padding(module: Convolution) -> list[int]:
    """As ``pad`` takes it: the last dimension first, before and after."""
    if module.padding == "valid":
        return []
    result: list[int] = []
    for d in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            total = module.dilation[d] * (module.kernel_size[d] - 1)
            result += [total // 2, total - total // 2]
        else:
            result += [module.padding[d]] * 2
    return result


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation's weight is multiplied with: its output without weight and bias."""
    x = wide(x)
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    norm = cast(nn.BatchNorm2d, module)
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return functional.batch_norm(x, None, None, training=True, eps=norm.eps)
    return functional.batch_norm(x, norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype), training=False, eps=norm.eps)


def sample_gradient(kind: str, role: str, module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradients of single samples for a bias or a normalisation's weight, [N, elements], from one call."""
    if kind != "norm":
        rows = gradients(kind, module, grad).sum(1)
        return rows.reshape(-1, rows.shape[-1] * getattr(module, "groups", 1))
    g = wide(grad)
    if role == "weight":
        g = g * normalised(module, x)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        elements = torch.Size(module.normalized_shape).numel()
        return g.reshape(g.shape[0] if g.dim() > len(module.normalized_shape) else 1, -1, elements).sum(1)
    return g.flatten(2).sum(2) if g.dim() > 2 else g


def square_sums(a: Tensor, g: Tensor, groups: int) -> Tensor:
    """``sum_n (sum_t g_t a_t^T)^2``, element by element, [groups, m, n], for rows [N * groups, T, n] and [N * groups, T, m]."""
    if a.shape[1] == 1 and groups == 1:
        return (g[:, 0].square().T @ a[:, 0].square()).unsqueeze(0)
    m, n = g.shape[2], a.shape[2]
    total = a.new_zeros(groups, m, n)
    # All samples at once, a few rows of the weight at a time, so that the products of all samples never exist together.
    step = max(1, CHUNK // max(1, a.shape[0] * n))
    for start in range(0, m, step):
        products = g[:, :, start : start + step].transpose(1, 2) @ a
        total[:, start : start + step] = torch.unflatten(products.square_(), 0, (-1, groups)).sum(0)
    return total


CHUNK = 2**22  # elements
