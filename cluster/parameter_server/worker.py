"""`Worker`: computes leases; becomes an actor where it is created."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import ray
import torch
from ray import ObjectRef, cloudpickle

from metadist.cluster.actors.buffers import Array, OuterSpec, to_array, to_tensor
from metadist.cluster.actors.errors import exits_raised
from metadist.cluster.actors.placement import WorkerInfo, worker_device
from metadist.cluster.parameter_server.compression import Bfloat16, Compression
from metadist.cluster.parameter_server.held import Held, check_room
from metadist.cluster.parameter_server.transport import (
    OBJECT_STORE,
    Pulled,
    Pushed,
    Transport,
    receive,
)
from metadist.compute import pick_device
from metadist.executor import Judge
from metadist.outer import Contribution, LeaseResult
from metadist.workload import Lease, Workload


class Judged(NamedTuple):
    """The metrics of each task of a chunk, and the seconds they took."""

    metrics: list[dict[str, float]]
    seconds: float


class Worker:
    """Holds the workload and its own copy of x on its device between leases.

    Args:
        name: The name of this worker in reports and errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._judge: tuple[ObjectRef[Any], Judge] | None = None
        self._applied = ExitStack()

    @exits_raised()
    def setup(
        self,
        payload: bytes,
        spec: OuterSpec,
        bounds: Sequence[tuple[int, int]] | None = None,
        compression: Compression = "none",
        transport: Transport = OBJECT_STORE,
        num_held: int = 0,
    ) -> WorkerInfo:
        """Where this worker runs, once it is ready to compute leases of another workload.

        Args:
            payload: The workload, pickled by `runtime_env.pickle_by_value`; or, for a worker that
                only judges, a `Judge`.
            spec: The names, shapes and dtype of x.
            bounds: The slices of x that the shards of the server own; None: there is one shard.
            compression: How sums of hypergradients are compressed, see `RayExecutor`.
            transport: How tensors are sent.
            num_held: Of how many tasks it will hold the states, see `compute_held`.
        """
        self._workload: Workload = cloudpickle.loads(payload)
        device = pick_device(worker_device(self._workload.compute.device))
        self._flat = torch.zeros(spec.num_elements, dtype=spec.dtype, device=device)
        self._spec = spec
        self._bounds = bounds or [(0, spec.num_elements)]
        self._rounding = Bfloat16() if compression == "bfloat16" else None
        self._transport = transport
        self._outer = spec.views(self._flat)
        # For as long as it lives: what is sampled ahead, in a thread, has these settings too.
        self._applied.close()
        self._applied.enter_context(self._workload.compute.applied())
        self._feed = (
            self._workload.feed(self._outer) if isinstance(self._workload, Workload) else None
        )
        self._held = Held()
        self._num_held = num_held
        return WorkerInfo.here(self._name, device)

    @exits_raised()
    def compute(
        self,
        lease: Lease,
        kept: Mapping[int, Array] | None,
        following: Lease | None,
        *pulled: Pulled,
    ) -> tuple[LeaseResult | Pushed, ...]:
        """The result of `lease`, and its contribution to each shard of the server.

        Args:
            lease: The tasks.
            kept: The states the algorithm keeps of these tasks, where it does.
            following: What this worker will probably compute next: its tasks are sampled meanwhile.
            pulled: x, in as many slices as there are shards.
        """
        self.load(pulled)
        self._sample_ahead(following)
        device = self._flat.device
        before = [part.previous for part in pulled if part.previous is not None]
        previous = None
        if before:
            previous = self._spec.views(torch.cat([receive(part).to(device) for part in before]))
        states = {index: to_tensor(state).to(device) for index, state in (kept or {}).items()}
        computed = self._workload.compute_lease(lease, self._outer, previous, states, self._feed)
        return computed.result, *self.send(computed)

    @exits_raised()
    def compute_held(
        self,
        lease: Lease,
        before: Sequence[Lease],
        kept: Mapping[int, Array] | None,
        following: Lease | None,
        *pulled: Pulled,
    ) -> tuple[LeaseResult | Pushed, ...]:
        """As `compute`, with the states of the tasks that this worker holds, and goes on to hold.

        Args:
            lease: The tasks.
            before: Leases of the same tasks at earlier versions of x, whose states are computed
                again first; their sums are in x.
            kept: The states to begin with, which replace what is held; None: what is held.
            following: As for `compute`.
            pulled: x at the version of each lease, in slices.
        """
        self._hold(lease.indices, lease.version, before, kept, pulled)
        self._sample_ahead(following)
        computed = self._step(lease, pulled[-len(self._bounds) :])
        return computed.result, *self.send(computed._replace(states={}))

    def _sample_ahead(self, following: Lease | None) -> None:
        if self._feed is not None and following is not None:
            self._feed.next = following.wanted

    @exits_raised()
    def give(
        self,
        indices: Sequence[int],
        version: int,
        before: Sequence[Lease],
        kept: Mapping[int, Array] | None,
        *pulled: Pulled,
        lets_go: bool = False,
    ) -> dict[int, Array]:
        """The states of tasks at that version of x, where there are any.

        Args:
            indices: The tasks.
            version: The version of x.
            before: As for `compute_held`.
            kept: As for `compute_held`.
            pulled: x at the version of each lease of `before`, in slices.
            lets_go: Whether another worker holds them from now on.
        """
        self._hold(indices, version, before, kept, pulled)
        states = {i: to_array(state) for i, state in self._held.at(indices, version).items()}
        if lets_go:
            self._held.let_go(indices)
        return states

    def _hold(
        self,
        indices: Sequence[int],
        version: int,
        before: Sequence[Lease],
        kept: Mapping[int, Array] | None,
        pulled: Sequence[Pulled],
    ) -> None:
        if kept is None:
            return
        device = self._flat.device
        states = {index: to_tensor(state).to(device) for index, state in kept.items()}
        self._held.set(indices, before[0].version if before else version, states)
        size = len(self._bounds)
        for number, lease in enumerate(before):
            self._step(lease, pulled[number * size : (number + 1) * size])

    def _step(self, lease: Lease, pulled: Sequence[Pulled]) -> Contribution:
        self.load(pulled)
        states = self._held.at(lease.indices, lease.version)
        computed = self._workload.compute_lease(lease, self._outer, None, states, self._feed)
        check_room(computed.states, self._num_held, self._flat.device)
        self._held.step(lease.indices, lease.version, computed.states)
        return computed

    def judge(
        self,
        indices: range,
        sent: Sequence[ObjectRef[Any]],
        outer: Mapping[str, Array],
        num_threads: int,
    ) -> Judged:
        """The metrics of these tasks.

        Args:
            indices: The tasks.
            sent: A reference to a `Judge`, pickled as a workload is. In a list, so that Ray does
                not read it for every call.
            outer: x.
            num_threads: The intra-op threads of torch, if the judge has no number of its own.
        """
        began = time.perf_counter()
        (ref,) = sent
        if self._judge is None or self._judge[0] != ref:
            self._judge = ref, cloudpickle.loads(ray.get(ref))
        judge = self._judge[1]
        x = {name: to_tensor(leaf).to(self._flat.device) for name, leaf in outer.items()}
        compute = replace(judge.compute, num_threads=judge.compute.num_threads or num_threads)
        with compute.applied():
            metrics = judge(x, indices)
        return Judged(metrics, time.perf_counter() - began)

    def load(self, pulled: Sequence[Pulled]) -> None:
        """Copy x to the device of this worker."""
        for (start, stop), part in zip(self._bounds, pulled, strict=True):
            self._flat[start:stop].copy_(receive(part.flat))

    def send(self, computed: Contribution) -> Iterator[Pushed]:
        """The part of a computed lease for each shard."""
        total = computed.total
        if self._rounding is not None:
            # The server may leave out a sum of no tasks, and the remainder with it.
            is_used = computed.result.num_tasks > 0
            total = self._rounding.round(total) if is_used else total.to(torch.bfloat16)
        left = {index: to_array(state) for index, state in computed.states.items()}
        if len(self._bounds) == 1:
            yield Pushed(self._transport.send(total), left)
            return
        halves = total.split(len(self._flat))
        for start, stop in self._bounds:
            pieces = [half[start:stop] for half in halves]
            mine = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            yield Pushed(self._transport.send(mine), {} if start else left)
