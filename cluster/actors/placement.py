"""`Placement`: a connection to a cluster, and the resources reserved there for workers."""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from metadist.checks.values import check
from metadist.cluster.actors.connection import (
    connect,
    demand,
    disconnect,
    draining_nodes,
    is_gone,
    is_of_this_machine,
    reserve,
    this_node,
)
from metadist.cluster.actors.errand import errand
from metadist.cluster.actors.options import Workers
from metadist.compute import CUBLAS_CONFIG, CUBLAS_FIXED

T = TypeVar("T")


class Placement:
    """Reserves one bundle of resources for each worker, and starts the actors there.

    Args:
        workers: The workers to reserve for.
        address: The address of the cluster, see `RayExecutor`.
        object_store_bytes: The shared memory of a cluster of our own; None: Ray's choice.
    """

    def __init__(
        self, workers: Workers, address: str | None, object_store_bytes: int | None
    ) -> None:
        check("object_store_bytes", object_store_bytes, is_integer=True, gt=0, none="")
        self._workers = workers
        self._address = address
        self._object_store_bytes = object_store_bytes
        self._is_connection_ours = False
        self._bundles: list[tuple[PlacementGroup, int]] = []

    def connect(self) -> None:
        """Connect, if this process is not connected.

        Raises:
            ConnectError: The cluster cannot be reached.
        """
        workers = self._workers
        self._is_connection_ours |= connect(
            self._address, workers.num_cpus, workers.show_output, self._object_store_bytes
        )

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns in a process with the CPUs of a worker, see `errand`.

        Raises:
            ConnectError: The cluster cannot be reached.
            ResourcesError: The CPUs are not free in time.
        """
        self.connect()
        workers = self._workers
        bundle = {"CPU": float(workers.cpus_per_worker)}
        group = reserve([bundle], workers.start_timeout_s, can_grow=self._can_grow)
        try:
            return errand(group, function, *arguments)
        finally:
            remove_placement_group(group)

    @property
    def _can_grow(self) -> bool:
        return not (self._is_connection_ours and is_of_this_machine(self._address))

    def open(self, device: str) -> None:
        """Connect, wait for the bundles of `min_workers`, and demand those of the others; once.

        Args:
            device: That of the workload; it decides on GPUs where `gpus_per_worker` is None.

        Raises:
            ValueError: It is one that Ray would have to pick, or needs GPUs where none are asked.
            ConnectError: The cluster cannot be reached.
            ResourcesError: They are not free in time.
        """
        workers = self._workers
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"device must be 'auto', 'cpu' or 'cuda' (Ray picks which GPU), got {device!r}"
            )
        if device == "cuda" and workers.gpus_per_worker == 0:
            raise ValueError("gpus_per_worker must be > 0 or None with device='cuda', got 0")
        self.connect()
        if self._bundles:
            return
        num_gpus = self._num_gpus(device)
        bundle = {"CPU": float(workers.cpus_per_worker)} | ({"GPU": num_gpus} if num_gpus else {})
        num_at_start = workers.num_at_start
        is_elastic = num_at_start < workers.num_workers
        option = "min_workers" if is_elastic else "num_workers"
        group = reserve([bundle] * num_at_start, workers.start_timeout_s, option, self._can_grow)
        self._bundles = [(group, index) for index in range(num_at_start)]
        for _ in range(workers.num_workers - num_at_start):
            self._bundles.append((demand(bundle), 0))

    def make(self, actor_class: type, number: int) -> Any:
        """An actor with bundle `number`; the class is called with a name.

        A bundle on a node that will stop is left there, since Ray takes back no part of a
        reservation; another one is demanded, on any other node.
        """
        group, index = self._bundles[number]
        bundle = group.bundle_specs[index]
        draining = draining_nodes()
        if draining and _node_of(group, index) in draining:
            group, index = self._bundles[number] = demand(bundle), 0
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        actor: Any = ray.remote(actor_class).options(
            num_cpus=bundle["CPU"],
            **gpu_options(bundle.get("GPU", 0)),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=place,
        )
        return actor.remote(f"worker-{number}")

    def num_on_gpus(self, device: str) -> int:
        """How many workers will have a GPU, as far as that is known without connecting."""
        if (per_worker := self._workers.gpus_per_worker) is not None:
            has_one = per_worker > 0
        elif device == "auto":
            has_one = ray.is_initialized() and self._num_gpus(device) > 0
        else:
            has_one = device == "cuda"
        return self._workers.num_workers if has_one else 0

    def close(self) -> None:
        """Return all resources, and close the connection if it was made here."""
        if self._is_connection_ours:
            disconnect()  # reservations end with it; to end them first hangs if all are dead
        elif not is_gone():
            for group in {group.id: group for group, _ in self._bundles}.values():
                remove_placement_group(group)
        self.forget()

    def forget(self) -> None:
        """Note that the cluster is gone, and the reservations with it."""
        self._bundles = []
        self._is_connection_ours = False

    def _num_gpus(self, device: str) -> float:
        """GPUs per worker."""
        if self._workers.gpus_per_worker is not None:
            return float(self._workers.gpus_per_worker)
        num_in_cluster = int(ray.cluster_resources().get("GPU", 0))
        if device == "cpu" or (num_in_cluster == 0 and device == "auto"):
            return 0.0
        if num_in_cluster == 0:
            # Nodes with GPUs may still join.
            return 1.0
        return 1.0 / math.ceil(self._workers.num_at_start / num_in_cluster)


def gpu_options(num_gpus: float) -> dict[str, Any]:
    """Ray's options of an actor with so many GPUs, whose cuBLAS adds up as that of this process."""
    if not num_gpus:
        return {"num_gpus": 0}
    # In the environment that the process starts with, since libraries read it when they are loaded.
    config = {CUBLAS_CONFIG: os.environ.get(CUBLAS_CONFIG, CUBLAS_FIXED)}
    return {"num_gpus": num_gpus, "runtime_env": {"env_vars": config}}


def _node_of(group: PlacementGroup, index: int) -> str | None:
    """The id of the node that a bundle is on; None while it is on none."""
    node: str | None = placement_group_table(group).get("bundles_to_node_id", {}).get(index)
    return node


class WorkerInfo(NamedTuple):
    """Where a worker runs; `device` is the name of the hardware, `node` Ray's id.

    `computes_as` is what decides on the bytes of its results, beside its workload.
    """

    name: str
    device: str
    host: str
    pid: int
    node: str = ""
    computes_as: str = ""

    @classmethod
    def here(cls, name: str, device: torch.device) -> WorkerInfo:
        """The description of this process."""
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return cls(
            name=name,
            device=hardware,
            host=socket.gethostname(),
            pid=os.getpid(),
            node=this_node(),
            computes_as=_fingerprint(hardware, device),
        )


def _fingerprint(hardware: str, device: torch.device) -> str:
    """The hardware, libraries and flags of this process that the bytes of a result depend on."""
    parts = [hardware, f"torch {torch.__version__}"]
    if device.type != "cuda":
        return ", ".join([*parts, torch.backends.cpu.get_cpu_capability()])
    parts.append(
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    )
    parts.append(f"cuDNN {torch.backends.cudnn.version()}")
    flags = (CUBLAS_CONFIG, "NVIDIA_TF32_OVERRIDE")
    return ", ".join([*parts, *(f"{name}={os.environ.get(name)}" for name in flags)])


def devices_of(infos: Iterable[WorkerInfo]) -> str:
    """The number of workers by hardware and host, in words; empty without workers."""
    devices = Counter(f"{info.device} on {info.host}" for info in infos)
    return ", ".join(f"{count} x {name}" for name, count in sorted(devices.items()))


def worker_device(device: str) -> str:
    """The device for an actor: a GPU only if Ray gave it one, though it may see others."""
    if device != "auto":
        return device
    # Outside an actor the question alone would start Ray, or join whatever cluster is at hand.
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"
