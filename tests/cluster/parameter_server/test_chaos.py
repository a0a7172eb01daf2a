"""Random kills at random moments, of workers and of the parameter server."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter

import pytest
import ray
import torch
from ray import exceptions

from metadist.cluster import ASP, SSP, Buffered, Failures, Server, Workers
from metadist.executor import StepReport
from metadist.optimizer import OuterOptimizer
from tests.algorithms.directions import run_in_one_process, with_what_a_step_leaves
from tests.cluster.toy import ADAM, Marks, Tally, first_state, local_run, make_workload, state_bytes

KINDS = ("worker by SIGKILL", "worker by ray.kill", "server by SIGKILL", "server by ray.kill")


class Chaos:
    """Runs to a version while processes are killed, each at a random time after a random step.

    Args:
        running: a started executor.
        until: the version at the end.
        num_kills: how many; as many of each kind as of any other, or one more.
        seed: of versions, times, kinds and victims.
    """

    def __init__(self, running, until: int, num_kills: int, seed: int) -> None:
        print(f"chaos of {num_kills} kills, seed {seed}")  # noqa: T201
        self._running = running
        self._until = until
        self._random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self._dead: set[object] = set()
        kinds = [KINDS[number % len(KINDS)] for number in range(num_kills)]
        self._random.shuffle(kinds)
        self._plan = sorted(
            (self._random.randrange(1, until - 1), self._random.uniform(0, 0.2), kind)
            for kind in kinds
        )
        self._threads: list[threading.Thread] = []

    def reports(self) -> list[StepReport]:
        """Of every step the last report of it."""
        reports: list[StepReport] = []
        for report in self._running.run(self._until):
            version = report.step.version
            del reports[version - 1 :]
            reports.append(report)
            assert len(reports) == version
            while self._plan and self._plan[0][0] <= version:
                _, *plan = self._plan.pop(0)
                self._threads.append(threading.Thread(target=self._kill_later, args=plan))
                self._threads[-1].start()
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            num_left = len(self._threads) + len(self._plan)
            if self._until - 1 - version <= 2 * num_left:
                # Few steps are left: one kill for each, since the next replaces who is dead.
                for thread in self._threads:
                    thread.join()
                if self._plan:
                    self._kill_later(*self._plan.pop(0)[1:])
        print(", ".join(f"{number} x {kind}" for kind, number in sorted(self.kills.items())))  # noqa: T201
        return reports

    def _kill_later(self, seconds: float, kind: str) -> None:
        time.sleep(seconds)
        victim, _, how = kind.partition(" by ")
        kill = self._kill_server if victim == "server" else self._kill_worker
        if kill(how):
            self.kills[kind] += 1
        else:
            # All are dead, and the driver replaces them on its way to the next step.
            self._plan.insert(0, (0, 0.05, kind))

    def _kill_server(self, how: str) -> bool:
        server = self._running._supervisor.server
        if server is None:
            return False
        try:
            pid = ray.get(server.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        except (exceptions.RayActorError, exceptions.GetTimeoutError):
            return False
        return self._kill(how, server, pid)

    def _kill_worker(self, how: str) -> bool:
        alive = [
            slot
            for slot in self._running._pool._slots
            if slot.is_alive and slot.info.pid not in self._dead
        ]
        if not alive:
            return False
        slot = self._random.choice(alive)
        return self._kill(how, slot.actor, slot.info.pid)

    def _kill(self, how: str, actor, pid: int) -> bool:
        if actor is None or pid in self._dead:
            return False
        self._dead.add(pid)
        if how == "ray.kill":
            ray.kill(actor)
            return True
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


OPTIONS = {"failures": Failures(max_losses=100), "server": Server(snapshot_every=3)}
SYNCHRONOUS = {"workers": Workers(num_workers=3), **OPTIONS}


@pytest.mark.parametrize(
    ("num_kills", "until"), [(6, 30), pytest.param(52, 160, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(2400)
def test_a_synchronous_run_ends_with_the_same_bytes_whoever_is_killed(executor, num_kills, until):
    running = executor(**SYNCHRONOUS)
    chaos = Chaos(running, until, num_kills, seed=num_kills)
    reports = chaos.reports()
    state, expected = local_run(until)
    assert sum(chaos.kills.values()) == num_kills
    assert [report.step for report in reports] == [report.step for report in expected]
    assert state_bytes(running.state()) == state_bytes(state)


@pytest.mark.slow
@with_what_a_step_leaves
@pytest.mark.timeout(1200)
def test_a_run_that_needs_the_step_before_ends_with_the_same_bytes(executor, name, keep_state):
    workload, first, local = run_in_one_process(name, keep_state, ADAM, meta_batch_size=4)
    list(local.run(40))
    running = executor(workload, first, **SYNCHRONOUS)
    chaos = Chaos(running, 40, 8, seed=8)
    chaos.reports()
    assert state_bytes(running.state()) == state_bytes(local.state())
    assert chaos.kills.total() == 8


@pytest.mark.parametrize(
    ("options", "num_kills", "until"),
    [
        pytest.param({"policy": SSP(3)}, 4, 40, marks=pytest.mark.slow),
        pytest.param({"policy": SSP(3)}, 24, 150, marks=pytest.mark.slow),
        pytest.param({"policy": ASP()}, 4, 100, marks=pytest.mark.slow),
        pytest.param({"policy": Buffered(2)}, 12, 100, marks=pytest.mark.slow),
    ],
    ids=["ssp", "ssp long", "asp", "buffered"],
)
@pytest.mark.timeout(1200)
def test_without_a_barrier_every_lease_is_in_x_exactly_once(executor, options, num_kills, until):
    # x counts how often each task was added to it.
    sgd = OuterOptimizer("sgd", lr=1.0)
    workload = make_workload(Marks(), Tally())
    running = executor(workload, first_state(Tally(), sgd), sgd, **options, **OPTIONS)
    chaos = Chaos(running, until, num_kills, seed=num_kills)
    reports = chaos.reports()
    assert chaos.kills.total() == num_kills
    counts = torch.zeros(512)
    for report in reports:
        assert report.step.repeated == ()
        if isinstance(options["policy"], SSP):
            assert max(report.step.staleness) <= 3
        for lease_id in report.step.applied:
            assert counts[lease_id] == 0
            counts[lease_id] = 1.0 / len(report.step.applied)
    num_leases = sum(len(report.step.applied) for report in reports)
    assert counts[:num_leases].all() and not counts[num_leases:].any()
    state = running.state()
    assert (state.version, state.applied_below, state.applied) == (until, num_leases, ())
    assert torch.equal(-state.outer["weight"], counts)
