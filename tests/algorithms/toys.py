"""What the tests of several algorithms share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.algorithm import Algorithm, State
from metadist.oracle import CountingOracle
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.synthetic.toys import NoData
from metadist.trees import Params
from tests.problems import (
    DOUBLE,
    Quadratic,
    generator,
    oracle_of,
    quadratic_task,
    randn,
    true_hypergradient,
)


def toy_task() -> Task:
    """The task of every toy of `metadist.tasks.synthetic.toys`."""
    return NoData().sample(0)


def point(*numbers: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(numbers, dtype=DOUBLE)


def estimate(
    algorithm: Algorithm,
    problem: Problem,
    outer: Params,
    task: Task,
    state: State = None,
    **options: int | bool | None,
) -> Any:
    """One estimate, from a new state unless one is given."""
    oracle, context, start = oracle_of(problem, outer, task, **options)
    state = algorithm.init(oracle, context, start) if state is None else state
    return algorithm.estimate(oracle, context, state)


def counts_of(
    algorithm: Algorithm, problem: Problem, outer: Params, task: Task, state: State = None
) -> dict[str, int]:
    """What one estimate asks of the oracle, from a new state unless one is given."""
    oracle, context, start = oracle_of(problem, outer, task)
    counting = CountingOracle(oracle)
    state = algorithm.init(counting, context, start) if state is None else state
    assert not counting.counts, "init asks for derivatives"
    algorithm.estimate(counting, context, state)
    return dict(counting.counts)


def steep_quadratic(index: int, num_outer: int = 3, num_inner: int = 5) -> Task:
    """A noiseless task of `Quadratic` with eigenvalues from 0.01 to 1."""
    basis = torch.linalg.qr(randn(index, num_inner, num_inner))[0]
    a = basis @ torch.diag(torch.logspace(-2, 0, num_inner, dtype=DOUBLE)) @ basis.T
    support = Batch.of(
        a[None], randn(index + 1, 1, num_inner, num_outer), randn(index + 2, 1, num_inner)
    )
    return Task(support, Batch.of(randn(index + 3, 1, num_inner)), index)


def alignment(algorithm: Algorithm, num_tasks: int = 6) -> float:
    """The least cosine, over quadratic tasks, of a new state's estimate and the hypergradient."""
    problem = Quadratic(2, 4)
    cosines = []
    for index in range(num_tasks):
        task, outer = quadratic_task(index), problem.init_outer(generator(index))
        h = estimate(algorithm, problem, outer, task).hypergradient["x"]
        truth = true_hypergradient(problem, outer, task)
        cosines.append(float(h @ truth / (h.norm() * truth.norm())))
    return min(cosines)
