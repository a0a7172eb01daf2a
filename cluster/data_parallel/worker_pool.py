"""`ShardPool`: one worker per shard, their rounds and their deaths."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import ObjectRef, exceptions

from metadist.cluster.actors.buffers import Array
from metadist.cluster.actors.errors import (
    ClusterError,
    ResourcesError,
    WorkerLostError,
    message,
)
from metadist.cluster.actors.failure import SHARD, Event, Failures, History, Raise, Retry
from metadist.cluster.actors.pool import wait_for_any
from metadist.cluster.data_parallel.exchange import Round
from metadist.cluster.data_parallel.layout import Key, Layout, Reply, ShardCheck, ShardInfo

log = logging.getLogger("metadist.cluster")

_Send = Callable[["_Slot"], ObjectRef[Any]]
"""Sends a piece of work to the worker of a slot."""


class _Work(NamedTuple):
    """A call that every shard has to answer; `place` and `step` as of `Round`."""

    place: Hashable
    step: int
    send: _Send


class _Done(NamedTuple):
    step: int
    answer: Any


@dataclass
class _Slot:
    """The place of one shard, kept by whichever actor fills it.

    `pending` is what is waited for: the answer to `work`, or while not ready the end of setup.
    `since` is when that began, or when the worker was lost. `held` are the trees it was sent.
    """

    part: int
    actor: Any = None
    info: ShardInfo | None = None
    ready: bool = False
    work: _Work | None = None
    pending: ObjectRef[Any] | None = None
    since: float = 0.0
    held: frozenset[Key] = frozenset()
    done: dict[Hashable, _Done] = field(default_factory=dict)
    num_losses: int = 0
    resume_at: float = 0.0


class ShardPool:
    """Workers that hold one shard each.

    A lost worker is replaced by one that reads its shard again, and is asked the same again: what
    is asked is a pure function of the message.

    Args:
        make_worker: creates the actor of that number.
        num_shards: how many.
        failures: limits and pauses; `timeout_s` limits a round.
        staleness: answers may be so many steps old.
    """

    def __init__(
        self, make_worker: Callable[[int], Any], num_shards: int, failures: Failures, staleness: int
    ) -> None:
        self._make_worker = make_worker
        self._failures = failures
        self._staleness = staleness
        self._slots = [_Slot(part) for part in range(num_shards)]
        self._setup: tuple[Any, ...] = ()
        self.bytes_sent = 0
        """To all workers, since the pool was made; buffers only."""
        self.bytes_received = 0
        self.computing_s = 0.0
        """Seconds x workers of computing."""
        self.oldest = 0
        """Steps, of the oldest answer used since this was last set to 0."""
        self.num_lost = 0

    def start(self, timeout_s: float, payload: ObjectRef[Any]) -> list[ShardInfo]:
        """Set all workers up, creating those that lack; what each of them holds.

        Args:
            timeout_s: how long to wait for all of them.
            payload: of `ShardWorker.setup`.
        """
        self._setup = (payload,)
        for slot in self._slots:
            self._release(slot)
            slot.ready, slot.info, slot.resume_at, slot.num_losses = False, None, 0.0, 0
        self.forget()
        deadline = time.perf_counter() + timeout_s
        while self.num_ready < len(self._slots):
            self._wait(0.5)
            if time.perf_counter() > deadline:
                raise ResourcesError(
                    f"{len(self._slots)} workers must be ready within start_timeout_s="
                    f"{timeout_s:g}, got {self.num_ready}: raise it, or see the logs of the nodes"
                )
        return self.infos

    @property
    def infos(self) -> list[ShardInfo]:
        """What the workers hold, and where they run."""
        return [slot.info for slot in self._slots if slot.info is not None]

    @property
    def num_ready(self) -> int:
        """Workers that are not being replaced."""
        return sum(slot.ready for slot in self._slots)

    def forget(self) -> None:
        """Let go of all answers; what is still being computed is thrown away."""
        for slot in self._slots:
            slot.done = {}
            if slot.work is not None:
                self._release(slot)

    def stop(self) -> None:
        """Kill all workers."""
        for slot in self._slots:
            self._discard(slot)

    def ask(self, round: Round) -> list[Reply]:
        """The reply of every shard.

        With staleness, of a shard that has none yet the last at the same place of an earlier
        step, if that is not too old; but at least half of the shards answer this round itself, or
        nothing would be new.
        """
        sent: dict[frozenset[Key], ObjectRef[Any]] = {}

        def send(slot: _Slot) -> ObjectRef[Any]:
            package = round.package(slot.part, slot.held)
            slot.held = slot.held - set(package.message.forget) | package.shared.keys()
            self.bytes_sent += package.num_bytes
            # One object for all shards that lack the same.
            keys = frozenset(package.shared)
            if keys not in sent:
                sent[keys] = ray.put(package.shared)
            reply: ObjectRef[Any] = slot.actor.compute.remote(
                package.message, sent[keys], package.own
            )
            return reply

        is_exact = any(request.draw is None for request in round.requests)
        work = _Work(round.place, round.step, send)
        replies: list[Reply] = self._all(work, 0 if is_exact else self._staleness)
        return replies

    def check(self, layout: Layout, shared: Array, owns: Sequence[Array]) -> list[ShardCheck]:
        """`ShardWorker.check` of every worker; `owns` by shard."""
        ref = ray.put(shared)

        def send(slot: _Slot) -> ObjectRef[Any]:
            check: ObjectRef[Any] = slot.actor.check.remote(layout, ref, owns[slot.part])
            return check

        checks: list[ShardCheck] = self._all(_Work("check", 0, send), 0)
        return checks

    def _all(self, work: _Work, staleness: int) -> list[Any]:
        """What every worker answers, `staleness` steps old at the most."""
        self._settle_ready(0.0)
        while True:
            self._revive()
            for slot in self._slots:
                if slot.ready and slot.work is None and self._age(slot, work) > 0:
                    slot.work, slot.since = work, time.perf_counter()
                    slot.pending = work.send(slot)
            ages = [self._age(slot, work) for slot in self._slots]
            if max(ages) <= staleness and 2 * ages.count(0) >= len(ages):
                self.oldest = max(self.oldest, *map(int, ages))
                answers = [slot.done[work.place].answer for slot in self._slots]
                if not staleness:
                    for slot in self._slots:
                        del slot.done[work.place]
                return answers
            self._wait()

    def _age(self, slot: _Slot, work: _Work) -> float:
        """Steps since this shard answered at this place."""
        done = slot.done.get(work.place)
        return math.inf if done is None else work.step - done.step

    def _release(self, slot: _Slot) -> None:
        slot.work = slot.pending = None
        slot.since = time.perf_counter()

    def _discard(self, slot: _Slot) -> None:
        """Kill the worker; it may be dead, or out of reach and still at work."""
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.ready, slot.held = None, False, frozenset()
        self._release(slot)

    def _wait(self, timeout_s: float = math.inf) -> None:
        """Until something happened to a call, or there is something else to do."""
        self._revive()
        self._settle_ready(min(timeout_s, self._next_check_s()))
        self._end_overdue()

    def _settle_ready(self, timeout_s: float) -> None:
        watched = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        for ref in wait_for_any(list(watched), timeout_s):
            self._settle(watched[ref])

    def _settle(self, slot: _Slot) -> None:
        """What became of the call that `slot` waited for."""
        assert slot.pending is not None
        try:
            answer = ray.get(slot.pending)
        except exceptions.RayError as error:
            self._failed(slot, error)
            return
        work = slot.work
        self._release(slot)
        if work is None:
            self._check_same(slot, answer)
            slot.ready, slot.info, slot.held = True, answer, frozenset()
            log.info("%s is ready: %s on %s", *answer.where[:3])
            return
        slot.done[work.place] = _Done(work.step, answer)
        slot.num_losses = 0
        if isinstance(answer, Reply):
            self.bytes_received += answer.flat.nbytes
            self.computing_s += answer.seconds

    def _check_same(self, slot: _Slot, info: ShardInfo) -> None:
        before = slot.info
        if before is not None and not all(
            np.array_equal(a, b)
            for a, b in ((before.support, info.support), (before.query, info.query))
        ):
            raise ClusterError(
                f"shard {slot.part} must hold the same examples whenever it is read, got others "
                "from the worker that replaced a lost one: is the sampler a pure function?"
            )

    def _failed(self, slot: _Slot, error: exceptions.RayError) -> None:
        """A call was lost; raises if it was no loss but a bug, and at the limit of losses."""
        name = f"worker-{slot.part}"
        slot.num_losses += 1
        decision = self._failures.decide(
            Event(SHARD, name, f"shard {slot.part}", error), History(slot.num_losses)
        )
        if isinstance(decision, Raise):
            raise decision.error
        slot.resume_at = time.perf_counter() + decision.after_s
        if isinstance(decision, Retry):
            self._release(slot)
            slot.held = frozenset()
        else:
            self.num_lost += 1
            log.info("%s was lost: %s", name, message(error).partition("\n")[0])
            self._discard(slot)

    def _end_overdue(self) -> None:
        """Kill workers that have been at one round for longer than `failures.timeout_s`."""
        limit_s = self._failures.timeout_s
        for slot in self._slots if limit_s is not None else ():
            if slot.work is not None and time.perf_counter() - slot.since > limit_s:  # type: ignore[operator]
                error = f"a round took over timeout_s={limit_s:g}"
                self._failed(slot, exceptions.GetTimeoutError(error))

    def _revive(self) -> None:
        """Set lost workers up again after their pause, in a new actor."""
        now = time.perf_counter()
        for slot in self._slots:
            if slot.ready:
                continue
            if slot.info is not None and now - slot.since > self._failures.all_lost_s:
                raise WorkerLostError(
                    f"shard {slot.part} has had no worker for {self._failures.all_lost_s:g} s: all "
                    "nodes with the resources of a worker may be gone"
                )
            if slot.pending is None and slot.resume_at <= now:
                if slot.actor is None:
                    slot.actor = self._make_worker(slot.part)
                slot.pending = slot.actor.setup.remote(*self._setup, slot.part, len(self._slots))

    def _next_check_s(self) -> float:
        """Seconds until something must be looked at though no call has ended."""
        now = time.perf_counter()
        times = [slot.resume_at for slot in self._slots if not slot.ready and slot.pending is None]
        if self._failures.timeout_s is not None:
            times += [slot.since + self._failures.timeout_s for slot in self._slots if slot.work]
        if self.num_ready < len(self._slots):
            times.append(now + 1.0)
        return max(0.0, min(times, default=math.inf) - now)
