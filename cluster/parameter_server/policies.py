"""Policies: when results become an outer step, and when another lease may be handed out.

Pure decisions on a `View` of the schedule; no Ray, no clock, no hidden state. An outer step is
one version of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from metadist.checks.values import check

WeightName = Literal["constant", "inverse", "polynomial"]


class View(NamedTuple):
    """What a policy decides on.

    Args:
        version: The current version of x.
        in_flight: The leases that workers compute: lease id -> version.
        arrived: The results that wait, in order of arrival: lease id -> version.
        leases_per_step: The number of leases in a meta-batch.
    """

    version: int
    in_flight: Mapping[int, int]
    arrived: Mapping[int, int]
    leases_per_step: int


@dataclass(frozen=True)
class StalenessWeight:
    """How much a result counts that was computed `tau` versions ago.

    Args:
        name: The factor: "constant" is 1, "inverse" is 1 / (1 + tau), "polynomial" is
            (1 + tau) ** -exponent.
        exponent: The exponent of "polynomial", > 0; None: 0.5.
    """

    name: WeightName = "constant"
    exponent: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(WeightName):
            raise ValueError(
                f"staleness_weight.name must be one of {get_args(WeightName)}, got {self.name!r}"
            )
        if self.exponent is not None and self.name != "polynomial":
            raise ValueError(
                "staleness_weight.exponent must be left out unless staleness_weight.name is "
                f"'polynomial', got {self.exponent} with {self.name!r}"
            )
        if self.exponent is not None:
            check("staleness_weight.exponent", self.exponent, gt=0)

    def __call__(self, tau: int) -> float:
        """The factor, in (0, 1]."""
        if self.name == "constant":
            return 1.0
        if self.name == "inverse":
            return 1.0 / (1.0 + tau)
        return float((1.0 + tau) ** -(0.5 if self.exponent is None else self.exponent))

    def __str__(self) -> str:
        if self.name != "polynomial":
            return self.name
        return f"polynomial(exponent={0.5 if self.exponent is None else self.exponent})"


CONSTANT = StalenessWeight()


class Policy(ABC):
    """When to step and when to hand out; subclass it as a frozen dataclass."""

    # Without annotation: jsonargparse would evaluate it in the module of a subclass, which need not
    # know ClassVar, and would lose the types of all fields there.
    is_synchronous = False
    """Whether every step applies one whole meta-batch, all of it computed at the current x.

    Kept states and two-point methods need that.
    """

    @abstractmethod
    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        """The arrived leases that make the next outer step, now; empty: wait for more."""

    @abstractmethod
    def may_issue(self, view: View) -> bool:
        """Whether one more lease may be handed out now."""

    def leases_per_step(self, meta_batch: int) -> int:
        """The fewest leases an outer step needs, `meta_batch` being those of a meta-batch."""
        return 1

    def weight(self, staleness: int) -> float:
        """The factor of a result that is `staleness` versions old."""
        return 1.0


@dataclass(frozen=True)
class BSP(Policy):
    """Bulk synchronous: a meta-batch at one version, applied together when all have arrived."""

    is_synchronous = True

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        return tuple(view.arrived) if len(view.arrived) == view.leases_per_step else ()

    def may_issue(self, view: View) -> bool:
        return len(view.in_flight) + len(view.arrived) < view.leases_per_step

    def leases_per_step(self, meta_batch: int) -> int:
        return meta_batch

    def __str__(self) -> str:
        return "bsp"


@dataclass(frozen=True)
class ASP(Policy):
    """Asynchronous: every lease that arrives is an outer step of its own, at once.

    Args:
        staleness_weight: How much a stale result counts.
    """

    staleness_weight: StalenessWeight = CONSTANT

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        return tuple(view.arrived)[:1]

    def may_issue(self, view: View) -> bool:
        return True

    def weight(self, staleness: int) -> float:
        return self.staleness_weight(staleness)

    def __str__(self) -> str:
        return f"asp(staleness_weight={self.staleness_weight})"


@dataclass(frozen=True)
class SSP(Policy):
    """Stale synchronous: like ASP, but nothing older than `staleness` versions is ever applied.

    A result is held back while a step would make a lease in flight too old; workers wait
    meanwhile. When the slow lease has come, the results that would not survive another version
    are applied together, as one step. So `staleness=0` is a barrier over the workers.
    Never stuck: results are held only while a lease is in flight, which arrives or is lost.

    Args:
        staleness: The number of versions a result may be old, >= 0.
        staleness_weight: How much a stale result counts.
    """

    staleness: int
    staleness_weight: StalenessWeight = CONSTANT

    def __post_init__(self) -> None:
        check("staleness of SSP", self.staleness, is_integer=True, ge=0)

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        oldest_allowed = view.version + 1 - self.staleness
        if not view.arrived or any(v < oldest_allowed for v in view.in_flight.values()):
            return ()
        last_chance = [n for n, version in view.arrived.items() if version < oldest_allowed]
        # min keeps the order of arrival among equally old ones.
        return tuple(last_chance) or (min(view.arrived, key=view.arrived.__getitem__),)

    def may_issue(self, view: View) -> bool:
        return not view.arrived

    def weight(self, staleness: int) -> float:
        return self.staleness_weight(staleness)

    def __str__(self) -> str:
        return f"ssp(staleness={self.staleness}, staleness_weight={self.staleness_weight})"


@dataclass(frozen=True)
class Buffered(Policy):
    """Every `size` results that arrive are one outer step; workers never wait.

    Args:
        size: The number of results in an outer step, >= 1.
        staleness_weight: How much a stale result counts.
    """

    size: int
    staleness_weight: StalenessWeight = CONSTANT

    def __post_init__(self) -> None:
        check("size of Buffered", self.size, is_integer=True, ge=1)

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        return tuple(view.arrived)[: self.size] if len(view.arrived) >= self.size else ()

    def may_issue(self, view: View) -> bool:
        return True

    def leases_per_step(self, meta_batch: int) -> int:
        return self.size

    def weight(self, staleness: int) -> float:
        return self.staleness_weight(staleness)

    def __str__(self) -> str:
        return f"buffered(size={self.size}, staleness_weight={self.staleness_weight})"
