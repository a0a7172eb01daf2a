"""Options that do not go together; tests/checks/test_values.py reads the rules of single ones."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

import pytest
import ray
from ray.util import client

from metadist.cluster import (
    ConnectError,
    DataParallelExecutor,
    RayExecutor,
    ResourcesError,
    Workers,
)
from metadist.cluster.actors import connection
from metadist.cluster.actors.placement import Placement, gpu_options
from metadist.compute import CUBLAS_CONFIG, Compute


def test_no_more_workers_are_waited_for_than_there_are():
    with pytest.raises(ValueError, match=r"min_workers must be <= num_workers=2, .* got 3"):
        Workers(num_workers=2, min_workers=3)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "device must be 'auto', 'cpu' or 'cuda' .* got 'cuda:1'"),
        ("cuda", "gpus_per_worker must be > 0 or None with device='cuda', got 0"),
    ],
)
def test_a_device_that_ray_cannot_reserve_is_refused(device, message):
    with pytest.raises(ValueError, match=message):
        Placement(Workers(gpus_per_worker=0), None, None).open(device)


@pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}", "ray://{}:{}/"])
def test_an_address_in_each_of_rays_forms_is_looked_up(form):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = form.format("127.0.0.1", server.getsockname()[1])
        connection._check_listening(address)
    with pytest.raises(ConnectionRefusedError):
        connection._check_listening(address)


def test_an_address_of_another_scheme_is_left_to_ray():
    connection._check_listening("anyscale://host:1")


def test_what_this_machine_lacks_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 4.0})
    bundle = {"CPU": 1.0, "GPU": 0.5}
    message = (
        r"num_workers=2 must have room on this machine, which is the whole cluster, got "
        r"CPU: 2 needed .*; GPU: 1 needed \(0.5 each\), 0 in the cluster, 0 free: lower "
        r"num_workers or gpus_per_worker, or use device='cpu', or give the address"
    )
    with pytest.raises(ResourcesError, match=message):
        connection.reserve([bundle] * 2, 300.0, can_grow=False)
    assert connection._lacking([{"CPU": 4 / 3}] * 3) == []


@pytest.mark.parametrize("bundle", [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.5}], ids=str)
def test_what_no_node_has_is_waited_for_only_with_an_autoscaler(monkeypatch, bundle):
    def node(is_alive=True, labels=None, **resources):
        return {"Alive": is_alive, "Resources": resources, "Labels": labels or {}}

    nodes = [node(CPU=2.0), node(CPU=2.0), node(CPU=1.0), node(False, CPU=9.0, GPU=9.0)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    asked = []
    report = {"autoscaler_report": {"active_nodes": {"node_1f": 1, "node_2e": 1}}}
    monkeypatch.setattr(connection, "_internal_kv_get", lambda key: json.dumps(report).encode())

    def reserved(bundles, strategy):
        asked.append(bundles)
        raise InterruptedError

    monkeypatch.setattr(connection, "placement_group", reserved)
    with pytest.raises(ResourcesError) as caught:
        connection.reserve([bundle] * 3, 300.0)
    said = str(caught.value)
    needed = "CPU: 1 and GPU: 1" if "GPU" in bundle else "CPU: 2.5 and GPU: 0"
    assert said.startswith(
        f"num_workers=3 must have nodes with {needed} each, got nodes with CPU: 1 and GPU: 0 (1x), "
        "CPU: 2 and GPU: 0 (2x), and none of them is of a group of Ray's autoscaler"
    )
    assert ("use device='cpu'" in said) == ("GPU" in bundle) and asked == []
    nodes[2]["Labels"] = {"ray.io/node-group": "head"}
    with pytest.raises(InterruptedError):
        connection.reserve([bundle] * 3, 300.0)
    nodes[2]["Labels"] = {}
    report["autoscaler_report"]["active_nodes"] = {"head": 1, "gpu": 2}
    with pytest.raises(InterruptedError):
        connection.reserve([bundle] * 3, 300.0)
    report.clear()
    with pytest.raises(InterruptedError):
        connection.reserve([{"CPU": 2.0}] * 3, 300.0)  # more nodes of that kind may join
    assert len(asked) == 3
    with pytest.raises(ResourcesError):
        connection.reserve([bundle] * 3, 300.0)


def test_rays_own_limit_of_a_start_is_explained(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConnectError, match=r"within its own limit of 30 s.*the machine is busy"):
        connection.connect("local", 1, False, None)


@pytest.mark.parametrize(
    ("gpus_per_worker", "device", "expected"),
    [(None, "cuda", 3), (None, "cpu", 0), (0, "auto", 0), (0.5, "auto", 3), (None, "auto", 0)],
)
def test_how_many_workers_have_a_gpu_is_known_where_it_is_asked_for(
    gpus_per_worker, device, expected, monkeypatch
):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    workers = Workers(num_workers=3, gpus_per_worker=gpus_per_worker)
    assert RayExecutor(workers).num_on_gpus(Compute(device=device)) == expected
    parallel = DataParallelExecutor(workers).num_on_gpus(Compute(device=device))
    assert parallel == min(1, expected)


class Environment:
    """An actor that tells of its process."""

    def value(self, name: str) -> str | None:
        return os.environ.get(name)


@pytest.mark.parametrize(("of_driver", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_an_actor_with_a_gpu_starts_with_what_fixes_the_sums_of_cublas(
    ray_session, monkeypatch, of_driver, expected
):
    monkeypatch.delenv(CUBLAS_CONFIG, raising=False)
    if of_driver:
        monkeypatch.setenv(CUBLAS_CONFIG, of_driver)
    options = gpu_options(0.5)
    assert options.pop("num_gpus") == 0.5  # which this cluster has not
    actor: Any = ray.remote(Environment).options(num_cpus=0, **options).remote()
    assert ray.get(actor.value.remote(CUBLAS_CONFIG)) == expected
    ray.kill(actor)
    assert gpu_options(0) == {"num_gpus": 0}


@pytest.mark.parametrize("is_client", [True, False])
def test_a_signal_waits_for_calls_of_rays_client_alone(monkeypatch, is_client):
    monkeypatch.setattr(client.ray, "is_connected", lambda: is_client)
    reached: list[str] = []

    def call() -> None:
        with connection.calls_kept_whole():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of the call")

    with pytest.raises(KeyboardInterrupt):
        call()
    assert bool(reached) is is_client
