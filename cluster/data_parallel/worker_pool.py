"""`ShardPool`: one worker per shard, their rounds and their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from ray import ObjectRef

from metadist.cluster.actors.buffers import Array
from metadist.cluster.actors.errors import ClusterError
from metadist.cluster.actors.failure import SHARD, Failures
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.actors.pool import RAY, ActorPool, Call, Runtime, Slot
from metadist.cluster.data_parallel.exchange import Round
from metadist.cluster.data_parallel.layout import Key, Layout, Reply, ShardCheck, ShardInfo


@dataclass(eq=False, kw_only=True)
class _Call(Call):
    """A question to a worker; `place` and `step` as in `Round`."""

    place: Hashable
    step: int


class _Done(NamedTuple):
    step: int
    answer: Any


@dataclass(eq=False)
class _Slot(Slot):
    """The place of the shard `part`."""

    part: int = 0
    shard: ShardInfo | None = None
    """What the last worker here read."""
    held: frozenset[Key] = frozenset()
    """The trees that the worker was sent."""
    done: dict[Hashable, _Done] = field(default_factory=dict)
    """By place of a round: the last answer."""


_Send = Callable[[_Slot], ObjectRef[Any]]
"""Sends a question to the worker of a slot."""


class ShardPool(ActorPool[_Slot]):
    """Workers that hold one shard each.

    A lost worker is replaced by one that reads its shard again and is asked the same again: an
    answer is a pure function of the shard and the message.

    Args:
        make_worker: Creates the actor of that number.
        num_shards: The number of shards, and workers.
        failures: When to try again, and when to end the run.
        staleness: Answers may be so many steps old.
        runtime: The clock and the calls of Ray.
    """

    def __init__(
        self,
        make_worker: Callable[[int], Any],
        num_shards: int,
        failures: Failures,
        staleness: int,
        runtime: Runtime = RAY,
    ) -> None:
        slots = [_Slot(f"worker-{part}", f"shard {part}", part=part) for part in range(num_shards)]
        super().__init__(make_worker, slots, num_shards, SHARD, failures, runtime)
        self._staleness = staleness
        self._payload: Any = None
        self.bytes_sent = 0
        """To all workers, since the pool was made; buffers only."""
        self.bytes_received = 0
        self.computing_s = 0.0
        """Seconds x workers of computing."""
        self.oldest = 0
        """Steps, of the oldest answer used since this was last set to 0."""

    def start(self, timeout_s: float, payload: ObjectRef[Any]) -> list[ShardInfo]:
        """Set all workers up with `payload` in time; returns what each of them holds."""
        self._payload = payload
        for slot in self._slots:
            slot.shard = None
        self.forget()
        self._start(timeout_s, len(self._slots))
        return [slot.shard for slot in self._slots if slot.shard is not None]

    def forget(self) -> None:
        """Let go of all answers; what is still being computed is thrown away."""
        for slot in self._slots:
            slot.calls, slot.done = [], {}

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
                sent[keys] = self._runtime.put(package.shared)
            reply: ObjectRef[Any] = slot.actor.compute.remote(
                package.message, sent[keys], package.own
            )
            return reply

        is_exact = any(request.draw is None for request in round.requests)
        staleness = 0 if is_exact else self._staleness
        replies: list[Reply] = self._all(round.place, round.step, send, staleness)
        return replies

    def check(self, layout: Layout, shared: Array, owns: Sequence[Array]) -> list[ShardCheck]:
        """`ShardWorker.check` of every worker; `owns` by shard."""
        ref = self._runtime.put(shared)

        def send(slot: _Slot) -> ObjectRef[Any]:
            check: ObjectRef[Any] = slot.actor.check.remote(layout, ref, owns[slot.part])
            return check

        checks: list[ShardCheck] = self._all("check", 0, send, 0)
        return checks

    def _all(self, place: Hashable, step: int, send: _Send, staleness: int) -> list[Any]:
        """What every worker answers, `staleness` steps old at the most."""
        self._wait(0.0)
        while True:
            self._check_starved()
            self._revive()
            now = self._runtime.now()
            for slot in self._slots:
                is_free = slot.is_alive and not slot.calls and slot.resume_at <= now
                if is_free and _age(slot, place, step) > 0:
                    call = _Call(send(slot), str(slot.work), place=place, step=step)
                    slot.calls, slot.since = [call], now
            ages = [_age(slot, place, step) for slot in self._slots]
            if max(ages) <= staleness and 2 * ages.count(0) >= len(ages):
                self.oldest = max(self.oldest, *map(int, ages))
                answers = [slot.done[place].answer for slot in self._slots]
                if not staleness:
                    for slot in self._slots:
                        del slot.done[place]
                return answers
            self._wait(math.inf)

    def _setup_of(self, slot: _Slot) -> tuple[Any, ...]:
        return self._payload, slot.part, len(self._slots)

    def _ready(self, slot: _Slot, answer: ShardInfo) -> WorkerInfo:
        before = slot.shard
        if before is not None and not (
            np.array_equal(before.support, answer.support)
            and np.array_equal(before.query, answer.query)
        ):
            raise ClusterError(
                f"shard {slot.part} must hold the same examples whenever it is read, got others "
                "from the worker that replaced a lost one: is the sampler a pure function?"
            )
        slot.shard, slot.held = answer, frozenset()
        return answer.where

    def _answered(self, slot: _Slot, call: _Call, answer: Any) -> None:
        slot.done[call.place] = _Done(call.step, answer)
        if isinstance(answer, Reply):
            self.bytes_received += answer.flat.nbytes
            self.computing_s += answer.seconds

    def _lost(self, slot: _Slot, calls: list[_Call], lost_data: bool, after_s: float = 0.0) -> None:
        # It may have read none of the trees that it was sent: the next message has all again.
        slot.held = frozenset()


def _age(slot: _Slot, place: Hashable, step: int) -> float:
    """Steps since the shard answered at this place."""
    done = slot.done.get(place)
    return math.inf if done is None else step - done.step
