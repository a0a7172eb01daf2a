"""Clusters of our own and of others, each in a process of its own."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import CLUSTER, Script
from tests.helpers import becomes


@pytest.fixture
def home() -> Iterator[str]:
    """A private home; short, because paths of sockets must be."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


OWN = """
import os, sys
from metadist.cluster import RayExecutor, Workers
from tests.cluster.toy import ADAM, Waiting, first_state, local_run, make_workload, state_bytes
gate = sys.argv[1]
workload = make_workload(Waiting(index=9, gate=gate))
# More workers than most machines of this size have cores.
executor = RayExecutor(Workers(num_workers=3), object_store_bytes=200 << 20)
executor.start(workload, ADAM, first_state())
print("started", os.environ.get("RAY_AUTH_MODE"), flush=True)
try:
    list(executor.run(3))
except KeyboardInterrupt:
    print("interrupted", flush=True)
state = executor.state()
print("same bytes", state_bytes(state) == state_bytes(local_run(2)[0]), flush=True)
executor.close()
print("closed", flush=True)
sys.stdin.read()
"""


def begun(home: str, gate: Path, again: bool = False) -> Script:
    """The program `OWN` once its first lease waits; raises what it has printed if it ends before.

    Ray gives a start 30 s, whatever else the machine does, and a variable cannot change that. The
    program then ends with the message of `ConnectError`, and is begun once more.
    """
    waiting = Path(f"{gate}.waiting")
    script = Script(OWN, home, str(gate))
    assert becomes(lambda: waiting.exists() or script.is_over(), timeout_s=300)
    if waiting.exists():
        return script
    output, errors = script.process.communicate()
    script.stop()
    assert "within its own limit of 30 s" in errors and not again, output + errors
    return begun(home, gate, again=True)


def test_a_cluster_of_our_own_is_safe_quiet_and_gone_after_closing(home, tmp_path):
    script = begun(home, tmp_path / "gate")
    try:
        # What Ctrl-C does in a terminal: the whole group gets it.
        os.killpg(script.process.pid, signal.SIGINT)
        assert script.process.stdout is not None
        lines = [script.process.stdout.readline().strip() for _ in range(4)]
        assert lines == ["started token", "interrupted", "same bytes True", "closed"]
        assert becomes(lambda: script.processes() == [script.process.pid], timeout_s=120)
        _, errors = script.finish()
        assert errors == ""
        token = Path(home) / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
    finally:
        script.stop()


OTHERS = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from ray.cluster_utils import Cluster
from metadist.cluster import RayExecutor, ResourcesError, Workers
from tests.cluster.toy import ADAM, first_state, local_run, make_workload, state_bytes
node = dict(include_dashboard=False, object_store_memory=100 << 20)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, **node))
cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=100 << 20)
os.environ["RAY_ADDRESS"] = cluster.address     # as in a submitted job

def run(workers):
    executor = RayExecutor(workers)
    executor.start(make_workload(), ADAM, first_state())
    list(executor.run(2))
    same = state_bytes(executor.state()) == state_bytes(local_run(2)[0])
    free = ray.available_resources()
    executor.close()
    return same, free.get("CPU", 0), free.get("GPU", 0), ray.is_initialized()

print(run(Workers(num_workers=2, gpus_per_worker=1)), flush=True)
try:
    RayExecutor(Workers(num_workers=4, start_timeout_s=1.0)).start(
        make_workload(), ADAM, first_state()
    )
except ResourcesError as error:
    print(error, ray.is_initialized(), flush=True)
try:
    RayExecutor(Workers(num_workers=1, gpus_per_worker=3)).start(
        make_workload(), ADAM, first_state()
    )
except ResourcesError as error:
    print(error, flush=True)
ray.init(address="auto", logging_level="WARNING")
print(run(Workers(num_workers=3)), ray.available_resources().get("CPU"), flush=True)
ray.shutdown()
cluster.shutdown()
"""


NODES = """
import os
os.environ["RAY_AUTH_MODE"] = "disabled"
from ray.cluster_utils import Cluster
from metadist.cluster import reach_nodes, versions
from metadist.cluster.actors import network
node = dict(include_dashboard=False, object_store_memory=100 << 20)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, **node))
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
ways = []
reach = network._reach
network._reach = lambda node, block, way: ways.append(way) or reach(node, block, way)
found = reach_nodes(cluster.address)
print([(node.error, node.versions == versions(), node.bytes_per_s > 0) for node in found])
print(len(ways), sum(way.startswith("from ") for way in ways), flush=True)
cluster.shutdown()
"""


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_each_node_is_reached_from_here_and_from_another_node(home):
    lines = Script(NODES, home).finish()[0].splitlines()
    assert lines == [str([(None, True, True)] * 3), "6 3"]


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_a_cluster_of_others_is_used_and_left_as_it_was(home):
    lines = Script(OTHERS, home).finish()[0].splitlines()
    assert lines[0] == "(True, 1.0, 0, False)"
    assert lines[1].startswith("num_workers=4 must be free") and lines[1].endswith("False")
    assert lines[2].startswith(
        "num_workers=1 must have nodes with CPU: 1 and GPU: 3 each, got nodes with CPU: 1 and "
        "GPU: 0 (1x), CPU: 2 and GPU: 2 (1x), and none of them is of a group of Ray's autoscaler"
    )
    assert lines[3].startswith("(True, 0, 2.0, True)")


def lines_until_closed(script: Script) -> list[str]:
    """What a script of ours prints until "closed", without what Ray says; kills it then."""
    assert script.process.stdout is not None
    seen: list[str] = []
    try:
        for line in script.process.stdout:
            if line.startswith("closed"):
                return seen
            if line.startswith(("alive", "same", "lost", "[")):
                seen.append(line.strip())
        raise AssertionError(f"{seen}\n{script.process.communicate()[1]}")
    finally:
        script.stop()


GROWING = (
    CLUSTER
    + """
from tests.cluster.toy import ADAM, first_state, local_run, make_workload, state_bytes
ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
executor = RayExecutor(Workers(num_workers=3, min_workers=1, start_timeout_s=300))
executor.start(make_workload(), ADAM, first_state())
seen = []
version = 0

def run_until(num_workers):
    global version
    deadline = time.monotonic() + 300
    while not seen or seen[-1].num_workers != num_workers:
        assert time.monotonic() < deadline, seen[-1]
        version += 1
        seen.extend(executor.run(version))
        time.sleep(0.1)
    print("alive", num_workers, flush=True)

run_until(1)
added = cluster.add_node(num_cpus=2, **node)
run_until(3)
cluster.remove_node(added, allow_graceful=False)
run_until(1)
cluster.add_node(num_cpus=1, **node)
run_until(2)
state, _ = local_run(version)
print("same bytes", state_bytes(executor.state()) == state_bytes(state), flush=True)
print("lost", sum(report.lost_workers for report in seen), flush=True)
executor.close()
print("closed", flush=True)
time.sleep(1000)
"""
)


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_workers_come_and_go_with_the_nodes(home):
    assert lines_until_closed(Script(GROWING, home)) == [
        *("alive 1", "alive 3", "alive 1", "alive 2"),
        *("same bytes True", "lost 2"),
    ]


PLACES = """
import os, time
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from ray.cluster_utils import Cluster
from metadist.cluster import RayExecutor, Workers
from tests.cluster.toy import ADAM, first_state, local_run, make_workload, state_bytes
node = dict(object_store_memory=100 << 20)
cluster = Cluster(
    initialize_head=True, head_node_args=dict(num_cpus=3, include_dashboard=False, **node)
)
names = {cluster.add_node(num_cpus=2, num_gpus=1, **node).node_id: "one"}
ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)

def where(_):
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids()["GPU"]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    return context.get_node_id(), gpus, os.environ["CUDA_VISIBLE_DEVICES"]

def places(executor):
    actors = [slot.actor for slot in executor._pool._slots if slot.is_alive]
    found = ray.get([actor.__ray_call__.remote(where) for actor in actors])
    return sorted((names[node], *gpus, visible) for node, gpus, visible in found)

def run(growing=False, **options):
    executor = RayExecutor(Workers(start_timeout_s=300, **options))
    executor.start(make_workload(), ADAM, first_state())
    version, reports = 2, list(executor.run(2))
    print(places(executor), flush=True)
    if growing:
        names[cluster.add_node(num_cpus=1, num_gpus=1, **node).node_id] = "two"
        deadline = time.monotonic() + 300
        while reports[-1].num_workers < 2:
            assert time.monotonic() < deadline
            version += 1
            reports += executor.run(version)
            time.sleep(0.1)
        print(places(executor), flush=True)
    same = state_bytes(executor.state()) == state_bytes(local_run(version)[0])
    executor.close()
    print("same bytes", same, flush=True)

print([RayExecutor(Workers(n))._placement._num_gpus("auto") for n in (1, 2, 3)])
run(num_workers=2, gpus_per_worker=0.5)
run(num_workers=2, min_workers=1, gpus_per_worker=1.0, growing=True)
print([RayExecutor(Workers(n))._placement._num_gpus("auto") for n in (1, 2, 3)])
run(num_workers=2, gpus_per_worker=1.0)
print("closed", flush=True)
time.sleep(1000)
"""


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_workers_go_where_the_gpus_are(home):
    seen = lines_until_closed(Script(PLACES, home))
    one, two = "('one', '0', '0')", "('two', '0', '0')"
    assert seen == [
        "[1.0, 0.5, 0.3333333333333333]",
        *(f"[{one}, {one}]", "same bytes True"),
        *(f"[{one}]", f"[{one}, {two}]", "same bytes True"),
        "[1.0, 1.0, 0.5]",
        *(f"[{one}, {two}]", "same bytes True"),
    ]


def test_a_cluster_that_is_not_there_is_reported(home):
    source = """
from metadist.cluster import ConnectError, RayExecutor
from tests.cluster.toy import ADAM, first_state, make_workload
try:
    RayExecutor(address="127.0.0.1:1").start(make_workload(), ADAM, first_state())
except ConnectError as error:
    print(error)
"""
    output, _ = Script(source, home).finish()
    assert output.startswith("address must name a running Ray cluster, got '127.0.0.1:1'")
    assert "RAY_AUTH_MODE=token" in output


DRAINED = (
    CLUSTER
    + """
import subprocess, sys
from metadist.cluster import Failures
from tests.cluster.toy import ADAM, first_state, local_run, make_workload, state_bytes
leaving = cluster.add_node(num_cpus=1, **node)
ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
executor = RayExecutor(
    Workers(num_workers=2, start_timeout_s=300), failures=Failures(max_losses=1)
)
executor.start(make_workload(), ADAM, first_state())
seen = []

def run_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, seen[-1]
        seen.extend(executor.run(len(seen) + 1))
        time.sleep(0.1)

def drain(node_id):
    words = f"--reason DRAIN_NODE_REASON_PREEMPTION --node-id {node_id} --reason-message test"
    words += f" --address {cluster.address} --deadline-remaining-seconds 600"
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

def where():
    return {info.node for info in executor._pool.infos if executor._pool.num_alive == 2}

run_until(lambda: len(seen) == 2)
assert leaving.node_id in where()
drain(leaving.node_id)
run_until(lambda: any(slot.heir for slot in executor._pool._slots))
print("alive", executor._pool.num_alive, flush=True)     # its place is yet to come
other = cluster.add_node(num_cpus=1, **node)
run_until(lambda: other.node_id in where() and leaving.node_id not in where())
cluster.remove_node(leaving, allow_graceful=False)
num_seen = len(seen)
run_until(lambda: len(seen) == num_seen + 20)
print("lost", sum(report.lost_workers + report.lost_servers for report in seen), flush=True)
assert not any(report.is_draining for report in seen)
drain(ray.get_runtime_context().get_node_id())
run_until(lambda: seen[-1].is_draining)
same = state_bytes(executor.state()) == state_bytes(local_run(len(seen))[0])
print("same bytes", same, flush=True)
executor.close()
print("closed", flush=True)
"""
)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_workers_leave_a_node_that_ray_announces_to_stop(home):
    lines = lines_until_closed(Script(DRAINED, home))
    assert lines == ["alive 2", "lost 0", "same bytes True"]
