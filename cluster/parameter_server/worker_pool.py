"""`WorkerPool`: the workers of a parameter server, their leases and their losses."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray import ObjectRef

from metadist.cluster.actors.failure import WORKER, Failures
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.actors.pool import RAY, ActorPool, Call, Runtime, Slot
from metadist.outer import LeaseResult
from metadist.workload import Lease


class Done(NamedTuple):
    """A lease came back; `totals` refer to its sums by shard of x, which stay where they are."""

    result: LeaseResult
    totals: tuple[ObjectRef[Any], ...]


class Lost(NamedTuple):
    """A lease has to be computed again; `lost_data`: because x could not be read."""

    lease: Lease
    lost_data: bool


STUCK_FACTOR = 2.0
"""A lease stuck behind one that takes this many times the median goes to another worker."""


@dataclass(eq=False, kw_only=True)
class _Call(Call):
    """A lease that a worker has, with what it was sent."""

    lease: Lease
    outer: tuple[ObjectRef[Any], ...]
    kept: ObjectRef[Any] | None
    totals: tuple[ObjectRef[Any], ...]


@dataclass(eq=False)
class _Slot(Slot):
    """`lease_s` is the time of the last lease; inf: there was none."""

    lease_s: float = math.inf

    @property
    def lease(self) -> Lease | None:
        """What it computes."""
        return self.calls[0].lease if self.calls else None


class WorkerPool(ActorPool[_Slot]):
    """Workers that compute one lease at a time, and may have others waiting.

    Args:
        make_worker: Creates the actor of that number.
        num_workers: The largest number of workers.
        failures: When to try again, and when to end the run.
        min_workers: The number that a start waits for; the others join when there are resources.
        prefetch: Leases that a worker may have beside the one it computes.
        backup_factor: A lease that takes this many times the median goes to an idle worker too, and
            the first answer counts; None: never.
    """

    def __init__(
        self,
        make_worker: Callable[[int], Any],
        num_workers: int,
        failures: Failures,
        min_workers: int,
        prefetch: int = 0,
        backup_factor: float | None = None,
        runtime: Runtime = RAY,
    ) -> None:
        slots = [_Slot(f"worker-{number}") for number in range(num_workers)]
        super().__init__(make_worker, slots, 1, WORKER, failures, runtime)
        self._min_workers = min_workers
        self._prefetch = prefetch
        self._backup_factor = backup_factor
        self._setup: tuple[Any, ...] = ()
        self._events: list[Done | Lost] = []
        self._paused: list[tuple[float, Lost]] = []
        """Leases that are lost from that time on: until then nobody is to try them again."""
        self._lease_seconds: deque[float] = deque(maxlen=100)
        self._waiting_s = 0.0

    def start(self, timeout_s: float, *setup: Any) -> None:
        """Set all workers up with these arguments of `Worker.setup`.

        Returns when `min_workers` are ready.
        """
        self._setup = setup
        self._lease_seconds.clear()
        self.forget()
        self._start(timeout_s, self._min_workers)

    @property
    def has_room(self) -> bool:
        """Whether a worker should be given a lease now."""
        now = self._runtime.now()
        return any(self._room_at(slot) <= now for slot in self._slots)

    def submit(
        self,
        lease: Lease,
        outer: tuple[ObjectRef[Any], ...],
        kept: ObjectRef[Any] | None = None,
    ) -> None:
        """Give `lease` to the worker that has been idle longest, else to the next to be idle.

        Args:
            lease: The lease to compute; a worker must have room for it.
            outer: The shards of x.
            kept: What it needs beside x, see `ParameterServer.kept`.
        """
        now = self._runtime.now()
        with_room = [slot for slot in self._slots if self._room_at(slot) <= now]
        slot = min(with_room, key=lambda slot: (len(slot.calls), slot.since))
        if not slot.calls:
            self._rest(slot)
        compute = slot.actor.compute.options(num_returns=1 + len(outer))
        ref, *totals = compute.remote(lease, kept, *outer)
        call = _Call(ref, lease.in_words, lease=lease, outer=outer, kept=kept, totals=tuple(totals))
        slot.calls.append(call)

    def back_up(self) -> None:
        """Give leases that take long to idle workers too; the first answer counts."""
        while (overdue := self._next_backup()) is not None and overdue[0] <= self._runtime.now():
            call = overdue[1]
            self.submit(call.lease, call.outer, call.kept)

    def forget(self) -> None:
        """Let go of all leases; what is still being computed is thrown away."""
        for slot in self._slots:
            slot.num_losses = 0
            for call in slot.calls:
                # An actor call cannot be taken back: the worker stays busy until it has answered.
                call.is_redundant = True
        self._losses.clear()
        self._errors.clear()
        self._events, self._paused = [], []

    def wait(self, timeout_s: float | None = None) -> list[Done | Lost]:
        """What happened to leases; blocks until something did, or a worker has room again."""
        self._check_starved()
        self._wait(math.inf if timeout_s is None else timeout_s)
        now = self._runtime.now()
        due = [lost for at, lost in self._paused if at <= now]
        self._paused = [(at, lost) for at, lost in self._paused if at > now]
        events, self._events = [*self._events, *due], []
        return events

    def take_waiting_s(self) -> float:
        """Seconds x workers without computing, since this was last called."""
        for slot in self._slots:
            if slot.is_alive and not slot.calls:
                self._rest(slot)
        # Two leases may end between two looks. The time of the second is then counted as waiting
        # with the first, and taken off with the second, perhaps only after this call: so the sum
        # may be negative for a while.
        waiting = max(0.0, self._waiting_s)
        self._waiting_s -= waiting
        return waiting

    def _rest(self, slot: _Slot, computing_s: float = 0.0) -> None:
        """Count the time since `slot.since` as waiting, but for `computing_s` of it."""
        now = self._runtime.now()
        self._waiting_s += now - slot.since - computing_s
        slot.since = now

    def _room_at(self, slot: _Slot) -> float:
        """When the worker may have one more lease than now; inf while it may not."""
        if not slot.is_alive or len(slot.calls) > self._prefetch:
            return math.inf
        if not slot.calls:
            return max(slot.since, slot.resume_at)
        # The next lease is sent when half of the current one is over, by the last one's time: early
        # enough that the worker need not wait for it; late enough that x is fresh, and that few
        # leases are stuck behind a slow one, since Ray cannot take back what an actor was sent.
        return slot.since + 0.5 * slot.lease_s

    def _setup_of(self, slot: _Slot) -> tuple[Any, ...]:
        return self._setup

    def _ready(self, slot: _Slot, answer: WorkerInfo) -> WorkerInfo:
        slot.lease_s = math.inf
        return answer

    def _answered(self, slot: _Slot, call: _Call, answer: LeaseResult) -> None:
        computing_s = answer.sampling_s + answer.compute_s
        # It may have begun, and even ended, before the end of the one before it was noticed.
        slot.lease_s = max(computing_s, self._runtime.now() - slot.since)
        self._lease_seconds.append(slot.lease_s)
        self._rest(slot, computing_s)
        if call.is_redundant:
            return
        for other in self._others(call):
            other.is_redundant = True
        self._events.append(Done(answer._replace(worker=slot.name), call.totals))

    def _lost(self, slot: _Slot, calls: list[_Call], lost_data: bool, after_s: float = 0.0) -> None:
        at = self._runtime.now() + after_s
        for call in calls:
            if not call.is_redundant and not self._others(call):
                self._paused.append((at, Lost(call.lease, lost_data)))

    def _others(self, call: _Call) -> list[_Call]:
        """The other calls for the same lease that are still awaited."""
        return [
            other
            for slot in self._slots
            for other in slot.calls
            if other is not call and other.lease == call.lease and not other.is_redundant
        ]

    def _next_backup(self) -> tuple[float, _Call] | None:
        """(when, which) lease is the next to go to an idle worker too; None while none may.

        A lease that is being computed gets a backup after `backup_factor` times the median, if
        there is such a factor: its machine may be slow, but most are just long. One that is stuck
        behind it always gets one, since it has not begun and an idle worker would do it at once.
        """
        now = self._runtime.now()
        is_idle = any(not slot.calls and self._room_at(slot) <= now for slot in self._slots)
        if not is_idle or not self._lease_seconds:
            return None
        median_s = statistics.median(self._lease_seconds)
        slow: list[tuple[float, _Call]] = []
        for slot in self._slots:
            for place, call in enumerate(slot.calls):
                factor = STUCK_FACTOR if place else self._backup_factor
                if factor is not None and not call.is_redundant and not self._others(call):
                    slow.append((slot.since + factor * median_s, call))
        return min(slow, key=lambda pair: pair[0], default=None)

    def _more_checks(self) -> list[float]:
        now = self._runtime.now()
        times = [at for slot in self._slots if (at := self._room_at(slot)) > now]
        times += [at for at, _ in self._paused]
        backup = self._next_backup()
        return times if backup is None else [*times, backup[0]]
