"""VRBO: no gap in its differences, restarts on the whole sets, new tasks."""

import pytest
import torch

from metadist.algorithms.parts.neumann import draw_bundle, neumann_estimate
from metadist.algorithms.stocbio import StocBiO
from metadist.algorithms.vrbo import VRBO
from metadist.autograd import AutogradOracle
from metadist.oracle import CountingOracle
from metadist.trees import add
from tests.algorithms.toys import estimate, point
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
)


def test_the_golden_quadratic():
    problem, outer, task = golden_quadratic()
    problem.start = point(2, -1)  # the solution, so y stays and h is that of StocBiO
    algorithm, state = VRBO(inner_steps=2, inner_lr=0.2, adjoint_steps=2, adjoint_lr=0.2), None
    for step in range(3):
        found = estimate(algorithm, problem, outer, task, state, step=step)
        assert_close(found.hypergradient, {"x": point(0.688, -0.896)}, 1e-12)
        state = found.state


@pytest.mark.parametrize("period", [1, 2, 100])
def test_without_noise_differences_add_up_to_plain_derivatives(period):
    problem, task = Quadratic(2, 4), quadratic_task(1)
    outer, state = problem.init_outer(generator(1)), None
    a, b, c, _ = quadratic_terms(task)
    algorithm = VRBO(inner_steps=3, inner_lr=0.2, adjoint_steps=4, adjoint_lr=0.3, period=period)
    y, identity = problem.start, torch.eye(4, dtype=DOUBLE)
    for step in range(5):
        found = estimate(algorithm, problem, outer, task, state, step=step)
        state, target = found.state, torch.linalg.solve(a, b @ outer["x"] + c)
        y = target + torch.linalg.matrix_power(identity - 0.2 * a, 3) @ (y - target)
        assert_close(state.inner, {"y": y}, 1e-10)
        oracle = AutogradOracle(problem, task)
        at = state.previous_inner
        plain = neumann_estimate(oracle, outer, at, draw_bundle(oracle, 4), 0.3)
        assert_close(found.hypergradient, plain.hypergradient, 1e-10)
        if step % period == 0:
            assert torch.equal(at["y"], state.inner["y"])
        outer = add(outer, found.hypergradient, -0.1)


def test_restarts_use_the_whole_sets():
    problem, task = Quadratic(2, 4), quadratic_task(1, num_support=6, num_query=4)
    outer, state = problem.init_outer(generator(1)), None
    algorithm = VRBO(inner_steps=2, inner_lr=0.2, adjoint_steps=3, adjoint_lr=0.3, period=3)
    whole = AutogradOracle(problem, task)
    exact = []
    for step in range(7):
        found = estimate(algorithm, problem, outer, task, state, batch_size=2, step=step)
        state = found.state
        at = state.previous_inner
        plain = neumann_estimate(whole, outer, at, draw_bundle(whole, 3), 0.3).hypergradient["x"]
        gradient = whole.inner_grad(outer, at, whole.draw_inner())["y"]
        exact.append(
            torch.allclose(found.hypergradient["x"], plain)
            and torch.allclose(state.inner_direction["y"], gradient)
        )
        outer = add(outer, found.hypergradient, -0.1)
    assert exact == [True, False, False, True, False, False, True]


def test_costs_of_a_restart():
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=6, num_query=4)
    outer = problem.init_outer(generator(0))
    algorithm = VRBO(inner_steps=3, adjoint_steps=4, period=5)
    counting = CountingOracle(AutogradOracle(problem, task, batch_size=2))
    algorithm.estimate(counting, outer, algorithm.init(counting, outer, {"y": problem.start}))
    # u on 3 parts, before and after 2 differences; w on 2 parts of the query set, 3 of support.
    assert counting.counts == {"inner_grad": 10, "outer_grads": 2, "hvp": 15, "jvp": 3}


def test_a_new_task_gets_the_plain_estimate_after_its_steps():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    vrbo = VRBO(inner_steps=4, inner_lr=0.2, adjoint_steps=3)
    found = estimate(vrbo, problem, outer, task, step=7)
    plain = estimate(StocBiO(4, 0.2, adjoint_steps=3), problem, outer, task, step=7)
    assert_close(found.hypergradient, plain.hypergradient, 1e-12)
    assert_close(found.state.inner, plain.state.inner, 1e-12)


def test_weights():
    algorithm = VRBO(period=3)
    assert [algorithm.recursive_weight(step) for step in range(5)] == [1, 0, 0, 1, 0]
