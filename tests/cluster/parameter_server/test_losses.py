"""Workers and servers that die: nothing is lost, nothing is counted twice, nothing hangs."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch
from ray import exceptions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metadist.cluster import (
    ASP,
    SSP,
    ClusterError,
    Failures,
    RayExecutor,
    Server,
    ServerLostError,
    WorkerLostError,
    Workers,
)
from metadist.cluster.actors.placement import Placement
from metadist.cluster.actors.pool import Runtime
from metadist.compute import Compute
from tests.algorithms.directions import NEW_TASKS, trainer
from tests.cluster.toy import (
    Deadly,
    FatalStep,
    Stuck,
    Waiting,
    cpus_taken,
    local_run,
    make_workload,
    state_bytes,
)
from tests.helpers import becomes
from tests.problems import assert_same_bytes


def total(reports, field):
    return sum(getattr(report, field) for report in reports)


def test_a_killed_worker_changes_no_byte(executor, tmp_path):
    expected, _ = local_run(4)
    running = executor(make_workload(Deadly(indices=(5,), folder=str(tmp_path))))
    reports = list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(expected)
    assert total(reports, "lost_workers") == 1
    # Another may have waited behind it.
    assert 5 in [n for report in reports for n in report.reissued]
    assert [report.step.version for report in reports] == [1, 2, 3, 4]


def test_a_worker_that_ray_gave_up_is_replaced(executor, tmp_path):
    expected, _ = local_run(3)
    gate = tmp_path / "gate"
    running = executor(make_workload(Waiting(index=4, gate=str(gate))))
    reports = running.run(3)
    first = next(reports)
    assert becomes(lambda: (tmp_path / "gate.waiting").exists())
    for slot in running._pool._slots:
        ray.kill(slot.actor, no_restart=True)
    gate.touch()
    rest = list(reports)
    assert state_bytes(running.state()) == state_bytes(expected)
    assert total([first, *rest], "lost_workers") == 2


@pytest.mark.slow
def test_a_worker_that_is_lost_between_leases_is_replaced(executor):
    running = executor()
    list(running.run(2))
    for slot in running._pool._slots:
        ray.kill(slot.actor, no_restart=True)
    list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(local_run(4)[0])


def test_an_interrupt_leaves_a_state_to_save(executor, monkeypatch, tmp_path):
    gate = tmp_path / "gate"
    running = executor(make_workload(Waiting(index=10, gate=str(gate))))
    reports = running.run(4)
    next(reports)
    next(reports)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        list(reports)
    state = running.state()
    assert (state.version, state.applied_below, state.applied) == (2, 8, ())
    gate.touch()
    list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(local_run(4)[0])


def server_pid(running):
    return ray.get(running._supervisor.server.__ray_call__.remote(lambda _: os.getpid()))


class OutOfMemory(Runtime):
    """Kills the server, and reports it as Ray's memory monitor does, once."""

    def __init__(self, server: Any) -> None:
        self.servers = [server]

    def get(self, refs: Any, timeout_s: float | None = None) -> Any:
        if self.servers:
            kill_for_good(self.servers.pop())
            raise exceptions.OutOfMemoryError("The actor was killed: the node is low on memory.")
        return super().get(refs, timeout_s)


@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL", "out of memory"])
def test_a_killed_server_changes_no_byte(executor, caplog, monkeypatch, how):
    running = executor()
    reports = running.run(4)
    seen = [next(reports), next(reports)]
    running.state()  # as for a checkpoint
    seen.append(next(reports))
    if how == "ray.kill":
        ray.kill(running._supervisor.server)
    elif how == "SIGKILL":
        os.kill(server_pid(running), signal.SIGKILL)
    else:
        runtime = OutOfMemory(running._supervisor.server)
        monkeypatch.setattr(running._supervisor, "_runtime", runtime)
    seen += reports
    assert [report.step.version for report in seen] == [1, 2, 3, 3, 4]
    assert seen[2].step == seen[3].step
    assert state_bytes(running.state()) == state_bytes(local_run(4)[0])
    assert (total(seen, "lost_servers"), total(seen, "lost_workers")) == (1, 0)
    assert {8, 9, 10, 11} <= set(seen[3].reissued)
    assert "lost at version 3 of x; another one resumes from version 2: The actor" in caplog.text


def kill_for_good(actor: Any) -> None:
    """Kill it, and wait until it is dead: until then it may answer."""
    ray.kill(actor)
    with suppress(exceptions.RayActorError):
        while True:
            ray.get(actor.version.remote())


def test_the_state_can_be_had_when_the_server_is_dead(executor):
    running = executor()
    reports = running.run(3)
    next(reports), next(reports)
    kill_for_good(running._supervisor.server)
    assert running.state().version == 0
    assert [report.step.version for report in reports] == [1, 2, 3]
    kill_for_good(running._supervisor.server)
    # Nothing was asked for since.
    assert running.state().version == 0
    assert [report.step.version for report in running.run(3)] == [1, 2, 3]
    assert state_bytes(running.state()) == state_bytes(local_run(3)[0])


@pytest.mark.slow
def test_a_server_that_always_dies_ends_the_run(executor):
    running = executor(make_workload(problem=FatalStep()), failures=Failures(max_losses=2))
    message = "lost 2 times in a row without a new version of x, max_losses=2.* from version 0: "
    with pytest.raises(ServerLostError, match=message):
        list(running.run(2))


class Killing(RayExecutor):
    """Kills its server after each of some versions, when x has it for the first time."""

    to_come: tuple[int, ...] = (2, 5, 9)

    def run(self, until_version):
        for report in super().run(until_version):
            yield report
            if report.step.version in self.to_come:
                self.to_come = self.to_come[1:]
                assert self._supervisor is not None
                ray.kill(self._supervisor.server)


@pytest.mark.parametrize(
    ("name", "keep_state"),
    [("soba", True), pytest.param("mrbo", False, marks=pytest.mark.slow)],
    ids=["kept state", "two points"],
)
def test_what_a_step_left_for_the_next_survives_the_server(
    free_cluster, tmp_path, name, keep_state
):
    def make(**options):
        return trainer(NEW_TASKS[name], keep_state, checkpoint_every=2, log_every=1, **options)

    whole = make()
    expected = whole.fit(10)
    killing = Killing(Workers(num_workers=2, start_timeout_s=600), server=Server(snapshot_every=1))
    disturbed = make(run_dir=tmp_path / "run", executor=killing)
    found = disturbed.fit(10)
    assert_same_bytes(disturbed.outer, whole.outer)
    assert (found.num_steps, found.num_tasks) == (expected.num_steps, expected.num_tasks)
    if keep_state:
        for index in range(2):
            assert_same_bytes(disturbed.inner(index), whole.inner(index))
    assert killing.to_come == ()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("outer/hypergradient_norm")]
    assert steps == list(range(1, 11))


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(ASP(), marks=pytest.mark.slow),
        SSP(staleness=0),
    ],
)
def test_no_policy_gets_stuck_or_counts_twice_when_workers_die(executor, tmp_path, policy):
    workload = make_workload(Deadly(indices=(3,), folder=str(tmp_path)))
    running = executor(workload, policy=policy)
    reports = list(running.run(12))
    applied = [n for report in reports for n in report.step.applied]
    assert sorted(applied) == list(range(len(applied)))
    assert total(reports, "lost_workers") == 1
    if isinstance(policy, SSP):
        assert max(max(report.step.staleness) for report in reports) <= policy.staleness


def test_a_task_that_always_kills_its_worker_ends_the_run(executor):
    running = executor(make_workload(Deadly(indices=(6,))), failures=Failures(max_losses=2))
    with pytest.raises(WorkerLostError) as caught:
        list(running.run(4))
    assert "lease 6 (tasks 6) lost its worker 2 times" in str(caught.value) or (
        "was lost 2 times in a row" in str(caught.value)
    )
    assert running.state().version == 1


def test_a_lease_that_takes_too_long_is_given_to_another_worker(executor, tmp_path):
    gate = tmp_path / "gate"
    waiting = tmp_path / "gate.waiting"
    workload = make_workload(Waiting(index=1, gate=str(gate)))
    running = executor(workload, failures=Failures(timeout_s=5.0))

    def open_when_replaced() -> None:
        pids: set[str] = {""}

        def second_waits() -> bool:
            if waiting.exists():
                pids.add(waiting.read_text())
            return len(pids) > 2

        becomes(second_waits)
        gate.touch()

    watcher = threading.Thread(target=open_when_replaced)
    watcher.start()
    reports = list(running.run(1))
    watcher.join()
    assert total(reports, "lost_workers") >= 1
    assert 1 in reports[0].reissued
    assert state_bytes(running.state()) == state_bytes(local_run(1)[0])


def test_a_lease_that_takes_long_goes_to_an_idle_worker_too(executor, tmp_path):
    gate = tmp_path / "gate"
    running = executor(make_workload(Stuck(index=5, gate=str(gate))), backup_factor=2.0)
    reports = list(running.run(3))
    workers = {tuple(found.worker for found in report.results) for report in reports[2:]}
    assert len({name for names in workers for name in names}) == 1, "the other is stuck"
    assert state_bytes(running.state()) == state_bytes(local_run(3)[0])
    gate.touch()
    # It comes back; the answer that it gives late is ignored.
    slots = running._pool._slots
    assert becomes(lambda: running._pool.wait(0.1) == [] and all(s.item is None for s in slots))
    reports = list(running.run(6))
    assert [report.step.version for report in reports] == [4, 5, 6]
    assert total(reports, "lost_workers") == 0
    assert state_bytes(running.state()) == state_bytes(local_run(6)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where torch sees no GPU")
def test_workers_that_cannot_start_are_reported(executor, monkeypatch):
    monkeypatch.setattr(Placement, "_num_gpus", lambda self, device: 0.0)
    with pytest.raises(ClusterError, match="device must be 'cpu' or 'auto' where torch sees no"):
        executor(
            replace(make_workload(), compute=Compute(device="cuda")), workers=Workers(num_workers=1)
        )
    assert becomes(lambda: cpus_taken() == 0)
