"""A policy of a user: it knows no name of `typing`."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.cluster import Policy, View


@dataclass(frozen=True)
class Patient(Policy):
    """Applies the results that have arrived once there are `size` of them."""

    size: int = 2

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        return tuple(view.arrived) if len(view.arrived) >= self.size else ()

    def may_issue(self, view: View) -> bool:
        return True
