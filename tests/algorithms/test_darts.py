"""DARTS: golden value, T1-T2 on quadratics, costs, degenerate cases."""

import pytest

from metadist.algorithms.darts import DARTS
from metadist.algorithms.itd import ITD
from metadist.algorithms.t1t2 import T1T2
from metadist.step_rules import SGD
from tests.algorithms.toys import estimate, point
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    smooth_task,
)


def test_golden_value():
    problem, outer, task = golden_quadratic()
    result = estimate(DARTS(200, 0.2, adjoint_lr=1.0), problem, outer, task)
    assert_close(result.hypergradient, {"x": point(1.2, -2.4)}, 1e-10)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0])
def test_it_is_t1t2_on_quadratics_exactly(epsilon):
    for index in range(3):
        problem, task = Quadratic(3, 5), quadratic_task(index, num_outer=3, num_inner=5)
        outer = problem.init_outer(generator(index))
        expected = estimate(T1T2(5, 0.2, adjoint_lr=0.2), problem, outer, task).hypergradient
        result = estimate(DARTS(5, 0.2, epsilon=epsilon), problem, outer, task)
        assert_close(result.hypergradient, expected)


@pytest.mark.parametrize(("adjoint_lr", "factor"), [(None, 0.3), (0.3, 0.3), (1.0, 1.0)])
def test_the_closed_form_of_a_quadratic(adjoint_lr, factor):
    """One step of g = y'Ay/2 - y'(Bx + c) from y_0 = 0, f = |y - t|^2/2 + rho |x|^2/2."""
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    _, b, c, t = quadratic_terms(task)
    y = 0.3 * (b @ outer["x"] + c)
    expected = problem.rho * outer["x"] + factor * b.T @ (y - t)
    result = estimate(DARTS(1, 0.3, adjoint_lr=adjoint_lr), problem, outer, task)
    assert_close(result.hypergradient, {"x": expected})


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_derivative_through_the_last_step(steps):
    """J changes with y, so this fails where the difference is at another point."""
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    expected = estimate(ITD(steps, 0.3, truncate=1), problem, outer, task)
    result = estimate(DARTS(steps, 0.3, epsilon=1e-4), problem, outer, task)
    assert_close(result.hypergradient, expected.hypergradient, 1e-7)


def test_the_rate_of_the_step_is_that_of_the_outer_step():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    decayed = estimate(
        DARTS(2, inner_optimizer=SGD(0.3, schedule="power")), problem, outer, task, step=3
    )
    expected = estimate(DARTS(2, 0.15), problem, outer, task, step=3)
    assert_close(decayed.hypergradient, expected.hypergradient)
