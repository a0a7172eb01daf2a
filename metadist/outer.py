"""The outer variable x and its optimiser: the pure core of the parameter server."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
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
        schedule: of the learning rate over `schedule_steps` outer steps: "constant", or falling
            to 0 as "linear" or "cosine".
        schedule_steps: the length of the schedule; needed unless it is "constant".
        warmup_steps: outer steps of linear growth of the rate from lr / warmup_steps.
    """

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = "adam"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_steps: int | None = None
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
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"schedule must be 'constant', 'linear' or 'cosine', got {self.schedule!r}"
            )
        if self.schedule != "constant" and (self.schedule_steps or 0) < 1:
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
        total: sum of task hypergradients, flat, shape (L,).
        num_tasks: how many tasks are in `total`.
        weight: multiplies `total` (staleness weighting).
    """

    lease_id: int
    version: int
    total: Tensor
    num_tasks: int
    weight: float = 1.0


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
    """`OuterVariable` as data: x, the optimiser's tensors, the version, which leases are in."""

    outer: Params
    optimizer: dict[str, Tensor]
    version: int
    applied_below: int
    applied: tuple[int, ...]


class OuterVariable:
    """x, its optimiser state and its version; applies contributions, each lease once.

    Contributions are added in lease order whatever order they come in, so a synchronous run
    gives the same bytes with any number of workers.
    """

    def __init__(self, outer: Params, optimizer: OuterOptimizer) -> None:
        check_flattenable(outer, "outer")
        self._like = {name: leaf.detach() for name, leaf in outer.items()}
        self._flat = torch.nn.Parameter(flatten(self._like).clone())
        self._config = optimizer
        self._optimizer = OPTIMIZERS[optimizer.name](
            [self._flat], lr=optimizer.lr, **optimizer.options
        )
        self.version = 0
        self._applied_below = 0
        self._applied: set[int] = set()

    @property
    def flat(self) -> Tensor:
        """x as one vector of shape (L,): shared memory, not to be written to."""
        return self._flat.detach()

    @property
    def params(self) -> Params:
        """A copy of x by name."""
        return unflatten(self.flat.clone(), self._like)

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
        """
        fresh: list[Contribution] = []
        repeated: list[int] = []
        for item in sorted(contributions, key=lambda item: item.lease_id):
            known = self.is_applied(item.lease_id)
            if known or (fresh and fresh[-1].lease_id == item.lease_id):
                repeated.append(item.lease_id)
                continue
            if item.total.shape != self._flat.shape:
                raise ValueError(
                    f"contribution of lease {item.lease_id} must have shape "
                    f"{tuple(self._flat.shape)}, got {tuple(item.total.shape)}"
                )
            if not 0 <= item.version <= self.version:
                raise ValueError(
                    f"contribution of lease {item.lease_id} must have a version between 0 and "
                    f"{self.version}, got {item.version}"
                )
            fresh.append(item)
        lr = self._config.lr_at(self.version)
        norm = 0.0
        num_tasks = sum(item.num_tasks for item in fresh)
        if num_tasks:
            mean = torch.zeros_like(self._flat)
            for item in fresh:
                mean.add_(item.total, alpha=item.weight)
            mean.div_(num_tasks)
            norm = float(mean.norm())
            if self._config.clip_norm is not None and norm > self._config.clip_norm:
                mean.mul_(self._config.clip_norm / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._flat.grad = mean
            self._optimizer.step()
            self._flat.grad = None
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

    def state(self) -> OuterState:
        """A copy of everything, for a checkpoint."""
        optimizer: dict[str, Tensor] = {}
        for name, value in self._optimizer.state_dict()["state"].get(0, {}).items():
            if value is not None:
                optimizer[name] = torch.as_tensor(value).detach().clone()
        return OuterState(
            self.params, optimizer, self.version, self._applied_below, tuple(sorted(self._applied))
        )

    @classmethod
    def from_state(cls, state: OuterState, optimizer: OuterOptimizer) -> OuterVariable:
        """The variable as it was when `state` was taken."""
        variable = cls(state.outer, optimizer)
        if state.optimizer:
            snapshot = variable._optimizer.state_dict()
            snapshot["state"] = {0: {name: leaf.clone() for name, leaf in state.optimizer.items()}}
            variable._optimizer.load_state_dict(snapshot)
        variable.version = state.version
        variable._applied_below = state.applied_below
        variable._applied = set(state.applied)
        return variable
