"""`Keeper`: the parameter server, and what it takes to start another in its place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray import ObjectRef, exceptions

from metadist.cluster.buffers import PackedState
from metadist.cluster.errors import ServerLostError, message
from metadist.cluster.fleet import Retry

log = logging.getLogger("metadist.cluster")


class ServerGone(Exception):
    """The parameter server is lost; `Keeper.replace` starts another. Never leaves the cluster."""


class Keeper:
    """Asks the parameter server, and keeps a state from which another can go on.

    The state is held in the shared memory of the driver's node. It is fetched while the workers
    compute, and takes the place of the last one when it is there: two of them at the most, each
    as large as a checkpoint.

    Args:
        make_server: creates the actor.
        retry: `max_losses` without a new version of x end the run; pauses between attempts.
        snapshot_every: versions of x between two states, >= 1.
        timeout_s: how long a server may take to start.
    """

    def __init__(
        self, make_server: Callable[[], Any], retry: Retry, snapshot_every: int, timeout_s: float
    ) -> None:
        self._make_server = make_server
        self._retry = retry
        self._snapshot_every = snapshot_every
        self._timeout_s = timeout_s
        self._fetching: ObjectRef[Any] | None = None
        self._asked_at = self._version = self._furthest = 0
        self._num_losses = self._num_lost = 0
        self.server: Any = None
        """The actor of a `ParameterServer`."""

    def start(self, state: PackedState, *setup: Any) -> None:
        """Set the server up with `state` and further arguments of `ParameterServer.setup`.

        Raises:
            ServerLostError: it could not start.
        """
        self._snapshot, self._setup = state, setup
        self._furthest, self._num_losses = state.version, 0
        if self.server is not None:
            with suppress(ServerGone):
                return self._set_up()
            log.info("the parameter server of the last run is gone, starting another")
            self.stop()
        try:
            self._set_up()
        except ServerGone as error:
            raise ServerLostError(f"the parameter server could not start: {error}") from error

    def stop(self) -> None:
        """Kill the server."""
        if self.server is not None:
            ray.kill(self.server)
        self.server = None

    def ask(self, ref: ObjectRef[Any], timeout_s: float | None = None) -> Any:
        """The answer of the server to a call; raises ServerGone if it is lost."""
        try:
            return ray.get(ref, timeout=timeout_s)
        except exceptions.RayTaskError:
            raise  # it lives
        except (exceptions.RayActorError, exceptions.GetTimeoutError) as error:
            raise ServerGone(message(error)) from error

    def state(self) -> PackedState:
        """Everything that must persist; another server would go on from here."""
        self._keep(self.ask(self.server.state.remote()))
        return self._snapshot

    def stepped(self, version: int) -> None:
        """Note that x has this version now."""
        self._version = version
        if version > self._furthest:
            self._furthest, self._num_losses = version, 0
        self._fetch()
        if self._fetching is None and version - self._asked_at >= self._snapshot_every:
            self._fetching, self._asked_at = self.server.state.remote(), version

    def take_num_lost(self) -> int:
        """Servers lost since this was last called."""
        lost, self._num_lost = self._num_lost, 0
        return lost

    def replace(self, error: ServerGone) -> None:
        """Start another server from the last state.

        Raises:
            ServerLostError: servers were lost too often in a row.
        """
        self._fetch()
        while True:
            self._num_losses += 1
            self._num_lost += 1
            if self._num_losses >= self._retry.max_losses:
                raise ServerLostError(
                    f"the parameter server was lost {self._num_losses} times in a row without a "
                    f"new version of x, max_losses={self._retry.max_losses}: its machine may lack "
                    f"memory. The last checkpoint holds, resume from it. The last loss, at version "
                    f"{self._version}: {error}"
                ) from error
            log.warning(
                "the parameter server was lost at version %d of x; another goes on from version "
                "%d: %s",
                self._version,
                self._snapshot.version,
                str(error).partition("\n")[0],
            )
            if self._num_losses > 1:
                time.sleep(self._retry.pause_s(self._num_losses - 1))
            self.stop()  # it may be out of reach and still at work
            try:
                self._set_up()
            except ServerGone as again:
                error = again
            else:
                return

    def _set_up(self) -> None:
        """Set the server up with the last state; makes one if there is none."""
        if self.server is None:
            self.server = self._make_server()
        arguments = (ray.put(self._snapshot), *self._setup)
        self.ask(self.server.setup.remote(*arguments), self._timeout_s)
        self._version = self._asked_at = self._snapshot.version
        self._fetching = None

    def _fetch(self) -> None:
        """Keep the state that was asked for, if it has come."""
        if self._fetching is None or not ray.wait([self._fetching], timeout=0)[0]:
            return
        with suppress(exceptions.RayActorError, exceptions.ObjectLostError):  # the next call tells
            self._keep(ray.get(self._fetching))
        self._fetching = None

    def _keep(self, state: PackedState) -> None:
        if state.version >= self._snapshot.version:
            self._snapshot = state
