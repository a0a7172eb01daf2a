"""`WorkerPool`: the workers of a parameter server, their leases and their losses."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray import ObjectRef, exceptions

from metadist.cluster.actors.errors import (
    ResourcesError,
    WorkerLostError,
    message,
)
from metadist.cluster.actors.failure import WORKER, Event, Failures, History, Raise, Retry
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.actors.pool import wait_for_any
from metadist.outer import LeaseResult
from metadist.workload import Lease

log = logging.getLogger("metadist.cluster")


class Done(NamedTuple):
    """A lease came back; `totals` refer to its sums by shard of x, which stay where they are."""

    result: LeaseResult
    totals: tuple[ObjectRef[Any], ...]


class Lost(NamedTuple):
    """A lease has to be computed again; `lost_data`: because x could not be read."""

    lease: Lease
    lost_data: bool


STUCK_FACTOR = 2.0
"""A lease that waits behind one that takes so many times as long as is usual goes to another."""


@dataclass(eq=False)
class _Call:
    """A lease that a worker has; `is_redundant`: its answer is not waited for any more."""

    lease: Lease
    outer: tuple[ObjectRef[Any], ...]
    kept: ObjectRef[Any] | None
    result: ObjectRef[Any]
    totals: tuple[ObjectRef[Any], ...]
    is_redundant: bool = False


@dataclass
class _Slot:
    """One worker's place, kept by whichever actor fills it.

    It computes the first of `calls` since `since`, or has had none since then. `setup` is there
    while it is being set up. `lease_s` is what its last lease took.
    """

    name: str
    actor: Any = None
    info: WorkerInfo | None = None
    since: float = 0.0
    alive: bool = False
    setup: ObjectRef[Any] | None = None
    calls: list[_Call] = field(default_factory=list)
    lease_s: float = math.inf
    num_losses: int = 0
    resume_at: float = 0.0

    @property
    def lease(self) -> Lease | None:
        """What it computes."""
        return self.calls[0].lease if self.calls else None


class WorkerPool:
    """Workers that compute one lease at a time, and may have others to go on with.

    A lost worker is replaced here and not restarted by Ray, which takes longer to say that it
    died, and would set it up again from arguments that may be gone.

    Args:
        make_worker: creates the actor of that number.
        num_workers: how many at the most.
        failures: see `Failures`.
        min_workers: how many make a start; the others join when there are resources for them.
        prefetch: leases that a worker may have beside the one it computes. It gets them late,
            when half the time of a lease is over: x is fresher then, and fewer are stuck behind
            one that takes long. (Ray cannot take back what an actor has been sent.)
        backup_factor: a lease that takes so many times as long as the median one goes to an idle
            worker too; None: never.
    """

    def __init__(
        self,
        make_worker: Callable[[int], Any],
        num_workers: int,
        failures: Failures,
        min_workers: int,
        prefetch: int = 0,
        backup_factor: float | None = None,
    ) -> None:
        self._make_worker = make_worker
        self._failures = failures
        self._min_workers = min_workers
        self._prefetch = prefetch
        self._backup_factor = backup_factor
        self._slots = [_Slot(f"worker-{number}") for number in range(num_workers)]
        self._setup: tuple[Any, ...] = ()
        self._lease_losses: Counter[int] = Counter()
        self._lease_seconds: deque[float] = deque(maxlen=100)
        self._num_lost = 0
        self._waiting_s = 0.0
        self._none_alive_since: float | None = None

    def start(self, timeout_s: float, *setup: Any) -> None:
        """Set all workers up with these arguments of `Worker.setup`, creating those that lack.

        Returns when `min_workers` are ready.
        """
        self._setup = setup
        self._lease_seconds.clear()
        self._num_lost, self._none_alive_since = 0, None
        self.forget()
        for slot in self._slots:
            # What is still being computed is of another workload.
            slot.alive, slot.setup, slot.resume_at = False, None, 0.0
            slot.calls, slot.lease_s = [], math.inf
        deadline = time.perf_counter() + timeout_s
        while self.num_alive < self._min_workers:
            self.wait(timeout_s=0.5)
            if time.perf_counter() > deadline:
                raise ResourcesError(
                    f"{self._min_workers} workers must be ready within start_timeout_s="
                    f"{timeout_s:g}, got {self.num_alive}: raise it, or see the logs of the nodes"
                )

    def stop(self) -> None:
        """Kill all workers."""
        for slot in self._slots:
            self._discard(slot)

    @property
    def infos(self) -> list[WorkerInfo]:
        """Where the workers run."""
        return [slot.info for slot in self._slots if slot.info is not None]

    @property
    def num_alive(self) -> int:
        """Workers that are not being replaced."""
        return sum(slot.alive for slot in self._slots)

    @property
    def has_room(self) -> bool:
        """Whether a worker should be given a lease now."""
        now = time.perf_counter()
        return any(self._room_at(slot) <= now for slot in self._slots)

    def submit(
        self,
        lease: Lease,
        outer: tuple[ObjectRef[Any], ...],
        kept: ObjectRef[Any] | None = None,
    ) -> None:
        """Give `lease` to the worker that has been idle longest, else to the next to be idle.

        Args:
            lease: what to compute; a worker must have room for it.
            outer: the shards of x.
            kept: what it needs beside x, see `ParameterServer.kept`.
        """
        now = time.perf_counter()
        open_ = [slot for slot in self._slots if self._room_at(slot) <= now]
        slot = min(open_, key=lambda slot: (len(slot.calls), slot.since))
        if not slot.calls:
            self._rest(slot)
        compute = slot.actor.compute.options(num_returns=1 + len(outer))
        result, *totals = compute.remote(lease, kept, *outer)
        slot.calls.append(_Call(lease, outer, kept, result, tuple(totals)))

    def back_up(self) -> None:
        """Give leases that take long to idle workers too; the first answer counts."""
        while (overdue := self._next_backup()) is not None and overdue[0] <= time.perf_counter():
            call = overdue[1]
            self.submit(call.lease, call.outer, call.kept)

    def forget(self) -> None:
        """Let go of all leases; what is still being computed is thrown away."""
        for slot in self._slots:
            slot.num_losses = 0
            for call in slot.calls:
                call.is_redundant = True
        self._lease_losses.clear()

    def wait(self, timeout_s: float | None = None) -> list[Done | Lost]:
        """What happened to leases; blocks until something did, or a worker has room again."""
        self._revive()
        watched: dict[ObjectRef[Any], tuple[_Slot, _Call | None]] = {}
        for slot in self._slots:
            if slot.setup is not None:
                watched[slot.setup] = slot, None
            watched |= {call.result: (slot, call) for call in slot.calls}
        limit_s = min(self._next_check_s(), math.inf if timeout_s is None else timeout_s)
        ready = set(wait_for_any(list(watched), limit_s))
        events: list[Done | Lost] = []
        for ref, (slot, call) in watched.items():
            if ref in ready:
                events += self._settle(slot, ref, call)
        return events + self._overdue()

    def take_waiting_s(self) -> float:
        """Seconds x workers without computing, since this was last called."""
        for slot in self._slots:
            if slot.alive and not slot.calls:
                self._rest(slot)
        # Two leases that end while nobody looks: with the first, computing the second is counted
        # as waiting. It is taken off when the second is seen, which may be later than here.
        waiting = max(0.0, self._waiting_s)
        self._waiting_s -= waiting
        return waiting

    def take_num_lost(self) -> int:
        """Workers lost since this was last called."""
        lost, self._num_lost = self._num_lost, 0
        return lost

    def _rest(self, slot: _Slot, computing_s: float = 0.0) -> None:
        """Count the time since `slot.since` as waiting, but for `computing_s` of it."""
        now = time.perf_counter()
        self._waiting_s += now - slot.since - computing_s
        slot.since = now

    def _room_at(self, slot: _Slot) -> float:
        """When the worker may have one more lease than now; inf while it may not."""
        if not slot.alive or len(slot.calls) > self._prefetch:
            return math.inf
        return slot.since + 0.5 * slot.lease_s if slot.calls else slot.since

    def _discard(self, slot: _Slot) -> None:
        """Kill the worker; it may be dead, or out of reach and still at work."""
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.alive, slot.setup = None, False, None
        slot.calls, slot.lease_s = [], math.inf

    def _settle(self, slot: _Slot, ref: ObjectRef[Any], call: _Call | None) -> list[Done | Lost]:
        """What became of a call that has ended: a lease, or setup if there is no `call`."""
        if call is not None and call not in slot.calls:
            return []  # lost with the worker, a moment ago
        try:
            answer = ray.get(ref)
        except exceptions.RayError as error:
            return self._failed(slot, call, error)
        if call is None:
            slot.alive, slot.setup, slot.info = True, None, answer
            slot.since = time.perf_counter()
            log.info("%s is ready: %s on %s", *answer[:3])
            return []
        slot.calls.remove(call)
        computing_s = answer.sampling_s + answer.compute_s
        # It may have begun, and even ended, before this was noticed of the one before it.
        slot.lease_s = max(computing_s, time.perf_counter() - slot.since)
        self._lease_seconds.append(slot.lease_s)
        self._rest(slot, computing_s)
        self._lease_losses.pop(answer.lease_id, None)
        slot.num_losses = 0
        if call.is_redundant:
            return []
        for other in self._others(call):
            other.is_redundant = True
        return [Done(answer._replace(worker=slot.name), call.totals)]

    def _others(self, call: _Call) -> list[_Call]:
        """Those of the same lease, which nobody has answered yet."""
        return [
            other
            for slot in self._slots
            for other in slot.calls
            if other is not call and other.lease == call.lease and not other.is_redundant
        ]

    def _next_backup(self) -> tuple[float, _Call] | None:
        """(when, which) lease is the next to go to an idle worker too; None while none may."""
        if not self._lease_seconds or all(slot.calls for slot in self._slots if slot.alive):
            return None
        usual_s = statistics.median(self._lease_seconds)
        slow = [
            (slot.since + factor * usual_s, call)
            for slot in self._slots
            for place, call in enumerate(slot.calls)
            # What is stuck behind a slow one has not begun.
            if (factor := STUCK_FACTOR if place else self._backup_factor) is not None
            and not call.is_redundant
            and not self._others(call)
        ]
        return min(slow, key=lambda pair: pair[0], default=None)

    def _failed(
        self, slot: _Slot, call: _Call | None, error: exceptions.RayError
    ) -> list[Done | Lost]:
        """The leases that are lost with a call; raises if it was no loss but a bug."""
        # Of several the first was being computed: the others had not begun.
        if slot.calls and not isinstance(error, exceptions.RayTaskError):
            call = slot.calls[0]
        slot.num_losses += 1
        num_lease_losses = 0
        if call is not None and not call.is_redundant:
            self._lease_losses[call.lease.id] += 1
            num_lease_losses = self._lease_losses[call.lease.id]
        work = None if call is None else f"lease {call.lease.id} (tasks {_tasks(call.lease)})"
        decision = self._failures.decide(
            Event(WORKER, slot.name, work, error), History(slot.num_losses, num_lease_losses)
        )
        if isinstance(decision, Raise):
            raise decision.error
        slot.resume_at = time.perf_counter() + decision.after_s
        answered = isinstance(decision, Retry)
        if answered:
            lost = [] if call is None else [call]
            slot.calls = [other for other in slot.calls if other is not call]
            slot.setup, slot.since = None, time.perf_counter()
        else:
            lost = slot.calls
            self._num_lost += 1
            log.info("%s was lost: %s", slot.name, message(error).partition("\n")[0])
            self._discard(slot)
        return [
            Lost(call.lease, lost_data=answered)
            for call in lost
            if not call.is_redundant and not self._others(call)
        ]

    def _overdue(self) -> list[Done | Lost]:
        """The leases that took longer than `failures.timeout_s`; their workers are killed."""
        if self._failures.timeout_s is None:
            return []
        latest = time.perf_counter() - self._failures.timeout_s
        events: list[Done | Lost] = []
        for slot in self._slots:
            if slot.calls and slot.since <= latest:
                error = exceptions.GetTimeoutError(
                    f"a lease took over timeout_s={self._failures.timeout_s:g}"
                )
                events += self._failed(slot, slot.calls[0], error)
        return events

    def _revive(self) -> None:
        """Set lost workers up again after their pause, in a new actor where the old one is gone."""
        now = time.perf_counter()
        for number, slot in enumerate(self._slots):
            if slot.alive or slot.setup is not None or slot.resume_at > now:
                continue
            if slot.actor is None:
                slot.actor = self._make_worker(number)
            slot.setup = slot.actor.setup.remote(*self._setup)
        if self.num_alive:
            self._none_alive_since = None
        elif self._none_alive_since is None:
            self._none_alive_since = now
        elif now - self._none_alive_since > self._failures.all_lost_s:
            raise WorkerLostError(
                f"no worker has been alive for {self._failures.all_lost_s:g} s: all nodes with the "
                "resources of a worker may be gone"
            )

    def _next_check_s(self) -> float:
        """Seconds until something must be looked at though no call has ended."""
        now = time.perf_counter()
        times = [slot.resume_at for slot in self._slots if not slot.alive and slot.setup is None]
        times += [at for slot in self._slots if (at := self._room_at(slot)) > now]
        if self._failures.timeout_s is not None:
            times += [slot.since + self._failures.timeout_s for slot in self._slots if slot.calls]
        if (backup := self._next_backup()) is not None:
            times.append(backup[0])
        if not self.num_alive:
            times.append(now + 1.0)
        return max(0.0, min(times, default=math.inf) - now)


def _tasks(lease: Lease) -> str:
    return ", ".join(map(str, lease.indices))
