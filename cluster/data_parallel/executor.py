"""`DataParallelExecutor`: one bilevel problem, its data on many workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import ray
import torch
from torch import Tensor

from metadist.algorithm import Estimate, State, split_own
from metadist.checks.values import check
from metadist.cluster.actors.buffers import OuterSpec, to_array
from metadist.cluster.actors.connection import calls_kept_whole, this_node
from metadist.cluster.actors.failure import Failures
from metadist.cluster.actors.metrics import RunMetrics
from metadist.cluster.actors.options import Workers, check_kind, refuse_unused
from metadist.cluster.actors.placement import Placement, devices_of
from metadist.cluster.actors.pool import RAY, Notices
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.data_parallel.checks import check_shards, check_starts, check_workload
from metadist.cluster.data_parallel.data import FirstShard, check_own_draws
from metadist.cluster.data_parallel.exchange import Exchange
from metadist.cluster.data_parallel.layout import Layout, ShardInfo
from metadist.cluster.data_parallel.oracle import ClusterOracle
from metadist.cluster.data_parallel.pending import Rounds, known
from metadist.cluster.data_parallel.worker import ShardWorker
from metadist.cluster.data_parallel.worker_pool import ShardPool
from metadist.compute import Compute
from metadist.draws import MiniBatches
from metadist.executor import Executor, StepReport
from metadist.flat_states import counters_of, flatten_state, unflatten_state
from metadist.optimizer import OuterOptimizer
from metadist.oracle import Constants, CountingOracle
from metadist.outer import Contribution, LeaseResult, OuterState, OuterVariable
from metadist.problem import check_rows
from metadist.retry import Retries
from metadist.sampler import Shardable, TaskSampler
from metadist.signals import signals_held
from metadist.trees import Params, flatten, zeros_like
from metadist.workload import Lease, Workload

log = logging.getLogger("metadist.cluster")


class DataParallelExecutor(Executor):
    """Solves one bilevel problem whose data is cut into shards, one on each of many workers.

        workers = Workers(num_workers=4)
        Trainer(problem, FixedTasks([task]), SOBA(), executor=DataParallelExecutor(workers))

    The algorithm runs in this process, on its CPU, and asks all workers for every derivative; the
    answers are averaged, and what is not linear in them is computed here. So the run is that of
    `LocalExecutor` on all data, to rounding, whatever the number of workers; with the same number
    of workers it has the same bytes each time, also if workers die. (Averages of hypergradients
    that workers compute on their own would be wrong: the mean of inverses of H is not the inverse
    of the mean.)

    The losses must be means over examples, encode must return outer variables as they are, and
    init_inner must not depend on data: all that is checked at the start. A sampler with a method
    `shard(index, part, num_parts) -> Task` (positions in the full sets as `Batch.index`) lets each
    worker read its part only; otherwise each samples task 0 and keeps its part.

    A worker that dies, or hangs for `Failures.timeout_s`, is replaced by another that reads the
    same shard. Where the driver dies, `metadist resume` resumes from the last checkpoint, with any
    number of workers (but with local statistics, see `batch_statistics`).

    Args:
        workers: The processes, each of which holds one shard.
        failures: How often and how soon lost workers are tried again, and how long one may take to
            answer a round.
        staleness: s >= 0: A step may use answers of a worker that are up to s steps old; it waits
            for half of the workers, and for those whose last answer is older. For single-loop
            algorithms only; results then depend on timing. 0: exact.
        batch_statistics: "whole": Every loss must be a mean over examples; batch norm is refused.
            "local": Batch norm sees each worker's own part of a batch. The loss is then the mean of
            that of the parts, weighted by their numbers of examples, so the result depends on the
            number of workers, which a run must keep; each worker draws from its own examples.
        allow_missing_classes: Whether a shard may lack a class that others have. Classes are known
            for samplers with `num_classes`, whose labels (int64) are the last tensor of a batch.
        address: As in `RayExecutor`.
        object_store_bytes: As in `RayExecutor`.
    """

    def __init__(
        self,
        workers: Workers = Workers(),
        failures: Failures = Failures(),
        *,
        staleness: int = 0,
        batch_statistics: Literal["whole", "local"] = "whole",
        allow_missing_classes: bool = False,
        address: str | None = None,
        object_store_bytes: int | None = None,
    ) -> None:
        check_kind("workers", workers, Workers, "Workers(num_workers=4)")
        check_kind("failures", failures, Failures, "Failures(max_losses=3)")
        refuse_unused(workers, "DataParallelExecutor", ("min_workers",))
        check("staleness", staleness, is_integer=True, ge=0)
        check("batch_statistics", batch_statistics, one_of=("whole", "local"))
        if batch_statistics == "local" and workers.num_workers > 1:
            self.statistics_of = f"the parts of {workers.num_workers} workers"
        self._placement = Placement(workers, address, object_store_bytes)
        # As the arguments are called, by which a run that was made in Python is written down.
        self._address, self._object_store_bytes = address, object_store_bytes
        self._batch_statistics = batch_statistics
        self._workers = workers
        self._failures = failures
        self._staleness = staleness
        self._allow_missing_classes = allow_missing_classes
        self._notices = Notices(RAY)
        self._pool: ShardPool | None = None
        self._arithmetic: dict[str, str] = {}
        self._variable: OuterVariable | None = None

    def retries(self) -> Retries:
        """See `Executor`."""
        return Retries(self._failures.max_user_errors, self._failures.backoff_s)

    def num_on_gpus(self, compute: Compute) -> int:
        """See `Executor`; all workers compute the same lease."""
        return min(1, self._placement.num_on_gpus(compute.device))

    def probe(self, sampler: TaskSampler) -> TaskSampler:
        """See `Executor`: where workers read their parts, the first of them."""
        if isinstance(sampler, Shardable):
            return FirstShard(sampler, self._workers.num_workers)
        return sampler

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        """See `Executor`; started again, it keeps its processes and sets them up anew."""
        check_workload(workload, self._staleness)
        self._arithmetic = workload.compute.arithmetic
        payload = pickle_by_value(workload)
        if not ray.is_initialized():
            self._forget()
        try:
            self._placement.open(workload.compute.device)
            if self._pool is None:
                make_worker = partial(self._placement.make, ShardWorker)
                self._pool = ShardPool(
                    make_worker, self._workers.num_workers, self._failures, self._staleness
                )
            self._pool.notify = self.notify
            self._pool.must_agree = not (self._staleness or self._workers.allow_mixed_devices)
            infos = self._pool.start(self._workers.start_timeout_s, ray.put(payload))
            self._open(self._pool, infos, workload, optimizer, state)
        except BaseException:
            self.close()
            raise
        self._metrics = RunMetrics(ray.get_runtime_context().get_job_id())
        log.info("%s", self.describe())

    def _open(
        self,
        pool: ShardPool,
        infos: list[ShardInfo],
        workload: Workload,
        optimizer: OuterOptimizer,
        state: OuterState,
    ) -> None:
        """Check the shards, and make ready to ask them."""
        problem_outer, _ = split_own(state.outer)
        positions = check_shards(infos, self._allow_missing_classes)
        shard_sizes = tuple(map(len, positions)), tuple(len(info.query) for info in infos)
        num_examples = sum(shard_sizes[0]), sum(shard_sizes[1])
        rows = check_rows(workload.problem, problem_outer, num_examples[0])
        layout = _layout(problem_outer, rows, num_examples)
        if self._batch_statistics == "local":
            check_own_draws(shard_sizes, workload.compute.batch_sizes)
            layout = layout._replace(shard_sizes=shard_sizes)
        checks = pool.check(
            layout,
            to_array(layout.pack_shared("outer", problem_outer)),
            [to_array(layout.pack_own("outer", problem_outer, index)) for index in positions],
        )
        context, start = check_starts(checks)
        shapes = {name: layout.outer.shapes[name] for name in context}
        layout = layout._replace(x=layout.outer._replace(shapes=shapes), y=OuterSpec.of(start))
        self._workload = workload
        self._context = context
        self._start = start
        self._num_examples = num_examples
        self._exchange = Exchange(pool, layout, positions)
        self._last: tuple[Tensor, State] | None = None
        self._variable = OuterVariable.from_state(state, optimizer, workload.stepping_rules())

    def run(self, until_version: int) -> Iterator[StepReport]:
        return self._metrics.watch(self._run(until_version))

    def _run(self, until_version: int) -> Iterator[StepReport]:
        variable, pool = self._started()
        pool.forget()
        while variable.version < until_version:
            began = time.perf_counter()
            computed_before = pool.computing_s
            (lease_id,) = variable.next_leases(1)
            lease = self._workload.lease(lease_id, variable.version)
            with self._workload.compute.applied(), calls_kept_whole():
                contribution = self._compute(lease, variable, pool)
                with signals_held():
                    step = variable.apply([contribution])
            seconds = time.perf_counter() - began
            computing_s = pool.computing_s - computed_before
            yield StepReport(
                step=step,
                results=(contribution.result,),
                seconds=seconds,
                waiting_s=max(0.0, self._workers.num_workers * seconds - computing_s),
                num_workers=pool.num_alive,
                lost_workers=pool.take_num_lost(),
                retried=pool.take_retried(),
                is_draining=self._notices.take([this_node()]),
            )

    def _compute(self, lease: Lease, variable: OuterVariable, pool: ShardPool) -> Contribution:
        """The lease of a step: one estimate of the algorithm, by all workers together."""
        began = time.perf_counter()
        sent, received, pool.oldest = pool.bytes_sent, pool.bytes_received, 0
        outer = variable.params
        estimate, num_rounds, calls = self._estimate(lease, outer, variable.states.get(0))
        total = flatten({**zeros_like(outer), **estimate.hypergradient})
        if not bool(total.isfinite().all()):
            return self._done(lease, began, torch.zeros_like(total), None, {}, calls)
        flat = flatten_state(estimate.state)
        self._last = flat, estimate.state
        metrics: dict[str, float] = {}
        if lease.report:
            metrics = {name: float(value) for name, value in estimate.metrics.items()}
            metrics["rounds"] = float(num_rounds)
            metrics["bytes_sent"] = float(pool.bytes_sent - sent)
            metrics["bytes_received"] = float(pool.bytes_received - received)
            if self._staleness:
                metrics["oldest_answer"] = float(pool.oldest)
            y = estimate.state.inner
            metrics |= self._exchange.metrics(lease.version, split_own(outer)[0], y)
        return self._done(lease, began, total, flat, metrics, calls)

    def _estimate(
        self, lease: Lease, outer: Params, flat: Tensor | None
    ) -> tuple[Estimate, int, Mapping[str, int]]:
        """(the estimate from the kept state `flat`, its rounds, the calls of the oracle)."""
        workload = self._workload
        problem_outer, own = split_own(outer)
        x = {**{name: problem_outer[name] for name in self._context}, **own}
        rounds = Rounds(partial(self._exchange.ask, lease.version))
        oracle = CountingOracle(
            ClusterOracle(
                workload.problem,
                MiniBatches(
                    self._num_examples,
                    task_id=0,
                    batch_size=workload.compute.batch_sizes,
                    seed=workload.compute.seed,
                    step=lease.version,
                ),
                rounds,
                # A kept start; the context is made of outer variables.
                Constants(start=frozenset(self._start)),
                lease.report,
            )
        )
        state = self._state(workload.algorithm.init(oracle, x, self._start), flat)
        estimate: Estimate = known(workload.algorithm.estimate(oracle, x, state))
        return estimate, rounds.num_rounds, oracle.counts

    def _done(
        self,
        lease: Lease,
        began: float,
        total: Tensor,
        flat: Tensor | None,
        metrics: dict[str, float],
        calls: Mapping[str, int],
    ) -> Contribution:
        """The computed lease; without a state where the hypergradient was not finite."""
        states = {} if flat is None else {0: flat}
        result = LeaseResult(
            lease_id=lease.id,
            version=lease.version,
            num_tasks=len(states),
            dropped=() if states else (0,),
            metrics=metrics,
            compute_s=time.perf_counter() - began,
            calls=calls,
            worker="data-parallel",
        )
        return Contribution(result, total, states)

    def _state(self, first: State, flat: Tensor | None) -> State:
        """The state that the last step left."""
        if flat is None:
            return first
        # The workers still hold trees of the last step, which they know by the identity of their
        # tensors here: with the very same tensors those are not sent again.
        if self._last is not None and self._last[0] is flat:
            return self._last[1]
        return unflatten_state(flat, first, counters_of(flat))

    def state(self) -> OuterState:
        return self._started()[0].state()

    def describe(self) -> dict[str, str]:
        infos = self._pool.infos if self._pool else []
        return {
            "executor": "data_parallel",
            "policy": f"staleness {self._staleness}" if self._staleness else "bsp",
            "num_workers": str(self._workers.num_workers),
            **({"batch_statistics": "local"} if self._batch_statistics == "local" else {}),
            **({"device": devices_of(infos)} if infos else {}),
            **self._arithmetic,
        }

    def close(self) -> None:
        if ray.is_initialized():
            if self._pool is not None:
                self._pool.stop()
            self._placement.close()
        self._forget()

    def _forget(self) -> None:
        self._placement.forget()
        self._pool = self._variable = None

    def _started(self) -> tuple[OuterVariable, Any]:
        if self._variable is None or self._pool is None:
            raise RuntimeError("the executor must be started with start(...) before it is used")
        return self._variable, self._pool


def _layout(outer: Params, rows: set[str], num_examples: tuple[int, int]) -> Layout:
    """Before the context and the inner variable are known."""
    spec = OuterSpec.of(outer)
    return Layout(spec, spec, spec, frozenset(rows), num_examples)
