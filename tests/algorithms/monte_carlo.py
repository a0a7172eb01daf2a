"""What tests of stochastic methods share: many draws at once, and moments within their error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from metadist.autograd import AutogradOracle
from metadist.problem import Problem
from metadist.task import Task
from metadist.trees import Params, flatten


def by_draws(
    function: Callable[[AutogradOracle], Params],
    problem: Problem,
    task: Task,
    num_draws: int,
    batch_size: int | None = None,
) -> Tensor:
    """`function`, flat, with oracles of that many seeds; shape (num_draws, numbers)."""

    def one(number: Tensor) -> Tensor:
        return flatten(function(AutogradOracle(problem, task._replace(id=number), batch_size)))

    return vmap(one, chunk_size=10_000)(torch.arange(num_draws))


def assert_mean(samples: Tensor, expected: Tensor, num_errors: float = 4.0) -> None:
    """The mean of `samples` (axis 0) is within so many standard errors of `expected`."""
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - expected).abs() <= num_errors * error + 1e-12).all()), (
        samples.mean(0),
        expected,
        error,
    )
