"""Natural continual learning: steps in the metric of what earlier tasks have fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcl import _distributed
from fastcl._model import some
from fastcl.ops import _sharded
from fastcl.optim import _saved
from fastcl.optim._numbers import check_gradients, check_numbers, device_lr
from fastcl.precision._base import Precision
from fastcl.precision._blocks import Block
from fastcl.precision._numbers import positive


class _Row(NamedTuple):
    """A block that a step updates."""

    block: Block
    grads: list[Tensor | None]
    states: list[dict[str, Any]]


class NCL(torch.optim.Optimizer):
    """Natural continual learning: gradient descent with momentum whose steps are measured by the posterior precision of earlier tasks.

    Kao, Jensen et al., "Natural continual learning: success is a journey, not (just) a destination", NeurIPS 2021, arXiv 2106.08085, eq. 7.

    With the posterior ``N(mu, Lambda^-1)`` of the tasks that have ended, kept per datum (:mod:`fastcl.precision`), a step is::

        M <- momentum M + g + strength Lambda (W - mu)
        V <- Lambda^-1 M
        W <- W - s V          s = lr / n_data, or min(lr / n_data, radius / sqrt(V^T Lambda V))

    ``g`` is the gradient of the mean loss. On the first task, where ``Lambda = I / n_data`` and ``mu = 0``, this is
    ``torch.optim.SGD(params, lr, momentum, weight_decay=strength / n_data)`` up to rounding. Later, directions that earlier tasks fixed
    are scaled down by their precision, and all others are free. The paper has a learning rate alone; ``radius`` is an addition: no step is
    then longer than ``radius`` in the norm ``sqrt(x^T Lambda x)`` that the precision measures.

    Kronecker-factored layers keep ``M`` ("dual_momentum") and ``H = Lambda (W - mu)`` ("pull"), which follows the parameters by
    ``H <- H - s M``: a step costs two matrix products for each layer, and the norm is ``<M, V>``. ``H`` is computed anew after ``refresh``
    steps, and at once after a parameter was written to by anything else: its version or its address tells, so writes in place through
    ``.data`` or NumPy go unnoticed. Other blocks keep ``V`` ("momentum_buffer"). Nothing waits for the device. When the precision has
    changed (``precision.version``: a task has ended), momenta begin again from 0.

    State is float64 for float64 parameters, else float32. With bfloat16 or float16 parameters steps of less than half a unit in the last
    place are lost while ``H`` counts them, until it is computed anew: train float32 parameters under autocast, or with ``refresh=1``.

    Gradients that are None leave their layer alone; where only one of weight and bias has one, the other's counts as 0, and both move: the
    factors couple them. A NaN or Inf in a gradient makes its layer's parameters NaN (with :class:`fastcl.DiagonalPrecision` its parameter,
    with :class:`fastcl.LowRankPrecision` all), with ``radius`` those of every layer that has a gradient, as the norm is NaN then: use a
    GradScaler, or look at the loss, where it may happen. ``state_dict`` holds momenta, pulls and counters, not the precision, which has a
    ``state_dict`` of its own: load that first.

    Args:
        model: the module that is trained. Whole layers may be frozen later; to train the weight or the bias of a layer alone, freeze the
            other before the precision is built. New parameters need a new precision and a new optimizer.
        precision: the precision of this model, such as :class:`fastcl.KroneckerPrecision`. Its ``n_data`` turns the paper's learning rate
            into the step's.
        lr: finite number >= 0, or a tensor of one element on the device.
        momentum: finite number >= 0.
        strength: lambda, how much the pull towards ``mu`` counts: finite number >= 0; 1 is Bayes' rule, 0 the projection alone.
        radius: number > 0, the longest step in the norm of Lambda, up to the rounding of the parameters; None for no bound.
        refresh: whole number >= 1: steps from one exact ``H`` to the next, which costs about one step more. In float32 ``H`` loses about
            1e-7 of its size per step while the parameters move a lot.

    Raises:
        TypeError: a model that is no Module, a precision that is none, arguments of a wrong kind.
        ValueError: a precision of another model, arguments outside of their ranges.

    Example::

        precision = fastcl.KroneckerPrecision(model, n_data=len(dataset))
        optimizer = fastcl.optim.NCL(model, precision, lr=0.05)
        for loader in loaders:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            with precision.collect() as fisher:
                for x, _ in loader:
                    fisher.backward(model(x))
            precision.merge_()
            precision.anchor_()
    """

    _state_names = frozenset({"dual_momentum", "pull", "momentum_buffer"})
    _needed_state = ()
    _group_keys = ("lr", "momentum", "strength", "radius", "refresh", "since_refresh", "current")

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        lr: float | Tensor,
        momentum: float = 0.9,
        strength: float = 1.0,
        radius: float | None = None,
        *,
        refresh: int = 100,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(precision, Precision):
            raise TypeError(f"precision must be one of fastcl's, such as KroneckerPrecision; got {type(precision).__name__}")
        if _distributed.unwrapped(precision.model) is not _distributed.unwrapped(model):
            raise ValueError("precision is that of another model; build it from the model that is given here")
        self._precision = precision
        self._seen: int | None = None  # the precision's version that momenta and pulls belong to
        self._since = 0  # steps since pulls were exact
        self._versions: list[tuple[int, int]] | None = None  # of the parameters after the latest step
        covered = {id(p) for block in precision.blocks for p in block.params}
        params = [p for p in model.parameters() if id(p) in covered]
        super().__init__(params, {"lr": lr, "momentum": momentum, "strength": strength, "radius": radius, "refresh": refresh})

    @property
    def precision(self) -> Precision:
        """The precision that measures the steps."""
        return self._precision

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction, with a RuntimeError: the precision says which parameters there are."""
        if self.param_groups:
            raise RuntimeError("NCL has the parameters of its precision, in one group; build a new precision and a new optimizer")
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_numbers(group, momentum="momentum value", strength="strength")
        if group["radius"] is not None:
            positive("radius", group["radius"])
        if isinstance(group["refresh"], bool) or not isinstance(group["refresh"], int):
            raise TypeError(f"refresh must be a whole number, got {type(group['refresh']).__name__}")
        if group["refresh"] < 1:
            raise ValueError(f"refresh must be a whole number >= 1, got {group['refresh']}")
        since, current = group.get("since_refresh", 0), group.get("current", True)  # of a state_dict
        if isinstance(since, bool) or not isinstance(since, int) or since < 0 or not isinstance(current, bool):
            raise ValueError(f"since_refresh and current must be a whole number >= 0, True or False; got {since!r}, {current!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every layer that has a gradient.

        Args:
            closure: evaluates the model again, runs backward and returns the loss.

        Returns:
            What ``closure`` returns.

        Raises:
            TypeError, ValueError: a hyper-parameter of the group outside its range, gradients that do not fit, a frozen parameter whose
                layer's other one has a gradient. Nothing has been written.
            RuntimeError: a parameter of the model has been replaced.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _outside(self)
        else:
            self._advance()
        return loss

    def _advance(self) -> None:
        group = self.param_groups[0]
        lr = group["lr"]
        # What a tensor holds stays on the device: looking at it would wait in every step.
        self._check_group({**group, "lr": 0.0} if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() else group)
        rows = []
        own = set(map(id, group["params"]))
        for block in self._precision.blocks:
            params = block.params
            strangers = [name for name, p in zip(block.names, params, strict=True) if id(p) not in own]
            if strangers:
                raise RuntimeError(
                    f"{some(strangers)} of the model: no longer what this optimizer was built with, but replaced or loaded with "
                    "assign=True; build a new optimizer"
                )
            grads = [None if p.grad is None else _exact(name, p.grad) for name, p in zip(block.names, params, strict=True)]
            if any(g is not None for g in grads):
                rows.append(_Row(block, grads, [self.state[p] for p in params]))
        if not rows:
            return
        _check(rows)
        self._follow(group)
        n, momentum, strength = self._precision.n_data, group["momentum"], group["strength"]
        if group["radius"] is None and not isinstance(lr, Tensor):
            for block, grads, states in rows:
                block.step(grads, states, lr / n, momentum, strength)
        else:
            self._bounded(rows, device_lr(group, rows[0].block.params[0]), group["radius"], momentum, strength)
        self._since += 1
        self._versions = _marks(group["params"])

    def _bounded(self, rows: list[_Row], lr: Any, radius: float | None, momentum: float, strength: float) -> None:
        """A step whose size is decided on the device."""
        norms = [block.direction(grads, states, momentum, strength) for block, grads, states in rows]
        device = norms[0].device
        whole = torch.stack([q.to(device, non_blocking=True) for q in norms]).sum()
        step = (lr.double() if isinstance(lr, Tensor) else torch.full_like(whole, lr)) / self._precision.n_data
        if radius is not None:
            # A direction of length 0 divides by 0, which makes Inf and leaves the learning rate; rounding may put it below 0.
            step = torch.minimum(step, radius / whole.clamp_min(0).sqrt())
        for (block, _, states), q in zip(rows, norms, strict=True):
            block.apply(states, step.to(q.device, non_blocking=True))

    def _follow(self, group: dict[str, Any]) -> None:
        """Make the state fit: the precision may be another one than before, and the parameters elsewhere than the last step left them."""
        version = self._precision.version
        if self._seen != version:
            for block in self._precision.blocks:
                states = [self.state[p] for p in block.params]
                (block.reset if any(states) else block.begin)(states)
            self._seen, self._since = version, 0
        elif self._since >= group["refresh"] or (self._versions is not None and self._versions != _marks(group["params"])):
            for block in self._precision.blocks:
                block.refresh([self.state[p] for p in block.params])
            self._since = 0

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's; ``param_groups[0]`` also says how many steps the pulls are old, and whether the state is current."""
        saved: dict[str, Any] = super().state_dict()
        saved["param_groups"][0] |= {"since_refresh": self._since, "current": self._seen == self._precision.version}
        return saved

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; tensors are copied. The precision's state has to be loaded before.

        The run goes on with the same bits, whether the model's parameters are loaded before or after.

        Raises:
            TypeError, ValueError: a state_dict of another optimizer, with other shapes or with values that are none; the key is named.
                Nothing has been loaded then.
        """
        _saved.load(self, state_dict, super().load_state_dict)

    def _check_loaded(self, states: Mapping[Any, tuple[Tensor, Mapping[str, Any]]]) -> None:
        """Each block's state is there as a whole, or not at all."""
        given = {id(p): {name for name, value in state.items() if value is not None} for p, state in states.values()}
        for block in self._precision.blocks:
            fresh: list[dict[str, Any]] = [{} for _ in block.params]
            block.begin(fresh)
            for p, name, own in zip(block.params, block.names, fresh, strict=True):
                if any(given.get(id(q)) for q in block.params) and given.get(id(p), set()) != set(own):
                    there = sorted(given.get(id(p), set()))
                    raise ValueError(f"state of {name!r} in the state_dict has {there}; with this precision it is {sorted(own)}")

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: torch's, the precision, and how old the state is."""
        own = {"_precision": self._precision, "_seen": self._seen, "_since": self._since}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle, deepcopy and load_state_dict."""
        super().__setstate__(state)
        group = self.param_groups[0]
        since, current = group.pop("since_refresh", None), group.pop("current", None)
        if since is not None:  # from a state_dict
            self._since, self._seen = since, self._precision.version if current else None
        self._versions = None
        for block in self._precision.blocks:
            self._rebuild(block)

    def _rebuild(self, block: Block) -> None:
        """A layer's weight and bias share buffers, which copies of the one and the other do not."""
        given = [dict(self.state[p]) if p in self.state else {} for p in block.params]
        states: list[dict[str, Any]] = [{} for _ in block.params]
        if not any(given):
            return
        block.begin(states)
        with torch.no_grad():
            for p, own, saved in zip(block.params, states, given, strict=True):
                for name, target in own.items():
                    value = _saved.held(saved[name])  # not of another name: load_state_dict has compared them
                    pair = _sharded.shards([target, value]) if _sharded.is_sharded([target, value]) else [target, value]
                    pair[0].copy_(pair[1])
                self.state[p] = own


def _exact(name: str, g: Tensor) -> Tensor:
    """The gradient as the kernels take it: without a subclass that only adds behaviour."""
    if type(g) is Tensor or _sharded.is_sharded([g]):
        return g
    if is_traceable_wrapper_subclass(g):
        raise TypeError(
            f"the gradient of {name!r} is a {type(g).__name__}, which has no memory of its own; accepted are Tensor and DTensor"
        )
    return g.as_subclass(Tensor)


def _check(rows: list[_Row]) -> None:
    """What holds for all blocks before the first of them is written."""
    for block, grads, _ in rows:
        pairs = [(p, g) for p, g in zip(block.params, grads, strict=True) if g is not None]
        params, found = [p for p, _ in pairs], [g for _, g in pairs]
        if _sharded.is_sharded(params):
            _sharded.check_matching("grads", found, "params", params, one_element=False)
            params, found = _sharded.shards(params), _sharded.shards(found)
        check_gradients(params, found)
        block.check(grads)


def _marks(params: list[Tensor]) -> list[tuple[int, int]]:
    """What tells that a parameter was written to, or put elsewhere."""
    local = _sharded.shards(params) if _sharded.is_sharded(params) else params
    return [(p._version, own.data_ptr()) for p, own in zip(params, local, strict=True)]


@_disable_dynamo
def _outside(optimizer: NCL) -> None:
    optimizer._advance()
