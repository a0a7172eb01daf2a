"""`ActorPool`: actors in numbered places, and their losses; the pools of both executors."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef, exceptions

from metadist.cluster.actors.connection import draining_nodes, is_gone, this_node
from metadist.cluster.actors.errors import (
    MixedDevicesError,
    ResourcesError,
    WorkerLostError,
    message,
)
from metadist.cluster.actors.failure import (
    Event,
    Failures,
    History,
    Kind,
    Loss,
    Raise,
    Repeat,
    Retry,
    loss_of,
)
from metadist.cluster.actors.placement import WorkerInfo
from metadist.retry import Pace, in_short, type_name

log = logging.getLogger("metadist.cluster")


class Runtime:
    """The clock and the calls of Ray that pools and the supervisor use; tests pass a dummy."""

    look_s = 5.0
    """The seconds between two questions which nodes will stop."""
    _draining: frozenset[str] = frozenset()
    _looked_at = -math.inf

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def put(self, value: Any) -> ObjectRef[Any]:
        return ray.put(value)

    def get(self, refs: Any, timeout_s: float | None = None) -> Any:
        return ray.get(refs, timeout=timeout_s)

    def kill(self, actor: Any) -> None:
        ray.kill(actor)

    def is_gone(self) -> bool:
        return is_gone()

    def draining(self) -> frozenset[str]:
        """The ids of the nodes that will stop, as of a few seconds ago."""
        if self.now() - self._looked_at >= self.look_s:
            self._draining, self._looked_at = draining_nodes(), self.now()
        return self._draining

    def this_node(self) -> str:
        return this_node()

    def ready(self, refs: Sequence[ObjectRef[Any]], limit_s: float = 0.0) -> list[ObjectRef[Any]]:
        """Those that are ready as soon as one is, or after `limit_s`, which may be infinite.

        All that are ready at once, so that no worker is preferred for its place in the list.
        """
        if not refs:
            self.sleep(limit_s)
            return []
        if limit_s:
            ray.wait(list(refs), num_returns=1, timeout=None if limit_s == math.inf else limit_s)
        return list(ray.wait(list(refs), num_returns=len(refs), timeout=0)[0])


RAY = Runtime()


class Notices:
    """The nodes of which it was noted that they will stop."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.noted: frozenset[str] = frozenset()

    def take(self, nodes: Sequence[str]) -> bool:
        """Whether one of these nodes will stop, for which this is noted now."""
        draining = self._runtime.draining()
        new = frozenset(node for node in nodes if node in draining) if draining else draining
        is_new = not new <= self.noted
        self.noted |= new
        return is_new


@dataclass(eq=False)
class Call:
    """Some `work`, in words, that an actor was sent.

    Args:
        ref: The answer.
        work: What it is about.
        kind: Each kind of work has its own usual time.
        size: How many times `Failures.timeout_s` it may take.
        is_redundant: Whether nobody awaits the answer.
        is_slow: Whether it was reported as slow.
    """

    ref: ObjectRef[Any]
    work: str
    kind: str = ""
    size: int = 1
    is_redundant: bool = False
    is_slow: bool = False


@dataclass(eq=False)
class Slot:
    """The place of one actor, kept by whichever actor fills it.

    Args:
        name: The name of each actor here.
        work: What its setup is for, in words.
        actor: None while there is none.
        info: Where the last one runs.
        is_alive: Whether it is set up.
        setup: Its answer to `setup`, while that is awaited.
        calls: What it was sent, in order: it computes the first, the others wait there.
        since: When it began with the first call, or has had none; or when it was lost.
        num_losses: Losses in a row.
        resume_at: It is left alone until then.
        heir: Another actor, which takes its place when it is set up, or this one is lost: this one
            is on a node that will stop. And its answer to `setup`.
        is_heir_ready: Whether that has come.
    """

    name: str
    work: str | None = None
    actor: Any = None
    info: WorkerInfo | None = None
    is_alive: bool = False
    setup: ObjectRef[Any] | None = None
    calls: list[Any] = field(default_factory=list)
    since: float = 0.0
    num_losses: int = 0
    resume_at: float = 0.0
    heir: tuple[Any, ObjectRef[Any]] | None = None
    is_heir_ready: bool = False


S = TypeVar("S", bound=Slot)


class ActorPool(ABC, Generic[S]):
    """Sets actors up, waits for their answers, and replaces the lost ones.

    Ray could restart them itself. But it takes longer to report a death, and it would set the new
    process up from arguments that may have been lost too.

    Args:
        make_actor: Creates the actor of that number.
        slots: Their places.
        num_needed: Without so many the work stands still.
        kind: What the messages say of them.
        failures: When to try again, and when to end the run.
        runtime: The clock and the calls of Ray.
    """

    def __init__(
        self,
        make_actor: Callable[[int], Any],
        slots: Sequence[S],
        num_needed: int,
        kind: Kind,
        failures: Failures,
        runtime: Runtime,
    ) -> None:
        self._make_actor = make_actor
        self._slots = slots
        self._num_needed = num_needed
        self._kind = kind
        self._failures = failures
        self._runtime = runtime
        self._num_lost = 0
        self._losses: Counter[str | None] = Counter()
        """By work: losses in a row."""
        self._errors: defaultdict[str | None, list[str]] = defaultdict(list)
        """By work: the types of errors of user code in a row."""
        self._retried: list[str] = []
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)
        """By kind of work."""
        self.notify: Callable[..., None] = ignore
        """Called with an event that must be known before a step ends, see `Executor.notify`."""
        self.must_agree = False
        """Whether all actors must compute to the same bytes."""

    @abstractmethod
    def _setup_of(self, slot: S) -> tuple[Any, ...]:
        """The arguments of the actor's `setup`."""

    @abstractmethod
    def _ready(self, slot: S, answer: Any) -> WorkerInfo:
        """Take the answer of `setup`; returns where the actor runs."""

    @abstractmethod
    def _answered(self, slot: S, call: Any, answer: Any) -> None:
        """Take the answer to a call."""

    @abstractmethod
    def _lost(self, slot: S, calls: list[Any], lost_data: bool, after_s: float = 0.0) -> None:
        """Note that these calls bring no answer; they may be asked again after that time.

        `lost_data`: because an argument was lost.
        """

    def _more_checks(self) -> list[float]:
        """Further times at which something must be looked at."""
        return []

    @property
    def infos(self) -> list[WorkerInfo]:
        """Where the actors run."""
        return [slot.info for slot in self._slots if slot.info is not None]

    @property
    def num_alive(self) -> int:
        """Actors that are not being replaced."""
        return sum(slot.is_alive for slot in self._slots)

    def stop(self) -> None:
        """Kill all actors."""
        for slot in self._slots:
            self._discard(slot)

    def take_num_lost(self) -> int:
        """Actors lost since this was last called."""
        lost, self._num_lost = self._num_lost, 0
        return lost

    def take_retried(self) -> tuple[str, ...]:
        """The errors of user code, in words, whose work is done again, since this was called."""
        retried, self._retried = tuple(self._retried), []
        return retried

    def _start(self, timeout_s: float, num_ready: int) -> None:
        """Set all actors up, creating those that lack; returns when `num_ready` are ready."""
        now = self._runtime.now()
        for slot in self._slots:
            self._drop_heir(slot)
            # What is still being computed belongs to another workload.
            slot.is_alive, slot.setup, slot.calls, slot.info = False, None, [], None
            slot.since, slot.num_losses, slot.resume_at = now, 0, 0.0
        self._num_lost = 0
        self._retried = []
        self._paces.clear()
        self._losses.clear()
        self._errors.clear()
        while self.num_alive < num_ready:
            self._wait(0.5)
            if self._runtime.now() > now + timeout_s:
                raise ResourcesError(
                    f"{num_ready} workers must be ready within start_timeout_s={timeout_s:g}, "
                    f"got {self.num_alive}: raise it, or see the logs of the nodes"
                )

    def _wait(self, timeout_s: float) -> None:
        """Wait until something happened to a call, or something else is due; take care of it."""
        self._revive()
        self._leave_nodes()
        watched: dict[ObjectRef[Any], tuple[S, Any]] = {}
        for slot in self._slots:
            if slot.setup is not None:
                watched[slot.setup] = slot, None
            for call in slot.calls:
                watched[call.ref] = slot, call
            if slot.heir is not None and not slot.is_heir_ready:
                watched[slot.heir[1]] = slot, slot.heir
        ready = set(self._runtime.ready(list(watched), min(timeout_s, self._next_check_s())))
        for ref, (slot, call) in watched.items():
            if ref in ready and call is not None and call is slot.heir:
                slot.is_heir_ready = True
                if not slot.calls:
                    self._succeed(slot)
            # A call may have been lost with its actor a moment ago.
            elif ref in ready and (call is None or call in slot.calls):
                self._settle(slot, ref, call)
        self._report_slow()
        self._end_overdue()

    def _check_starved(self) -> None:
        """Raise WorkerLostError if too few have been alive for too long."""
        if self.num_alive >= self._num_needed:
            return
        lost_at = sorted(slot.since for slot in self._slots if not slot.is_alive)
        # The loss that left fewer than needed.
        since = lost_at[len(self._slots) - self._num_needed]
        if self._runtime.now() - since > self._failures.all_lost_s:
            raise WorkerLostError(
                f"at least {self._num_needed} workers must be alive within all_lost_s="
                f"{self._failures.all_lost_s:g} after a loss, got {self.num_alive}: all nodes with "
                "the resources of a worker may be gone"
            )

    def _revive(self) -> None:
        """Set lost actors up again after their pause, in a new process where need be."""
        now = self._runtime.now()
        for number, slot in enumerate(self._slots):
            if slot.is_alive or slot.setup is not None or slot.resume_at > now:
                continue
            if slot.actor is None:
                slot.actor = self._make_actor(number)
            slot.setup = slot.actor.setup.remote(*self._setup_of(slot))

    def _settle(self, slot: S, ref: ObjectRef[Any], call: Any) -> None:
        """Take what became of a call that has ended, or of setup if there is no `call`."""
        try:
            answer = self._runtime.get(ref)
        except exceptions.RayError as error:
            self._failed(slot, call, error)
            return
        if call is None:
            info = self._ready(slot, answer)
            if self.must_agree:
                _require_same_bytes(info, self.infos)
            slot.info = info
            slot.is_alive, slot.setup, slot.since = True, None, self._runtime.now()
            log.info("%s is ready: %s on %s", *slot.info[:3])
            return
        slot.calls.remove(call)
        self._paces[call.kind].add(self._runtime.now() - slot.since)
        slot.num_losses = 0
        self._losses.pop(call.work, None)
        self._errors.pop(call.work, None)
        self._answered(slot, call, answer)
        if slot.is_heir_ready:
            self._succeed(slot)

    def _leave_nodes(self) -> None:
        """Set actors up elsewhere ahead of the end of their nodes."""
        draining = self._runtime.draining()
        for number, slot in enumerate(self._slots):
            if slot.is_alive and slot.heir is None and slot.info and slot.info.node in draining:
                log.info("%s leaves node %s, which will stop", slot.name, slot.info.node)
                self.notify("worker_moved", worker=slot.name, node=slot.info.node)
                heir = self._make_actor(number)
                slot.heir = heir, heir.setup.remote(*self._setup_of(slot))

    def _succeed(self, slot: S) -> None:
        """Let the heir take the place; calls that were sent ahead are sent again."""
        lost, heir, slot.heir = slot.calls, slot.heir, None
        assert heir is not None
        self._discard(slot)
        slot.actor, slot.setup = heir
        self._lost(slot, lost, lost_data=False)

    def _drop_heir(self, slot: S) -> None:
        if slot.heir is not None:
            self._runtime.kill(slot.heir[0])
        slot.heir, slot.is_heir_ready = None, False

    def _failed(self, slot: S, call: Any, error: exceptions.RayError) -> None:
        """Do what `Failures.decide` says about a call that failed."""
        if slot.calls and not isinstance(error, exceptions.RayTaskError):
            # With an actor all its calls end, but it had begun with the first only.
            call = slot.calls[0]
        work = slot.work if call is None else call.work
        if slot.heir is not None and loss_of(error) is Loss.ACTOR:
            log.info("%s is gone with its node, which was to stop", slot.name)
            self._succeed(slot)
            return
        event = Event(self._kind, slot.name, work, error)
        is_awaited = call is not None and not call.is_redundant
        if not event.is_of_user:
            slot.num_losses += 1
            self._losses[work] += is_awaited
        history = History(slot.num_losses, self._losses[work], tuple(self._errors[work]))
        decision = self._failures.decide(event, history)
        if isinstance(decision, Raise):
            raise decision.error
        slot.resume_at = self._runtime.now() + decision.after_s
        if isinstance(decision, (Repeat, Retry)):
            lost = [] if call is None else [call]
            if slot.calls[:1] in ([], [call]):
                slot.since = self._runtime.now()
            slot.calls = [other for other in slot.calls if other is not call]
            slot.setup = None
        else:
            log.info("%s was lost: %s", slot.name, message(error).partition("\n")[0])
            lost = slot.calls
            self._num_lost += 1
            self._discard(slot)
        if isinstance(decision, Repeat):
            if is_awaited or call is None:
                self._errors[work].append(type_name(event.cause))
            self._retried.append(f"{work} on {slot.name}: {in_short(event.cause)}")
            log.warning("%s raised and is tried again: %s", work, message(error))
            self._lost(slot, lost, lost_data=False, after_s=decision.after_s)
        else:
            self._lost(slot, lost, lost_data=isinstance(decision, Retry))

    def _discard(self, slot: S) -> None:
        """Kill the actor; it may be dead, or out of reach and still at work."""
        if slot.actor is not None:
            self._runtime.kill(slot.actor)
        self._drop_heir(slot)
        slot.actor, slot.is_alive, slot.setup, slot.calls = None, False, None, []
        slot.since = self._runtime.now()

    def _report_slow(self) -> None:
        """Warn once of each call that an actor has been at for very long."""
        for slot in self._slots:
            if not slot.calls or slot.calls[0].is_slow:
                continue
            call, seconds = slot.calls[0], self._runtime.now() - slot.since
            pace = self._paces[call.kind]
            if seconds < pace.slow_s:
                continue
            call.is_slow = True
            way_out = "Failures(timeout_s=...) would replace it"
            pace.report(self.notify, call.work, slot.name, seconds, way_out)

    def _end_overdue(self) -> None:
        """Replace actors that have been at one call for longer than `Failures.timeout_s`."""
        limit_s = self._failures.timeout_s
        if limit_s is None:
            return
        for slot in self._slots:
            if slot.calls and slot.since + limit_s * slot.calls[0].size <= self._runtime.now():
                times = f"{slot.calls[0].size} times " if slot.calls[0].size > 1 else ""
                error = exceptions.GetTimeoutError(
                    f"it took longer than {times}timeout_s={limit_s:g}"
                )
                self._failed(slot, slot.calls[0], error)

    def _next_check_s(self) -> float:
        """Seconds until something must be looked at though no call has ended."""
        now = self._runtime.now()
        times = [*self._more_checks(), now + self._runtime.look_s]
        for slot in self._slots:
            if slot.setup is None and (slot.resume_at > now or not slot.is_alive):
                times.append(slot.resume_at)
            if slot.calls and not slot.calls[0].is_slow:
                times.append(slot.since + self._paces[slot.calls[0].kind].slow_s)
            if slot.calls and self._failures.timeout_s is not None:
                times.append(slot.since + self._failures.timeout_s * slot.calls[0].size)
        if self.num_alive < self._num_needed:
            times.append(now + 1.0)
        return max(0.0, min(times, default=math.inf) - now)


def _require_same_bytes(info: WorkerInfo, others: Sequence[WorkerInfo]) -> None:
    """Raise MixedDevicesError unless the actor computes as the others do, or did."""
    for other in others:
        if info.computes_as != other.computes_as:
            raise MixedDevicesError(
                "allow_mixed_devices must be True for workers that compute differently, got "
                f"{other.name} on {other.host} ({other.computes_as}) and {info.name} on "
                f"{info.host} ({info.computes_as}): the result would depend on which of them "
                "computed what. Reserve nodes of one kind with the same packages, or pass "
                "Workers(allow_mixed_devices=True), which gives up equal bytes"
            )


def ignore(event: str, **fields: Any) -> None:
    """An event that nobody waits for."""
