"""Leases: the pieces of work that are handed out, and how one is computed.

The stream of task indices 0, 1, 2, ... is cut into leases of `tasks_per_lease` consecutive
tasks: lease n holds the tasks n * tasks_per_lease and following. So a lease is known by its
number, and a lost one is computed again from that number with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Algorithm
from metadist.hypergradient import HypergradientSum, Vectorize, task_hypergradients
from metadist.problem import Problem
from metadist.task import Task, TaskSampler, to_device
from metadist.trees import Params, flatten


class Lease(NamedTuple):
    """A piece of work: the tasks `indices`, at `version` of x; `report` asks for metrics too."""

    id: int
    version: int
    indices: tuple[int, ...]
    report: bool


class LeaseResult(NamedTuple):
    """What is small of a computed lease; the sum of hypergradients travels beside it.

    Args:
        lease_id: the lease.
        version: of x that it was computed at.
        num_tasks: tasks in the sum.
        dropped: ids of tasks left out because their hypergradient was not finite.
        metrics: sums over the tasks in the sum; empty unless the lease asked for a report.
        sampling_s: seconds spent on sampling the tasks.
        compute_s: seconds spent on their hypergradients.
    """

    lease_id: int
    version: int
    num_tasks: int
    dropped: tuple[int, ...]
    metrics: dict[str, float]
    sampling_s: float
    compute_s: float


@dataclass(frozen=True)
class Workload:
    """Everything but x that a lease is computed from; the same object goes to every worker.

    Args:
        problem, sampler, algorithm: what is trained on what by which method.
        meta_batch_size: tasks per synchronous outer step; a multiple of `tasks_per_lease`.
        tasks_per_lease: tasks that travel together; the smallest piece that can be lost.
        report_every: outer steps between leases that report losses and metrics.
        vectorize, chunk_size, batch_size: see `task_hypergradients`.
        seed: of the mini-batch draws.
        num_threads: intra-op threads of torch while a lease is computed. The sums of a
            convolution depend on it, so it is the same wherever the lease is computed.
    """

    problem: Problem
    sampler: TaskSampler
    algorithm: Algorithm
    meta_batch_size: int = 16
    tasks_per_lease: int = 1
    report_every: int = 10
    vectorize: Vectorize = "auto"
    chunk_size: int | None = None
    batch_size: int | None = None
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        for name in ("meta_batch_size", "tasks_per_lease", "report_every", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("chunk_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1 or None, got {value}")
        if self.meta_batch_size % self.tasks_per_lease:
            raise ValueError(
                "meta_batch_size must be a multiple of tasks_per_lease "
                f"({self.tasks_per_lease}), got {self.meta_batch_size}"
            )
        if not callable(getattr(self.sampler, "sample", None)):
            raise ValueError(
                "sampler must have a method sample(index) -> Task, got "
                f"{type(self.sampler).__name__} without one"
            )

    @property
    def leases_per_step(self) -> int:
        """Leases in a synchronous outer step."""
        return self.meta_batch_size // self.tasks_per_lease

    def lease(self, lease_id: int, version: int) -> Lease:
        """The lease of this number, to be computed at `version`."""
        first = lease_id * self.tasks_per_lease
        step = lease_id // self.leases_per_step + 1
        return Lease(
            lease_id,
            version,
            tuple(range(first, first + self.tasks_per_lease)),
            # The first step, and every step after which a report is due.
            report=step == 1 or step % self.report_every == 0,
        )

    def hypergradients(
        self, outer: Params, tasks: list[Task], report: bool = False
    ) -> HypergradientSum:
        """`task_hypergradients` of `tasks` as this workload has them computed."""
        return task_hypergradients(
            self.problem,
            self.algorithm,
            outer,
            tasks,
            vectorize=self.vectorize,
            chunk_size=self.chunk_size,
            batch_size=self.batch_size,
            seed=self.seed,
            report=report,
        )

    def compute(self, lease: Lease, outer: Params) -> tuple[LeaseResult, Tensor]:
        """(the result, the sum of hypergradients as a flat tensor on the device of `outer`)."""
        leaf = next(iter(outer.values()))
        with intra_op_threads(self.num_threads):
            began = time.perf_counter()
            tasks = [
                to_device(self.sampler.sample(index), leaf.device, leaf.dtype)
                for index in lease.indices
            ]
            sampled = time.perf_counter()
            result = self.hypergradients(outer, tasks, lease.report)
            flat = flatten(result.total)
        return (
            LeaseResult(
                lease.id,
                lease.version,
                result.num_tasks,
                result.dropped,
                result.metrics if lease.report else {},
                sampled - began,
                time.perf_counter() - sampled,
            ),
            flat,
        )


@contextmanager
def intra_op_threads(num_threads: int) -> Iterator[None]:
    """Within the block torch computes with `num_threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(device: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' or 'auto' where torch sees no GPU, got {device!r}")
    return chosen
