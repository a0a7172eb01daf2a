"""Workers and servers that die: nothing is lost, nothing is counted twice, nothing hangs."""

from __future__ import annotations

import signal
import threading

import pytest
import ray
import torch

from metadist.cluster import ClusterError, RayExecutor, ServerLostError, WorkerLostError
from metadist.cluster.fleet import Retry
from tests.cluster.toy import (
    Deadly,
    Waiting,
    cpus_taken,
    local_run,
    make_workload,
    state_bytes,
    wait_until,
)


def total(reports, field):
    return sum(getattr(report, field) for report in reports)


def test_a_killed_worker_changes_no_byte(executor, tmp_path):
    expected, _ = local_run(4)
    running = executor(make_workload(Deadly(indices=(5,), folder=str(tmp_path))))
    reports = list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(expected)
    assert total(reports, "lost_workers") == 1
    assert [n for report in reports for n in report.reissued] == [5]
    assert [report.step.version for report in reports] == [1, 2, 3, 4]


def test_a_worker_that_ray_gave_up_is_replaced(executor, tmp_path):
    expected, _ = local_run(3)
    gate = tmp_path / "gate"
    running = executor(make_workload(Waiting(index=4, gate=str(gate))))
    reports = running.run(3)
    first = next(reports)
    assert wait_until(lambda: (tmp_path / "gate.waiting").exists())
    for slot in running._fleet._slots:
        ray.kill(slot.actor, no_restart=True)
    gate.touch()
    rest = list(reports)
    assert state_bytes(running.state()) == state_bytes(expected)
    assert total([first, *rest], "lost_workers") == 2


def test_a_worker_that_is_lost_between_leases_is_replaced(executor):
    running = executor()
    list(running.run(2))
    for slot in running._fleet._slots:
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


def test_a_dead_server_ends_the_run(executor, tmp_path):
    gate = tmp_path / "gate"
    running = executor(make_workload(Waiting(index=6, gate=str(gate))))
    reports = running.run(3)
    next(reports)
    ray.kill(running._server)
    gate.touch()
    with pytest.raises(ServerLostError, match=r"died at version 1 .* last checkpoint holds"):
        list(reports)
    with pytest.raises(ServerLostError):
        running.state()


def test_a_dead_server_is_no_death_of_workers_that_miss_its_x(executor):
    running = executor()
    ray.kill(running._server)
    with pytest.raises(ServerLostError):
        list(running.run(1))


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "asp"},
        {"policy": "ssp", "staleness": 0},
    ],
)
def test_no_policy_gets_stuck_or_counts_twice_when_workers_die(executor, tmp_path, options):
    workload = make_workload(Deadly(indices=(3,), folder=str(tmp_path)))
    running = executor(workload, **options)
    reports = list(running.run(12))
    applied = [n for report in reports for n in report.step.applied]
    assert sorted(applied) == list(range(len(applied)))
    assert total(reports, "lost_workers") == 1
    if "staleness" in options:
        assert max(max(report.step.staleness) for report in reports) <= options["staleness"]


def test_a_task_that_always_kills_its_worker_ends_the_run(executor):
    running = executor(make_workload(Deadly(indices=(6,))), max_losses=2)
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
    running = executor(workload, lease_timeout_s=5.0)

    def open_when_replaced() -> None:
        pids: set[str] = {""}

        def second_waits() -> bool:
            if waiting.exists():
                pids.add(waiting.read_text())
            return len(pids) > 2

        wait_until(second_waits)
        gate.touch()

    watcher = threading.Thread(target=open_when_replaced)
    watcher.start()
    reports = list(running.run(1))
    watcher.join()
    assert total(reports, "lost_workers") >= 1
    assert 1 in reports[0].reissued
    assert state_bytes(running.state()) == state_bytes(local_run(1)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where torch sees no GPU")
def test_workers_that_cannot_start_are_reported(executor, monkeypatch):
    monkeypatch.setattr(RayExecutor, "_num_gpus", lambda self: 0.0)
    with pytest.raises(ClusterError, match="device must be 'cpu' or 'auto' where torch sees no"):
        executor(num_workers=1, device="cuda")
    assert wait_until(lambda: cpus_taken() == 0)


def test_pauses_double_up_to_a_limit():
    retry = Retry(backoff_s=0.5, max_backoff_s=3)
    assert [retry.pause_s(n) for n in (1, 2, 3, 4)] == [0.5, 1, 2, 3]


@pytest.mark.parametrize("name", ["backoff_s", "max_backoff_s", "all_lost_s"])
def test_retry_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
        Retry(**{name: -1})
