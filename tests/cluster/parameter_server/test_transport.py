"""Sums and x that go from memory to memory: the bytes of the object store, whatever is lost."""

from __future__ import annotations

import importlib.util
import os
import signal
from typing import Any

import pytest
import ray
import torch

from metadist.cluster import Failures, RayExecutor, Server, Workers
from metadist.cluster.parameter_server.transport import OBJECT_STORE, Transport, receive
from tests.algorithms.directions import with_what_a_step_leaves
from tests.cluster.parameter_server.wide import (
    CLIPPED,
    Wide,
    pid_of,
    wide_directions,
    wide_workload,
)
from tests.cluster.toy import ADAM, first_state, local_run, make_workload, state_bytes

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="the package nixl is not there: Linux only"
)
DIRECT = {
    "workers": Workers(num_workers=2),
    "transport": "nixl",
    "failures": Failures(max_losses=100),
}


def test_what_is_sent_through_the_object_store_is_numpy_on_the_same_memory():
    tensor = torch.arange(4.0)
    for sent in (OBJECT_STORE.send(tensor), OBJECT_STORE.send_copy(tensor)):
        assert receive(sent).data_ptr() == tensor.data_ptr()


@needs_nixl
def test_what_is_sent_directly_is_where_it_was(ray_session):
    transport = Transport("nixl")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = torch.arange(10, dtype=dtype)[2:7]
        sent, copied = transport.send(tensor), transport.send_copy(tensor)
        assert isinstance(sent, ray.ObjectRef)
        assert torch.equal(receive(sent), tensor)
        tensor += 1
        assert torch.equal(receive(copied), tensor - 1)


@needs_nixl
def test_the_way_changes_no_byte(executor):
    running = executor(
        wide_workload(), first_state(Wide()), workers=Workers(num_workers=1), transport="nixl"
    )
    assert running.describe()["transport"] == "nixl"
    list(running.run(2))
    assert isinstance(ray.get(running._supervisor.pull()[0]).flat, ray.ObjectRef)
    expected = local_run(2, wide_workload())[0]
    assert state_bytes(running.state()) == state_bytes(expected)
    assert all(torch.equal(running.state().outer[name], x) for name, x in expected.outer.items())


@needs_nixl
@pytest.mark.slow
def test_a_lost_worker_and_a_lost_server_change_no_byte(executor):
    running = executor(wide_workload(), first_state(Wide(), CLIPPED), CLIPPED, **DIRECT)
    reports = running.run(8)
    seen = [next(reports), next(reports)]
    os.kill(running._pool.infos[1].pid, signal.SIGKILL)
    seen += [next(reports), next(reports)]
    running.state()
    os.kill(pid_of(running._supervisor.server), signal.SIGKILL)
    seen += reports
    assert [report.step.version for report in seen] == list(range(1, 9))
    assert sum(report.lost_workers for report in seen) == 1
    assert sum(report.lost_servers for report in seen) == 1
    expected = local_run(8, wide_workload(), CLIPPED)[0]
    assert state_bytes(running.state()) == state_bytes(expected)


@needs_nixl
@pytest.mark.slow
@with_what_a_step_leaves
def test_shards_and_what_a_step_leaves_for_the_next(executor, name, keep_state):
    workload, first, expected = wide_directions(name, keep_state)
    running = executor(workload, first, CLIPPED, server=Server(num_shards=2), **DIRECT)
    list(running.run(6))
    assert state_bytes(running.state()) == state_bytes(expected)


@needs_nixl
@pytest.mark.slow
def test_bfloat16_has_the_same_bytes_too(executor):
    options: dict[str, Any] = {"compression": "bfloat16", "workers": Workers(num_workers=1)}
    states = []
    for way in ("object_store", "nixl"):
        running = executor(wide_workload(), first_state(Wide()), transport=way, **options)
        list(running.run(3))
        states.append(state_bytes(running.state()))
        running.close()
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "gloo"}, r"transport must be one of \('object_store', 'nixl'\), got 'gloo'"),
        (
            {"server": Server(gpus_per_server=0.5)},
            "gpus_per_worker must be > 0 with gpus_per_server=0.5, got None",
        ),
    ],
)
def test_a_way_that_there_is_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RayExecutor(**options)


def test_a_server_on_a_gpu_wants_workers_on_one():
    with pytest.raises(ValueError, match=r"device must not be 'cpu' with gpus_per_server=0.5"):
        RayExecutor(Workers(gpus_per_worker=0.5), Server(gpus_per_server=0.5)).start(
            make_workload(), ADAM, first_state()
        )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"package nixl is missing.*pip install 'metadist\[nixl\]"):
        RayExecutor(transport="nixl")


def test_a_ray_without_direct_transport_is_named(monkeypatch):
    monkeypatch.setattr(ray, "put", lambda value: None)
    with pytest.raises(ValueError, match=r"'object_store' with Ray .*got 'nixl': install Ray 2.60"):
        RayExecutor(transport="nixl")
