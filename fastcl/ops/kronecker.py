"""Kronecker-factored precision: solving with it, its quadratic form, merging two of them, and the step of natural continual learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.ops import _dispatch, _kronecker_checks, _kronecker_layers
from fastcl.ops import _kronecker_operators as operators
from fastcl.ops._kronecker_layers import Layers
from fastcl.reference import kronecker_merge
from fastcl.reference.kronecker import Factors, Layer

Tensors = Sequence[Tensor]


def kron_solve_(grads: Sequence[Layer], inverse_factors: Sequence[Factors]) -> None:
    r"""Multiply each layer's gradient with the inverse of its precision, in place: ``X <- G^-1 X A^-1``.

    A layer's weight [m, ...] and bias [m] are the matrix ``X = [W.flatten(1) | b]`` of shape [m, n], the bias being the last column, and
    its precision is ``Lambda vec(X) = vec(G X A)`` (Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", ICML 2015): two products instead of a solve of size m n. With factors in place of their inverses it is ``Lambda X``.

    Computed in the factors' dtype and rounded once to the gradient's. Layers of at most 128 x 129 go through one call; larger ones through
    the vendor's matrix products in blocks of rows, so that no temporary of a layer's size is made (but for a gradient that is not a matrix
    of the factors' dtype). The products follow torch's settings (``torch.set_float32_matmul_precision``), never autocast. NaN and Inf
    propagate within their layer. Not differentiable.

    Args:
        grads: for each layer its weight's gradient, at least two dimensions, outputs first, or a pair (weight's, bias's); the bias may be
            None. Dense tensors on one device, float64, float32, bfloat16 or float16, any strides; written. They may not share memory.
        inverse_factors: for each layer the pair ``(A^-1 [n, n], G^-1 [m, m])``, both float64 or both float32, contiguous rows at any
            distance; a factor with one dimension ([n] or [m]) is diagonal.

    Raises:
        TypeError: not a list of layers or pairs, a dtype that is not accepted, a DTensor (:class:`fastcl.optim.NCL` takes those).
        ValueError: lengths, shapes, strides or devices that do not fit, shared memory, a gradient that requires grad while autograd
            records. Nothing has been written then.
    """
    traced = _dispatch.traced()
    weights, biases = _kronecker_layers.flatten("grads", grads, traced=traced)
    A, G = _kronecker_layers.flatten_factors("inverse_factors", inverse_factors)
    if traced or not operators.solve_now(Layers(weights=weights, biases=biases, A=A, G=G)):
        _kronecker_layers.for_dispatcher(grads=[*weights, *biases], inverse_factors=[*A, *G])
        torch.ops.fastcl.kron_solve_(weights, biases, A, G)


def kron_quadratic(deltas: Sequence[Layer], factors: Sequence[Factors]) -> Tensor:
    """The squared norm of a change of the parameters under the precision: ``sum <X, G X A>`` over all layers.

    Layers and factors as in :func:`kron_solve_`. The products are made in the factors' dtype, their sums in float64; the sums' order does
    not depend on the number of threads. Not differentiable.

    Args:
        deltas: for each layer its weight's change or a pair (weight's, bias's), as ``grads`` in :func:`kron_solve_`; read.
        factors: for each layer the pair ``(A [n, n], G [m, m])``, as ``inverse_factors`` in :func:`kron_solve_`.

    Returns:
        0-d, float64, on the layers' device (on the CPU if there are none).

    Raises:
        TypeError: as :func:`kron_solve_`.
        ValueError: lengths, shapes, strides or devices that do not fit. Nothing is written in any case.
    """
    traced = _dispatch.traced()
    weights, biases = _kronecker_layers.flatten("deltas", deltas, traced=traced)
    A, G = _kronecker_layers.flatten_factors("factors", factors)
    result = None if traced else operators.quadratic_now(Layers(weights=weights, biases=biases, A=A, G=G))
    if result is None:
        _kronecker_layers.for_dispatcher(deltas=[*weights, *biases], factors=[*A, *G])
        result = torch.ops.fastcl.kron_quadratic(weights, biases, A, G)
    total: Tensor = result
    return total


def ncl_step_(
    params: Sequence[Layer],
    grads: Sequence[Layer],
    M: Tensors,
    H: Tensors,
    inverse_factors: Sequence[Factors],
    lr: float | Tensor,
    momentum: float = 0.9,
    strength: float = 1.0,
    radius: float | None = None,
    *,
    workspace: Tensors | None = None,
) -> None:
    r"""One step of natural continual learning, in place, without waiting for the device.

    With ``g`` the gradient and ``X = [W | b]`` of each layer, and ``Lambda`` the precision of the past tasks' posterior around ``mu``
    (Kao, Jensen et al., "Natural continual learning", NeurIPS 2021, eq. 8 with momentum, in dual variables)::

        M <- momentum M + g + strength H
        V <- G^-1 M A^-1                               # Lambda^-1 M
        s = lr, or min(lr, radius / sqrt(q)) with q = sum over all layers <M, V> = V^T Lambda V
        X <- X - s V
        H <- H - s M                                   # so H stays Lambda (X - mu)

    ``radius`` bounds the step's length in the metric ``Lambda``: fastcl's extension, the authors' step is ``radius=None``. ``lr`` is the
    paper's, divided by the number of data points. Start with ``M = 0`` and ``H = Lambda (X - mu)``, which is 0 at the posterior's mean; in
    float32 H drifts by roundings, so refresh it now and then.

    Layers of at most 128 x 129 are one call, both products and all tails included. Larger ones are one sweep over M, g and H, and the
    vendor's products in blocks, of which the second adds to the weights: without a radius temporaries are one block (two, where the
    weight is no matrix of the factors' dtype or ``lr`` a tensor) of 2^18 elements, 128 columns or an eighth of all elements, whatever is
    most. With a radius V is kept in ``workspace`` until ``q`` is known. Sums are float64, their order is fixed.
    A NaN or Inf in a gradient spreads over its layer, and with a radius over all layers. Not differentiable.

    Args:
        params: for each layer its weight [m, ...] or a pair (weight, bias [m]), as ``grads`` in :func:`kron_solve_`; written.
        grads: for each layer the gradients in the same form, of the parameters' shapes; the same dtypes, any strides; read.
        M: for each layer the dual momentum [m, n], of the factors' dtype, contiguous rows at any distance; written.
        H: the pull ``Lambda (X - mu)``, as M; written.
        inverse_factors: as in :func:`kron_solve_`.
        lr: finite number >= 0, or a 0-d float32 or float64 tensor on the device, where it is read.
        momentum: finite number >= 0.
        strength: lambda, finite number >= 0.
        radius: finite number > 0, or None for no bound.
        workspace: matrices as M for V, whose content does not matter before and after; written where V has to be kept. None: made here.

    Raises:
        TypeError: as :func:`kron_solve_`, and a number of another type.
        ValueError: lengths, shapes, strides or devices that do not fit, shared memory, numbers outside their ranges, a parameter that
            requires grad while autograd records. Nothing has been written then.
    """
    traced = _dispatch.traced()
    weights, biases = _kronecker_layers.flatten("params", params, traced=traced)
    weight_grads, bias_grads = _kronecker_layers.flatten("grads", grads, traced=traced)
    A, G = _kronecker_layers.flatten_factors("inverse_factors", inverse_factors)
    if not traced and isinstance(M, (list, tuple)) and isinstance(H, (list, tuple)) and isinstance(workspace, (list, tuple, type(None))):
        layers = Layers(weights, biases, weight_grads, bias_grads, list(M), list(H), list(workspace or ()), A, G)
        if operators.step_now(layers, lr, momentum, strength, radius):
            return
    V = () if workspace is None else workspace
    own = {"params": [*weights, *biases], "grads": [*weight_grads, *bias_grads], "inverse_factors": [*A, *G]}
    _kronecker_layers.for_dispatcher(**own, M=M, H=H, workspace=V)
    _kronecker_checks.learning_rate(lr, weights)
    _kronecker_checks.numbers(momentum, strength, radius)
    rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    torch.ops.fastcl.ncl_step_(weights, biases, weight_grads, bias_grads, M, H, V, A, G, *rate, momentum, strength, radius)


def ncl_direction_(
    grads: Sequence[Layer],
    M: Tensors,
    V: Tensors,
    H: Tensors,
    inverse_factors: Sequence[Factors],
    momentum: float = 0.9,
    strength: float = 1.0,
) -> Tensor:
    """The first half of :func:`ncl_step_` for a joint radius with other forms of precision: M and V are written, ``sum <M, V>`` returned.

    Arguments and errors as there, V being the workspace. Returns 0-d, float64, on the device.
    """
    traced = _dispatch.traced()
    weights, biases = _kronecker_layers.flatten("grads", grads, traced=traced)
    A, G = _kronecker_layers.flatten_factors("inverse_factors", inverse_factors)
    result = None
    if not traced and all(isinstance(value, (list, tuple)) for value in (M, V, H)):
        layers = Layers(weights, biases, weights, biases, list(M), list(H), list(V), A, G)
        result = operators.direction_now(layers, momentum, strength)
    if result is None:
        _kronecker_layers.for_dispatcher(grads=[*weights, *biases], M=M, V=V, H=H, inverse_factors=[*A, *G])
        _kronecker_checks.numbers(momentum, strength)
        result = torch.ops.fastcl.ncl_direction_(M, V, weights, biases, H, A, G, momentum, strength)
    total: Tensor = result
    return total


def ncl_apply_(params: Sequence[Layer], H: Tensors, V: Tensors, M: Tensors, step: Tensor) -> None:
    """The second half: ``X <- X - step V;  H <- H - step M`` with the step size, 0-d float64, on the device.

    Arguments and errors as in :func:`ncl_step_`.
    """
    traced = _dispatch.traced()
    weights, biases = _kronecker_layers.flatten("params", params, traced=traced)
    if traced or not operators.apply_now(weights, biases, H, V, M, step):
        _kronecker_layers.for_dispatcher(params=[*weights, *biases], H=H, V=V, M=M)
        if not isinstance(step, Tensor):
            raise TypeError(f"step must be a 0-d float64 tensor, got {type(step).__name__}")
        torch.ops.fastcl.ncl_apply_(weights, biases, H, V, M, step)


def kron_merge(B_L: Tensor, B_R: Tensor, C_L: Tensor, C_R: Tensor, rule: str = "kl") -> tuple[Tensor, Tensor]:
    r"""The sum of two Kronecker products as one: ``L x R`` close to ``B_L x B_R + C_L x C_R``.

    * ``"kl"``: minimises ``log|L x R| + tr((L x R)^-1 (B_L x B_R + C_L x C_R))``, the divergence between the Gaussians of these
      precisions' inverses (Kao, Jensen et al., NeurIPS 2021, appendix). The optimum is ``L = e0 B_L + e1 C_L, R = f0 B_R + f1 C_R``: with
      ``d_L`` and ``d_R`` the generalised eigenvalues of ``(C_L, B_L)`` and ``(C_R, B_R)``, four scalars are iterated,
      ``f_j = mean(d_L^j / (e0 + e1 d_L))`` and ``e_j = mean(d_R^j / (f0 + f1 d_R))``, until they are still to 1e-14. k identical
      tasks give k F.
    * ``"pi"``: ``L = B_L + pi C_L, R = B_R + C_R / pi`` with ``pi = sqrt(tr B_L tr C_R / (tr C_L tr B_R))`` (Martens and Grosse 2015).
      k identical tasks give k^2 F.
    * ``"frobenius"``: the nearest one in the Frobenius norm (Van Loan and Pitsianis 1993), from the Gram matrices of both sides.

    Runs once per task: it waits for the device, and computes in float64 on the matrices' device.

    Args:
        B_L: [n, n], symmetric to 1e-5 of its largest element, or [n], a diagonal; positive definite for ``"kl"``.
        B_R: [m, m] or [m], likewise.
        C_L: as B_L, of its shape; positive semi-definite, may be 0.
        C_R: as B_R, of its shape; likewise.
        rule: "kl", "pi" or "frobenius".

    Returns:
        L, R: of the widest dtype among the inputs and float32, with no memory of theirs.

    Raises:
        TypeError: not dense tensors of float64, float32, bfloat16 or float16, a DTensor, a rule that is no string.
        ValueError: a matrix that is not square or symmetric, shapes or devices that do not fit, NaN or Inf, a B that is not positive
            definite, a C that is not positive semi-definite, an unknown rule. Nothing is written in any case.
    """
    _kronecker_checks.merged({"B_L": B_L, "B_R": B_R, "C_L": C_L, "C_R": C_R}, rule, tuple(kronecker_merge.RULES))
    with torch.no_grad():
        return kronecker_merge.kron_merge(B_L, B_R, C_L, C_R, rule)
