"""Shared parts of synthetic problems whose lower level is a mean over examples, in float64.

Their data can be cut into mini-batches and shards, and a dense Hessian gives the exact solution.

Shape letters: n examples, L size of x, P size of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metadist.autograd import AutogradOracle
from metadist.checks.exact import implicit_gradient, newton
from metadist.problem import Problem
from metadist.task import Task
from metadist.tasks.fixed import OneTask
from metadist.trees import Params

DOUBLE = torch.float64
NEWTON_STEPS = 30


class DenseTask(OneTask):
    """A task small enough for a dense Hessian, by which solutions are judged."""

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """|grad Phi(x)| and |y - y*(x)|, by Newton's method with a dense Hessian.

        Cost: up to 30 Hessians of size P x P.
        """
        outer = {"x": outer["x"].cpu().double()}
        found = inner["y"].cpu().double()
        hypergradient, solution = implicit_hypergradient(problem, self.sample(0), outer, found)
        return {
            "hypergradient_norm": float(hypergradient.norm()),
            "inner_distance": float((found - solution).norm()),
        }


def implicit_hypergradient(
    problem: Problem, task: Task, outer: Params, near: Tensor
) -> tuple[Tensor, Tensor]:
    """(grad Phi(x), y*(x)): grad_x f - J H^-1 grad_y f at the minimiser of g found from `near`.

    Raises:
        NoMinimiser: Newton's method finds none from there.
    """

    def g(y: Tensor) -> Tensor:
        return problem.inner_loss(outer, {"y": y}, task.support)

    gradient = torch.func.grad(g)
    y, hessian, _ = newton(gradient, torch.func.jacrev(gradient), near, NEWTON_STEPS)
    at = {"y": y}
    return implicit_gradient(AutogradOracle(problem, task), outer, at, hessian)["x"], y


class Synthetic(Problem):
    """A problem in vectors x and y, both starting from constants."""

    def __init__(self, num_outer: int, num_inner: int, start: float = 0.0) -> None:
        self.num_outer = num_outer
        self.num_inner = num_inner
        self.start = start

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.full((self.num_outer,), self.start, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": outer["x"].new_full((self.num_inner,), self.start)}
