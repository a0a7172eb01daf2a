"""T1-T2: golden value, closed form, equality with truncated ITD."""

import pytest
import torch

from metadist.algorithms.itd import ITD
from metadist.algorithms.t1t2 import T1T2
from tests.algorithms.toys import estimate, point, steep_quadratic
from tests.problems import (
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
)


def test_golden_value():
    problem, outer, task = golden_quadratic()
    result = estimate(T1T2(200, 0.2), problem, outer, task)
    assert_close(result.hypergradient, {"x": point(1.2, -2.4)}, 1e-10)
    assert_close(result.state.inner, {"y": point(2, -1)}, 1e-10)
    # H v - b = (0, -6), b = (1, -2)
    assert float(result.metrics["adjoint_residual"]) == pytest.approx(6 / 5**0.5)


@pytest.mark.parametrize("task_of", [quadratic_task, steep_quadratic])
def test_closed_form_on_random_quadratics(task_of):
    for index in range(3):
        problem, task = Quadratic(3, 5), task_of(index, num_outer=3, num_inner=5)
        outer = problem.init_outer(generator(index))
        a, b, c, t = quadratic_terms(task)
        result = estimate(T1T2(6, 0.2, adjoint_lr=0.7), problem, outer, task)
        power = torch.linalg.matrix_power(torch.eye(5, dtype=a.dtype) - 0.2 * a, 6)
        solution = torch.linalg.solve(a, b @ outer["x"] + c)
        y = solution - power @ solution
        expected = problem.rho * outer["x"] + 0.7 * b.T @ (y - t)
        assert_close(result.hypergradient, {"x": expected})


def test_with_the_inner_rate_and_one_step_it_is_itd():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    h = estimate(ITD(1, 0.2), problem, outer, task).hypergradient
    # J does not depend on y here.
    assert_close(estimate(T1T2(1, 0.2, adjoint_lr=0.2), problem, outer, task).hypergradient, h)
