"""`Supervisor`: asks the parameter server, and starts another one when it is lost."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ray import ObjectRef, exceptions

from metadist.cluster.actors.buffers import OuterSpec, PackedState, owned, versions_of
from metadist.cluster.actors.errors import ServerLostError, message
from metadist.cluster.actors.failure import SERVER, Event, Failures, History, Raise, Retry
from metadist.cluster.actors.options import Server
from metadist.cluster.actors.pool import RAY, Notices, Runtime
from metadist.outer import LeaseResult, StepResult, norm_of_blocks
from metadist.signals import signals_held

log = logging.getLogger("metadist.cluster")


class ServerGone(Exception):
    """The parameter server is lost; `Supervisor.replace` starts another one after `after_s`."""

    def __init__(self, why: str, after_s: float) -> None:
        super().__init__(why)
        self.after_s = after_s


class SumLost(Exception):
    """A sum of hypergradients was lost on its way to the server, which lives."""


class Supervisor:
    """Asks the parameter server, and keeps a snapshot from which another one can resume.

    Why snapshots: a process that Ray restarted would have lost x, and the last checkpoint may be
    many steps old. A snapshot is in the memory of the driver: the shared memory of its node may be
    lost. It is fetched while the workers compute, and replaces the last one when it has arrived:
    there are two at most, each as large as a checkpoint, one of them in shared memory.

    The server is one actor or several, which own a slice of x each. Calls of one caller are
    answered in their order, so what all are asked between two steps has the same version. When one
    is lost, all are replaced: the others may have taken a step that it has not.

    Args:
        make_server: Creates the actor of that shard.
        failures: `max_losses` without a new version of x end the run; pauses between attempts.
        options: See `Server`.
        start_timeout_s: How long a server may take to start.
        runtime: The clock and the calls of Ray.
    """

    def __init__(
        self,
        make_server: Callable[[int], Any],
        failures: Failures,
        options: Server,
        start_timeout_s: float,
        runtime: Runtime = RAY,
    ) -> None:
        self._make_server = make_server
        self._failures = failures
        self._snapshot_every = options.snapshot_every
        self._timeout_s = options.timeout_s
        self._start_timeout_s = start_timeout_s
        self._runtime = runtime
        self._fetching: list[ObjectRef[Any]] = []
        self._asked_at = self._version = self._furthest = 0
        self._num_losses = self._num_lost = 0
        self._checking: list[ObjectRef[Any]] = []
        self._checked_at = 0.0
        self._notices = Notices(runtime)
        self._nodes: list[str] = []
        self._left: frozenset[str] = frozenset()
        self.servers: list[Any] = []
        """The actors, each a `ParameterServer`."""
        self.gather: Callable[..., None] | None = None
        """Called with the version of a state, and perhaps the seconds it may take, before it
        replaces the last snapshot: has what belongs to it and is not in the server. Snapshots are
        then made by calls of `state` alone, when `is_due`."""

    @property
    def server(self) -> Any:
        """The actor of the first shard, which has the states of tasks; None while there is none."""
        return self.servers[0] if self.servers else None

    def start(self, parts: list[PackedState], specs: list[OuterSpec], *setup: Any) -> None:
        """Set the server up.

        Args:
            parts: The state, cut into the parts of the shards.
            specs: The descriptions of their slices of x.
            setup: Further arguments of `ParameterServer.setup`, the same for all.

        Raises:
            ServerLostError: It could not start.
        """
        self._snapshot, self._specs, self._setup = parts, specs, setup
        self._furthest, self._num_losses = parts[0].version, 0
        if self.servers:
            with suppress(ServerGone, ServerLostError):
                return self._set_up()
            log.info("the parameter server of the last run is gone, starting another")
            self.stop()
            self._num_losses = 0
        try:
            self._set_up()
        except ServerGone as error:
            if error.__cause__ is None:  # it has not answered: another one would be no faster
                raise ServerLostError(f"the parameter server could not start: {error}") from error
            self.replace(error)

    def stop(self) -> None:
        """Kill the server."""
        for server in self.servers:
            self._runtime.kill(server)
        self.servers = []

    def ask(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None = None) -> list[Any]:
        """The answers of the server to calls; `timeout_s` replaces that of this object.

        Raises:
            ServerGone: The server, or an answer of it, is lost.
            SumLost: It could not read what it was sent.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            return list(self._runtime.get(list(refs), limit_s))
        except exceptions.GetTimeoutError:
            raise self._failed(_no_answer(limit_s)) from None
        except exceptions.RayError as error:
            raise self._failed(error) from error

    def _failed(self, error: exceptions.RayError) -> Exception:
        """The exception to raise for a call that failed with `error`."""
        draining = self._runtime.draining()
        if not draining or not any(node in draining for node in self._nodes):
            self._num_losses += 1  # the end of a node that was announced is no failure
        work = f"the step from version {self._version}"
        event = Event(SERVER, "the parameter server", work, error)
        decision = self._failures.decide(event, History(self._num_losses))
        if isinstance(decision, Raise):
            return decision.error
        if isinstance(decision, Retry):
            # No pause: the sum has to be computed again first.
            return SumLost(message(error))
        self._num_lost += 1
        return ServerGone(message(error), decision.after_s)

    def check(self) -> float | None:
        """Seconds until this should be called again, while there is nothing else to ask it.

        Raises:
            ServerGone: A server has not answered for too long.
        """
        if self._timeout_s is None:
            return None
        now = self._runtime.now()
        waited_s = now - self._checked_at
        if self._checking and self._all_ready(self._checking):
            self.ask(self._checking)
            self._checking = []
        if self._checking:
            if waited_s > self._timeout_s:
                raise self._failed(_no_answer(self._timeout_s))
            return self._timeout_s - waited_s
        if waited_s > self._timeout_s / 2:
            self._checking, self._checked_at, waited_s = self.versions(), now, 0.0
        return self._timeout_s / 2 - waited_s

    def versions(self) -> list[ObjectRef[Any]]:
        """References to the version of x in each shard."""
        return [server.version.remote() for server in self.servers]

    def pull(self) -> tuple[ObjectRef[Any], ...]:
        """References to x as workers read it, one for each shard."""
        return tuple(server.pull.remote() for server in self.servers)

    def apply(
        self,
        results: Sequence[LeaseResult],
        weights: Sequence[float],
        totals: Sequence[tuple[ObjectRef[Any], ...]],
    ) -> tuple[StepResult, tuple[ObjectRef[Any], ...]]:
        """(what one outer step with these leases did, references to the new x).

        Each step returns two objects. The driver reads the small one; the new x stays in the shared
        memory of the server's node, and only its reference goes through the driver to the workers.
        It is a return value, and nothing that the server puts there itself, because Ray deletes
        what a process has put when that process dies; return values belong to the caller.

        Args:
            results: The leases.
            weights: The weight of each.
            totals: References to the sums of each, by shard.
        """
        pushed = list(zip(*totals, strict=True))
        if len(self.servers) == 1:
            calls = [self.server.apply.options(num_returns=2).remote(results, weights, *pushed[0])]
        else:
            # Two rounds: clipping needs the norm over all shards, and if one cannot take the step,
            # none may have taken it, or x would be of two versions.
            pairs = zip(self.servers, pushed, strict=True)
            squares = self.ask(
                [server.prepare.remote(results, weights, *sums) for server, sums in pairs]
            )
            norm = norm_of_blocks(itertools.chain.from_iterable(squares))
            calls = self._commit(norm)
        steps = self.ask([step for step, _ in calls])
        return steps[0], tuple(outer for _, outer in calls)

    def _commit(self, norm: float) -> list[Any]:
        """The calls with which each shard takes the step; none is left out, whatever comes up."""
        calls: list[Any] = []

        def send() -> None:
            while len(calls) < len(self.servers):
                server = self.servers[len(calls)]
                calls.append(server.commit.options(num_returns=2).remote(norm))

        with signals_held():  # in between x is of two versions
            try:
                send()
            except BaseException:
                send()
                raise
        return calls

    def state(self) -> list[PackedState]:
        """Everything that must persist, by shard; another server would resume from here."""
        parts = self.ask(self._states())
        if len(versions_of(parts)) > 1:
            raise self._failed(
                exceptions.RaySystemError(f"its shards have versions {versions_of(parts)} of x")
            )
        if self.gather is not None:
            self.gather(parts[0].version)
        self._keep(parts)
        return self._snapshot

    def last_state(self, limit_s: float) -> list[PackedState]:
        """The state of the server if it gives it in time, or else the last snapshot.

        Starts nothing, and raises nothing for a loss: with this a run ends, perhaps because the
        cluster is gone.
        """
        refs = pending = self._states()
        deadline = self._runtime.now() + limit_s
        while pending:
            left_s = deadline - self._runtime.now()
            if left_s <= 0 or self._runtime.is_gone():
                return self._snapshot
            ready = set(self._runtime.ready(pending, min(1.0, left_s)))
            pending = [ref for ref in pending if ref not in ready]
        with suppress(exceptions.RayError):
            parts = self._runtime.get(refs)
            if self.gather is not None and len(versions_of(parts)) == 1:
                try:
                    self.gather(parts[0].version, deadline - self._runtime.now())
                except Exception as error:  # noqa: BLE001 - whatever it is: there is a snapshot
                    log.warning("the states of the last steps are lost: %s", error)
                    return self._snapshot
            self._keep(parts)
        return self._snapshot

    def _states(self) -> list[ObjectRef[Any]]:
        return [server.state.remote() for server in self.servers]

    def stepped(self, version: int) -> None:
        """Note that x has this version now."""
        self._version = version
        if version > self._furthest:
            self._furthest, self._num_losses = version, 0
        if self.gather is not None:
            return
        self._fetch()
        if not self._fetching and version - self._asked_at >= self._snapshot_every:
            self._fetching, self._asked_at = self._states(), version

    @property
    def is_due(self) -> bool:
        """Whether the last snapshot is `snapshot_every` versions old."""
        return self._version - self._snapshot[0].version >= self._snapshot_every

    def take_num_lost(self) -> int:
        """Servers lost since this was last called."""
        lost, self._num_lost = self._num_lost, 0
        return lost

    def replace(self, error: ServerGone) -> None:
        """Start another server from the last snapshot.

        Raises:
            ServerLostError: Servers were lost too often in a row.
        """
        self._fetch()
        while True:
            log.warning(
                "the parameter server was lost at version %d of x; another one resumes from "
                "version %d: %s",
                self._version,
                self._snapshot[0].version,
                str(error).partition("\n")[0],
            )
            self._runtime.sleep(error.after_s)
            self.stop()  # it may be out of reach and still at work
            try:
                return self._set_up()
            except ServerGone as again:
                error = again

    def take_notice(self) -> bool:
        """Whether the end of a node of the server or of this process was announced just now."""
        return self._notices.take([self._runtime.this_node(), *self._nodes])

    def leave_nodes(self) -> bool:
        """Whether the server was moved, between two steps, from nodes that will stop.

        It stays on the driver's node, with which the run ends anyway.
        """
        left = self._notices.noted - self._left - {self._runtime.this_node()}
        if not left or not any(node in left for node in self._nodes):
            return False
        self._left |= left  # once: there may be no other place
        self.state()
        log.info("the parameter server leaves nodes that will stop: %s", ", ".join(sorted(left)))
        self.stop()
        self._set_up()
        return True

    def _set_up(self) -> None:
        """Set the server up with the last snapshot; makes one if there is none."""
        if not self.servers:
            self.servers = [self._make_server(number) for number in range(len(self._snapshot))]
        refs = [self._runtime.put(part) for part in self._snapshot]
        calls = [
            server.setup.remote(ref, spec, *self._setup)
            for server, ref, spec in zip(self.servers, refs, self._specs, strict=True)
        ]
        self._nodes = self.ask(calls, self._start_timeout_s)
        self._version = self._asked_at = self._snapshot[0].version
        self._fetching, self._checking = [], []
        self._checked_at = self._runtime.now()

    def _fetch(self) -> None:
        """Keep the snapshot that was asked for, if it has arrived."""
        if not self._fetching or not self._all_ready(self._fetching):
            return
        with suppress(exceptions.RayError):  # the next call to the server reports its loss
            self._keep(self._runtime.get(self._fetching))
        self._fetching = []

    def _keep(self, parts: list[PackedState]) -> None:
        if len(versions_of(parts)) == 1 and parts[0].version >= self._snapshot[0].version:
            self._snapshot = [owned(part) for part in parts]

    def _all_ready(self, refs: list[ObjectRef[Any]]) -> bool:
        return len(self._runtime.ready(refs)) == len(refs)


def _no_answer(limit_s: float | None) -> exceptions.RayError:
    return exceptions.GetTimeoutError(f"no answer for {limit_s:g} s")
