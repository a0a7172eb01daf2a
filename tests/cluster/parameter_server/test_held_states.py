"""Kept states that stay on the workers: the bytes of one process, and no travelling."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from metadist.algorithms import ITD
from metadist.cluster import RayExecutor, Server, Workers
from metadist.cluster.actors.buffers import OuterSpec, join_states
from metadist.cluster.parameter_server import held as held_module
from metadist.cluster.parameter_server.held import Held, Homes, check_room
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.worker import Worker
from metadist.run.rebuild import config_of
from metadist.step_rules import Adam
from metadist.task import Batch, Task
from metadist.trainer import Trainer
from metadist.trees import Params
from tests.cluster.in_process import World, holding
from tests.cluster.toy import (
    ADAM,
    FewLines,
    Regression,
    first_state,
    happens_first,
    local_run,
    make_workload,
    state_bytes,
)
from tests.problems import assert_same_bytes


@dataclass(frozen=True)
class DeadlyAt(FewLines):
    """Kills its process when it samples a task of `deaths` for the so-many-th time in all."""

    folder: str = ""
    deaths: tuple[tuple[int, int], ...] = ()

    def sample(self, index: int) -> Any:
        if self.folder:
            count = 1
            while not happens_first(self.folder, f"task-{index}-{count}"):
                count += 1
            if (index, count) in self.deaths:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index)


@dataclass(frozen=True)
class Ridge(Regression):
    """Regression whose x is the logarithm of a weight decay."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"log_decay": torch.zeros(1)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"weight": torch.zeros(self.num_features), "bias": torch.zeros(1)}

    def encode(self, outer: Params, task: Task) -> Params:
        return outer

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        decay = (context["log_decay"].exp() * inner["weight"].square()).sum()
        return super().inner_loss(context, inner, batch) + 0.1 * decay

    outer_loss = Regression.inner_loss


@dataclass(frozen=True)
class Wide(Ridge):
    """With an x of 4 kB."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"log_decay": torch.zeros(1), "idle": torch.zeros(1000)}


def keeping(sampler: Any = None, num_features: int = 4) -> Any:
    steps = Adam(0.01, eps=1e-3, clip_norm=1.0, carry=True)
    return replace(
        make_workload(problem=Ridge(num_features)),
        sampler=sampler or FewLines(num_features),
        algorithm=ITD(3, inner_optimizer=steps),
        keep_state=True,
    )


HELD = {"state": "worker", "server": Server(snapshot_every=3)}


def test_states_that_stay_have_the_bytes_of_one_process(executor):
    _, local = local_run(NUM_STEPS, keeping())
    running = executor(keeping(), **HELD)
    reports = list(running.run(4))
    middle = running.state()
    assert state_bytes(middle) == expected(4)
    reports += running.run(NUM_STEPS)
    assert [report.step for report in reports] == [report.step for report in local]
    assert state_bytes(running.state()) == expected()
    assert sorted(middle.states) == [0, 1, 2, 3]
    running = executor(keeping(), middle, **HELD)
    list(running.run(NUM_STEPS))
    assert state_bytes(running.last_state()) == expected()


def test_killed_workers_and_servers_change_no_byte(executor, tmp_path):
    sampler = DeadlyAt(folder=str(tmp_path), deaths=((0, 5), (2, 6)))
    running = executor(keeping(sampler), **HELD)
    told = []
    running.notify = lambda event, **fields: told.append((event, fields))
    running._pool.notify = running.notify
    reports = []
    for report in running.run(NUM_STEPS):
        reports.append(report)
        if report.step.version == 5 and not any(r.lost_servers for r in reports):
            ray.kill(running._supervisor.server)
    assert state_bytes(running.state()) == expected()
    assert sum(report.lost_workers for report in reports) == 2
    assert sum(report.lost_servers for report in reports) == 1
    held = [fields["workers"] for event, fields in told if event == "states_held"]
    assert held[0] == ["worker-0: 0, 2", "worker-1: 1, 3"]
    assert len(held) > 1


@pytest.mark.slow
def test_one_worker_has_the_same_bytes(executor):
    running = executor(keeping(), workers=Workers(num_workers=1), **HELD)
    list(running.run(NUM_STEPS))
    assert state_bytes(running.state()) == expected()


@dataclass(frozen=True)
class Traced(Ridge):
    """Leaves the number of each process that builds an inner variable in a folder."""

    folder: str = ""

    def init_inner(self, outer: Params, task: Task) -> Params:
        (Path(self.folder) / str(os.getpid())).touch()
        return super().init_inner(outer, task)


def test_the_driver_builds_no_inner_variable_and_resumes_from_storage(
    free_cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr("metadist.run.checkpoint_files.LARGE_STATES_BYTES", 1)
    uri = f"memory://{tmp_path.name}"

    def make(run_dir=None, **options):
        problem = Traced(folder=str(tmp_path))
        method = keeping().algorithm
        return Trainer(problem, FewLines(), method, run_dir=run_dir, quiet=True, **options)

    def held():
        executor = RayExecutor(Workers(num_workers=2, start_timeout_s=600), state="worker")
        return make(uri, checkpoint_every=2, executor=executor, config="given: here\n")

    first = held()
    first.fit(3)
    again = held()
    assert again.restore() == "step-00000003"
    again.fit(5)
    assert not (tmp_path / str(os.getpid())).exists()
    whole = make()
    whole.fit(5)
    assert_same_bytes(again.outer, whole.outer)
    for index in range(4):
        assert_same_bytes(again.inner(index), whole.inner(index))


def test_a_run_of_python_writes_down_who_has_the_states():
    config = config_of({"executor": RayExecutor(state="worker")}, None)
    assert '"state": "worker"' in config


NUM_STEPS = 7


@cache
def expected(version: int = NUM_STEPS) -> bytes:
    """The state of a run in one process."""
    return state_bytes(local_run(version, keeping())[0])


def start_in_process(world, workload, num_workers, snapshot_every):
    """(the scheduler, its state as a function, that of an end)."""
    first = first_state(workload.problem)
    spec = OuterSpec.of(first.outer)
    scheduler, held = holding(world, workload, first, num_workers, snapshot_every)

    def whole(parts):
        state = join_states(parts, spec)
        return state._replace(states=held.at(state.version))

    return (
        scheduler,
        lambda: whole(scheduler.state()),
        lambda: whole(scheduler._supervisor.last_state(20.0)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_whoever_is_lost_the_bytes_are_those_of_one_process(seed):
    random = Random(seed)
    num_workers, snapshot_every = 1 + seed % 3, random.randint(1, 4)
    moments = {random.randint(1, 90) for _ in range(random.randint(0, 6))}
    world = World(random.randrange)
    calls = itertools.count()

    def happen():
        if next(calls) in moments:
            living = world.of(random.choice([Worker, Worker, ParameterServer]))
            if living:
                random.choice(living).die()

    world.happen = happen
    scheduler, state, _ = start_in_process(world, keeping(), num_workers, snapshot_every)
    versions = {report.step.version for report in scheduler.run(NUM_STEPS)}
    assert state_bytes(state()) == expected()
    assert versions == set(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize("seed", range(8))
def test_an_interrupted_run_ends_with_x_and_states_of_one_version(seed):
    random = Random(seed)
    world = World(random.randrange)
    scheduler, _, last_state = start_in_process(world, keeping(), 2, snapshot_every=3)
    calls = itertools.count()
    end, loss = random.randint(5, 60), random.choice([Worker, ParameterServer, None])

    def happen():
        if next(calls) == end:
            raise KeyboardInterrupt

    world.happen = happen
    with pytest.raises(KeyboardInterrupt):
        list(scheduler.run(NUM_STEPS * 10))
    if loss is not None:
        random.choice(world.of(loss)).die()
    found = last_state()
    assert state_bytes(found) == expected(found.version)
    assert found.version >= scheduler._supervisor._version - (0 if loss is None else 3)


def test_no_state_travels_but_for_a_snapshot():
    world = World()
    scheduler, state, _ = start_in_process(world, keeping(num_features=1000), 2, 100)
    list(scheduler.run(2))
    sent = sum(actor.num_bytes for actor in world.actors)
    list(scheduler.run(12))
    sent_in_steps = sum(actor.num_bytes for actor in world.actors) - sent
    states = state().states
    size = sum(leaf.nbytes for leaf in states.values())
    assert size >= 4 * 3 * 4 * 1000  # tasks, the weights and two moments of Adam, bytes
    assert sent_in_steps < size / 10
    assert sum(actor.num_bytes for actor in world.actors) - sent - sent_in_steps >= size


def test_a_worker_holds_two_versions_and_no_others():
    held = Held()
    held.set((3,), 7, {3: torch.tensor([7.0])})
    held.step((3,), 7, {3: torch.tensor([8.0])})
    held.step((3,), 8, {})  # its hypergradient was dropped
    assert [held.at((3,), version)[3].item() for version in (8, 9)] == [8.0, 8.0]
    with pytest.raises(RuntimeError, match=r"held at version 7 of x, got \[8, 9\]"):
        held.at((3,), 7)
    held.let_go((3,))
    with pytest.raises(RuntimeError, match="got none"):
        held.at((3,), 9)


def test_leases_stay_where_they_are_and_move_to_who_joins():
    homes: Homes[str] = Homes(4)
    places = [homes.place(number, "ab", 0) for number in range(4)]
    assert [place.worker for place in places] == ["a", "b", "a", "b"]
    assert not any(place.is_held or place.source for place in places)
    for number in range(4):
        homes.confirm(number, 1)
    assert all(homes.place(number, "ab", 1).is_held for number in range(4))
    assert homes.place(0, "b", 1) == ("b", False, None), "a is lost: from the snapshot"
    assert homes.place(2, "b", 1) == ("b", False, None)
    homes.confirm(0, 2)
    assert homes.place(1, "bc", 2, moves=False).worker == "b"
    homes.confirm(1, 2)
    assert homes.place(1, "bc", 2) == ("c", False, "b"), "b has more than its share"
    homes.forget_versions()
    assert homes.place(1, "bc", 0) == ("c", False, None), "x went back: from the snapshot"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "driver"}, r"state must be one of \('server', 'worker'\), got 'driver'"),
        (
            {"state": "worker", "backup_factor": 2.0},
            "backup_factor must be None with state='worker'",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RayExecutor(**options)


def test_what_keeps_no_state_or_has_a_large_x_is_refused_before_the_start(executor):
    with pytest.raises(ValueError, match="state must be 'server' with keep_state=False"):
        RayExecutor(state="worker").start(make_workload(), ADAM, first_state())
    workload = replace(keeping(), problem=Wide())
    with pytest.raises(ValueError, match=r"snapshot_every must be <= \d+ with state='worker'"):
        executor(workload, **{**HELD, "server": Server(snapshot_every=10**6)})


def test_more_states_than_memory_are_refused(monkeypatch):
    monkeypatch.setattr(held_module, "memory_bytes", lambda device: 1000)
    states = {0: torch.zeros(100), 1: torch.zeros(100)}
    check_room(states, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"num_workers must be higher .* of 2 tasks"):
        check_room(states, 2, torch.device("cpu"))
