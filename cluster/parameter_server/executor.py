"""`RayExecutor`: trains on a Ray cluster, or on this machine's cores with Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.cluster.actors.buffers import (
    OuterSpec,
    PackedState,
    join,
    join_states,
    pack_state,
    split_state,
)
from metadist.cluster.actors.failure import Failures
from metadist.cluster.actors.metrics import RunMetrics
from metadist.cluster.actors.placement import Placement, devices_of
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.parameter_server.policies import BSP, Policy
from metadist.cluster.parameter_server.scheduler import Scheduler
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.supervisor import Supervisor
from metadist.cluster.parameter_server.transport import Transport, TransportName
from metadist.cluster.parameter_server.worker import Transfer, Worker
from metadist.cluster.parameter_server.worker_pool import WorkerPool
from metadist.executor import Executor, StepReport
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterState, shard_bounds
from metadist.trees import Params
from metadist.workload import Workload

log = logging.getLogger("metadist.cluster")


class RayExecutor(Executor):
    """Computes leases on Ray workers; under BSP to the same bytes as `LocalExecutor`.

    Uses the Ray connection that this process has; otherwise see `address`.

    What happens when something dies:

        a worker, its node   its lease goes to another worker; it is replaced as soon as there are
                             resources for it, on any node
        a worker hangs       the same after `lease_timeout_s`; or see `backup_factor`
        the server, a shard  another goes on from an earlier state, see `snapshot_every`, never one
                             older than the last checkpoint; the steps since are taken and
                             reported again
        the driver, the head the run ends, and Ray with all it started; `metadist resume` (or
                             `Trainer.restore`) goes on from the last checkpoint

    Under BSP the result has the same bytes in each case. Under the other policies every lease
    is in x once.

    Args:
        num_workers: workers, each one process that computes one lease at a time.
        min_workers: workers that make a start, the others join when their resources appear; None:
            `num_workers`. Ray's autoscaler sees those that lack as demand.
        policy: When results become an outer step: `BSP()`, `SSP(staleness=2)`, `ASP()`,
            `Buffered(size=4)` or a `Policy` of your own.
        cpus_per_worker: CPUs reserved per worker, > 0.
        gpus_per_worker: GPUs reserved per worker, also a fraction. None: one where the cluster
            has one for each of `min_workers` at the start, an equal share of one where it has
            fewer, none where it has none or with Compute(device="cpu"). Give a number if nodes
            with GPUs join later.
        address: of a running cluster, for example "auto" or "10.0.0.1:6379". None: the variable
            RAY_ADDRESS, which Ray sets in a submitted job, and without it (or with "local") a
            cluster of our own on this machine, with at least the CPUs the workers need.
        start_timeout_s: how long to wait for free resources, and again for the workers.
        max_losses: a worker or a lease that is lost so often in a row ends the run, and so does
            the parameter server without a new version of x in between.
        lease_timeout_s: a worker that computes one lease for longer is replaced; None: never.
        backup_factor: a lease that takes so many times as long as the median one goes to an idle
            worker too, and the first answer counts; None: never. Try 2 where some machines are
            slow at times.
        prefetch: leases that a worker may have beside the one it computes, so that it can go on at
            once; 0: none. They are handed out when half the usual time of a lease is over. Except
            under BSP they are computed at an older x.
        snapshot_every: versions of x between the states that the driver keeps in shared memory
            for the case that the server is lost; what was stepped since is computed again. One
            takes the server about half the time of a step, and the driver's node the memory of
            two checkpoints.
        num_shards: processes among which the parameter server is divided, to the same bytes. The
            first is on the driver's node, the second on another, and so on in turn (on nodes with a
            free GPU where `gpus_per_server` asks for one). For an x that is too large for one
            node's memory or network; on one node they are no faster. A shard has at least 65536
            numbers of x, and a problem with `project_outer` only one shard.
        server_timeout_s: a parameter server that does not answer for longer is replaced; None:
            never.
        transfer: how workers send their sums of hypergradients: "full" as they are, or "bfloat16"
            in 2 bytes a number, where what a worker rounds off is added to what it sends next. x
            and what an algorithm keeps of tasks are always sent as they are. With "bfloat16" the
            result depends, in the third digit of a step, on which worker computed what.
        transport: by which way x and the sums go: "object_store", Ray's, or "nixl", from memory to
            memory without a copy in between, over RDMA or between GPUs where the machine has it
            (Ray's direct tensor transport, alpha in Ray 2.60; needs metadist[nixl] on all nodes).
        gpus_per_server: GPUs reserved for each shard of the server, also a fraction; with some x
            is kept and stepped there, and with "nixl" goes from GPU to GPU. The result has other
            roundings than a step on the CPU. `gpus_per_worker` must be given then.
        show_worker_output: print what workers print, with Ray's own messages. Errors of user
            code come with their traceback in any case.
        object_store_bytes: shared memory of a cluster of our own; None: Ray's choice.
    """

    def __init__(
        self,
        num_workers: int = 2,
        policy: Policy = BSP(),
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float | None = None,
        address: str | None = None,
        start_timeout_s: float = 60.0,
        max_losses: int = 5,
        lease_timeout_s: float | None = None,
        min_workers: int | None = None,
        backup_factor: float | None = None,
        prefetch: int = 1,
        snapshot_every: int = 10,
        num_shards: int = 1,
        server_timeout_s: float | None = 300.0,
        transfer: Transfer = "full",
        transport: TransportName = "object_store",
        gpus_per_server: float = 0.0,
        show_worker_output: bool = False,
        object_store_bytes: int | None = None,
    ) -> None:
        self._placement = Placement(
            num_workers,
            min_workers,
            cpus_per_worker,
            gpus_per_worker,
            start_timeout_s,
            address,
            show_worker_output,
            object_store_bytes,
        )
        if not isinstance(policy, Policy):
            raise ValueError(
                "policy must be a Policy, such as BSP(), SSP(staleness=2), ASP() or "
                f"Buffered(size=4), got {policy!r}"
            )
        if prefetch < 0:
            raise ValueError(f"prefetch must be >= 0, got {prefetch}")
        for field, value in (("snapshot_every", snapshot_every), ("num_shards", num_shards)):
            if value < 1:
                raise ValueError(f"{field} must be >= 1, got {value}")
        if server_timeout_s is not None and not server_timeout_s > 0:
            raise ValueError(
                f"server_timeout_s must be > 0 or None for no limit, got {server_timeout_s}"
            )
        if transfer not in ("full", "bfloat16"):
            raise ValueError(f"transfer must be 'full' or 'bfloat16', got {transfer!r}")
        if gpus_per_server < 0:
            raise ValueError(f"gpus_per_server must be >= 0, got {gpus_per_server}")
        if gpus_per_server and not gpus_per_worker:
            raise ValueError(
                f"gpus_per_worker must be a number > 0 with gpus_per_server={gpus_per_server:g}, "
                f"got {gpus_per_worker}: the workers must leave room for the server on a GPU, and "
                "have one themselves"
            )
        self._transport = Transport(transport, on_gpu=gpus_per_server > 0)
        self._gpus_per_server = gpus_per_server
        self._policy = policy
        if backup_factor is not None and not backup_factor >= 1:
            raise ValueError(
                f"backup_factor must be >= 1 or None for no backup leases, got {backup_factor}"
            )
        self._failures = Failures(max_losses=max_losses, timeout_s=lease_timeout_s)
        self._backup_factor = backup_factor
        self._prefetch = prefetch
        self._snapshot_every = snapshot_every
        self._num_shards = num_shards
        self._server_timeout_s = server_timeout_s
        self._transfer = transfer
        self._num_workers = num_workers
        self._min_workers = num_workers if min_workers is None else min_workers
        self._start_timeout_s = start_timeout_s
        self._pool: WorkerPool | None = None
        self._supervisor: Supervisor | None = None
        self._scheduler: Scheduler | None = None

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        """See `Executor`; started again, it keeps its processes and sets them up anew."""
        if self._policy.is_synchronous and self._num_workers > workload.leases_per_step:
            raise ValueError(
                f"num_workers must be <= {workload.leases_per_step} with policy="
                f"{str(self._policy)!r}, as many as an outer step has leases "
                f"(meta_batch_size={workload.meta_batch_size} / "
                f"tasks_per_lease={workload.tasks_per_lease}), got {self._num_workers}: the "
                "others would never work; lower tasks_per_lease"
            )
        if workload.must_be_synchronous and not self._policy.is_synchronous:
            why = (
                "keep_state=True"
                if workload.keep_state
                else f"the two-point method {type(workload.algorithm).__name__}"
            )
            raise ValueError(
                f"policy must be synchronous, as BSP() is, with {why}, got {str(self._policy)!r}: "
                "every step needs what the step before it left"
            )
        self._spec = OuterSpec.of(state.outer)
        self._bounds = shard_bounds(self._spec.num_elements, self._num_shards)
        if self._num_shards > 1 and workload.stepping_rules().project is not None:
            raise ValueError(
                f"num_shards must be 1 with {type(workload.problem).__name__}, which has a "
                f"project_outer, got {self._num_shards}: a projection needs the whole of x"
            )
        if self._transfer == "bfloat16" and self._spec.dtype == torch.float16:
            raise ValueError(
                "transfer must be 'full' with an outer variable of float16, got 'bfloat16', which "
                "is as large and less exact"
            )
        if self._gpus_per_server and workload.compute.device == "cpu":
            raise ValueError(
                f"device must not be 'cpu' with gpus_per_server={self._gpus_per_server:g}, got "
                "'cpu': the server's GPU serves workers that have one themselves"
            )
        payload = pickle_by_value(workload)
        if not ray.is_initialized():
            self._forget_actors()
        try:
            self._placement.open(workload.compute.device)
            pool = self._start_pool(payload)
            parts = split_state(pack_state(state), self._bounds)
            supervisor = self._start_server(parts, optimizer, workload)
        except BaseException:
            self.close()
            raise
        self._scheduler = Scheduler(workload, self._policy, supervisor, pool)
        self._metrics = RunMetrics(ray.get_runtime_context().get_job_id())
        log.info("%s", self.describe())

    def run(self, until_version: int) -> Iterator[StepReport]:
        reports = self._started().run(until_version)
        return self._metrics.watch(reports)

    def outer(self) -> Params:
        return self._spec.views(join(self._started().read()))

    def state(self) -> OuterState:
        return join_states(self._started().state(), self._spec)

    def describe(self) -> dict[str, str]:
        infos = self._pool.infos if self._pool else []
        ways = {"transfer": self._transfer, "transport": self._transport.name}
        unusual = {name: way for name, way in ways.items() if way not in ("full", "object_store")}
        return {
            "executor": "ray",
            "policy": str(self._policy),
            "num_workers": str(self._num_workers)
            if self._min_workers == self._num_workers
            else f"{self._min_workers} to {self._num_workers}",
            **({"device": devices_of(infos)} if infos else {}),
            **unusual,
        }

    def close(self) -> None:
        if ray.is_initialized():
            if self._pool is not None:
                self._pool.stop()
            if self._supervisor is not None:
                self._supervisor.stop()
            self._placement.close()
        self._forget_actors()

    def _forget_actors(self) -> None:
        self._placement.forget()
        self._pool = self._supervisor = self._scheduler = None

    def _start_pool(self, payload: bytes) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(
                partial(self._placement.make, Worker),
                self._num_workers,
                self._failures,
                self._min_workers,
                self._prefetch,
                self._backup_factor,
            )
        # Put once, owned by the driver: workers that start later, anywhere, read it too.
        self._pool.start(
            self._start_timeout_s,
            ray.put(payload),
            self._spec,
            self._bounds,
            self._transfer,
            self._transport,
        )
        return self._pool

    def _start_server(
        self, parts: list[PackedState], optimizer: OuterOptimizer, workload: Workload
    ) -> Supervisor:
        if self._supervisor is None:
            self._supervisor = Supervisor(
                partial(_make_server, self._gpus_per_server),
                self._failures,
                self._snapshot_every,
                self._start_timeout_s,
                self._server_timeout_s,
            )
        rules = pickle_by_value(workload.stepping_rules())
        specs = self._spec.of_slices(self._bounds)
        self._supervisor.start(
            parts, specs, optimizer, workload.compute.num_threads, rules, self._transport
        )
        return self._supervisor

    def _started(self) -> Scheduler:
        if self._scheduler is None:
            raise RuntimeError("the executor must be started with start(...) before it is used")
        return self._scheduler


def _make_server(num_gpus: float, number: int) -> Any:
    # The first beside the driver: the run ends with that node anyway. The others on other nodes,
    # for the sake of their memory and network.
    here = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    nodes = [here, *sorted(alive - {here})]
    # A mere wish (`soft`) Ray often ignores; all it can be where not every node has a GPU. A node
    # that has died meanwhile is a loss as any other.
    place = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=num_gpus > 0)
    actor: Any = ray.remote(ParameterServer).options(
        num_cpus=0, num_gpus=num_gpus, scheduling_strategy=place
    )
    return actor.remote()
