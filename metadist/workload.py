"""Leases: the pieces of work that are handed out, and how one is computed.

The stream of task indices 0, 1, 2, ... is cut into leases of `tasks_per_lease` consecutive
tasks: lease n holds the tasks n * tasks_per_lease and following. So a lease is known by its
number, and a lost one is computed again from that number with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Algorithm, split_own
from metadist.checks.values import check_fields, rule
from metadist.compute import Compute
from metadist.feed import Feed, Wanted, send
from metadist.hypergradient import HypergradientSum, task_hypergradients
from metadist.memory import device_memory
from metadist.outer import Contribution, LeaseResult, StepRules
from metadist.problem import Problem, check_rows, is_constrained
from metadist.sampler import (
    Repeatable,
    Stream,
    TaskSampler,
    num_tasks_of,
    require_sampler,
    sample_task,
)
from metadist.task import Task
from metadist.trees import Params, flatten


class Lease(NamedTuple):
    """A piece of work: the tasks `indices`, at `version` of x; `report` asks for metrics too."""

    id: int
    version: int
    indices: tuple[int, ...]
    report: bool

    @property
    def in_words(self) -> str:
        """Which lease it is, for messages."""
        return f"lease {self.id} (tasks {', '.join(map(str, self.indices))})"

    @property
    def wanted(self) -> Wanted:
        """Its tasks, as a feed is asked for them."""
        return Wanted(self.indices, self.version)


@dataclass(frozen=True)
class Workload:
    """Everything but x that a lease is computed from; the same object goes to every worker.

    Args:
        problem, sampler, algorithm: What is trained, on which tasks, by which method.
        meta_batch_size: Tasks per synchronous outer step; a multiple of `tasks_per_lease`.
        tasks_per_lease: Tasks that travel together; the smallest piece that can be lost.
        keep_state: Every outer step has the same tasks, 0 .. meta_batch_size-1 (of a stream, with
            the data of that step), and what the algorithm keeps of each (the inner variable, an
            adjoint, ...) goes from step to step. Otherwise every task is new. The
            start of adaptation gets no hypergradient then.
        report_every: Outer steps between leases that report losses and metrics.
        compute: How leases are computed, and on which device.
        chunk_on_cpu: The most tasks that go through vmap together on a CPU; None: as `compute`
            says.
    """

    problem: Problem
    sampler: TaskSampler
    algorithm: Algorithm
    meta_batch_size: int = rule(16, ge=1)
    tasks_per_lease: int = rule(1, ge=1)
    keep_state: bool = False
    report_every: int = rule(10, ge=1)
    compute: Compute = field(default_factory=Compute)
    chunk_on_cpu: int | None = rule(None, ge=1, none="")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.compute.num_threads is None:
            raise ValueError(
                "num_threads must be >= 1 in a training, got None: sums depend on it, and every "
                "worker must use the same"
            )
        if self.meta_batch_size % self.tasks_per_lease:
            raise ValueError(
                "meta_batch_size must be a multiple of tasks_per_lease "
                f"({self.tasks_per_lease}), got {self.meta_batch_size}"
            )
        if self.keep_state and self.algorithm.trains == "start":
            raise ValueError(
                f"keep_state must be False with {type(self.algorithm).__name__}, got True: it "
                "trains where adaptation starts, and a kept state starts where the last ended"
            )
        require_sampler("sampler", self.sampler)

    @cached_property
    def _on_cpu(self) -> Compute:
        return replace(self.compute, chunk_size=self.chunk_on_cpu or self.compute.chunk_size)

    @property
    def leases_per_step(self) -> int:
        """Leases in a synchronous outer step."""
        return self.meta_batch_size // self.tasks_per_lease

    @property
    def is_two_point(self) -> bool:
        """Whether leases need the previous x too, see `Algorithm.recursive_weight`."""
        return not self.keep_state and self.algorithm.recursive_weight(0) is not None

    @property
    def must_be_synchronous(self) -> bool:
        """Whether a step needs what the step before it left."""
        return self.keep_state or self.is_two_point

    def needs_previous(self, version: int) -> bool:
        """Whether the leases at this version of x are computed at the version before it too."""
        weight = self.algorithm.recursive_weight(version)
        return self.is_two_point and version > 0 and weight is not None and weight < 1

    def stepping_rules(self) -> StepRules:
        """The rules of problem and algorithm for the owner of x."""
        return StepRules(
            project=partial(_project, self.problem) if is_constrained(self.problem) else None,
            recursive_weight=self.algorithm.recursive_weight if self.is_two_point else None,
        )

    def lease(self, lease_id: int, version: int) -> Lease:
        """The lease of this number, to be computed at `version`."""
        number = lease_id % self.leases_per_step if self.keep_state else lease_id
        first = number * self.tasks_per_lease
        step = lease_id // self.leases_per_step + 1
        return Lease(
            id=lease_id,
            version=version,
            indices=tuple(range(first, first + self.tasks_per_lease)),
            # The first step, and every step after which a report is due.
            report=step == 1 or step % self.report_every == 0,
        )

    def hypergradients(
        self,
        outer: Params,
        tasks: list[Task],
        report: bool = False,
        step: int = 0,
        previous: Params | None = None,
        states: Mapping[int, Tensor] | None = None,
    ) -> HypergradientSum:
        """`task_hypergradients` of `tasks` with the settings of this workload."""
        on_cpu = next(iter(outer.values())).device.type == "cpu"
        return task_hypergradients(
            self.problem,
            self.algorithm,
            outer,
            tasks,
            compute=self._on_cpu if on_cpu else self.compute,
            report=report,
            step=step,
            previous=previous,
            states=states if self.keep_state else None,
            is_checked=True,
        )

    def compute_lease(
        self,
        lease: Lease,
        outer: Params,
        previous: Params | None = None,
        states: Mapping[int, Tensor] | None = None,
        feed: Feed | None = None,
    ) -> Contribution:
        """The computed lease, on the device of `outer`.

        Args:
            lease: The tasks.
            outer: x at the version of the lease.
            previous: x one version before; used where `needs_previous`.
            states: The states of the tasks that have one, by index; used where `keep_state`.
            feed: What brings tasks to the device of `outer`; None: they are sampled here.

        Raises:
            DeviceMemoryError: The memory of the GPU does not hold it.
        """
        leaf = next(iter(outer.values()))
        if not self.needs_previous(lease.version):
            previous = None
        sizes = {
            "chunk_size": self.compute.chunk_size,
            "tasks_per_lease": self.tasks_per_lease,
            "meta_batch_size": self.meta_batch_size,
            "graph_budget": self.compute.graph_budget,
        }
        with self.compute.applied(), device_memory(lease.in_words, **sizes):
            began = time.perf_counter()
            if feed is None:
                tasks = [sample_task(self.sampler, n, lease.version) for n in lease.indices]
                tasks = send(tasks, leaf.device, leaf.dtype)
            else:
                tasks = feed.tasks(lease.wanted)
            if isinstance(self.sampler, Stream):
                # The sizes at step 0, which were checked before, tell nothing.
                for task in tasks:
                    check_rows(self.problem, split_own(outer)[0], len(task.support.index))
            sampled = time.perf_counter()
            found = self.hypergradients(
                outer, tasks, lease.report, lease.version, previous, states or {}
            )
            total = flatten(found.total)
            if found.previous is not None:
                total = torch.cat([total, flatten(found.previous)])
        result = LeaseResult(
            lease_id=lease.id,
            version=lease.version,
            num_tasks=found.num_tasks,
            dropped=found.dropped,
            metrics=found.metrics,
            sampling_s=sampled - began,
            compute_s=time.perf_counter() - sampled,
            calls=found.calls,
        )
        return Contribution(result, total, found.states)

    def feed(self, outer: Params) -> Feed:
        """What brings tasks to the device of `outer`."""
        leaf, compute = next(iter(outer.values())), self.compute
        with device_memory("the data that stays there", data_budget=compute.data_budget):
            return Feed(
                *(self.sampler, leaf.device, leaf.dtype),
                budget=compute.data_budget,
                num_threads=compute.num_threads,
            )


def trains_start(algorithm: Algorithm, learns_start: bool) -> bool:
    """Whether `algorithm` trains where adaptation starts, if that depends on x (`learns_start`)."""
    return algorithm.trains == "start" or (algorithm.trains == "both" and learns_start)


def tasks_of_steps(
    sampler: TaskSampler,
    algorithm: Algorithm,
    meta_batch_size: int | None,
    keep_state: bool | None,
    *,
    learns_start: bool = False,
    is_one_task: bool = False,
) -> tuple[int, bool]:
    """(`meta_batch_size`, `keep_state`) of a training; None is what the sampler says.

    A sampler of a fixed set has all its tasks at every step, with kept states, unless where
    adaptation starts is learned: a kept state starts where the last ended. Otherwise 16 tasks, new
    at every step.

    Args:
        sampler: The sampler.
        algorithm: The algorithm.
        meta_batch_size: That of the Trainer.
        keep_state: That of the Trainer.
        learns_start: Whether the start of adaptation depends on the outer variable.
        is_one_task: Whether the tasks 0 and 1 have the same data.

    Raises:
        ValueError: An argument contradicts the sampler, or nothing says whether to keep states.
    """
    name = type(sampler).__name__
    learns_start = trains_start(algorithm, learns_start)
    num_tasks = num_tasks_of(sampler)
    if num_tasks is None:
        if keep_state is None and is_one_task and not learns_start:
            raise ValueError(
                f"keep_state must be given for {name}, whose tasks 0 and 1 are the same, got None: "
                "give the sampler num_tasks = 1, so that each outer step continues from the last "
                "one, or pass keep_state=False if each must start from the beginning"
            )
        return 16 if meta_batch_size is None else meta_batch_size, bool(keep_state)
    if learns_start and not keep_state:
        return num_tasks if meta_batch_size is None else meta_batch_size, False
    if keep_state is False:
        raise ValueError(
            f"keep_state must be True with {name}, whose num_tasks={num_tasks} are those of every "
            "outer step, got False: each step would start from the beginning, and the weights "
            "found would never be kept. Leave it out, or use a sampler without num_tasks"
        )
    if meta_batch_size and isinstance(sampler, Repeatable) and sampler.repeats:
        if meta_batch_size % num_tasks:
            raise ValueError(
                f"meta_batch_size must be a multiple of {num_tasks}, the num_tasks of {name}, got "
                f"{meta_batch_size}: every outer step has each of them as often"
            )
        return meta_batch_size, True
    if meta_batch_size not in (None, num_tasks):
        raise ValueError(
            f"meta_batch_size must be {num_tasks}, the num_tasks of {name}, with keep_state, got "
            f"{meta_batch_size}: every outer step has all of them. Leave it out, or use a sampler "
            "without num_tasks"
        )
    return num_tasks, True


def default_tasks_per_lease(meta_batch_size: int, chunk: int = 1) -> int:
    """The largest divisor that leaves at least four leases, or is at most `chunk`."""
    return largest_divisor(meta_batch_size, max(meta_batch_size // 4, chunk))


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, and 1 at least."""
    most = min(max(1, most), number)
    return max(size for size in range(1, most + 1) if number % size == 0)


def _project(problem: Problem, outer: Params) -> Params:
    problem_outer, own = split_own(outer)
    projected = {**problem.project_outer(problem_outer), **own}
    return {name: projected[name] for name in outer}
