"""Policies: when results become an outer step, and when another lease may be handed out.

Pure decisions on a `View` of the schedule; no Ray, no clock, no hidden state. An outer step is
one version of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

PolicyName = Literal["bsp", "ssp", "asp", "buffered"]
WeightName = Literal["constant", "inverse", "polynomial"]


class View(NamedTuple):
    """What a policy decides on.

    Args:
        version: of x now.
        in_flight: lease id -> version, of the leases that workers compute.
        arrived: lease id -> version, of the results that wait, in order of arrival.
        leases_per_step: leases in a meta-batch.
    """

    version: int
    in_flight: Mapping[int, int]
    arrived: Mapping[int, int]
    leases_per_step: int


@dataclass(frozen=True)
class StalenessWeight:
    """How much a result counts that was computed `tau` versions ago.

    Args:
        name: "constant" 1, "inverse" 1 / (1 + tau), "polynomial" (1 + tau) ** -exponent.
        exponent: of "polynomial" only, > 0, default 0.5.
    """

    name: WeightName = "constant"
    exponent: float | None = None

    def __post_init__(self) -> None:
        names = ("constant", "inverse", "polynomial")
        if self.name not in names:
            raise ValueError(f"staleness_weight must be one of {names}, got {self.name!r}")
        if self.exponent is not None and self.name != "polynomial":
            raise ValueError(
                "staleness_exponent must be left out unless staleness_weight='polynomial', "
                f"got {self.exponent} with {self.name!r}"
            )
        if self.exponent is not None and not 0 < self.exponent < float("inf"):
            raise ValueError(f"staleness_exponent must be > 0 and finite, got {self.exponent}")

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
    """Asynchronous: every lease that arrives is an outer step of its own, at once."""

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
    """

    staleness: int
    staleness_weight: StalenessWeight = CONSTANT

    def __post_init__(self) -> None:
        if self.staleness < 0:
            raise ValueError(f"staleness must be >= 0 with policy='ssp', got {self.staleness}")

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
    """Every `size` results that arrive are one outer step; workers never wait."""

    size: int
    staleness_weight: StalenessWeight = CONSTANT

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"buffer_size must be >= 1 with policy='buffered', got {self.size}")

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


def make_policy(
    name: str | Policy,
    staleness: int | None = None,
    buffer_size: int | None = None,
    staleness_weight: str = "constant",
    staleness_exponent: float | None = None,
) -> Policy:
    """The policy of that name; ValueError for an option it lacks or does not use.

    Args:
        name: "bsp", "ssp", "asp" or "buffered"; or a Policy, which is returned as it is.
        staleness: versions a result may be old, >= 0; of "ssp" only, and needed there.
        buffer_size: results per outer step, >= 1; of "buffered" only, and needed there.
        staleness_weight: "constant", "inverse" or "polynomial"; of all but "bsp".
        staleness_exponent: > 0, default 0.5; of "polynomial" only.
    """
    if isinstance(name, Policy):
        given = (staleness, buffer_size, staleness_exponent)
        if any(value is not None for value in given) or staleness_weight != "constant":
            raise ValueError(
                "staleness, buffer_size, staleness_weight and staleness_exponent must be set in "
                f"the policy object itself, got policy={name} and such an option beside it"
            )
        return name
    if name not in ("bsp", "ssp", "asp", "buffered"):
        raise ValueError(
            f"policy must be 'bsp', 'ssp', 'asp' or 'buffered' (or a Policy), got {name!r}"
        )
    _check_used(name, "staleness", staleness, "ssp")
    _check_used(name, "buffer_size", buffer_size, "buffered")
    # Made before the check of bsp, so that a wrong value is reported as such.
    weight = StalenessWeight(staleness_weight, staleness_exponent)  # type: ignore[arg-type]
    if name == "bsp":
        if weight != CONSTANT:
            raise ValueError(
                "staleness_weight must be 'constant' with policy='bsp', where nothing is stale, "
                f"got {staleness_weight!r}: leave it out, or use 'ssp', 'asp' or 'buffered'"
            )
        return BSP()
    if name == "ssp":
        return SSP(_needed(name, "staleness", staleness), weight)
    if name == "buffered":
        return Buffered(_needed(name, "buffer_size", buffer_size), weight)
    return ASP(weight)


def _check_used(policy: str, option: str, value: int | None, user: str) -> None:
    if value is not None and policy != user:
        raise ValueError(
            f"{option} must be left out with policy={policy!r}, got {value}: "
            f"only policy={user!r} uses it"
        )


def _needed(policy: str, option: str, value: int | None) -> int:
    if value is None:
        raise ValueError(f"{option} must be given with policy={policy!r}, got None")
    return value
