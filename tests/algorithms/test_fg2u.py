"""(FG)2U: slopes along its directions, its mean and variance."""

import pytest
import torch

from metadist.algorithms.fg2u import FG2U
from metadist.algorithms.itd import ITD
from metadist.algorithms.parts.differences import random_pair
from metadist.autograd import AutogradOracle
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.trees import Params, dot, flatten, scale
from tests.algorithms.monte_carlo import assert_mean, by_draws
from tests.algorithms.toys import estimate
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    smooth_task,
    vector_task,
)


def samples(algorithm, problem, outer, task, num_draws):
    """Hypergradient and start gradient, one after the other, for that many seeds."""

    def both(oracle):
        context, start = problem.encode(outer, task), problem.init_inner(outer, task)
        found = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))
        return {
            **found.hypergradient,
            **{f"start {name}": leaf for name, leaf in found.start_gradient.items()},
        }

    return by_draws(both, problem, task, num_draws)


def exact(problem, outer, task, **options):
    found = estimate(ITD(**options), problem, outer, task)
    return torch.cat([flatten(found.hypergradient), flatten(found.start_gradient)])


def test_slopes_are_those_of_itd():
    """With one direction the estimate is <g, v> v, g being the hypergradient of ITD."""
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    context, start = problem.encode(outer, task), problem.init_inner(outer, task)
    itd = estimate(ITD(3, 0.1), problem, outer, task)
    v, z = random_pair(AutogradOracle(problem, task), context, start, "normal")
    slope = dot(itd.hypergradient, v) + dot(itd.start_gradient, z)
    algorithm = FG2U(3, 0.1, num_directions=1, directions="normal")
    found = estimate(algorithm, problem, outer, task)
    assert_close(found.hypergradient, scale(v, slope), 1e-12)
    assert_close(found.start_gradient, scale(z, slope), 1e-12)
    assert_close(found.state.inner, itd.state.inner, 1e-12)


@pytest.mark.parametrize("directions", ["rademacher", "normal"])
def test_it_is_unbiased(directions):
    problem, outer, task = golden_quadratic()
    algorithm = FG2U(2, 0.2, num_directions=1, directions=directions)
    g = exact(problem, outer, task, inner_steps=2, inner_lr=0.2)
    torch.testing.assert_close(g[:2], torch.tensor([0.0992, -0.8704], dtype=g.dtype))
    assert_mean(samples(algorithm, problem, outer, task, 200_000), g)


@pytest.mark.parametrize(("directions", "excess"), [("rademacher", -1), ("normal", 1)])
@pytest.mark.parametrize("num_directions", [1, 4])
def test_relative_variance(directions, excess, num_directions):
    """(d - 1) / b and (d + 1) / b, d counting context and start."""
    problem, task = Quadratic(3, 4), quadratic_task(0, num_outer=3)
    outer = problem.init_outer(generator(0))
    algorithm = FG2U(2, 0.2, num_directions=num_directions, directions=directions)
    g = exact(problem, outer, task, inner_steps=2, inner_lr=0.2)
    found = samples(algorithm, problem, outer, task, 50_000)
    relative = (found - g).square().sum(1) / g.square().sum()
    assert_mean(relative[:, None], torch.tensor([(7 + excess) / num_directions]))
    # Of the context alone: the slope has the variance of the whole direction.
    square, own = g.square().sum(), g[:3].square().sum()
    error = (found - g)[:, :3].square().sum(1) * num_directions
    expected = 3 * square + excess * own
    assert_mean(error[:, None], expected)


def test_an_empty_context_is_maml():
    torch.manual_seed(0)
    problem = FewShotProblem(MLP(3, 2, (4,)).double(), adapt="all", loss="mse")
    outer = problem.init_outer(generator(0))
    result = task_hypergradients(problem, FG2U(2), outer, [vector_task(0), vector_task(1)])
    assert all(bool(leaf.isfinite().all()) for leaf in result.total.values())
    assert any(bool(leaf.any()) for leaf in result.total.values())


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("directions", ["rademacher", "normal"])
def test_with_one_number_in_x_only_that_one_has_directions(directions, kept, vectorize):
    """y_0 is a constant. With Rademacher v = +-1, v^2 = 1: h is exact, in closed form.

    y_T = (I - R) A^-1 (Bx + c), dy_T/dx = (I - R) A^-1 B, R = (I - inner_lr A)^T;   h = dPhi/dx
    """
    problem, tasks = Quadratic(1, 6), [quadratic_task(i, 1, 6) for i in range(2)]
    outer = problem.init_outer(generator(0))
    algorithm = FG2U(3, 0.05, num_directions=2, directions=directions)
    expected = torch.zeros(1, dtype=torch.float64)
    for task in tasks:
        a, b, c, t = quadratic_terms(task)
        contraction = torch.linalg.matrix_power(torch.eye(6, dtype=a.dtype) - 0.05 * a, 3)
        solved = torch.linalg.solve(a, torch.eye(6, dtype=a.dtype)) - contraction @ a.inverse()
        y = solved @ (b @ outer["x"] + c)
        expected += problem.rho * outer["x"] + (solved @ b).T @ (y - t)
    result = task_hypergradients(
        problem,
        algorithm,
        outer,
        tasks,
        compute=Compute(vectorize=vectorize),
        states={} if kept else None,
    )
    ratio = float(result.total["x"] / expected)
    if directions == "rademacher":
        assert abs(ratio - 1) < 1e-9
    else:
        assert ratio > 0  # of each task the mean of v^2


class HalfConstant(Smooth):
    """One leaf of the context and one of the start do not depend on x."""

    def encode(self, outer, task):
        return {**super().encode(outer, task), "b": torch.ones(2, 3, dtype=torch.float64)}

    def init_inner(self, outer, task):
        return {**super().init_inner(outer, task), "w": torch.ones(3, dtype=torch.float64)}


@pytest.mark.parametrize("kept", [True, False])
def test_what_x_does_not_enter_has_no_direction(kept):
    class Seen(ITD):
        def estimate(self, oracle, context, state):
            found.append(random_pair(oracle, context, state.inner, "normal"))
            return super().estimate(oracle, context, state)

    found: list[tuple[Params, Params]] = []
    problem, task = HalfConstant(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    task_hypergradients(problem, Seen(2, 0.1), outer, [task], states={} if kept else None)
    ((v, z),) = found
    assert bool(v["c"].all()) and not bool(v["b"].any()) and not bool(z["w"].any())
    assert bool(z["m"].any()) is not kept
