"""What travels arrives unchanged, and nothing writes to shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
import torch

from metadist.cluster.actors.buffers import (
    OuterSpec,
    join_states,
    owned,
    pack_state,
    read_only,
    unpack_state,
)
from metadist.cluster.actors.placement import worker_device
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.transport import Pulled, Pushed, receive
from metadist.cluster.parameter_server.worker import Worker
from metadist.optimizer import OuterOptimizer
from metadist.outer import LeaseResult, OuterVariable
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
        workload = make_workload(problem=problem)
        contributions.append(workload.compute_lease(lease, variable.params))
    variable.apply(contributions)
    return variable.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_state_survives_packing(dtype):
    state = stepped_state(torch.float32)
    state = state._replace(outer={name: leaf.to(dtype) for name, leaf in state.outer.items()})
    spec = OuterSpec.of(state.outer)
    unpacked = unpack_state(pack_state(state), spec)
    assert state_bytes(unpacked) == state_bytes(state)
    assert state_bytes(join_states([pack_state(state)], spec)) == state_bytes(state)
    assert {leaf.dtype for leaf in unpacked.outer.values()} == {dtype}


def test_a_joined_state_has_memory_of_its_own():
    state = stepped_state(torch.float32)
    packed = pack_state(state)
    joined = join_states([packed], OuterSpec.of(state.outer))
    for leaf in (*joined.outer.values(), *joined.optimizer.values()):
        leaf.add_(1)
    assert state_bytes(unpack_state(packed, OuterSpec.of(state.outer))) == state_bytes(state)


def test_an_owned_state_has_memory_of_its_own():
    state = stepped_state(torch.float32)
    packed = pack_state(state)
    mine = owned(packed)
    for theirs, ours in zip(packed.optimizer.values(), mine.optimizer.values(), strict=True):
        assert not np.shares_memory(theirs, ours)
    assert not np.shares_memory(packed.flat, mine.flat)
    spec = OuterSpec.of(state.outer)
    assert state_bytes(unpack_state(mine, spec)) == state_bytes(state)


@pytest.mark.parametrize(
    "changed", [{"version": 2}, {"applied_below": 2}, {"applied": (4,)}], ids=str
)
def test_parts_of_two_versions_are_no_state(changed):
    packed = pack_state(stepped_state(torch.float32))
    with pytest.raises(ValueError, match="the parts of x must be of one version, got"):
        join_states([packed, packed._replace(**changed)], OuterSpec({}, torch.float32))


def test_a_dtype_that_numpy_lacks_is_refused():
    with pytest.raises(ValueError, match=r"outer must be float16, float32 or float64 .*bfloat16"):
        OuterSpec.of({"x": torch.zeros(2, dtype=torch.bfloat16)})


def test_reading_a_read_only_array_is_no_warning():
    array = np.arange(3.0)
    array.flags.writeable = False
    assert read_only(array).tolist() == [0, 1, 2]


def test_what_the_server_returns_is_no_way_in():
    server = make_server()
    _, after = server.apply(
        [LeaseResult(0, 0, 1)], [1.0], Pushed(np.zeros_like(server.pull().flat))
    )
    for array in (server.pull().flat, after.flat, server.state().flat):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 7


def test_the_server_applies_a_lease_once():
    server = make_server()
    pushed = Pushed(np.ones_like(server.pull().flat))
    first, x = server.apply([LeaseResult(0, 0, 1)], [1.0], pushed)
    x = x.flat.copy()
    again, same = server.apply([LeaseResult(0, 0, 1)], [1.0], pushed)
    assert (first.applied, first.version) == ((0,), 1)
    assert (again.applied, again.repeated, again.version) == ((), (0,), 1)
    np.testing.assert_array_equal(x, same.flat)


def test_the_server_weighs_contributions():
    server = make_server()
    before = server.pull().flat.copy()
    _, after = server.apply([LeaseResult(0, 0, 2)], [0.5], Pushed(np.ones_like(before)))
    np.testing.assert_allclose(before - after.flat, 0.25, rtol=1e-6)


def test_shared_memory_is_never_written_to(ray_session):
    # Large enough to lie in shared memory, where one writer would reach all readers.
    big = Regression(num_idle=100_000)
    state = first_state(big)
    spec = OuterSpec.of(state.outer)
    worker: Any = ray.remote(Worker).options(num_cpus=0).remote("worker")
    worker.setup.remote(pickle_by_value(make_workload(problem=big)), spec)
    server: Any = ray.remote(ParameterServer).options(num_cpus=0).remote()
    server.setup.remote(pack_state(state), spec, ADAM, 1)
    flat = ray.put(Pulled(np.arange(spec.num_elements, dtype=np.float32)))
    before = receive(ray.get(flat).flat).clone()
    lease = make_workload().lease(0, 0)
    meta, pushed = worker.compute.options(num_returns=2).remote(lease, None, None, flat)
    pushed_before = receive(ray.get(pushed).total).clone()
    results = [LeaseResult(0, 0, 1)]
    _, first = ray.get(server.apply.options(num_returns=2).remote(results, [1.0], pushed))
    first_before = first.flat.copy()
    results = [LeaseResult(1, 0, 1)]
    _, second = ray.get(server.apply.options(num_returns=2).remote(results, [1.0], pushed))
    ray.get(worker.compute.options(num_returns=2).remote(lease, None, None, ray.put(second)))
    np.testing.assert_array_equal(ray.get(flat).flat, before)
    np.testing.assert_array_equal(ray.get(pushed).total, pushed_before)
    # What the server gave out stays as it was, though it was its own memory.
    np.testing.assert_array_equal(first.flat, first_before)
    assert (second.flat != first.flat).any()
    assert ray.get(meta).num_tasks == 1
    for actor in (worker, server):
        ray.kill(actor)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", [], "cpu"), ("auto", [1], "cuda"), ("cpu", [1], "cpu"), ("cuda", [1], "cuda")],
)
def test_a_worker_takes_a_gpu_only_if_it_was_given_one(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
    assert worker_device(device) == expected


def test_a_device_is_found_without_starting_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: pytest.fail("this would start Ray"))
    assert worker_device("auto") == "cpu"
