"""`Scheduler`: who computes what at which version, and when x is stepped. Runs in the driver."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import ObjectRef, exceptions

from metadist.cluster.buffers import Array, PackedState
from metadist.cluster.errors import ServerLostError, is_loss, message
from metadist.cluster.fleet import Done, Fleet, Lost
from metadist.cluster.ledger import Ledger
from metadist.cluster.policies import Policy
from metadist.cluster.server import Arrival, Progress
from metadist.executor import StepReport
from metadist.lease import Workload
from metadist.outer import StepResult


class Scheduler:
    """Hands out leases and passes references to their results on; the data stays on the nodes.

    Args:
        workload: what the leases are cut from.
        policy: when to step.
        server: the actor of a `ParameterServer`.
        fleet: started workers.
    """

    def __init__(self, workload: Workload, policy: Policy, server: Any, fleet: Fleet) -> None:
        self._workload = workload
        self._policy = policy
        self._server = server
        self._fleet = fleet
        self._version = 0
        self._outer: ObjectRef[Any] | None = None

    def run(self, until_version: int) -> Iterator[StepReport]:
        """Train until x has that version; yields after every outer step."""
        # Whatever an interrupted run left in flight is not in x: it is computed again.
        self._fleet.forget()
        self._ledger = self._open_ledger(until_version)
        self._outer = self._server.pull.remote()
        self._done: dict[int, Done] = {}
        self._lost: set[int] = set()
        self._reissued: list[int] = []
        self._fleet.take_waiting_s()
        ended = time.perf_counter()
        self._hand_out()
        while self._ledger.version < until_version:
            for event in self._fleet.wait():
                self._note(event)
            while weights := self._ledger.next_step():
                done = [self._done[lease_id] for lease_id in sorted(weights)]
                step = self._apply(done, weights)
                if step is None:
                    break
                now = time.perf_counter()
                # The workers go on while the caller looks at the report.
                self._hand_out()
                yield self._report(step, done, now - ended)
                ended = now
            self._hand_out()

    def pull(self) -> Array:
        """The current x."""
        return self._ask(self._server.pull.remote())

    def state(self) -> PackedState:
        """Everything that must persist."""
        return self._ask(self._server.state.remote())

    def _open_ledger(self, until_version: int) -> Ledger:
        progress: Progress = self._ask(self._server.progress.remote())
        self._version = progress.version
        return Ledger(
            self._policy,
            self._workload.leases_per_step,
            *progress,
            until_version=until_version,
        )

    def _hand_out(self) -> None:
        while self._fleet.has_idle and (lease_id := self._ledger.issue()) is not None:
            if lease_id in self._lost:
                self._lost.remove(lease_id)
                self._reissued.append(lease_id)
            assert self._outer is not None
            lease = self._workload.lease(lease_id, self._ledger.version)
            kept = None
            if self._workload.must_be_synchronous:
                kept = self._server.kept.remote(lease.indices)
            self._fleet.submit(lease, self._outer, kept)

    def _note(self, event: Done | Lost) -> None:
        if isinstance(event, Done):
            self._ledger.arrive(event.result.lease_id)
            self._done[event.result.lease_id] = event
            return
        self._lose(event.lease.id)
        if event.lost_data:
            # The server may have died with it: find out here, and not as the death of workers.
            self._ask(self._server.version.remote())
            self._outer = self._server.pull.remote()

    def _lose(self, lease_id: int) -> None:
        self._ledger.lose(lease_id)
        self._lost.add(lease_id)
        self._done.pop(lease_id, None)

    def _apply(self, done: list[Done], weights: dict[int, float]) -> StepResult | None:
        """What the outer step did; None if a sum was lost with its node, before it was added."""
        arrivals = [
            Arrival(r.lease_id, r.version, r.num_tasks, weights[r.lease_id], r.state_sizes)
            for r in (item.result for item in done)
        ]
        meta, outer = self._server.apply.options(num_returns=2).remote(
            arrivals, *(item.total for item in done)
        )
        try:
            step: StepResult = self._ask(meta)
        except exceptions.RayTaskError as error:
            if not is_loss(error):
                raise
            for item in done:
                self._lose(item.result.lease_id)
            return None
        self._outer, self._version = outer, step.version
        self._ledger.apply(weights, step.version)
        for lease_id in weights:
            del self._done[lease_id]
        return step

    def _report(self, step: StepResult, done: list[Done], seconds: float) -> StepReport:
        reissued, self._reissued = tuple(self._reissued), []
        return StepReport(
            step,
            tuple(item.result for item in done),
            tuple(item.worker for item in done),
            seconds,
            self._fleet.take_waiting_s(),
            self._fleet.num_alive,
            self._fleet.take_num_lost(),
            reissued,
        )

    def _ask(self, ref: ObjectRef[Any]) -> Any:
        """The answer of the server to a call."""
        try:
            return ray.get(ref)
        except exceptions.RayActorError as error:
            raise ServerLostError(
                f"the parameter server died at version {self._version} of x: the last checkpoint "
                f"holds, resume from it. The cause: {message(error)}"
            ) from error
