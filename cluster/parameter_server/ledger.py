"""`Ledger`: which leases are in flight, which have arrived, and which come next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection

from metadist.cluster.parameter_server.policies import Policy, View
from metadist.outer import Numbers


class Ledger:
    """Pure bookkeeping: every lease is in one state: to come, in flight, arrived, or applied.

    Leases are handed out in the order of their numbers, lost ones first, but for those that a
    worker has made ready for. No more are handed out than the steps up to `until_version` need, and
    none out of order that those would not have: so nothing is in flight at the end, and nothing is
    left out below what is.

    Args:
        policy: Decides which leases may be handed out, and which are applied.
        leases_per_step: The leases in a meta-batch.
        version: The version of x now.
        applied_below, applied: The leases in x, see `OuterState`.
        until_version: The version at which the run ends.
    """

    def __init__(
        self,
        policy: Policy,
        leases_per_step: int,
        version: int,
        applied_below: int,
        applied: Collection[int],
        until_version: int,
    ) -> None:
        self._policy = policy
        self._leases_per_step = leases_per_step
        self._until_version = until_version
        self._issued = Numbers(applied_below, applied)
        self._lost: list[int] = []
        self.version = version
        self.in_flight: dict[int, int] = {}
        self.arrived: dict[int, int] = {}

    @property
    def _view(self) -> View:
        return View(self.version, self.in_flight, self.arrived, self._leases_per_step)

    def issue(self, wanted: int | None = None) -> int | None:
        """The next lease, in flight from now on; None if none may be handed out.

        Args:
            wanted: A lease that is handed out before its turn, if the others of the same step, or
                of an asynchronous run, come later anyway.
        """
        if self._num_left <= 0 or not self._policy.may_issue(self._view):
            return None
        if self._lost:
            lease_id = heapq.heappop(self._lost)
        else:
            lease_id = next(self._issued.missing())
            if wanted is not None and self._comes_anyway(wanted):
                lease_id = wanted
            self._issued.add(lease_id)
        self.in_flight[lease_id] = self.version
        return lease_id

    def _comes_anyway(self, lease_id: int) -> bool:
        """Whether a fresh lease is one of those of this step, or of an asynchronous run."""
        left = self._num_left
        if self._policy.is_synchronous:
            left = min(left, self._leases_per_step - self._num_out)
        turn = itertools.islice(self._issued.missing(), max(0, left))
        return lease_id in itertools.takewhile(lambda n: n <= lease_id, turn)

    def upcoming(self, most: int) -> dict[int, int]:
        """Lease id -> version of those that will be issued next, in order, if none is lost.

        Their versions are those of a synchronous policy; others do not know them.
        """
        leases = itertools.chain(sorted(self._lost), self._issued.missing())
        size, out = self._leases_per_step, self._num_out
        few = itertools.islice(leases, max(0, min(most, self._num_left)))
        return {n: self.version + (out + place) // size for place, n in enumerate(few)}

    @property
    def _num_out(self) -> int:
        return len(self.in_flight) + len(self.arrived)

    @property
    def _num_left(self) -> int:
        """How many more the steps up to the last one need."""
        num_steps = self._until_version - self.version
        return self._policy.leases_per_step(self._leases_per_step) * num_steps - self._num_out

    def arrive(self, lease_id: int) -> None:
        """Note that the result of a lease in flight has arrived."""
        self.arrived[lease_id] = self.in_flight.pop(lease_id)

    def lose(self, lease_id: int) -> None:
        """Note that a lease in flight, or its result, is lost: it comes first from now on."""
        self.in_flight.pop(lease_id, None)
        self.arrived.pop(lease_id, None)
        heapq.heappush(self._lost, lease_id)

    def next_step(self) -> dict[int, float]:
        """Lease id -> weight of the leases to apply now as one outer step; empty: none."""
        if self.version >= self._until_version:
            return {}
        leases = self._policy.leases_to_apply(self._view)
        if leases and self._policy.is_synchronous:
            versions = [self.arrived[lease_id] for lease_id in leases]
            if versions != [self.version] * self._leases_per_step:
                raise ValueError(
                    f"policy {self._policy} must apply {self._leases_per_step} leases of version "
                    f"{self.version} together, as it says is_synchronous, got {len(leases)} of the "
                    f"versions {sorted(set(versions))}: leave is_synchronous out"
                )
        return {
            lease_id: self._policy.weight(self.version - self.arrived[lease_id])
            for lease_id in leases
        }

    def apply(self, lease_ids: Collection[int], version: int) -> None:
        """Note that these leases are in x, which now has `version`."""
        for lease_id in lease_ids:
            del self.arrived[lease_id]
        self.version = version
