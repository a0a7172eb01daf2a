"""Toy problems of the literature in float64, and what the tests of several algorithms share.

Each toy has one task, whose data the losses do not use: `toy_task()`. Starts are given to
`run_single`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metadist.algorithm import Algorithm, Estimate, State
from metadist.hypergradient import task_hypergradients
from metadist.oracle import CountingOracle
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, tree_map
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    generator,
    oracle_of,
    quadratic_task,
    randn,
    smooth_task,
    true_hypergradient,
)


def toy_task() -> Task:
    """A task whose sets hold one example each, to be ignored."""
    nothing = Batch.of(torch.zeros(1, dtype=DOUBLE))
    return Task(nothing, nothing, 0)


def point(*numbers: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(numbers, dtype=DOUBLE)


class Toy(Problem):
    """A problem in x of size `num_outer` and y of size `num_inner`, both starting from 0."""

    num_outer = 1
    num_inner = 1

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.zeros(self.num_outer, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.zeros(self.num_inner, dtype=DOUBLE)}

    def inner_loss(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        return self.lower(outer["x"], inner["y"])

    def outer_loss(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        return self.upper(outer["x"], inner["y"])

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner loss g."""
        raise NotImplementedError

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer loss f."""
        raise NotImplementedError


class Sine(Toy):
    """The sine toy of MEHA, whose lower minima are many and all global.

        f = |x - 2|^2 + |y - 4|^2,    g = sum of sin(x + y - 2)

    For x and y of one size these are copies of a problem of one number each; there x + y =
    2 - pi/2 + 2 pi k at the minima, and the best is x = 3 pi/4, y = 2 + 3 pi/4, f = 0.253749. For
    x of size 1 and y of size n: x = (2 (1 - n) + 3 pi n / 2) / (1 + n), y = 2 + 3 pi / 2 - x.
    """

    def __init__(self, num_outer: int = 1, num_inner: int | None = None) -> None:
        self.num_outer = num_outer
        self.num_inner = num_outer if num_inner is None else num_inner

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y - 2).sin().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - 2).square().sum() + (y - 4).square().sum()


class Coreset(Toy):
    """The coreset toy of BOME: y is to be the point of a hull of four points nearest to (3, -2).

    g = |y - p' softmax(x)|^2, f = |y - (3, -2)|^2 / 10; solution y = (1.8, 0.4) with weights
    (0, .8, 0, .2) and f = .72, approached as two of x tend to minus infinity.
    """

    num_outer = 4
    num_inner = 2
    corners = torch.tensor([[1, 3], [3, 1], [-2, 2], [-3, -2]], dtype=DOUBLE)

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - x.softmax(0) @ self.corners).square().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.1 * (y - point(3, -2)).square().sum()


class Minimax(Toy):
    """The minimax toy of BOME: f = x y, g = -x y with x in [-10, 10]; solution x = 0.

    There y is boxed too, which makes |x| * 10 of the upper objective. From (4, 4) a barrier
    method does not get to that box, so it is left out here, and the tests assert that.
    """

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": point(4)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": point(4)}

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return -(x * y).sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum()

    def project_outer(self, outer: Params) -> Params:
        return tree_map(lambda leaf: leaf.clamp(-10, 10), outer)


class Degenerate(Toy):
    """The degenerate toy of BOME: g = y_1^2 / 2 - x y_1 leaves y_2 free, H = diag(1, 0).

    f = (x - y_2)^2 / 2 + (y_1 - 1)^2 / 2; the optimistic solution is x = y_1 = y_2 = 1, f = 0.
    """

    num_inner = 2

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y[0].square() - x[0] * y[0]

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x[0] - y[1]).square() + 0.5 * (y[0] - 1).square()


class MerelyConvex(Toy):
    """A lower level that is convex but leaves half of y = (y1, y2) free, x, y1, y2 of size n.

    g = |y1|^2 / 2 - x'y1, f = |x - y2|^2 / 2 + |y1 - 1|^2 / 2; solution x = y1 = y2 = 1.
    """

    def __init__(self, size: int = 10) -> None:
        self.num_outer, self.num_inner = size, 2 * size

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        y1, _ = y.chunk(2)
        return 0.5 * y1.square().sum() - x @ y1

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2)
        return 0.5 * (x - y2).square().sum() + 0.5 * (y1 - 1).square().sum()


class PBGDToy(Toy):
    """A non-convex lower level with solution y = -x, x in [0, 3].

    f(x, -x) has local minima at .3824, 1.2152 (global) and 2.8296.
    """

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return (total.square() + x * total.sin().square()).sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        wave = (4 * y + 2).cos() / (1 + (2 - 4 * x).exp())
        return (wave + 0.5 * ((4 * x - 2).square() + 1).log()).sum()

    def project_outer(self, outer: Params) -> Params:
        return tree_map(lambda leaf: leaf.clamp(0, 3), outer)


class Lasso(Toy):
    """A lower level with a non-smooth part: y = soft(a, x), x in [0, 1]^n the thresholds.

    g = |y - a|^2 / 2 + sum x_i |y_i| with a = 1/n on the first half and -1/n on the second,
    f = sum y_i; solution y = 0 with any x_i >= 1/n on the first half, y = -1/n, x = 0 on the
    second.
    """

    def __init__(self, size: int = 4) -> None:
        self.num_outer = self.num_inner = size
        sign = torch.where(torch.arange(size) < size / 2, 1.0, -1.0).to(DOUBLE)
        self.target = sign / size

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - self.target).square().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return y.sum()

    def nonsmooth_loss(self, outer: Params, inner: Params) -> Tensor:
        return (outer["x"] * inner["y"].abs()).sum()

    def prox_inner(self, outer: Params, inner: Params, size: float) -> Params:
        y = inner["y"]
        return {"y": y.sign() * (y.abs() - size * outer["x"]).relu()}

    def project_outer(self, outer: Params) -> Params:
        return tree_map(lambda leaf: leaf.clamp(0, 1), outer)


class PenaltyToy(Toy):
    """The toys of the penalty paper in 20 dimensions, x in [-5, 5].

    "sum": f = |x|^2 + |y|^2 - 1, g = |1 - x - y|^2, solution x = y = 1/2.
    "difference": f = |y|^2 - |x - y|^2, g = |x - y|^2, solution x = y = 0.
    """

    num_outer = num_inner = 20

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return ((1 - x - y) if self.kind == "sum" else (x - y)).square().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "sum":
            return (x.square() + y.square()).sum() - 1
        return y.square().sum() - (x - y).square().sum()

    def project_outer(self, outer: Params) -> Params:
        return tree_map(lambda leaf: leaf.clamp(-5, 5), outer)


SINE_SOLUTION = (0.75 * math.pi, 2 + 0.75 * math.pi)
"""(x, y) of `Sine`."""


def estimate(
    algorithm: Algorithm,
    problem: Problem,
    outer: Params,
    task: Task,
    state: State = None,
    **options: int | bool | None,
) -> Estimate:
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


def assert_vmap_is_loop(algorithm: Algorithm) -> None:
    """On two problems, tasks go through together as they do one by one."""
    problems = ((Quadratic(2, 4), quadratic_task), (Smooth(), smooth_task))
    for problem, task_of in problems:
        outer, tasks = problem.init_outer(generator(1)), [task_of(index) for index in range(3)]
        one, other = (
            task_hypergradients(
                problem, algorithm, outer, tasks, vectorize=vectorize, batch_size=2, report=True
            )
            for vectorize in (False, True)
        )
        assert one.num_tasks == 3
        assert_close(other.total, one.total, 1e-9)
        assert other.metrics == pytest.approx(one.metrics, rel=1e-8, abs=1e-12)


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
