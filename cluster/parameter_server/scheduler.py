"""`Scheduler`: which worker computes what at which version of x, and when x is stepped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ray import ObjectRef

from metadist.cluster.actors.buffers import PackedState
from metadist.cluster.actors.connection import calls_kept_whole
from metadist.cluster.parameter_server.ledger import Ledger
from metadist.cluster.parameter_server.policies import Policy
from metadist.cluster.parameter_server.server import Progress
from metadist.cluster.parameter_server.states import HeldStates
from metadist.cluster.parameter_server.supervisor import ServerGone, SumLost, Supervisor
from metadist.cluster.parameter_server.worker_pool import Done, Fetch, Fetched, Lost, WorkerPool
from metadist.executor import StepReport
from metadist.outer import Numbers, StepResult
from metadist.sampler import Stream
from metadist.workload import Lease, Workload

T = TypeVar("T")


class Scheduler:
    """Runs in the driver: hands out leases and passes on references to their results.

    The data stays on the nodes: sums go from workers to the server, and x from there to workers.

    Args:
        workload: The workload that leases are cut from.
        policy: Decides when to step.
        supervisor: The supervisor of a started server.
        pool: Started workers.
        held: Where workers hold the states of tasks; None: the server has them, if there are any.
    """

    def __init__(
        self,
        workload: Workload,
        policy: Policy,
        supervisor: Supervisor,
        pool: WorkerPool,
        held: HeldStates | None = None,
    ) -> None:
        self._workload = workload
        self._policy = policy
        self._supervisor = supervisor
        self._pool = pool
        self._held = held
        if held is not None:
            supervisor.gather = self._gather
        self._ledger: Ledger | None = None
        self._outer: tuple[ObjectRef[Any], ...] = ()

    def run(self, until_version: int) -> Iterator[StepReport]:
        """Train until x has that version; yields after every outer step."""
        self._ledger = None
        self._until_version = until_version
        self._handed_out: Numbers | None = None
        self._reissued: list[int] = []
        self._pool.take_waiting_s()
        self._supervisor.take_num_lost()
        self._ended = time.perf_counter()
        while not self._is_done:
            with calls_kept_whole():
                report = self._with_server(self._advance)
            if report is not None:
                yield report

    @property
    def _is_done(self) -> bool:
        # No ledger: the server was lost, perhaps when the caller asked for the state after a step.
        return self._ledger is not None and self._ledger.version >= self._until_version

    def state(self) -> list[PackedState]:
        """Everything that must persist, the parts of all shards."""
        return self._with_server(self._snapshot)

    def _snapshot(self) -> list[PackedState]:
        parts = self._supervisor.state()
        if self._held is not None:
            self._held.keep(parts[0].version)
        return parts

    def _gather(self, version: int, limit_s: float = math.inf) -> None:
        """Have the states at this version, which is that of x, on the driver's disk.

        Raises:
            TimeoutError: It took longer than `limit_s`, or something was lost where that is given.
        """
        until = time.perf_counter() + limit_s
        held, ledger = self._held, self._ledger
        if held is None or held.has(version):
            return
        held.gather(version)
        while not held.has(version):
            held.ask(ledger.in_flight if ledger else ())
            for event in self._pool.wait(1.0):
                if isinstance(event, Fetched):
                    held.take(event)
                elif isinstance(event, Lost) and isinstance(event.lease, Fetch):
                    held.lost(event.lease)
                elif ledger is not None:
                    self._note(event, ledger)
                if isinstance(event, Lost) and limit_s < math.inf:
                    raise TimeoutError("a worker was lost")
            if time.perf_counter() > until:
                raise TimeoutError("the workers did not give their states in time")
            if ledger is not None and limit_s == math.inf:
                self._hand_out(ledger)

    def _with_server(self, action: Callable[[], T]) -> T:
        """What `action` returns; it is repeated whenever the server is lost and replaced."""
        while True:
            try:
                return action()
            except ServerGone as error:
                self._supervisor.replace(error)
                self._ledger = None

    def _advance(self) -> StepReport | None:
        """The report of an outer step; None if it waited for something to happen instead."""
        if self._ledger is None or self._supervisor.leave_nodes():
            self._ledger = self._open_ledger()
        ledger = self._ledger
        if ledger.version >= self._until_version:
            return None
        if self._held is not None and self._supervisor.is_due:
            self._snapshot()
        weights = ledger.next_step()
        if not weights:
            self._hand_out(ledger)
            for event in self._pool.wait(self._supervisor.check()):
                self._note(event, ledger)
            return None
        done = [self._done[lease_id] for lease_id in sorted(weights)]
        step = self._apply(done, weights, ledger)
        if step is None:
            return None
        now = time.perf_counter()
        # The workers compute while the caller looks at the report.
        self._hand_out(ledger)
        self._supervisor.stepped(step.version)
        seconds, self._ended = now - self._ended, now
        return self._report(step, done, seconds)

    def _open_ledger(self) -> Ledger:
        """A ledger of the leases in x; all others that were handed out are computed again."""
        self._pool.forget()
        self._done: dict[int, Done] = {}
        progress: Progress = self._supervisor.ask([self._supervisor.server.progress.remote()])[0]
        self._outer = self._supervisor.pull()
        if self._held is not None:
            self._held.reached(progress.version, self._outer)
        if self._handed_out is None:
            self._handed_out = Numbers(progress.applied_below, progress.applied)
        return Ledger(
            self._policy,
            self._workload.leases_per_step,
            *progress,
            until_version=self._until_version,
        )

    def _hand_out(self, ledger: Ledger) -> None:
        while self._has_room and (lease_id := ledger.issue(self._pool.ahead)) is not None:
            assert self._handed_out is not None
            if lease_id in self._handed_out:
                self._reissued.append(lease_id)
            self._handed_out.add(lease_id)
            lease = self._workload.lease(lease_id, ledger.version)
            if self._held is not None:
                self._held.send(lease, is_last=ledger.version + 1 == self._until_version)
                continue
            kept = None
            if self._workload.keep_state:
                kept = self._supervisor.server.kept.remote(lease.indices)
            self._pool.submit(lease, self._outer, kept, self._upcoming(ledger))
        if self._held is None:
            self._pool.back_up()
        elif news := self._held.take_news():
            self._pool.notify("states_held", workers=news)

    def _upcoming(self, ledger: Ledger) -> dict[int, Lease]:
        """The next leases, whose tasks a worker may sample before it is given one of them."""
        if isinstance(self._workload.sampler, Stream) and not self._policy.is_synchronous:
            return {}  # their tasks are of an outer step that nobody knows yet
        found = ledger.upcoming(2 * self._pool.num_alive)
        return {number: self._workload.lease(number, at) for number, at in found.items()}

    @property
    def _has_room(self) -> bool:
        # A lease waits for the worker that holds its states, however many it has.
        return bool(self._pool.actors) if self._held is not None else self._pool.has_room

    def _note(self, event: Done | Fetched | Lost, ledger: Ledger) -> None:
        if isinstance(event, Done):
            ledger.arrive(event.result.lease_id)
            self._done[event.result.lease_id] = event
            if self._held is not None:
                self._held.done(event.result.lease_id, event.result.version)
            return
        if isinstance(event, Fetched) or not isinstance(event.lease, Lease):
            return  # of a snapshot that was given up
        self._lose(event.lease.id, ledger)
        if event.lost_data:
            # x was lost, perhaps with the server: find out before the losses of workers that cannot
            # read x add up to the end of the run.
            self._supervisor.ask(self._supervisor.versions())
            self._outer = self._supervisor.pull()
            if self._held is not None:
                self._held.reached(ledger.version, self._outer)

    def _lose(self, lease_id: int, ledger: Ledger) -> None:
        ledger.lose(lease_id)
        self._done.pop(lease_id, None)

    def _apply(
        self, done: list[Done], weights: dict[int, float], ledger: Ledger
    ) -> StepResult | None:
        """What the outer step did; None if a sum was lost with its node before it was added."""
        results = [item.result for item in done]
        try:
            step, outer = self._supervisor.apply(
                results,
                [weights[result.lease_id] for result in results],
                [item.totals for item in done],
            )
        except SumLost:
            # Which one is unknown, and the others were not added either.
            for result in results:
                self._lose(result.lease_id, ledger)
            return None
        self._outer = outer
        ledger.apply(weights, step.version)
        if self._held is not None:
            self._held.reached(step.version, outer)
        for lease_id in weights:
            del self._done[lease_id]
        return step

    def _report(self, step: StepResult, done: list[Done], seconds: float) -> StepReport:
        reissued, self._reissued = tuple(self._reissued), []
        return StepReport(
            step=step,
            results=tuple(item.result for item in done),
            seconds=seconds,
            waiting_s=self._pool.take_waiting_s(),
            num_workers=self._pool.num_alive,
            lost_workers=self._pool.take_num_lost(),
            reissued=reissued,
            lost_servers=self._supervisor.take_num_lost(),
            retried=self._pool.take_retried(),
            is_draining=self._supervisor.take_notice(),
        )
