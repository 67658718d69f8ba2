"""What both optimizers share: the transforms, the scaler's contract, clipping, and lists that are made with little work per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastcl.ops import _checks, _optimizer_checks, _sharded
from fastcl.optim import _projection, _saved
from fastcl.optim._binding import Bound
from fastcl.optim._numbers import check_gradients
from fastcl.optim._rows import Plan, Rows, State, same
from fastcl.optim.transforms import ChildMask, Project, Transform


class Swept(torch.optim.Optimizer):
    """An optimizer whose step is one call of an operator for each group."""

    # GradScaler then leaves unscaling and skipping to the step: it sets grad_scale and found_inf, which are read on the device.
    _step_supports_amp_scaling = True
    _state_names: ClassVar[frozenset[str]]  # what a state may hold, and must
    _needed_state: ClassVar[tuple[str, ...]]
    _group_keys: ClassVar[tuple[str, ...]]

    def __init__(self, params: Any, defaults: dict[str, Any], transforms: Iterable[Transform], clip_norm: float | None) -> None:
        if isinstance(transforms, (Transform, str)) or not isinstance(transforms, Iterable):
            raise TypeError(f"transforms must be a list of transforms of fastcl.optim, got {type(transforms).__name__}")
        self._transforms = tuple(transforms)
        for i, t in enumerate(self.transforms):
            if not isinstance(t, Transform):
                raise TypeError(f"transforms[{i}] must be a transform of fastcl.optim, got {type(t).__name__}")
        self.clip_norm = clip_norm
        self._forget()
        self._complete = False
        super().__init__(params, defaults)
        self._bind()
        self._complete = True

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The transforms in their order. Their settings may change; which they are is for good: state may depend on it."""
        return self._transforms

    @transforms.setter
    def transforms(self, value: object) -> None:  # noqa: ARG002
        raise AttributeError(
            "transforms cannot be replaced; build a new optimizer, or assign the attributes of the transforms that are there"
        )

    @property
    def clip_norm(self) -> float | None:
        """The largest norm of all gradients together; None: they are not clipped."""
        return self._clip_norm

    @clip_norm.setter
    def clip_norm(self, value: float | None) -> None:
        if value is not None and _checks.at_least_zero("clip_norm", value) == 0:
            raise ValueError("clip_norm must be above 0, got 0: every gradient would be 0")
        self._clip_norm = value

    def _forget(self) -> None:
        self._plans: list[Plan] = []
        self._owners: list[State] = []
        self._bound: list[Bound] = []
        self._places: list[Any] | None = None
        self._checked: dict[int, tuple[list[Any], list[torch.dtype]]] = {}  # state and dtypes by a group's first position

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _bind(self) -> None:
        """Look up the transforms' values for all parameters. Raises what does not fit, before anything is kept."""
        params = self._all()
        names = [n for group in self.param_groups for n in group.get("param_names", ())] or None
        bound = [Bound(t, params, names) for t in self.transforms]
        self._accept(bound, params)
        self._bound = bound
        self._places = _projection.places(params) if any(isinstance(t, ChildMask) for t in self.transforms) else None

    def _accept(self, bound: Sequence[Bound], params: Sequence[Tensor]) -> None:
        """What else an optimizer asks of its transforms."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; transforms need values for the new parameters too, in mappings that were extended before.

        Raises:
            TypeError: a parameter that is no dense floating-point tensor.
            ValueError: a hyper-parameter outside its range, transforms that do not fit. The group has not been added then.
        """
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            added = self.param_groups[-1]["params"]
            local = _sharded.shards(added) if _sharded.is_sharded(added) else added
            _checks.dense("params", local, _checks.FLOATING)
            if self._complete:
                self._bind()
        except Exception:
            self.param_groups.pop()
            raise
        self._plans = []

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _check_masks(self) -> None:
        """Raises ValueError if masks that state depends on have been written to."""

    def _check_loaded(self, states: Mapping[Any, tuple[Tensor, Mapping[str, Any]]]) -> None:
        """What else an optimizer asks of state that is to be loaded: by its key the parameter and what it is to have."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: evaluates the model again, runs backward and returns the loss.

        Returns:
            What ``closure`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _outside(self)
        else:
            self._sweep()
        return loss

    def _sweep(self) -> None:
        if any(b.version != t.version for b, t in zip(self._bound, self.transforms, strict=True)):
            self._bind()
        rows = [r for r in map(self._rows, self.param_groups, self._plans_now()) if r.params]
        if not rows:
            return
        self._check_masks()
        if len(rows) > 1 or self._incomplete(rows[0].group, rows[0].states):
            # One call of an operator checks all of its own before it writes; several calls, and new state, must not write one by one.
            self._check_rows(rows)
        done = 0
        try:
            for r in rows:
                self._complete_state(r)
            for done in self._updates(rows):  # noqa: B007
                pass
        except Exception:
            for r in rows[done:]:
                r.forget_made(self.state)
            raise

    def _check_rows(self, rows: Sequence[Rows]) -> None:
        numbers = {id(group): n for n, group in enumerate(self.param_groups)}
        for r in rows:
            lr = r.group["lr"]
            # What a tensor holds stays on the device: looking at it would wait in every step.
            group = {**r.group, "lr": 0.0} if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() else r.group
            try:
                self._check_group(group)
                check_gradients(r.local, r.local_grads)
                self._check_state(r)
                for bound in self._bound:
                    bound.check_sizes()
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{numbers[id(r.group)]}]: {error}") from None

    def _check_state(self, r: Rows) -> None:
        """State that is there, in the form in which steps need it. Raises TypeError or ValueError naming the parameter."""
        names = sorted(self._state_names - {"step"})
        seen = [s.get(name) for name in names for s in r.states], [p.dtype for p in r.local]
        tensors, dtypes = self._checked.get(r.start, ([], []))
        if dtypes == seen[1] and same(tensors, seen[0]):
            return
        whole = self._whole_state(r)
        there = [(i, p, s) for i, (p, s) in enumerate(zip(r.local, r.states, strict=True)) if s]
        for name in names:
            rows = [(i, p, s.get(name)) for i, p, s in there]
            missing = [i for i, _, t in rows if t is None and name in self._needed_state]
            if missing:
                raise ValueError(f"the state of params[{missing[0]}] has no {name!r}; put back what was there, or clear the whole state")
            rows = [row for row in rows if isinstance(row[2], Tensor)]
            found: Any = [t for _, _, t in rows]
            if _sharded.is_sharded(found):
                found = _sharded.shards(found)
            params = [p for _, p, _ in rows]
            # For all at once, as there may be thousands; the first that does not fit is looked for only then.
            kinds = {(t.dtype, p.dtype) for t, p in zip(found, params, strict=True)}
            fits = all(t == (torch.float64 if p == torch.float64 else torch.float32) for t, p in kinds)
            if fits and all(map(Tensor.is_same_size, found, params)) and [t.stride() for t in found] == [p.stride() for p in params]:
                continue
            for (i, p, _), t in zip(rows, found, strict=True):
                if whole[i]:
                    _optimizer_checks.check_state(f"{name} of params[{i}]", t, p)
        self._checked[r.start] = seen

    def _whole_state(self, r: Rows) -> list[bool]:
        """Of which rows the moments have their parameter's shape."""
        return [True] * len(r.params)

    def _complete_state(self, r: Rows) -> None:
        if not self._incomplete(r.group, r.states):
            return
        r.before = [dict(self.state[p]) if p in self.state else None for p in r.params]
        r.fresh = self._begin(r.group, r.params, r.local, range(r.start, r.start + len(r.params)) if r.members is None else r.members)
        r.states = [self.state[p] for p in r.params]

    def _updates(self, rows: Sequence[Rows]) -> Iterator[int]:
        """Update group after group; yields how many are done."""
        found_inf = getattr(self, "found_inf", None)
        found_inf = _projection.plain(found_inf) if isinstance(found_inf, Tensor) else None
        scale = _projection.scale([r.grads for r in rows], getattr(self, "grad_scale", None), self._clip_norm)
        transforms = self._entries(rows, scale)
        for n, (r, entries) in enumerate(zip(rows, transforms, strict=True)):
            # Rows that are split into fresh ones and others need their places, too.
            whole = self._places is None or (r.members is None and r.start == 0 and r.local is r.params and r.fresh is None)
            self._update(r, entries, None if whole else r.pick(self._places or ()), scale, found_inf)
            if r.local is not r.params:
                _sharded.bump_versions(r.params)
            yield n + 1

    def _update(self, rows: Rows, transforms: list[Any], places: list[Any] | None, scale: Tensor | None, found_inf: Tensor | None) -> None:
        raise NotImplementedError

    def _steps(self, rows: Rows) -> list[Tensor]:
        return [s["step"] for s in rows.states]

    def _entries(self, rows: Sequence[Rows], scale: Tensor | None) -> list[list[Any]]:
        """For each group the transforms as the operator takes them, with the projections' coefficients."""
        entries: list[list[Any]] = [[] for _ in rows]
        for transform, bound in zip(self.transforms, self._bound, strict=True):
            if not transform.active:
                continue
            lists = [[r.pick(column) for column in bound.lists] for r in rows]
            if isinstance(transform, Project):
                steps = [self._steps(r) if self._places is not None else [] for r in rows]
                coefficient = _projection.coefficient(rows, steps, entries, self._places, scale, [own[0] for own in lists])
                for own, found in zip(lists, entries, strict=True):
                    found.append(("project", own[0], coefficient))
            else:
                for own, found in zip(lists, entries, strict=True):
                    found.append(transform.entry(own))
        return entries

    def _plans_now(self) -> list[Plan]:
        """What is known of the groups' parameters, as long as it holds.

        Made again when a group's list has other parameters than it had, and when ``state`` holds other dictionaries than it held; both are
        seen by comparing identities. What the dictionaries hold is looked up in every step.
        """
        groups = self.param_groups
        known = self._plans
        fits = len(known) == len(groups) and all(same(plan.params, group["params"]) for plan, group in zip(known, groups, strict=True))
        if fits and same(self._owners, self.state.values()):
            return known
        self._plans, start = [], 0
        for group in groups:
            params = list(group["params"])
            sharded = _sharded.is_sharded(params)
            local = _sharded.shards(params) if sharded else params
            self._plans.append(Plan(params, start, local, sharded, [self.state.get(p, {}) for p in params]))
            start += len(params)
        if not fits and known:
            self._bind()
        self._owners = list(self.state.values())
        return self._plans

    def _rows(self, group: dict[str, Any], plan: Plan) -> Rows:
        params, local, states = plan.params, plan.local, plan.states
        grads: list[Any] = [p.grad for p in params]
        for t, bound in zip(self.transforms, self._bound, strict=True):
            if isinstance(t, Project) and t.active:
                wanted = bound.present[plan.start : plan.start + len(params)]
                grads = [_sharded.zeros_like(p) if g is None and w else g for g, p, w in zip(grads, params, wanted, strict=True)]
        members = [i for i, g in enumerate(grads) if g is not None]
        whole = len(members) == len(params)
        if not whole:
            columns: Any = (params, local, states, grads)
            params, local, states, grads = ([column[i] for i in members] for column in columns)
        if plan.sharded:
            local_grads = self._local_grads(params, grads)
        else:
            local, local_grads = params, grads
        positions = None if whole else [plan.start + i for i in members]
        return Rows(group, params, grads, local, local_grads, states, positions, plan.start)

    def _local_grads(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        _sharded.check_matching("grads", grads, "params", params, one_element=False)
        return _sharded.shards(grads)

    def _incomplete(self, group: dict[str, Any], states: Sequence[State]) -> bool:
        """Whether a state that is there lacks something."""
        raise NotImplementedError

    def _begin(
        self, group: dict[str, Any], params: Sequence[Tensor], local: Sequence[Tensor], positions: Sequence[int]
    ) -> list[bool] | None:
        """Make what is missing in the state of these parameters; says whose, if the step has to know."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's, with torch.optim's names: its optimizer of the same name loads it. Transforms are not part of it."""
        saved: dict[str, Any] = super().state_dict()
        return saved

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, from this optimizer's or torch.optim's of the same name. What is loaded is copied.

        State keeps its precision beside half-precision parameters (torch.optim's would round it), and gets its parameter's strides.

        Raises:
            TypeError, ValueError: a state_dict of another optimizer, with amsgrad, with other shapes, or with values that are none; the key
                is named. Nothing has been loaded then.
        """
        _saved.load(self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: torch's, and the transforms."""
        self._check_masks()
        own = {"transforms": self.transforms, "_clip_norm": self._clip_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle, deepcopy and load_state_dict."""
        own = dict(state)
        self._transforms = own.pop("transforms", None) or getattr(self, "_transforms", ())
        super().__setstate__(own)
        self.defaults.setdefault("differentiable", False)
        _saved.unwrap(self)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()
        self._complete = True
        self._bind()


@_disable_dynamo
def _outside(optimizer: Swept) -> None:
    optimizer._sweep()
