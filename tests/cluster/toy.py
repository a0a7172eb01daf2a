"""A bilevel problem small enough to count every lease, and samplers that misbehave on purpose.

Shape letters: S examples, D features.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray
import torch
from torch import Tensor

from metadist.algorithm import Algorithm, Estimate
from metadist.compute import Compute
from metadist.executor import LocalExecutor, StepReport
from metadist.optimizer import OuterOptimizer
from metadist.oracle import Oracle
from metadist.outer import OuterState, OuterVariable
from metadist.problem import Problem
from metadist.sampler import TaskSampler
from metadist.task import Batch, Task
from metadist.trees import Params, add, zeros_like
from metadist.workload import Workload


@dataclass(frozen=True)
class Regression(Problem):
    """Linear regression adapted from x: start = x, g and f mean squared errors."""

    num_features: int = 4
    dtype: torch.dtype = torch.float32
    num_idle: int = 0

    def init_outer(self, generator: torch.Generator) -> Params:
        weight_D = torch.randn(self.num_features, generator=generator, dtype=torch.float64)
        bias = torch.zeros(1)
        idle = torch.zeros(self.num_idle)
        tree = {"weight": weight_D, "bias": bias, "idle": idle}
        return {name: leaf.to(self.dtype) for name, leaf in tree.items()}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {name: outer[name] for name in ("weight", "bias")}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs_SD, targets_S = batch.tensors
        return (inputs_SD @ inner["weight"] + inner["bias"] - targets_S).square().mean()

    outer_loss = inner_loss


@dataclass(frozen=True)
class FatalStep(Regression):
    """Kills the process that steps x, whenever it does."""

    def project_outer(self, outer: Params) -> Params:
        os.kill(os.getpid(), signal.SIGKILL)
        return outer


@dataclass(frozen=True)
class Tally(Problem):
    """The hypergradient of task i of `Marks` is 1 at place i, whatever x is: x counts tasks."""

    num_tasks: int = 512

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"weight": torch.zeros(self.num_tasks)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return outer

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return (batch.tensors[0] @ inner["weight"]).sum()

    outer_loss = inner_loss


@dataclass(frozen=True)
class Marks:
    """Task i is the i-th unit vector."""

    num_tasks: int = 512

    def sample(self, index: int) -> Task:
        unit_1D = torch.zeros(1, self.num_tasks, dtype=torch.float64)
        unit_1D[0, index] = 1.0
        return Task(Batch.of(unit_1D), Batch.of(unit_1D), index)


class Adapted(NamedTuple):
    inner: Params


@dataclass(frozen=True)
class OneStep(Algorithm):
    """First-order MAML with one inner step."""

    inner_lr: float = 0.1

    def init(self, oracle: Oracle, context: Params, inner: Params) -> Adapted:
        return Adapted(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        return add(inner, oracle.inner_grad(context, inner, oracle.draw_inner()), -self.inner_lr)

    def estimate(self, oracle: Oracle, context: Params, state: Adapted) -> Estimate:
        adapted = self.adapt(oracle, context, state.inner)
        gradient = oracle.outer_grads(context, adapted, oracle.draw_outer())[1]
        return Estimate(zeros_like(context), gradient, Adapted(adapted), {})


@dataclass(frozen=True)
class Lines:
    """Tasks with weights near (1, 2, ...), a pure function of the index."""

    num_features: int = 4
    num_examples: int = 6

    def sample(self, index: int) -> Task:
        generator = torch.Generator().manual_seed(index)
        shape_SD = (2 * self.num_examples, self.num_features)
        inputs_SD = torch.randn(shape_SD, generator=generator, dtype=torch.float64)
        noise_D = torch.randn(self.num_features, generator=generator, dtype=torch.float64)
        targets_S = inputs_SD @ (torch.arange(1.0, self.num_features + 1) + 0.1 * noise_D)
        half = self.num_examples
        return Task(
            Batch.of(inputs_SD[:half], targets_S[:half]),
            Batch.of(inputs_SD[half:], targets_S[half:]),
            index,
        )


class FewLines(Lines):
    """Four of them, whose states can be kept."""

    num_tasks = 4


@dataclass(frozen=True)
class Moving(Lines):
    """Lines with other data at every outer step."""

    def sample(self, index: int) -> Task:
        return self.sample_at(index, 0)

    def sample_at(self, index: int, step: int) -> Task:
        return super().sample(10_000 * step + index)._replace(id=index)


def happens_first(folder: str, name: str) -> bool:
    """Whether nobody has asked for this `name` in `folder` before."""
    try:
        (Path(folder) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Deadly(Lines):
    """Kills its own process, as the system does when memory runs out, at some tasks.

    `folder` remembers which deaths have happened; None: every time.
    """

    indices: tuple[int, ...] = ()
    folder: str | None = None

    def sample(self, index: int) -> Task:
        if index in self.indices and (
            self.folder is None or happens_first(self.folder, f"died-{index}")
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index)


@dataclass(frozen=True)
class Waiting(Lines):
    """Waits at the task `index` until the file `gate` exists, and says so with `gate`.waiting."""

    index: int = 0
    gate: str = ""

    def sample(self, index: int) -> Task:
        if index == self.index:
            Path(self.gate + ".waiting").write_text(str(os.getpid()))
            while not Path(self.gate).exists():
                time.sleep(0.01)
        return super().sample(index)


@dataclass(frozen=True)
class Stuck(Lines):
    """Only the first process that samples the task `index` waits there until `gate` exists."""

    index: int = 0
    gate: str = ""

    def sample(self, index: int) -> Task:
        if index == self.index and happens_first(str(Path(self.gate).parent), "stuck"):
            while not Path(self.gate).exists():
                time.sleep(0.01)
        return super().sample(index)


@dataclass(frozen=True)
class Slow(Lines):
    """The first process that samples is slow, all others are fast."""

    folder: str = ""
    seconds: float = 0.1

    def sample(self, index: int) -> Task:
        happens_first(self.folder, f"slow-{os.getpid()}-is-{len(os.listdir(self.folder))}")
        if (Path(self.folder) / f"slow-{os.getpid()}-is-0").exists():
            time.sleep(self.seconds)
        return super().sample(index)


@dataclass(frozen=True)
class Steady(Lines):
    """Every task takes so many seconds, wherever it is sampled."""

    seconds: float = 0.4

    def sample(self, index: int) -> Task:
        time.sleep(self.seconds)
        return super().sample(index)


class BrokenTaskError(Exception):
    """What a user's own code may raise."""


@dataclass(frozen=True)
class Broken(Lines):
    """Raises at one task."""

    index: int = 0

    def sample(self, index: int) -> Task:
        if index == self.index:
            raise BrokenTaskError(f"no file for task {index}")
        return super().sample(index)


@dataclass(frozen=True)
class Flaky(Lines):
    """Cannot reach its disk at the first two attempts at one task."""

    folder: str = ""
    index: int = 0

    def sample(self, index: int) -> Task:
        if index == self.index and any(
            happens_first(self.folder, f"away-{attempt}") for attempt in range(2)
        ):
            raise ConnectionError("the share is away")
        return super().sample(index)


@dataclass(frozen=True)
class Leaving(Lines):
    """Ends its process in good order at one task."""

    index: int = 0

    def sample(self, index: int) -> Task:
        if index == self.index:
            sys.exit(0)
        return super().sample(index)


ADAM = OuterOptimizer("adam", lr=0.05, clip_norm=10.0)


def make_workload(
    sampler: TaskSampler | None = None,
    problem: Problem | None = None,
    meta_batch_size: int = 4,
    tasks_per_lease: int = 1,
) -> Workload:
    """The toy workload; four leases per step."""
    return Workload(
        problem or Regression(),
        sampler or Lines(),
        OneStep(),
        meta_batch_size=meta_batch_size,
        tasks_per_lease=tasks_per_lease,
        report_every=2,
        compute=Compute(device="cpu"),
    )


def first_state(problem: Problem | None = None, optimizer: OuterOptimizer = ADAM) -> OuterState:
    """Where a run begins."""
    generator = torch.Generator().manual_seed(0)
    return OuterVariable((problem or Regression()).init_outer(generator), optimizer).state()


def state_bytes(state: OuterState) -> bytes:
    """Everything in a state, bit for bit."""
    tensors = {
        **state.outer,
        **{f"optimizer.{name}": leaf for name, leaf in state.optimizer.items()},
        **{f"recursion.{name}": leaf for name, leaf in state.recursion.items()},
        **{f"states.{index}": leaf for index, leaf in state.states.items()},
    }
    parts = [f"{name}:".encode() + leaf.numpy().tobytes() for name, leaf in tensors.items()]
    return b"|".join([*parts, repr((state.version, state.applied_below, state.applied)).encode()])


def local_run(
    until: int, workload: Workload | None = None, optimizer: OuterOptimizer = ADAM
) -> tuple[OuterState, list[StepReport]]:
    """What a Ray run has to reproduce."""
    workload = workload or make_workload()
    executor = LocalExecutor()
    executor.start(workload, optimizer, first_state(workload.problem, optimizer))
    reports = list(executor.run(until))
    return executor.state(), reports


def cpus_taken() -> float:
    """CPUs that are reserved or that actors hold."""
    return ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
