"""`RayExecutor`: trains on a Ray cluster, or on this machine's cores with Ray."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, get_args

import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.checks.values import check
from metadist.cluster.actors.buffers import (
    OuterSpec,
    PackedState,
    join_states,
    pack_state,
    split_state,
    to_array,
)
from metadist.cluster.actors.connection import draining_nodes
from metadist.cluster.actors.failure import Failures
from metadist.cluster.actors.metrics import RunMetrics
from metadist.cluster.actors.options import Server, Workers, check_kind
from metadist.cluster.actors.placement import Placement, devices_of, gpu_options
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.parameter_server.checks import (
    StateName,
    check_policy,
    check_room_for_versions,
    check_server,
)
from metadist.cluster.parameter_server.compression import Compression
from metadist.cluster.parameter_server.policies import BSP, Policy
from metadist.cluster.parameter_server.scheduler import Scheduler
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.states import HeldStates
from metadist.cluster.parameter_server.supervisor import Supervisor
from metadist.cluster.parameter_server.transport import Transport, TransportName
from metadist.cluster.parameter_server.worker import Worker
from metadist.cluster.parameter_server.worker_pool import WorkerPool
from metadist.compute import Compute
from metadist.executor import Executor, Judge, StepReport
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterState, shard_bounds
from metadist.trees import Params
from metadist.workload import Workload

log = logging.getLogger("metadist.cluster")

T = TypeVar("T")

LAST_STATE_S = 20.0
"""How long the server may take to give its state when a run ends; schedulers grant 30 s."""


class RayExecutor(Executor):
    """Computes leases on Ray workers.

    Under BSP the bytes are those of `LocalExecutor` with the same `tasks_per_lease`.

    Uses the Ray connection that this process has; otherwise see `address`.

    What happens when something dies:

        a worker, its node   its lease goes to another worker; it is replaced as soon as there are
                             resources for it, on any node
        a worker that hangs  the same after `Failures.timeout_s`; or see `backup_factor`
        the server, a shard  another one resumes from an earlier state, see
                             `Server.snapshot_every`, never one older than the last checkpoint; the
                             steps since are repeated and reported again
        a node that Ray      its workers, and shards of the server, are started elsewhere ahead of
        announces to stop    its end, and a checkpoint is written if x or the driver is there
        the driver, the head the run ends, and Ray with all it started; `metadist resume` (or
                             `Trainer.restore`) resumes from the last checkpoint

    Under BSP the result has the same bytes in each case. Under the other policies every lease
    is in x once. The workers compute validation and test too, see `judge`; what is said of leases
    holds for the tasks of these.

    Args:
        workers: The processes that compute leases.
        server: The parameter server, which owns x.
        policy: When results become an outer step: `BSP()`, `SSP(staleness=2)`, `ASP()`,
            `Buffered(size=4)` or a `Policy` of your own.
        failures: How often and how soon lost workers, leases and servers are tried again, and how
            long a lease may take.
        prefetch: The leases a worker may hold beside the one it computes, so that it can start the
            next at once; 0: none. They are handed out when half the usual time of a lease is over.
            Except under BSP they are computed at an older x. With state="worker" all leases of a
            step are handed out at once, and this is for validation alone.
        backup_factor: A lease that takes so many times as long as the median one goes to an idle
            worker too, and the first answer counts; None: never. Try 2 where some machines are
            slow at times.
        compression: How workers send their sums of hypergradients: "none", as they are, or
            "bfloat16", in 2 bytes per element, where the part that a worker rounds off is added to
            the next sum it sends. x and the states an algorithm keeps are always sent as they are.
            With "bfloat16" the result depends, in the third digit of a step, on which worker
            computed what.
        transport: How x and the sums travel: "object_store", Ray's, or "nixl", from memory to
            memory without a copy in between, over RDMA or between GPUs where the machine has it
            (Ray's direct tensor transport, alpha in Ray 2.60; needs metadist[nixl] on all nodes).
        state: Who has the states that an algorithm keeps of tasks from step to step (`keep_state`):
            "server": the parameter server; they travel with each lease. "worker": the worker that
            computes the task, which then always computes it; x and the sums alone travel. Every
            `Server.snapshot_every` versions, and for a checkpoint, the driver fetches them one by
            one to its temporary folder; those of a lost worker are computed again from there.
            For inner variables that are large; it changes no byte.
        address: The address of a running cluster, for example "auto" or "10.0.0.1:6379". None: the
            variable RAY_ADDRESS, which Ray sets in a submitted job, and without it (or with
            "local") a cluster of our own on this machine, with at least the CPUs the workers need.
        object_store_bytes: The shared memory of a cluster of our own; None: Ray's choice.
    """

    def __init__(
        self,
        workers: Workers = Workers(),
        server: Server = Server(),
        policy: Policy = BSP(),
        failures: Failures = Failures(),
        *,
        prefetch: int = 1,
        backup_factor: float | None = None,
        compression: Compression = "none",
        transport: TransportName = "object_store",
        state: StateName = "server",
        address: str | None = None,
        object_store_bytes: int | None = None,
    ) -> None:
        check_kind("workers", workers, Workers, "Workers(num_workers=4)")
        check_kind("server", server, Server, "Server(num_shards=2)")
        check_kind("policy", policy, Policy, "SSP(staleness=2)")
        check_kind("failures", failures, Failures, "Failures(max_losses=3)")
        check("prefetch", prefetch, is_integer=True, ge=0)
        check("backup_factor", backup_factor, ge=1, none="for no backup leases")
        if compression not in get_args(Compression):
            raise ValueError(
                f"compression must be one of {get_args(Compression)}, got {compression!r}"
            )
        if state not in get_args(StateName):
            raise ValueError(f"state must be one of {get_args(StateName)}, got {state!r}")
        if state == "worker" and backup_factor is not None:
            raise ValueError(
                f"backup_factor must be None with state='worker', got {backup_factor}: no other "
                "worker holds the states of a slow one's tasks"
            )
        if server.gpus_per_server and not workers.gpus_per_worker:
            raise ValueError(
                f"gpus_per_worker must be > 0 with gpus_per_server={server.gpus_per_server:g}, got "
                f"{workers.gpus_per_worker}: the workers must leave room for the server on a GPU, "
                "and have one themselves"
            )
        self._placement = Placement(workers, address, object_store_bytes)
        self._channel = Transport(transport, on_gpu=server.gpus_per_server > 0)
        # As the arguments are called, by which a run that was made in Python is written down.
        self._address, self._object_store_bytes = address, object_store_bytes
        self._transport = transport
        self._workers = workers
        self._server = server
        self._policy = policy
        self._failures = failures
        self._prefetch = prefetch
        self._backup_factor = backup_factor
        self._compression = compression
        self._state = state
        self._held: HeldStates | None = None
        self._pool: WorkerPool | None = None
        self._supervisor: Supervisor | None = None
        self._scheduler: Scheduler | None = None
        self._judge: tuple[bytes, ObjectRef[Any]] | None = None
        self._arithmetic: dict[str, str] = {}

    def num_on_gpus(self, compute: Compute) -> int:
        """See `Executor`; with device "auto" and no `gpus_per_worker` a connection tells."""
        return self._placement.num_on_gpus(compute.device)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Executor`; with state="worker" a process with the CPUs of a worker calls it.

        So this process builds no inner variable for a check. An executor that is at work has no
        CPUs left for that, and calls it here.
        """
        if self._state != "worker" or self._pool is not None:
            return function(*arguments)
        try:
            return self._placement.call(function, *arguments)
        except BaseException:
            self.close()
            raise

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        """See `Executor`; started again, it keeps its processes and sets them up anew."""
        check_policy(workload, self._policy, self._workers, self._state)
        self._spec = OuterSpec.of(state.outer)
        self._bounds = shard_bounds(self._spec.num_elements, self._server.num_shards)
        check_server(workload, self._server, self._spec, self._compression)
        self._arithmetic = workload.compute.arithmetic
        payload = pickle_by_value(workload)
        if not ray.is_initialized():
            self._forget_actors()
        try:
            self._placement.open(workload.compute.device)
            self._held = None
            if self._state == "worker":
                check_room_for_versions(self._spec, self._server.snapshot_every)
            pool = self._start_pool(payload, self._num_held(workload))
            if self._state == "worker":
                self._held = HeldStates(workload, pool, state.version, state.states)
                state = state._replace(states={})
            parts = split_state(pack_state(state), self._bounds)
            supervisor = self._start_server(parts, optimizer, workload)
        except BaseException:
            self.close()
            raise
        self._scheduler = Scheduler(workload, self._policy, supervisor, pool, self._held)
        self._metrics = RunMetrics(ray.get_runtime_context().get_job_id())
        log.info("%s", self.describe())

    def run(self, until_version: int) -> Iterator[StepReport]:
        reports = self._started().run(until_version)
        return self._metrics.watch(reports)

    def judge(self, judge: Judge, outer: Params, chunks: Sequence[range]) -> list[dict[str, float]]:
        """See `Executor`; workers that are started for it alone are stopped after it."""
        payload = pickle_by_value(judge)
        if not ray.is_initialized():
            self._forget_actors()
        is_alone = self._pool is None
        try:
            if is_alone:
                self._spec = OuterSpec.of(outer)
                self._bounds = [(0, self._spec.num_elements)]
                self._placement.open(judge.compute.device)
            pool = self._start_pool(payload) if self._pool is None else self._pool
            digest = hashlib.sha256(payload).digest()
            if self._judge is None or self._judge[0] != digest:
                # Once for all validations: a sampler may hold much data.
                self._judge = digest, ray.put(payload)
            x = ray.put({name: to_array(leaf.detach()) for name, leaf in outer.items()})
            num_threads = max(1, int(self._workers.cpus_per_worker))
            found = pool.judge(chunks, [self._judge[1]], x, num_threads)
            if num_lost := pool.take_num_lost():
                self.notify("worker_lost", num_lost=num_lost, num_workers=pool.num_alive)
            if retried := pool.take_retried():
                self.notify("user_error", errors=list(retried))
            return found
        finally:
            if is_alone:
                self.close()

    def state(self) -> OuterState:
        return self._whole(self._started().state())

    def last_state(self) -> OuterState:
        if self._supervisor is None:
            return self.state()
        return self._whole(self._supervisor.last_state(LAST_STATE_S))

    def _whole(self, parts: list[PackedState]) -> OuterState:
        found = join_states(parts, self._spec)
        return found if self._held is None else found._replace(states=self._held.at(found.version))

    def describe(self) -> dict[str, str]:
        infos = self._pool.infos if self._pool else []
        ways = {
            "compression": self._compression,
            "transport": self._transport,
            "state": self._state,
        }
        usual = ("none", "object_store", "server")
        unusual = {name: way for name, way in ways.items() if way not in usual}
        return {
            "executor": "ray",
            "policy": str(self._policy),
            "num_workers": str(self._workers.num_workers)
            if self._workers.num_at_start == self._workers.num_workers
            else f"{self._workers.num_at_start} to {self._workers.num_workers}",
            **({"device": devices_of(infos)} if infos else {}),
            **self._arithmetic,
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
        self._pool = self._supervisor = self._scheduler = self._judge = self._held = None

    def _num_held(self, workload: Workload) -> int:
        """Of how many tasks a worker holds the states."""
        if self._state != "worker":
            return 0
        leases = math.ceil(workload.leases_per_step / self._workers.num_at_start)
        return leases * workload.tasks_per_lease

    def _start_pool(self, payload: bytes, num_held: int = 0) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(
                partial(self._placement.make, Worker),
                self._workers.num_workers,
                self._failures,
                self._workers.num_at_start,
                self._prefetch,
                self._backup_factor,
            )
        self._pool.notify = self.notify
        self._pool.must_agree = (
            self._policy.is_synchronous and not self._workers.allow_mixed_devices
        )
        # Put once, owned by the driver: workers that start later, anywhere, read it too.
        self._pool.start(
            self._workers.start_timeout_s,
            ray.put(payload),
            self._spec,
            self._bounds,
            self._compression,
            self._channel,
            num_held,
        )
        return self._pool

    def _start_server(
        self, parts: list[PackedState], optimizer: OuterOptimizer, workload: Workload
    ) -> Supervisor:
        if self._supervisor is None:
            self._supervisor = Supervisor(
                partial(_make_server, self._server.gpus_per_server),
                self._failures,
                self._server,
                self._workers.start_timeout_s,
            )
        rules = pickle_by_value(workload.stepping_rules())
        specs = self._spec.of_slices(self._bounds)
        self._supervisor.start(
            parts, specs, optimizer, workload.compute.num_threads, rules, self._channel
        )
        return self._supervisor

    def _started(self) -> Scheduler:
        if self._scheduler is None:
            raise RuntimeError("the executor must be started with start(...) before it is used")
        return self._scheduler


def _make_server(num_gpus: float, number: int) -> Any:
    # The first shard runs beside the driver, as the run ends with that node anyway. The others run
    # on other nodes, to use their memory and network.
    here = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    nodes = [here, *sorted(alive - {here} - draining_nodes())]
    # Ray often ignores a soft affinity; but a hard one would fail where not every node has a GPU. A
    # node that has died in the meantime is a loss like any other.
    place = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=num_gpus > 0)
    actor: Any = ray.remote(ParameterServer).options(
        num_cpus=0, **gpu_options(num_gpus), scheduling_strategy=place
    )
    return actor.remote()
