"""Tasks that are sampled while the lease before is computed: the same bytes, and in time."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch

from metadist.algorithms import ITD
from metadist.cluster import ASP, BSP, SSP, Buffered, Failures, LeaseError, WorkerLostError, Workers
from metadist.cluster.actors.buffers import OuterSpec, join_states
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.worker import Worker
from tests.cluster.in_process import World, holding, scheduled
from tests.cluster.parameter_server.test_held_states import Ridge
from tests.cluster.toy import (
    BrokenTaskError,
    FewLines,
    Lines,
    Moving,
    first_state,
    happens_first,
    local_run,
    make_workload,
    state_bytes,
)
from tests.pretend_device import DEVICE, pretending

SEEN: list[tuple[int, int, bool]] = []
"""(task, step, whether a thread sampled it), in order."""


def note(index: int, step: int = 0) -> None:
    # That of this module: workers get a copy of what is defined here.
    from tests.cluster.parameter_server.test_ahead import SEEN

    SEEN.append((index, step, threading.current_thread() is not threading.main_thread()))


class Noted(Lines):
    def sample(self, index: int) -> Any:
        note(index)
        return super().sample(index)


class NotedMoving(Moving):
    def sample_at(self, index: int, step: int) -> Any:
        note(index, step)
        return super().sample_at(index, step)


class NotedFew(FewLines):
    """A stream of few tasks, whose states can be kept."""

    def sample_at(self, index: int, step: int) -> Any:
        note(index, step)
        return super().sample(10_000 * step + index)._replace(id=index)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Everything is sampled ahead, however quick it is."""
    monkeypatch.setattr("metadist.feed.WORTH_S", 0.0)
    SEEN.clear()


def run(scheduler: Any, steps: int, problem: Any = None) -> Any:
    """(the state after so many steps, the reports)."""
    reports = list(scheduler.run(steps))
    spec = OuterSpec.of(first_state(problem).outer)
    return join_states(scheduler.state(), spec), reports


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("sampler", [Noted(), NotedMoving()], ids=["tasks", "stream"])
def test_workers_sample_ahead_with_the_bytes_of_one_process(sampler, prefetch):
    workload = make_workload(sampler, meta_batch_size=6)
    expected = state_bytes(local_run(8, workload)[0])
    for seed in range(4):
        SEEN.clear()
        random = Random(seed)
        world = World(random.randrange)
        scheduler = scheduled(world, workload, first_state(), num_workers=3, prefetch=prefetch)
        found, _ = run(scheduler, 8)
        assert state_bytes(found) == expected
        ahead = [task for *task, is_ahead in SEEN if is_ahead]
        assert len(ahead) > 20, "most of 48 leases"
        # Nothing past the end, and of a stream nothing of another step than that of the task.
        assert max(index for index, *_ in SEEN) == 47
        if isinstance(sampler, NotedMoving):
            assert all(step == index // 6 for index, step, _ in SEEN)


@pytest.mark.parametrize("policy", [BSP(), ASP(), SSP(2), Buffered(3)], ids=str)
def test_no_worker_that_dies_takes_what_it_has_sampled_along(policy):
    workload = make_workload(Noted(), meta_batch_size=6)
    expected = state_bytes(local_run(6, workload)[0])
    for seed in range(6):
        random = Random(seed)
        world = World(random.randrange)

        def kill(world: World = world, random: Random = random) -> None:
            for kind, chance in ((Worker, 0.05), (ParameterServer, 0.01)):
                for actor in world.of(kind):
                    if random.random() < chance:
                        actor.die()

        scheduler = scheduled(world, workload, first_state(), 3, policy, prefetch=1)
        world.happen = kill
        found, reports = run(scheduler, 6)
        if policy.is_synchronous:
            assert state_bytes(found) == expected
        last = {report.step.version: report for report in reports}
        applied = [result.lease_id for report in last.values() for result in report.results]
        assert sorted(applied) == list(range(len(applied)))
    assert any(is_ahead for *_, is_ahead in SEEN)


@pytest.mark.parametrize("sampler", [Noted(), NotedMoving()], ids=["tasks", "stream"])
def test_workers_on_a_device_sample_ahead_on_the_host(sampler, monkeypatch):
    workload = make_workload(sampler, meta_batch_size=6)
    expected = state_bytes(local_run(4, workload)[0])
    SEEN.clear()
    monkeypatch.setattr(
        "metadist.cluster.parameter_server.worker.pick_device", lambda device: DEVICE
    )
    with pretending():
        scheduler = scheduled(World(Random(0).randrange), workload, first_state(), 3, prefetch=1)
        found, _ = run(scheduler, 4)
    assert state_bytes(found) == expected
    assert sum(is_ahead for *_, is_ahead in SEEN) >= 15


def test_of_a_stream_nothing_is_sampled_ahead_where_nobody_knows_its_step():
    workload = make_workload(NotedMoving(), meta_batch_size=6)
    world = World(Random(0).randrange)
    run(scheduled(world, workload, first_state(), 3, ASP(), prefetch=1), 10)
    assert not any(is_ahead for *_, is_ahead in SEEN)
    assert len(SEEN) == 10


def test_workers_that_hold_states_sample_ahead_too():
    workload = replace(
        make_workload(NotedFew(), Ridge()),
        algorithm=ITD(inner_steps=1, inner_lr=0.1),
        keep_state=True,
    )
    first = first_state(Ridge())
    expected = state_bytes(local_run(5, workload)[0])
    SEEN.clear()
    scheduler, held = holding(World(Random(0).randrange), workload, first, 2, 3)
    found, _ = run(scheduler, 5, Ridge())
    assert state_bytes(found._replace(states=held.at(found.version))) == expected
    # Each task is sampled once a step; in a thread but for the first of each worker.
    assert sorted(task for *task, _ in SEEN) == [[i, step] for i in range(4) for step in range(5)]
    assert sum(is_ahead for *_, is_ahead in SEEN) >= 12


@dataclass(frozen=True)
class Fatal(Lines):
    """Slow, and the process is killed at one task."""

    index: int = 0

    def sample(self, index: int) -> Any:
        time.sleep(0.01)
        if index == self.index:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index)


@dataclass(frozen=True)
class Failing(Lines):
    """Slow, and raises at one task: an error of its disk at first, then one for ever."""

    index: int = 0
    folder: str = ""

    def sample(self, index: int) -> Any:
        time.sleep(0.01)
        if index == self.index:
            if happens_first(self.folder, "away"):
                raise ConnectionError("the share is away")
            raise BrokenTaskError(f"no file for task {index}")
        return super().sample(index)


def test_a_task_that_kills_who_samples_it_ahead_is_named(executor):
    started = executor(
        make_workload(Fatal(index=9)),
        workers=Workers(num_workers=2),
        failures=Failures(max_losses=2, backoff_s=0.0),
    )
    with pytest.raises(WorkerLostError, match=r"lease 9 \(tasks 9\) lost its worker|in a row"):
        list(started.run(5))


def test_an_error_ahead_of_time_is_one_of_its_own_lease(executor, tmp_path):
    started = executor(
        make_workload(Failing(index=9, folder=str(tmp_path))),
        workers=Workers(num_workers=2),
        failures=Failures(max_losses=2, backoff_s=0.0),
    )
    retried = []
    reports = started.run(5)
    for report in itertools.islice(reports, 2):
        retried += report.retried
    with pytest.raises(LeaseError, match=r"lease 9 \(tasks 9\)[^$]*no file for task 9"):
        next(reports)
    # What a thread has met is counted once, and when it is the turn of that lease.
    assert not retried
    assert torch.equal(*[state.outer["weight"] for state in (started.state(), local_run(2)[0])])
