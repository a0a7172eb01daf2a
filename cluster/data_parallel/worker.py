"""`ShardWorker`: holds one shard of a task's data and answers questions about it."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor

from metadist.cluster.actors.buffers import Array, to_array, to_tensor
from metadist.cluster.actors.errors import exits_raised
from metadist.cluster.actors.placement import WorkerInfo, worker_device
from metadist.cluster.data_parallel.checks import shard_fault
from metadist.cluster.data_parallel.data import ShardOracle, class_labels, sample_shard
from metadist.cluster.data_parallel.layout import (
    Key,
    Layout,
    Message,
    Reply,
    Request,
    Role,
    ShardCheck,
    ShardInfo,
)
from metadist.compute import pick_device
from metadist.draws import SOURCES
from metadist.hypergradient import attention_for
from metadist.memory import device_memory
from metadist.metrics import adaptation_metrics
from metadist.oracle import DERIVATIVES, Oracle
from metadist.task import Task, to_device
from metadist.trees import Params, check_flattenable
from metadist.workload import Workload


class ShardWorker:
    """Answers questions about its shard; becomes an actor where it is created."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._trees: dict[Key, Params] = {}
        self._oracle: ShardOracle | None = None

    @exits_raised()
    def setup(self, payload: bytes, part: int, num_parts: int) -> ShardInfo:
        """The shard `part`, read and ready; `payload` is the workload, by `pickle_by_value`."""
        self._workload: Workload = cloudpickle.loads(payload)
        self._device = pick_device(worker_device(self._workload.compute.device))
        self._part = part
        self._trees = {}
        self._oracle = None
        sampler = self._workload.sampler
        self._data = sample_shard(sampler, part, num_parts)
        self._shard: Task | None = None
        form = tuple(
            (
                *batch.names,
                *(f"{tuple(tensor.shape[1:])} {tensor.dtype}" for tensor in batch.tensors),
            )
            for batch in self._data[:2]
        )
        return ShardInfo(
            WorkerInfo.here(self._name, self._device),
            to_array(self._data.support.index),
            to_array(self._data.query.index),
            (form[0], form[1]),
            (class_labels(sampler, self._data.support), class_labels(sampler, self._data.query)),
        )

    @exits_raised()
    def check(self, layout: Layout, shared: Array, own: Array) -> ShardCheck:
        """Whether this shard can be asked, at the given outer variable."""
        with self._workload.compute.applied(), attention_for(self._workload.algorithm):
            problem = self._workload.problem
            outer = self._tree(layout, "outer", shared, own)
            shard = self._on_device(layout)
            start = problem.init_inner(outer, shard)
            check_flattenable(start, "the inner variable")
            fault = shard_fault(
                problem,
                shard,
                outer,
                start,
                layout.num_examples[0],
                is_local=layout.shard_sizes is not None,
            )
            context = tuple(problem.encode(outer, shard))
        return ShardCheck(fault, context, {name: to_array(leaf) for name, leaf in start.items()})

    @exits_raised()
    def compute(self, message: Message, shared: dict[Key, Array], own: dict[Key, Array]) -> Reply:
        """The answers to `message`; buffers of trees that all shards need, of this shard's own."""
        began = time.perf_counter()
        layout, workload = message.layout, self._workload
        for key in message.forget:
            self._trees.pop(key, None)
        for key, flat in shared.items():
            self._trees[key] = self._tree(layout, key[0], flat, own[key])
        oracle = self._oracle_at(message.step, layout)
        answered: list[bool] = []
        flats: list[Tensor] = []
        metrics: dict[str, float] = {}
        sizes = {
            "batch_size": workload.compute.batch_size,
            "graph_budget": workload.compute.graph_budget,
        }
        with (
            workload.compute.applied(),
            device_memory(f"the shard of {self._name}", **sizes),
            attention_for(workload.algorithm),
        ):
            for request in message.requests:
                trees = [self._trees[key] for key in request.trees]
                if request.draw is None:
                    metrics = self._metrics(layout, *trees)
                    continue
                share = oracle.share(request.draw)
                answered.append(share > 0)
                if share > 0:
                    found = oracle.together(partial(_answer, request), *trees)
                    roles = DERIVATIVES[request.method].gives
                    for role, tree in zip(roles, found, strict=True):
                        flats += [share * leaf for leaf in self._flats(layout, role, tree)]
            flat = to_array(torch.cat(flats)) if flats else np.empty(0)
        return Reply(tuple(answered), flat, metrics, time.perf_counter() - began)

    def _oracle_at(self, step: int, layout: Layout) -> ShardOracle:
        """The oracle of an outer step: what it keeps serves all rounds of the step."""
        if self._oracle is None or self._oracle.step != step:
            workload = self._workload
            self._oracle = ShardOracle(
                workload.problem,
                self._on_device(layout),
                layout.num_examples,
                workload.compute.batch_sizes,
                workload.compute.seed,
                workload.algorithm.compiles,
                step,
                workload.compute.graph_budget,
                shard_sizes=layout.shard_sizes,
                part=self._part,
            )
        return self._oracle

    def _on_device(self, layout: Layout) -> Task:
        """The shard where it is computed on, in the dtype of x."""
        if self._shard is None:
            self._shard = to_device(self._data, self._device, layout.outer.dtype)
            self._data = self._shard
        return self._shard

    def _tree(self, layout: Layout, role: Role, shared: Array, own: Array) -> Params:
        first, second = (to_tensor(array).to(self._device) for array in (shared, own))
        return layout.unpack(role, first, second, self._on_device(layout).support.index)

    def _flats(self, layout: Layout, role: Role, result: Params) -> list[Tensor]:
        """What goes back of a result."""
        if role == "value":
            return [result["value"].detach().reshape(1)]
        index = self._on_device(layout).support.index
        return [layout.pack_shared(role, result), layout.pack_own(role, result, index)]

    def _metrics(self, layout: Layout, outer: Params, y: Params) -> dict[str, float]:
        shard, problem = self._on_device(layout), self._workload.problem
        context, start = problem.encode(outer, shard), problem.init_inner(outer, shard)
        compute = self._workload.compute
        # What the shard holds of the examples that are reported, and their share of these.
        oracle = ShardOracle(
            problem,
            shard,
            layout.num_examples,
            compute.part_size,
            compute.seed,
            shard_sizes=layout.shard_sizes,
            part=self._part,
        )
        draws = [oracle.parts(source)[0] for source in SOURCES]
        support, query = (
            [(oracle.share(draw), oracle.batch(draw))] if oracle.share(draw) else []
            for draw in draws
        )
        found = adaptation_metrics(problem, context, start, y, support, query)
        return {name: float(value) for name, value in found.items()}


def _answer(request: Request, oracle: Oracle, *trees: Params) -> tuple[Params, ...]:
    assert request.draw is not None
    return oracle.derive(request.method, request.draw, *trees)
