"""The outer variable x and its optimiser: the pure core of the parameter server."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metadist.trees import Params, check_flattenable, flatten, unflatten


@dataclass(frozen=True)
class OuterOptimizer:
    """How the outer variable is stepped: a `torch.optim` optimiser by name, clipping, a schedule.

    The optimiser acts on x as one flat vector, which is the same for every optimiser that acts
    element by element.

    Args:
        name: one of `OPTIMIZERS`.
        lr: the outer learning rate, > 0.
        options: further arguments of that torch.optim class, e.g. {"weight_decay": 1e-4}.
        clip_norm: the hypergradient is scaled down to this Euclidean norm; None: never.
        schedule: of the learning rate: "constant"; falling to 0 over `schedule_steps` outer steps
            as "linear" or "cosine"; or "power", lr * (k+1)^-schedule_power at outer step k.
        schedule_steps: the length of "linear" and "cosine", which need it.
        schedule_power: the exponent of "power", in (0, 1].
        warmup_steps: outer steps of linear growth of the rate from lr / warmup_steps.
    """

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = "adam"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    schedule: Literal["constant", "linear", "cosine", "power"] = "constant"
    schedule_steps: int | None = None
    schedule_power: float = 0.5
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name must be one of {sorted(OPTIMIZERS)}, got {self.name!r}")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"lr of the outer optimizer must be > 0, got {self.lr}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"clip_norm must be > 0, or None for no clipping, got {self.clip_norm}"
            )
        if self.schedule not in ("constant", "linear", "cosine", "power"):
            raise ValueError(
                f"schedule must be 'constant', 'linear', 'cosine' or 'power', got {self.schedule!r}"
            )
        if not 0 < self.schedule_power <= 1:
            raise ValueError(f"schedule_power must be in (0, 1], got {self.schedule_power}")
        if self.schedule in ("linear", "cosine") and (self.schedule_steps or 0) < 1:
            raise ValueError(
                f"schedule_steps must be >= 1 with schedule={self.schedule!r}, "
                f"got {self.schedule_steps}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
        known = set(inspect.signature(OPTIMIZERS[self.name]).parameters) - {"params", "lr"}
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"options of {self.name} must be among {sorted(known)}, got {option!r}"
                )

    def lr_at(self, version: int) -> float:
        """The learning rate of the step from `version` to `version + 1`."""
        warmup = min(1.0, (version + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.lr * warmup
        if self.schedule == "power":
            return self.lr * warmup * (version + 1) ** -self.schedule_power
        progress = min(1.0, version / (self.schedule_steps or 1))
        decay = (
            1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )
        return self.lr * warmup * decay


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


class Contribution(NamedTuple):
    """What one lease adds to an outer step.

    Args:
        lease_id: the lease; each is applied once.
        version: of x that it was computed at.
        total: sum of task hypergradients, flat, shape (L,); of a two-point method (2 L,), followed
            by the sum at the previous x.
        num_tasks: how many tasks are in `total`.
        weight: multiplies `total` (staleness weighting).
        states: what the algorithm keeps of these tasks, by task index.
    """

    lease_id: int
    version: int
    total: Tensor
    num_tasks: int
    weight: float = 1.0
    states: Mapping[int, Tensor] = {}  # never changed


class StepResult(NamedTuple):
    """What one call of `OuterVariable.apply` did.

    `applied` and `repeated` are lease ids; `staleness` is in versions, one per applied lease;
    `hypergradient_norm` is that of the mean, before clipping.
    """

    version: int
    applied: tuple[int, ...]
    repeated: tuple[int, ...]
    staleness: tuple[int, ...]
    hypergradient_norm: float
    lr: float


class OuterState(NamedTuple):
    """`OuterVariable` as data.

    Args:
        outer: x.
        optimizer: the tensors of its optimiser.
        version: outer steps taken.
        applied_below, applied: the leases in x: all below a number, and some others.
        recursion: of a two-point method, w and the previous x, each of shape (L,).
        states: what the algorithm keeps of each task, by task index.
    """

    outer: Params
    optimizer: dict[str, Tensor]
    version: int
    applied_below: int
    applied: tuple[int, ...]
    recursion: Mapping[str, Tensor] = {}  # never changed
    states: Mapping[int, Tensor] = {}  # never changed


class StepRules(NamedTuple):
    """What of a step is not the optimiser's business.

    Args:
        project: applied to x after every step, see `Problem.project_outer`; None: nothing.
        recursive_weight: a_k of a two-point method by version, see `Algorithm.recursive_weight`;
            None: a one-point method.
    """

    project: Callable[[Params], Params] | None = None
    recursive_weight: Callable[[int], float | None] | None = None


class OuterVariable:
    """x, its optimiser state and its version; applies contributions, each lease once.

    Contributions are added in lease order whatever order they come in, so a synchronous run
    gives the same bytes with any number of workers.

    Args:
        outer: x at the start.
        optimizer: how it is stepped.
        rules: what else belongs to a step.
    """

    def __init__(
        self, outer: Params, optimizer: OuterOptimizer, rules: StepRules | None = None
    ) -> None:
        check_flattenable(outer, "outer")
        self._like = {name: leaf.detach() for name, leaf in outer.items()}
        self._flat = torch.nn.Parameter(flatten(self._like).clone())
        self._config = optimizer
        self._optimizer = OPTIMIZERS[optimizer.name](
            [self._flat], lr=optimizer.lr, **optimizer.options
        )
        self._rules = rules or StepRules()
        self._recursion: dict[str, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        """What the algorithm keeps of each task, by task index."""
        self.version = 0
        self._applied_below = 0
        self._applied: set[int] = set()

    @property
    def previous(self) -> Tensor | None:
        """x one version before, shape (L,), of a two-point method after its first step."""
        return self._recursion.get("previous")

    @property
    def flat(self) -> Tensor:
        """x as one vector of shape (L,): shared memory, not to be written to."""
        return self._flat.detach()

    @property
    def params(self) -> Params:
        """A copy of x by name."""
        return self.unflatten(self.flat.clone())

    def unflatten(self, flat: Tensor) -> Params:
        """Views of a vector like `flat` by name."""
        return unflatten(flat, self._like)

    def is_applied(self, lease_id: int) -> bool:
        """Whether this lease's contribution is in x."""
        return lease_id < self._applied_below or lease_id in self._applied

    def next_leases(self, num_leases: int) -> list[int]:
        """The smallest `num_leases` lease ids that are not in x."""
        unapplied = (n for n in itertools.count(self._applied_below) if n not in self._applied)
        return list(itertools.islice(unapplied, num_leases))

    def apply(self, contributions: Sequence[Contribution]) -> StepResult:
        """One outer step with the weighted sum of `contributions` over their number of tasks.

        A lease that was applied before is left out and reported as repeated; if nothing is left,
        or no task of what is left was finite, x stays as it is. The version goes up by one for
        every call that holds a new lease.

        Raises:
            ValueError: a contribution is not one of this variable, or not finite; nothing changed.
        """
        fresh: list[Contribution] = []
        repeated: list[int] = []
        weight = self._weight()
        expected = len(self._flat) * (1 if weight is None or weight == 1 else 2)
        for item in contributions:
            _check_number("lease_id", item.lease_id, item)
        for item in sorted(contributions, key=lambda item: item.lease_id):
            known = self.is_applied(item.lease_id)
            if known or (fresh and fresh[-1].lease_id == item.lease_id):
                repeated.append(item.lease_id)
                continue
            self._check(item, expected)
            fresh.append(item)
        lr = self._config.lr_at(self.version)
        norm = 0.0
        recursion = self._recursion
        num_tasks = sum(item.num_tasks for item in fresh)
        if num_tasks:
            mean = torch.zeros(expected, dtype=self._flat.dtype, device=self._flat.device)
            for item in fresh:
                mean.add_(item.total, alpha=item.weight)
            mean.div_(num_tasks)
            if weight is not None:
                recursion = self._recur(mean, weight)
                mean = recursion["w"].clone()
            norm = float(mean.norm())
            # Huge but finite numbers may have no finite norm.
            if not math.isfinite(norm) and not bool(mean.isfinite().all()):
                raise ValueError(
                    "contributions must have a finite mean, got NaN or Inf from leases "
                    f"{[item.lease_id for item in fresh]}"
                )
            if self._config.clip_norm is not None and norm > self._config.clip_norm:
                mean.mul_(self._config.clip_norm / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._flat.grad = mean
            self._optimizer.step()
            self._flat.grad = None
            self._recursion = recursion
            if self._rules.project is not None:
                with torch.no_grad():
                    self._flat.copy_(flatten(self._rules.project(self.params)))
        for item in fresh:
            self.states.update(item.states)
        staleness = tuple(self.version - item.version for item in fresh)
        if fresh:
            self.version += 1
            self._applied.update(item.lease_id for item in fresh)
            while self._applied_below in self._applied:
                self._applied.remove(self._applied_below)
                self._applied_below += 1
        return StepResult(
            self.version,
            tuple(item.lease_id for item in fresh),
            tuple(repeated),
            staleness,
            norm,
            lr,
        )

    def _weight(self) -> float | None:
        """a_k of the step to come; 1 as long as there is nothing to go back to."""
        if self._rules.recursive_weight is None:
            return None
        return self._rules.recursive_weight(self.version) if self._recursion else 1.0

    def _recur(self, mean: Tensor, weight: float) -> dict[str, Tensor]:
        """w_k = h(x_k) + (1 - a_k) (w_{k-1} - h(x_{k-1})), and x_k."""
        w, *at_previous = mean.split(len(self._flat))
        if at_previous:
            w = w + (1 - weight) * (self._recursion["w"] - at_previous[0])
        return {"w": w.clone(), "previous": self.flat.clone()}

    def _check(self, item: Contribution, expected: int) -> None:
        """Raise ValueError unless `item` can be added."""
        what = f"contribution of lease {item.lease_id}"
        if item.total.shape != (expected,) or not item.total.is_floating_point():
            raise ValueError(
                f"{what} must have shape ({expected},), got {tuple(item.total.shape)}"
                + ("" if item.total.is_floating_point() else f" of {item.total.dtype}")
            )
        _check_number("version", item.version, item, most=self.version)
        _check_number("num_tasks", item.num_tasks, item)
        if not 0 <= item.weight < math.inf:
            raise ValueError(f"{what} must have a finite weight >= 0, got {item.weight}")
        for index, state in item.states.items():
            _check_number("task index", index, item)
            like = self.states.get(index, state)
            if state.shape != like.shape or state.ndim != 1 or state.dtype != like.dtype:
                raise ValueError(
                    f"{what} must have a state of task {index} of shape {tuple(like.shape)} and "
                    f"{like.dtype}, got {tuple(state.shape)} and {state.dtype}"
                )

    def state(self) -> OuterState:
        """A copy of everything, for a checkpoint."""
        optimizer: dict[str, Tensor] = {}
        for name, value in self._optimizer.state_dict()["state"].get(0, {}).items():
            if value is not None:
                optimizer[name] = torch.as_tensor(value).detach().clone()
        return OuterState(
            self.params,
            optimizer,
            self.version,
            self._applied_below,
            tuple(sorted(self._applied)),
            {name: leaf.clone() for name, leaf in self._recursion.items()},
            {index: leaf.clone() for index, leaf in sorted(self.states.items())},
        )

    @classmethod
    def from_state(
        cls, state: OuterState, optimizer: OuterOptimizer, rules: StepRules | None = None
    ) -> OuterVariable:
        """The variable as it was when `state` was taken.

        Raises:
            ValueError: see `check_state`.
        """
        check_state(state, optimizer)
        variable = cls(state.outer, optimizer, rules)
        variable._recursion = {name: leaf.clone() for name, leaf in state.recursion.items()}
        variable.states = {index: leaf.clone() for index, leaf in state.states.items()}
        if state.optimizer:
            snapshot = variable._optimizer.state_dict()
            snapshot["state"] = {0: {name: leaf.clone() for name, leaf in state.optimizer.items()}}
            variable._optimizer.load_state_dict(snapshot)
        variable.version = state.version
        variable._applied_below = state.applied_below
        variable._applied = set(state.applied)
        return variable


def check_state(state: OuterState, optimizer: OuterOptimizer) -> None:
    """Raise ValueError unless the parts of `state` belong together and to the optimiser."""
    length = sum(leaf.numel() for leaf in state.outer.values())
    like = torch.nn.Parameter(torch.zeros(1))
    like.grad = torch.zeros(1)
    stepped = OPTIMIZERS[optimizer.name]([like], lr=optimizer.lr, **optimizer.options)
    stepped.step()
    known = {name: leaf for name, leaf in stepped.state[like].items() if leaf is not None}
    shapes = {
        name: () if torch.as_tensor(leaf).ndim == 0 else (length,) for name, leaf in known.items()
    }
    recursion = {"w": (length,), "previous": (length,)}
    for group, leaves, expected in (
        ("optimizer", state.optimizer, shapes),
        ("recursion", state.recursion, recursion),
    ):
        found = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        if found not in ({}, expected):
            raise ValueError(
                f"{group} of a state must have the shapes {expected}, or be empty, got {found}"
            )
    if min([state.version, state.applied_below, *state.applied]) < 0:
        raise ValueError("version and leases of a state must be >= 0")


def _check_number(name: str, value: Any, item: Contribution, most: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer from 0 to `most`."""
    if not isinstance(value, int) or value < 0 or (most is not None and value > most):
        rule = ">= 0" if most is None else f"between 0 and {most}"
        raise ValueError(
            f"contribution of lease {item.lease_id} must have a {name} {rule}, got {value}"
        )
