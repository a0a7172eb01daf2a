"""`RayExecutor`: trains on a Ray cluster, or on this machine's cores with Ray."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray
from ray import exceptions
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from metadist.cluster.buffers import OuterSpec, PackedState, pack_state, to_tensor, unpack_state
from metadist.cluster.errors import ServerLostError
from metadist.cluster.fleet import Fleet, Retry
from metadist.cluster.launch import connect, reserve
from metadist.cluster.policies import BSP, Policy, make_policy
from metadist.cluster.runtime_env import pickle_by_value
from metadist.cluster.scheduler import Scheduler
from metadist.cluster.server import ParameterServer
from metadist.cluster.worker import Worker
from metadist.executor import StepReport
from metadist.lease import Workload
from metadist.outer import OuterOptimizer, OuterState
from metadist.trees import Params

log = logging.getLogger("metadist.cluster")


class RayExecutor:
    """Computes leases on Ray workers; under "bsp" to the same bytes as `LocalExecutor`.

    Uses the Ray connection that this process has; otherwise see `address`.

    Args:
        num_workers: workers, each one process that computes one lease at a time.
        policy: "bsp", "ssp", "asp" or "buffered", or a `Policy`.
        staleness, buffer_size, staleness_weight, staleness_exponent: see `make_policy`.
        cpus_per_worker: CPUs reserved per worker, > 0.
        gpus_per_worker: GPUs reserved per worker, also a fraction. None: one where the cluster
            has one for each worker at the start, an equal share of one where it has fewer, none
            where it has none or device="cpu". Give a number if nodes with GPUs join later.
        device: "auto" (a GPU if one is reserved, else the CPU), "cpu" or "cuda".
        address: of a running cluster, for example "auto" or "10.0.0.1:6379". None: the variable
            RAY_ADDRESS, which Ray sets in a submitted job, and without it (or with "local") a
            cluster of our own on this machine, with at least the CPUs the workers need.
        start_timeout_s: how long to wait for free resources, and again for the workers.
        max_losses: a worker or a lease that is lost so often in a row ends the run.
        lease_timeout_s: a worker that computes one lease for longer is replaced; None: never.
        show_worker_output: print what workers print, with Ray's own messages. Errors of user
            code come with their traceback in any case.
        object_store_bytes: shared memory of a cluster of our own; None: Ray's choice.
    """

    def __init__(
        self,
        num_workers: int = 2,
        policy: str | Policy = "bsp",
        staleness: int | None = None,
        buffer_size: int | None = None,
        staleness_weight: str = "constant",
        staleness_exponent: float | None = None,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float | None = None,
        device: str = "auto",
        address: str | None = None,
        start_timeout_s: float = 60.0,
        max_losses: int = 5,
        lease_timeout_s: float | None = None,
        show_worker_output: bool = False,
        object_store_bytes: int | None = None,
    ) -> None:
        _check(num_workers, cpus_per_worker, gpus_per_worker, device, start_timeout_s)
        self._policy = make_policy(
            policy, staleness, buffer_size, staleness_weight, staleness_exponent
        )
        self._retry = Retry(max_losses=max_losses, lease_s=lease_timeout_s)
        self._num_workers = num_workers
        self._cpus_per_worker = cpus_per_worker
        self._gpus_per_worker = gpus_per_worker
        self._device = device
        self._address = address
        self._start_timeout_s = start_timeout_s
        self._show_worker_output = show_worker_output
        self._object_store_bytes = object_store_bytes
        self._is_connection_ours = False
        self._reservation: PlacementGroup | None = None
        self._fleet: Fleet | None = None
        self._server: Any = None
        self._scheduler: Scheduler | None = None

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        """See `Executor`; started again, it keeps its processes and sets them up anew."""
        if isinstance(self._policy, BSP) and self._num_workers > workload.leases_per_step:
            raise ValueError(
                f"num_workers must be <= {workload.leases_per_step} with policy='bsp', as many as "
                f"an outer step has leases (meta_batch_size={workload.meta_batch_size} / "
                f"tasks_per_lease={workload.tasks_per_lease}), got {self._num_workers}: the "
                "others would never work; lower tasks_per_lease"
            )
        if workload.must_be_synchronous and not isinstance(self._policy, BSP):
            why = (
                "keep_state=True"
                if workload.keep_state
                else f"the two-point method {type(workload.algorithm).__name__}"
            )
            raise ValueError(
                f"policy must be 'bsp' with {why}, got {str(self._policy)!r}: every step needs "
                "what the step before it left"
            )
        self._spec = OuterSpec.of(state.outer)
        payload = pickle_by_value(workload)
        if not ray.is_initialized():
            self._forget_actors()
        try:
            self._is_connection_ours |= connect(
                self._address,
                self._num_workers * self._cpus_per_worker,
                self._show_worker_output,
                self._object_store_bytes,
            )
            fleet = self._start_fleet(payload)
            self._start_server(pack_state(state), optimizer, workload)
        except BaseException:
            self.close()
            raise
        self._scheduler = Scheduler(workload, self._policy, self._server, fleet)
        log.info("%s", self.describe())

    def run(self, until_version: int) -> Iterator[StepReport]:
        return self._started().run(until_version)

    def outer(self) -> Params:
        return self._spec.views(to_tensor(self._started().pull()))

    def state(self) -> OuterState:
        return unpack_state(self._started().state(), self._spec)

    def describe(self) -> dict[str, str]:
        infos = self._fleet.infos if self._fleet else []
        devices = Counter(f"{info.device} on {info.host}" for info in infos)
        return {
            "executor": "ray",
            "policy": str(self._policy),
            "num_workers": str(self._num_workers),
            "device": ", ".join(f"{count} x {name}" for name, count in sorted(devices.items()))
            or self._device,
        }

    def close(self) -> None:
        if ray.is_initialized():
            if self._fleet is not None:
                self._fleet.stop()
            if self._server is not None:
                ray.kill(self._server)
            if self._reservation is not None:
                remove_placement_group(self._reservation)
            if self._is_connection_ours:
                ray.shutdown()
        self._forget_actors()

    def _forget_actors(self) -> None:
        self._fleet = self._server = self._reservation = self._scheduler = None
        self._is_connection_ours = False

    def _start_fleet(self, payload: bytes) -> Fleet:
        if self._reservation is None:
            num_gpus = self._num_gpus()
            bundle = {"CPU": float(self._cpus_per_worker)} | ({"GPU": num_gpus} if num_gpus else {})
            self._reservation = reserve([bundle] * self._num_workers, self._start_timeout_s)
        if self._fleet is None:
            self._fleet = Fleet(self._make_worker, self._num_workers, self._retry)
        # Put once, owned by the driver: workers that start later, anywhere, read it too.
        self._fleet.start(self._start_timeout_s, ray.put(payload), self._spec)
        return self._fleet

    def _make_worker(self, number: int) -> Any:
        assert self._reservation is not None
        bundle = self._reservation.bundle_specs[number]
        place = PlacementGroupSchedulingStrategy(
            self._reservation, placement_group_bundle_index=number
        )
        actor = ray.remote(Worker).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=place,
        )
        return actor.remote(f"worker-{number}", self._device)

    def _start_server(
        self, state: PackedState, optimizer: OuterOptimizer, workload: Workload
    ) -> None:
        rules = pickle_by_value(workload.stepping_rules())
        arguments = (ray.put(state), self._spec, optimizer, workload.num_threads, rules)
        try:
            if self._server is not None:
                ray.get(self._server.setup.remote(*arguments))
                return
        except exceptions.RayActorError:
            log.info("the parameter server of the last run is gone, starting another")
        # Beside the driver: the run ends with that node anyway.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(ParameterServer).options(num_cpus=0, scheduling_strategy=node)
        self._server = actor.remote()
        try:
            ray.get(self._server.setup.remote(*arguments), timeout=self._start_timeout_s)
        except (exceptions.RayActorError, exceptions.GetTimeoutError) as error:
            raise ServerLostError(f"the parameter server could not start: {error}") from error

    def _num_gpus(self) -> float:
        """GPUs per worker."""
        if self._gpus_per_worker is not None:
            return float(self._gpus_per_worker)
        num_in_cluster = int(ray.cluster_resources().get("GPU", 0))
        if self._device == "cpu" or (num_in_cluster == 0 and self._device == "auto"):
            return 0.0
        if num_in_cluster == 0:
            # Nodes with GPUs may still join.
            return 1.0
        return 1.0 / math.ceil(self._num_workers / num_in_cluster)

    def _started(self) -> Scheduler:
        if self._scheduler is None:
            raise RuntimeError("the executor must be started with start(...) before it is used")
        return self._scheduler


def _check(
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float | None,
    device: str,
    start_timeout_s: float,
) -> None:
    if num_workers < 1:
        raise ValueError(f"num_workers must be >= 1, got {num_workers}")
    if not cpus_per_worker > 0:
        raise ValueError(f"cpus_per_worker must be > 0, got {cpus_per_worker}")
    if gpus_per_worker is not None and gpus_per_worker < 0:
        raise ValueError(f"gpus_per_worker must be >= 0 or None, got {gpus_per_worker}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device must be 'auto', 'cpu' or 'cuda' (Ray picks which GPU), got {device!r}"
        )
    if device == "cuda" and gpus_per_worker == 0:
        raise ValueError("gpus_per_worker must be > 0 or None with device='cuda', got 0")
    if not start_timeout_s > 0:
        raise ValueError(f"start_timeout_s must be > 0, got {start_timeout_s}")
