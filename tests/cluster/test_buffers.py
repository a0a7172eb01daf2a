"""What travels arrives unchanged, and nothing writes to shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
import torch

from metadist.cluster.buffers import OuterSpec, pack_state, read_only, unpack_state
from metadist.cluster.runtime_env import pickle_by_value
from metadist.cluster.server import Arrival, ParameterServer
from metadist.cluster.worker import Worker, worker_device
from metadist.outer import Contribution, OuterOptimizer, OuterVariable
from tests.cluster.toy import ADAM, Regression, first_state, make_workload, state_bytes

SGD = OuterOptimizer("sgd", lr=1.0)


def make_server(optimizer=SGD):
    state = first_state(optimizer=optimizer)
    spec = OuterSpec.of(state.outer)
    server = ParameterServer()
    server.setup(pack_state(state), spec, optimizer, 1)
    return server


def stepped_state(dtype):
    problem = Regression(dtype=dtype)
    variable = OuterVariable.from_state(first_state(problem), ADAM)
    contributions = []
    for lease_id in (0, 2):
        lease = make_workload(problem=problem).lease(lease_id, 0)
        result, total, _ = make_workload(problem=problem).compute(lease, variable.params)
        contributions.append(Contribution(lease_id, 0, total, result.num_tasks))
    variable.apply(contributions)
    return variable.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_state_survives_packing(dtype):
    state = stepped_state(torch.float32)
    state = state._replace(outer={name: leaf.to(dtype) for name, leaf in state.outer.items()})
    unpacked = unpack_state(pack_state(state), OuterSpec.of(state.outer))
    assert state_bytes(unpacked) == state_bytes(state)
    assert {leaf.dtype for leaf in unpacked.outer.values()} == {dtype}


def test_an_unpacked_state_has_memory_of_its_own():
    state = stepped_state(torch.float32)
    packed = pack_state(state)
    unpacked = unpack_state(packed, OuterSpec.of(state.outer))
    for leaf in (*unpacked.outer.values(), *unpacked.optimizer.values()):
        leaf.add_(1)
    assert state_bytes(unpack_state(packed, OuterSpec.of(state.outer))) == state_bytes(state)


def test_a_dtype_that_numpy_lacks_is_refused():
    with pytest.raises(ValueError, match=r"outer must be float16, float32 or float64 .*bfloat16"):
        OuterSpec.of({"x": torch.zeros(2, dtype=torch.bfloat16)})


def test_reading_a_read_only_array_is_no_warning():
    array = np.arange(3.0)
    array.flags.writeable = False
    assert read_only(array).tolist() == [0, 1, 2]


def test_the_server_returns_copies():
    server = make_server()
    before = server.pull()
    server.pull()[:] = 7
    _, after = server.apply([Arrival(0, 0, 1, 1.0)], np.zeros_like(before))
    after[:] = 7
    np.testing.assert_array_equal(server.pull(), before)
    assert before.flags.writeable


def test_the_server_applies_a_lease_once():
    server = make_server()
    total = np.ones_like(server.pull())
    first, x = server.apply([Arrival(0, 0, 1, 1.0)], total)
    again, same = server.apply([Arrival(0, 0, 1, 1.0)], total)
    assert (first.applied, first.version) == ((0,), 1)
    assert (again.applied, again.repeated, again.version) == ((), (0,), 1)
    np.testing.assert_array_equal(x, same)


def test_the_server_weighs_contributions():
    server = make_server()
    before = server.pull()
    _, after = server.apply([Arrival(0, 0, 2, 0.5)], np.ones_like(before))
    np.testing.assert_allclose(before - after, 0.25, rtol=1e-6)


def test_shared_memory_is_never_written_to(ray_session):
    # Large enough to lie in shared memory, where one writer would reach all readers.
    big = Regression(num_idle=100_000)
    state = first_state(big)
    spec = OuterSpec.of(state.outer)
    worker: Any = ray.remote(Worker).options(num_cpus=0).remote("worker", "cpu")
    worker.setup.remote(pickle_by_value(make_workload(problem=big)), spec)
    server: Any = ray.remote(ParameterServer).options(num_cpus=0).remote()
    server.setup.remote(pack_state(state), spec, ADAM, 1)
    flat = ray.put(np.arange(spec.num_elements, dtype=np.float32))
    before = ray.get(flat).copy()
    lease = make_workload().lease(0, 0)
    meta, total = worker.compute.options(num_returns=2).remote(lease, flat, None)
    total_before = ray.get(total).copy()
    arrivals = [Arrival(0, 0, 1, 1.0)]
    ray.get(server.apply.options(num_returns=2).remote(arrivals, total))
    ray.get(worker.compute.options(num_returns=2).remote(lease, total, None))
    np.testing.assert_array_equal(ray.get(flat), before)
    np.testing.assert_array_equal(ray.get(total), total_before)
    assert ray.get(meta).num_tasks == 1
    for actor in (worker, server):
        ray.kill(actor)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", [], "cpu"), ("auto", [1], "cuda"), ("cpu", [1], "cpu"), ("cuda", [1], "cuda")],
)
def test_a_worker_takes_a_gpu_only_if_it_was_given_one(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
    assert worker_device(device) == expected
