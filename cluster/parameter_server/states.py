"""`HeldStates`: the driver's side of kept states that stay on the workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from ray import ObjectRef
from torch import Tensor

from metadist.cluster.actors.buffers import Array, on_disk, to_array
from metadist.cluster.parameter_server.held import Homes
from metadist.cluster.parameter_server.worker_pool import Fetch, Fetched, WorkerPool
from metadist.workload import Lease, Workload


class HeldStates:
    """Sends leases to the workers that hold the states of their tasks, and keeps snapshots.

    A worker that does not hold them gets those of the last snapshot and computes the leases since
    again, with x as it was; their sums are in x, and are thrown away. So the versions of x since
    that snapshot are kept, by reference, where the server has put them.

    Args:
        workload: The workload that leases are cut from.
        pool: Started workers.
        version: The version of x at the start.
        states: The states at that version.
    """

    def __init__(
        self, workload: Workload, pool: WorkerPool, version: int, states: Mapping[int, Tensor]
    ) -> None:
        self._workload = workload
        self._pool = pool
        self._homes: Homes[Any] = Homes(workload.leases_per_step)
        self._snapshots = {version: dict(states)}
        self._snapshot = self._version = version
        self._outers: dict[int, tuple[ObjectRef[Any], ...]] = {}
        self._wanted = version
        self._gathered: dict[int, Tensor] = {}
        self._asked: dict[int, Any] = {}
        self._to_ask: list[int] = []
        self._reported: list[str] = []

    def reached(self, version: int, outer: tuple[ObjectRef[Any], ...]) -> None:
        """Note that x has that version; that of an earlier snapshot, if the server was lost."""
        if version < self._version:
            self._homes.forget_versions()
            self._outers.clear()
            self.keep(version)
        self._version = version
        self._outers[version] = outer

    def send(self, lease: Lease, is_last: bool = False) -> None:
        """Have the worker that holds the states compute `lease`; some must be alive.

        Args:
            lease: The lease.
            is_last: Whether no step comes after that of the lease.
        """
        number = self._number(lease.id)
        place = self._homes.place(number, self._pool.actors, lease.version)
        before: range = range(0)
        kept: Any = None
        if place.source is not None:
            give = place.source.give.options(num_returns=1)
            kept = give.remote(lease.indices, lease.version, (), None, lets_go=True)
        elif not place.is_held:
            before, kept = self._from_snapshot(lease.indices, lease.version)
        leases, pulled = self._again(number, before)
        outer = self._outers[lease.version]
        following = self._following(number, lease, is_last)
        arguments = leases, kept, following, *pulled, *outer
        self._pool.submit_held(place.worker, lease, len(outer), *arguments)

    def _following(self, number: int, lease: Lease, is_last: bool) -> Lease | None:
        """What the worker of that lease will probably compute after it."""
        homes = self._homes.workers
        mine = sorted(other for other in homes if homes[other] is homes[number])
        later = [other for other in mine if other > number]
        if later:
            return self._workload.lease(lease.id - number + later[0], lease.version)
        if is_last:
            return None
        size = self._workload.leases_per_step
        return self._workload.lease(lease.id - number + size + mine[0], lease.version + 1)

    def done(self, lease_id: int, version: int) -> None:
        """Note that a worker has computed the lease at that version."""
        self._homes.confirm(self._number(lease_id), version + 1)

    def has(self, version: int) -> bool:
        """Whether the driver has the states at that version."""
        return version in self._snapshots

    def at(self, version: int) -> dict[int, Tensor]:
        """The states at that version, on the driver's disk."""
        return self._snapshots[version]

    def gather(self, version: int) -> None:
        """Begin to fetch the states at the present version of x."""
        self._wanted = version
        self._gathered, self._asked = {}, {}
        self._to_ask = list(range(self._workload.leases_per_step))

    def ask(self, in_flight: Collection[int]) -> None:
        """Ask each worker that owes nothing for the states of one lease.

        Args:
            in_flight: The ids of the leases in flight: where a worker is only about to get the
                states with one, that is waited for.
        """
        waiting = {self._number(lease_id) for lease_id in in_flight}
        for number in list(self._to_ask):
            if number in waiting and not self._homes.is_certain(number):
                continue
            if not self._pool.actors:
                return
            place = self._homes.place(number, self._pool.actors, self._wanted, moves=False)
            if place.worker in self._asked.values():
                continue
            fetch = Fetch(self._indices(number), self._wanted)
            before, kept = range(0), None
            if not place.is_held:
                before, kept = self._from_snapshot(fetch.indices, self._wanted)
            leases, pulled = self._again(number, before)
            self._pool.fetch(place.worker, fetch, leases, kept, *pulled)
            self._to_ask.remove(number)
            self._asked[number] = place.worker

    def take(self, fetched: Fetched) -> None:
        """Write what a worker has given to the driver's disk."""
        number, version = self._answered(fetched.fetch), fetched.fetch.version
        if version != self._wanted:
            return  # of a snapshot that was given up
        for index, array in fetched.states.items():
            self._gathered[index] = on_disk(array)
        if not self._homes.is_certain(number):
            self._homes.confirm(number, version)
        if not self._to_ask and not self._asked:
            self._snapshots[version] = dict(sorted(self._gathered.items()))
            self._gathered = {}

    def lost(self, fetch: Fetch) -> None:
        """Note that a worker will not give that: it is asked for again."""
        self._to_ask.append(self._answered(fetch))

    def keep(self, version: int) -> None:
        """Begin again from the snapshot of that version, which is whole, and forget older ones."""
        self._snapshots = {version: self._snapshots[version]}
        self._snapshot = version
        for old in [old for old in self._outers if old < version]:
            del self._outers[old]

    def take_news(self) -> list[str] | None:
        """Each worker with the tasks whose states it holds; None: as last said."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for number, worker in sorted(self._homes.workers.items()):
            name = self._pool.name_of(worker)
            if name is not None:
                found[name] += self._indices(number)
        news = [f"{name}: {', '.join(map(str, tasks))}" for name, tasks in sorted(found.items())]
        if news == self._reported:
            return None
        self._reported = news
        return news

    def _answered(self, fetch: Fetch) -> int:
        number = self._number(fetch.indices[0] // self._workload.tasks_per_lease)
        self._asked.pop(number, None)
        return number

    def _number(self, lease_id: int) -> int:
        return lease_id % self._workload.leases_per_step

    def _indices(self, number: int) -> tuple[int, ...]:
        return self._workload.lease(number, 0).indices

    def _from_snapshot(
        self, indices: tuple[int, ...], version: int
    ) -> tuple[range, dict[int, Array]]:
        """(the versions whose leases are to be computed again, the states to begin with)."""
        states = self._snapshots[self._snapshot]
        kept = {index: to_array(states[index]) for index in indices if index in states}
        return range(self._snapshot, version), kept

    def _again(
        self, number: int, versions: range
    ) -> tuple[tuple[Lease, ...], list[ObjectRef[Any]]]:
        """The leases of that number at these versions, as they were, and x at each."""
        work = self._workload
        leases = [work.lease(at * work.leases_per_step + number, at) for at in versions]
        return tuple(leases), [part for at in versions for part in self._outers[at]]
