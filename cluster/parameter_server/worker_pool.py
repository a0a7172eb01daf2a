"""`WorkerPool`: the workers of a parameter server, their leases and their losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

from ray import ObjectRef

from metadist.cluster.actors.buffers import Array
from metadist.cluster.actors.connection import calls_kept_whole
from metadist.cluster.actors.failure import WORKER, Failures
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.actors.pool import RAY, ActorPool, Call, Runtime, Slot
from metadist.executor import chunk_in_words
from metadist.outer import LeaseResult
from metadist.workload import Lease


class Done(NamedTuple):
    """A lease came back; `totals` refer to its sums by shard of x, which stay where they are."""

    result: LeaseResult
    totals: tuple[ObjectRef[Any], ...]


class Lost(NamedTuple):
    """A lease has to be computed again; `lost_data`: because x could not be read."""

    lease: Lease | Fetch
    lost_data: bool


class Fetch(NamedTuple):
    """The states of these tasks at that version of x are to be fetched from a worker."""

    indices: tuple[int, ...]
    version: int

    @property
    def in_words(self) -> str:
        """What it is, for messages."""
        return f"the states of tasks {', '.join(map(str, self.indices))}"


class Fetched(NamedTuple):
    """They came: the states by task, where there are any, in the object store."""

    fetch: Fetch
    states: dict[int, Array]


STUCK_FACTOR = 2.0
"""A lease stuck behind one that takes this many times the median goes to another worker."""


Work = Lease | range | Fetch
"""A lease of a training, the indices of tasks of an evaluation, or states to fetch."""


@dataclass(eq=False, kw_only=True)
class _Call(Call):
    """Some work that a worker has, with what else it was sent; None: nobody else can do it."""

    item: Work
    arguments: tuple[Any, ...] | None
    totals: tuple[ObjectRef[Any], ...] = ()


class _Paused(NamedTuple):
    """Work that is lost from the time `at` on: until then nobody is to try it again."""

    at: float
    item: Work
    lost_data: bool


@dataclass(eq=False)
class _Slot(Slot):
    """`lease_s` is the time of the last lease; inf: there was none.

    `ahead` is the lease whose tasks it samples while it computes another one; None: none.
    """

    lease_s: float = math.inf
    ahead: int | None = None

    @property
    def item(self) -> Work | None:
        """What it computes."""
        return self.calls[0].item if self.calls else None


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
        runtime: The clock and the calls of Ray.
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
        self._events: list[Done | Fetched] = []
        self._paused: list[_Paused] = []
        self._judged: dict[range, list[dict[str, float]]] = {}
        self._waiting_s = 0.0
        self._never_ahead: set[int] = set()
        """Leases that a worker has sampled ahead, and died: their tasks may be why."""

    def start(self, timeout_s: float, *setup: Any) -> None:
        """Set all workers up with these arguments of `Worker.setup`.

        Returns when `min_workers` are ready.
        """
        self._setup = setup
        self._never_ahead.clear()
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
        upcoming: Mapping[int, Lease] = MappingProxyType({}),
    ) -> None:
        """Have a worker compute `lease`.

        Args:
            lease: The lease to compute; a worker must have room for it.
            outer: The shards of x.
            kept: What it needs beside x, see `ParameterServer.kept`.
            upcoming: The leases that will come next, in order: the worker samples the one that it
                may well be given.
        """
        self._send(lease, kept, *outer, upcoming=upcoming)

    @property
    def ahead(self) -> int | None:
        """The lease whose tasks the worker has that would be given the next one; None: none."""
        now = self._runtime.now()
        with_room = [slot for slot in self._slots if self._room_at(slot) <= now]
        return min(with_room, key=_next_to_work).ahead if with_room else None

    @property
    def actors(self) -> list[Any]:
        """The workers that may be given work, however much they have."""
        return [slot.actor for slot in self._slots if slot.is_alive and not slot.is_heir_ready]

    def name_of(self, actor: Any) -> str | None:
        """The name of a worker; None if it is gone."""
        return next((slot.name for slot in self._slots if slot.actor is actor), None)

    def submit_held(self, actor: Any, lease: Lease, num_shards: int, *arguments: Any) -> None:
        """Have this one of `actors` compute `lease`, whose states it holds.

        Args:
            actor: The worker.
            lease: The lease.
            num_shards: The shards of x.
            arguments: The further arguments of `Worker.compute_held`.
        """
        compute = actor.compute_held.options(num_returns=1 + num_shards)
        ref, *totals = compute.remote(lease, *arguments)
        size = 1 + len(arguments[0])
        call = _Call(ref, lease.in_words, "lease", size, item=lease, arguments=None)
        call.totals = tuple(totals)
        self._add(actor, call)

    def fetch(self, actor: Any, fetch: Fetch, *arguments: Any) -> None:
        """Ask this one of `actors`; the further arguments are those of `Worker.give`."""
        ref = actor.give.remote(*fetch, *arguments)
        size = 1 + len(arguments[0])
        self._add(actor, _Call(ref, fetch.in_words, "fetch", size, item=fetch, arguments=None))

    def _add(self, actor: Any, call: _Call) -> None:
        slot = next(slot for slot in self._slots if slot.actor is actor)
        if not slot.calls:
            self._rest(slot)
        slot.calls.append(call)

    def judge(self, chunks: Sequence[range], *arguments: Any) -> list[dict[str, float]]:
        """The metrics of the tasks in all chunks, in order; leases are kept for `wait` meanwhile.

        Args:
            chunks: The indices of tasks that travel together.
            arguments: The further arguments of `Worker.judge`.
        """
        to_do = deque(chunks)
        self._judged = {}
        try:
            while len(self._judged) < len(chunks):
                with calls_kept_whole():
                    while to_do and self.has_room:
                        self._send(to_do.popleft(), *arguments)
                    self.back_up()
                    self._check_starved()
                    self._wait(math.inf)
                    to_do.extendleft(paused.item for paused in self._take_due(range))
            return [metrics for chunk in chunks for metrics in self._judged[chunk]]
        finally:
            self._let_go(range)
            for chunk in chunks:
                self._losses.pop(chunk_in_words(chunk), None)
                self._errors.pop(chunk_in_words(chunk), None)

    def _send(
        self,
        item: Lease | range,
        *arguments: Any,
        upcoming: Mapping[int, Lease] = MappingProxyType({}),
    ) -> None:
        """Give `item` to the worker that has been idle longest, else to the next to be idle.

        But first to one that has its tasks already.
        """
        now = self._runtime.now()
        with_room = [slot for slot in self._slots if self._room_at(slot) <= now]
        few = min(len(slot.calls) for slot in with_room)
        slot = min(
            (slot for slot in with_room if len(slot.calls) == few),
            key=lambda slot: (not isinstance(item, Lease) or slot.ahead != item.id, slot.since),
        )
        if not slot.calls:
            self._rest(slot)
        if isinstance(item, Lease):
            kept, *outer = arguments
            following = self._following(slot, item, upcoming)
            slot.ahead = None if following is None else following.id
            compute = slot.actor.compute.options(num_returns=1 + len(outer))
            ref, *totals = compute.remote(item, kept, following, *outer)
            call = _Call(ref, item.in_words, "lease", item=item, arguments=arguments)
            call.totals = tuple(totals)
        else:
            ref = slot.actor.judge.remote(item, *arguments)
            # A lease has a task at least, and its hypergradient takes longer than its metrics.
            call = _Call(
                ref, chunk_in_words(item), "chunk", len(item), item=item, arguments=arguments
            )
        slot.calls.append(call)

    def _following(self, slot: _Slot, lease: Lease, upcoming: Mapping[int, Lease]) -> Lease | None:
        """Which of the leases to come the worker will probably have after this one."""
        if slot.ahead is not None and slot.ahead != lease.id and slot.ahead in upcoming:
            return upcoming[slot.ahead]
        others = [other for other in self._slots if other is not slot and other.is_alive]
        taken = {other.ahead for other in others} | self._never_ahead
        # The others that are idle take the next ones at once.
        num_idle = sum(not other.calls and other.ahead not in upcoming for other in others)
        free = (upcoming[number] for number in upcoming if number not in taken)
        return next(islice(free, num_idle, None), None)

    def back_up(self) -> None:
        """Give what takes long to idle workers too; the first answer counts."""
        while (overdue := self._next_backup()) is not None and overdue[0] <= self._runtime.now():
            call = overdue[1]
            assert call.arguments is not None and not isinstance(call.item, Fetch)
            self._send(call.item, *call.arguments)

    def forget(self) -> None:
        """Let go of all leases; what is still being computed is thrown away."""
        for slot in self._slots:
            slot.num_losses = 0
        self._let_go(Lease, Fetch)
        self._losses.clear()
        self._errors.clear()
        self._events = []

    def _let_go(self, *kinds: type[Work]) -> None:
        for slot in self._slots:
            for call in slot.calls:
                # An actor call cannot be taken back: the worker stays busy until it has answered.
                call.is_redundant |= isinstance(call.item, kinds)
        self._paused = [paused for paused in self._paused if not isinstance(paused.item, kinds)]

    def wait(self, timeout_s: float | None = None) -> list[Done | Fetched | Lost]:
        """What happened to leases; blocks until something did, or a worker has room again."""
        self._check_starved()
        self._wait(math.inf if timeout_s is None else timeout_s)
        lost = [Lost(paused.item, paused.lost_data) for paused in self._take_due(Lease, Fetch)]
        events, self._events = [*self._events, *lost], []
        return events

    def _take_due(self, *kinds: type[Work]) -> list[Any]:
        """The paused work of these kinds that may be tried again now."""
        now = self._runtime.now()
        due = [item for item in self._paused if item.at <= now and isinstance(item.item, kinds)]
        self._paused = [item for item in self._paused if item not in due]
        return due

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
        if not slot.is_alive or slot.is_heir_ready or len(slot.calls) > self._prefetch:
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

    def _answered(self, slot: _Slot, call: _Call, answer: Any) -> None:
        if isinstance(call.item, Fetch):
            self._rest(slot)
            if not call.is_redundant:
                self._events.append(Fetched(call.item, answer))
            return
        # It may have begun, and even ended, before the end of the one before it was noticed.
        slot.lease_s = max(answer.seconds, self._runtime.now() - slot.since)
        self._rest(slot, answer.seconds)
        if call.is_redundant:
            return
        for other in self._others(call):
            other.is_redundant = True
        if isinstance(answer, LeaseResult):
            self._events.append(Done(answer._replace(worker=slot.name), call.totals))
        elif isinstance(call.item, range):
            self._judged[call.item] = answer.metrics

    def _lost(self, slot: _Slot, calls: list[_Call], lost_data: bool, after_s: float = 0.0) -> None:
        at = self._runtime.now() + after_s
        if not slot.is_alive and slot.ahead is not None:
            self._never_ahead.add(slot.ahead)
            slot.ahead = None
        for call in calls:
            if not call.is_redundant and not self._others(call):
                self._paused.append(_Paused(at, call.item, lost_data))

    def _others(self, call: _Call) -> list[_Call]:
        """The other calls for the same work that are still awaited."""
        return [
            other
            for slot in self._slots
            for other in slot.calls
            if other is not call and other.item == call.item and not other.is_redundant
        ]

    def _next_backup(self) -> tuple[float, _Call] | None:
        """(when, which) lease is the next to go to an idle worker too; None while none may.

        A lease that is being computed gets a backup after `backup_factor` times the median, if
        there is such a factor: its machine may be slow, but most are just long. One that is stuck
        behind it always gets one, since it has not begun and an idle worker would do it at once.
        """
        now = self._runtime.now()
        is_idle = any(not slot.calls and self._room_at(slot) <= now for slot in self._slots)
        if not is_idle:
            return None
        slow: list[tuple[float, _Call]] = []
        for slot in self._slots:
            for place, call in enumerate(slot.calls):
                factor = STUCK_FACTOR if place else self._backup_factor
                usual_s = self._paces[slot.calls[0].kind].median_s
                if factor is None or usual_s is None or call.is_redundant or self._others(call):
                    continue
                if call.arguments is None:
                    continue
                slow.append((slot.since + factor * usual_s, call))
        return min(slow, key=lambda pair: pair[0], default=None)

    def _more_checks(self) -> list[float]:
        now = self._runtime.now()
        times = [at for slot in self._slots if (at := self._room_at(slot)) > now]
        times += [paused.at for paused in self._paused]
        backup = self._next_backup()
        return times if backup is None else [*times, backup[0]]


def _next_to_work(slot: _Slot) -> tuple[int, float]:
    return len(slot.calls), slot.since
