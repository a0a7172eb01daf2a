"""Problems with one shared lower problem, and shards of them in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ray import cloudpickle
from torch import Tensor

from metadist import Trainer
from metadist.algorithm import Algorithm
from metadist.checks.preflight import initial_outer
from metadist.cluster import DataParallelExecutor, Workers
from metadist.cluster.actors.failure import Failures
from metadist.cluster.data_parallel.checks import check_workload
from metadist.cluster.data_parallel.exchange import Package, Round
from metadist.cluster.data_parallel.layout import Key, Reply
from metadist.cluster.data_parallel.worker import ShardWorker
from metadist.cluster.data_parallel.worker_pool import ShardPool
from metadist.executor import Executor, StepReport
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterState, OuterVariable
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks import TextRegularisation
from metadist.trees import Params
from metadist.workload import Workload
from tests.cluster.dummy import DummyCall, DummyRuntime
from tests.cluster.toy import state_bytes
from tests.helpers import with_compute
from tests.problems import DOUBLE, assert_close, generator
from tests.tasks.text.test_text import NUM_CLASSES, NUM_FEATURES

ADAM = OuterOptimizer("adam", lr=0.05)

TRUE_WEIGHTS = torch.tensor([0.6, -0.8, 0.3], dtype=DOUBLE)


class Cleaning(Problem):
    """Ridge regression with a weight for each support example, and a learned ridge.

    g = mean of sigmoid(weights_i) * residual_i^2 + exp(ridge) |y|^2 / 2, f = mean of residual_j^2
    + 0.1 ridge^2.
    """

    def __init__(self, num_support: int = 11) -> None:
        self.num_support = num_support

    def init_outer(self, generator: torch.Generator) -> Params:
        weights = torch.randn(self.num_support, generator=generator, dtype=DOUBLE)
        return {"weights": 0.3 * weights, "ridge": torch.full((), -1.0, dtype=DOUBLE)}

    def per_example(self, outer: Params) -> set[str]:
        return {"weights"}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"slope": torch.zeros(3, dtype=DOUBLE), "offset": torch.ones(1, dtype=DOUBLE)}

    def _residuals(self, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        return inputs @ inner["slope"] + inner["offset"] - targets

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        weights = context["weights"][batch.index].sigmoid()
        ridge = 0.5 * context["ridge"].exp() * inner["slope"].square().sum()
        return (weights * self._residuals(inner, batch).square()).mean() + ridge

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._residuals(inner, batch).square().mean() + 0.1 * context["ridge"].square()

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        return {"error": self._residuals(inner, batch).abs().mean()}


class Shared(Cleaning):
    """The same without declaring whose rows the weights are: all of them go everywhere."""

    def per_example(self, outer: Params) -> set[str]:
        return set()


def cleaning_task(num_support: int = 11, num_query: int = 7) -> Task:
    """Lines with noise, the first third of the support set with wrong signs."""
    random = generator(num_support, num_query)

    def batch(size: int, num_wrong: int) -> Batch:
        inputs = torch.randn(size, 3, generator=random, dtype=DOUBLE)
        noise = 0.1 * torch.randn(size, generator=random, dtype=DOUBLE)
        sign = torch.where(torch.arange(size) < num_wrong, -1.0, 1.0).to(DOUBLE)
        return Batch.of(inputs, sign * (inputs @ TRUE_WEIGHTS + 0.5) + noise)

    return Task(batch(num_support, num_support // 3), batch(num_query, 0), 0)


class Whole:
    """Task 0 is the data set; other indices are other ones, for what samples several."""

    def __init__(self, num_support: int = 11, num_query: int = 7) -> None:
        self.num_support, self.num_query = num_support, num_query

    def sample(self, index: int) -> Task:
        task = cleaning_task(self.num_support, self.num_query)
        first, *rest = task.query.tensors
        return task._replace(query=Batch.of(first + index, *rest), id=index)


class Unequal(Whole):
    """Its shards hold examples in turn, the first shard as many as all others."""

    def shard(self, index: int, part: int, num_parts: int) -> Task:
        task = self.sample(index)

        def take(full: Batch) -> Batch:
            owner = full.index % (2 * num_parts - 2) if num_parts > 1 else full.index * 0
            owner = torch.where(owner < num_parts, owner, 0)
            return full.take((owner == part).nonzero()[:, 0])

        return Task(take(task.support), take(task.query), task.id)


class PreciseText(TextRegularisation):
    """Of the task of `sparse_task`, in double precision."""

    def __init__(self) -> None:
        super().__init__(NUM_FEATURES, NUM_CLASSES, strength=0.01)

    def init_outer(self, generator):
        return {name: x.double() for name, x in super().init_outer(generator).items()}


class LocalActor:
    """A `ShardWorker` in this process; `faults` take the place of its next replies, None: never."""

    def __init__(self, number: int, runtime: DummyRuntime) -> None:
        self._worker = ShardWorker(f"worker-{number}")
        self._runtime = runtime
        self._method: Callable[..., Any] = self._worker.setup
        self.faults: list[BaseException | None] = []

    def __getattr__(self, name: str) -> LocalActor:
        self._method = getattr(self._worker, name)
        return self

    def remote(self, *arguments: Any) -> Any:
        if self._method == self._worker.compute and self.faults:
            return self._runtime.put(self.faults.pop(0))
        values = [value.answer if isinstance(value, DummyCall) else value for value in arguments]
        return self._runtime.put(self._method(*values))


class LocalPool(ShardPool):
    """The shards in this process; `packages` are what each was sent, by round."""

    def __init__(self, num_shards: int) -> None:
        runtime = DummyRuntime()
        super().__init__(
            lambda number: LocalActor(number, runtime),
            num_shards,
            Failures(timeout_s=5.0),
            staleness=0,
            runtime=runtime,
        )
        self.packages: list[list[Package]] = []
        self.replies: list[list[Reply]] = []

    def ask(self, round: Round) -> list[Reply]:
        sent: list[Package] = []

        def note(part: int, held: frozenset[Key]) -> Package:
            sent.append(Round.package(round, part, held))
            return sent[-1]

        round.package = note  # type: ignore[method-assign]
        self.packages.append(sent)
        self.replies.append(super().ask(round))
        return self.replies[-1]


class InProcess(DataParallelExecutor):
    """The executor without Ray: everything but the processes is the same."""

    pool: LocalPool
    make_pool = LocalPool

    def __init__(self, num_workers: int, **options: Any) -> None:
        super().__init__(Workers(num_workers), **options)

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        check_workload(workload, self._staleness)
        self.pool = self.make_pool(self._workers.num_workers)
        self._pool = self.pool
        infos = self.pool.start(10.0, cloudpickle.dumps(workload))
        self._open(self.pool, infos, workload, optimizer, state)

    def run(self, until_version: int):
        return self._run(until_version)

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass


def solve(
    executor: Executor,
    algorithm: Algorithm,
    num_steps: int = 3,
    *,
    state: OuterState | None = None,
    problem: Problem | None = None,
    sampler: Any = None,
    optimizer: OuterOptimizer = ADAM,
    **options: Any,
) -> tuple[OuterState, list[StepReport]]:
    """`num_steps` outer steps in all on one task, from `state` or the beginning on."""
    problem, sampler = problem or Cleaning(), sampler or Unequal()
    options = {"report_every": 1, "seed": 3, **options}
    workload = Workload(problem, sampler, algorithm, 1, keep_state=True, **with_compute(options))
    if state is None:
        state = OuterVariable(initial_outer(workload), optimizer).state()
    executor.start(workload, optimizer, state)
    reports = list(executor.run(num_steps))
    return executor.state(), reports


def assert_same_state(actual: OuterState, expected: OuterState, tolerance: float = 1e-10) -> None:
    """Equal up to rounding: x, the optimiser's moments, and what the algorithm keeps."""
    assert_close(actual.outer, expected.outer, tolerance)
    assert_close(actual.optimizer, expected.optimizer, tolerance)
    assert_close({"kept": actual.states[0]}, {"kept": expected.states[0]}, tolerance)


def bytes_of(state: OuterState) -> bytes:
    """Everything in a state, bit for bit."""
    return state_bytes(state) + state.states[0].numpy().tobytes()


def cleaning(algorithm: Algorithm, executor: Executor, **options: Any) -> Trainer:
    """The same by a `Trainer`."""
    return Trainer(
        Cleaning(),
        options.pop("sampler", Unequal()),
        algorithm,
        **{
            "outer_optimizer": ADAM,
            "meta_batch_size": 1,
            "keep_state": True,
            "quiet": True,
            "seed": 3,
            "executor": executor,
            **options,
        },
    )
