"""A parameter server of several shards: the bytes of one, whatever happens to any of them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest
import ray
import torch

from metadist.cluster import ASP, Failures, RayExecutor, Server, StalenessWeight, Workers
from metadist.run.checkpoint import Checkpoint, CheckpointStore
from metadist.trees import Params
from tests.algorithms.directions import with_what_a_step_leaves
from tests.cluster.parameter_server.wide import (
    CLIPPED,
    Wide,
    pid_of,
    wide_directions,
    wide_workload,
)
from tests.cluster.processes import CLUSTER, Script
from tests.cluster.toy import (
    ADAM,
    Regression,
    Waiting,
    first_state,
    local_run,
    make_workload,
    state_bytes,
)
from tests.helpers import becomes

# On a busy machine a server that does not hang may be taken for one that does.
PERSISTENT = Failures(max_losses=100)
SHARDED = {"workers": Workers(num_workers=2), "server": Server(num_shards=2)}


@dataclass(frozen=True)
class Projected(Wide):
    """Whose outer variable is constrained."""

    def project_outer(self, outer: Params) -> Params:
        return {name: leaf.clamp(-1, 1) for name, leaf in outer.items()}


def test_shards_give_the_bytes_of_one_process(executor, tmp_path):
    expected, expected_reports = local_run(5, wide_workload(), CLIPPED)
    running = executor(wide_workload(), first_state(Wide(), CLIPPED), CLIPPED, **SHARDED)
    assert len(running._supervisor.servers) == 2
    reports = list(running.run(5))
    state = running.state()
    assert state_bytes(state) == state_bytes(expected)
    assert [report.step for report in reports] == [report.step for report in expected_reports]
    assert reports[0].step.hypergradient_norm > 0.5, "clipped"
    assert all(torch.equal(running.state().outer[name], x) for name, x in expected.outer.items())
    store = CheckpointStore(str(tmp_path))
    name = store.save(Checkpoint(state))
    assert {"tensors.safetensors", "tensors-1.safetensors"} < set(os.listdir(tmp_path / name))
    assert state_bytes(store.load()[1].state) == state_bytes(expected)


@pytest.mark.slow
def test_the_number_of_shards_may_change_between_the_parts_of_a_run(executor):
    running = executor(wide_workload(), first_state(Wide(), CLIPPED), CLIPPED, **SHARDED)
    list(running.run(5))
    alone = executor(wide_workload(), running.state(), CLIPPED, workers=Workers(num_workers=2))
    list(alone.run(7))
    again = executor(wide_workload(), alone.state(), CLIPPED, **SHARDED)
    list(again.run(9))
    assert state_bytes(again.state()) == state_bytes(local_run(9, wide_workload(), CLIPPED)[0])


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("between the halves of a step", 1),
        pytest.param("between the halves of a step", 0, marks=pytest.mark.slow),
        pytest.param("between steps", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_shard_changes_no_byte(executor, monkeypatch, number, when):
    running = executor(wide_workload(), first_state(Wide()), **SHARDED)
    supervisor = running._supervisor
    reports = running.run(4)
    seen = [next(reports), next(reports)]
    running.state()  # as for a checkpoint
    seen.append(next(reports))
    first = list(supervisor.servers)
    if when == "between steps":
        os.kill(pid_of(supervisor.servers[number]), signal.SIGKILL)
    else:
        ask = supervisor.ask

        def ask_and_kill(refs: Any, *arguments: Any) -> Any:
            answers = ask(refs, *arguments)
            if isinstance(answers[0], list):  # the squares that both have prepared
                monkeypatch.undo()
                os.kill(pid_of(supervisor.servers[number]), signal.SIGKILL)
            return answers

        monkeypatch.setattr(supervisor, "ask", ask_and_kill)
    seen += reports
    assert [report.step.version for report in seen] == [1, 2, 3, 3, 4]
    assert sum(report.lost_servers for report in seen) == 1
    assert not set(supervisor.servers) & set(first), "all go on from the same state"
    assert state_bytes(running.state()) == state_bytes(local_run(4, wide_workload())[0])


@with_what_a_step_leaves
def test_shards_keep_what_a_step_leaves_for_the_next(executor, name, keep_state):
    workload, first, expected = wide_directions(name, keep_state)
    running = executor(workload, first, CLIPPED, **SHARDED)
    reports = running.run(6)
    next(reports), next(reports)
    running.state()
    ray.kill(running._supervisor.servers[1])
    list(reports)
    state = running.state()
    assert state_bytes(state) == state_bytes(expected)
    assert bool(state.states) == keep_state
    assert bool(state.recursion) != keep_state


@pytest.mark.slow
def test_every_lease_is_in_x_once_without_a_barrier(executor):
    options = {**SHARDED, "policy": ASP(StalenessWeight("inverse"))}
    running = executor(wide_workload(), first_state(Wide()), **options)
    reports = list(running.run(12))
    applied = [n for report in reports for n in report.step.applied]
    assert sorted(applied) == list(range(len(applied)))
    assert running.state().applied_below == len(applied)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_server_that_hangs_is_replaced(executor, caplog, num_shards):
    options = {"server": Server(num_shards=num_shards, timeout_s=4.0), "failures": PERSISTENT}
    running = executor(wide_workload(), first_state(Wide()), **options)
    reports = running.run(4)
    seen = [next(reports), next(reports)]
    running.state()
    hung = pid_of(running._supervisor.servers[-1])
    os.kill(hung, signal.SIGSTOP)
    seen += reports
    assert seen[-1].step.version == 4
    assert sum(report.lost_servers for report in seen) >= 1
    assert "no answer for 4 s" in caplog.text
    assert state_bytes(running.state()) == state_bytes(local_run(4, wide_workload())[0])
    assert becomes(lambda: not os.path.exists(f"/proc/{hung}"))


def test_a_server_that_hangs_while_the_workers_compute_is_noticed(executor, tmp_path, caplog):
    gate = tmp_path / "gate"
    workload = make_workload(Waiting(index=5, gate=str(gate)))
    running = executor(workload, server=Server(timeout_s=4.0), failures=PERSISTENT)
    reports = running.run(2)
    next(reports)
    assert becomes(lambda: (tmp_path / "gate.waiting").exists())
    before = running._supervisor.server
    hung = pid_of(before)
    os.kill(hung, signal.SIGSTOP)
    replace = running._supervisor.replace

    def replace_and_open(error: Any) -> None:
        gate.touch()
        replace(error)

    running._supervisor.replace = replace_and_open
    assert [report.step.version for report in reports] == [1, 2]
    assert "no answer for 4 s" in caplog.text
    assert state_bytes(running.state()) == state_bytes(local_run(2)[0])


@pytest.mark.parametrize(
    ("options", "problem", "message"),
    [
        (
            {"server": Server(num_shards=2)},
            Projected(),
            "num_shards must be 1 with Projected, which has a proj",
        ),
        (
            {"server": Server(num_shards=4)},
            Wide(),
            "num_shards must be between 1 and 3 for .* 131577 n.*got 4: a",
        ),
        (
            {"server": Server(num_shards=2)},
            Regression(),
            "num_shards must be between 1 and 1 for .* of 5 numbers",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_the_start(options, problem, message):
    with pytest.raises(ValueError, match=message):
        RayExecutor(**options).start(make_workload(problem=problem), ADAM, first_state(problem))


NODES = (
    CLUSTER
    + """
from tests.cluster.parameter_server.test_shards import PERSISTENT, Wide, wide_workload
from tests.cluster.toy import ADAM, first_state, local_run, state_bytes
added = cluster.add_node(num_cpus=0, **node)
ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
here = ray.get_runtime_context().get_node_id()
executor = RayExecutor(
    Workers(num_workers=1, start_timeout_s=300), Server(num_shards=2), failures=PERSISTENT
)
executor.start(wide_workload(), ADAM, first_state(Wide()))

def places():
    where = lambda _: ray.get_runtime_context().get_node_id()
    found = [ray.get(s.__ray_call__.remote(where)) for s in executor._supervisor.servers]
    return sorted(node == here for node in found)

print("beside the driver", places(), flush=True)
reports = list(executor.run(3))
cluster.remove_node(added, allow_graceful=False)
reports += executor.run(6)
print("beside the driver", places(), flush=True)
print("lost", sum(report.lost_servers for report in reports) >= 1, flush=True)
expected, _ = local_run(6, wide_workload())
print("same bytes", state_bytes(executor.state()) == state_bytes(expected), flush=True)
executor.close()
ray.shutdown()
cluster.shutdown()
"""
)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shards_are_spread_over_nodes_and_survive_them(tmp_path):
    output, _ = Script(NODES, str(tmp_path)).finish(timeout_s=600)
    # Ray prints the last words of the node in between.
    words = ("beside", "lost", "same")
    assert [line for line in output.splitlines() if line.startswith(words)] == [
        "beside the driver [False, True]",
        "beside the driver [True, True]",
        "lost True",
        "same bytes True",
    ]
