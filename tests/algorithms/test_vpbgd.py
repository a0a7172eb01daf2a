"""V-PBGD: closed forms, its non-convex toy, the rise of gamma."""

import pytest
import torch

from metadist.algorithms.vpbgd import VPBGD
from metadist.tasks.synthetic.toys import Degenerate, PBGDToy
from tests.algorithms.toys import alignment, estimate, point, toy_task
from tests.problems import (
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    randn,
    run_single,
)


def test_one_step_on_the_golden_instance():
    """By hand: omega = (.4, -.8) after one step of .2, y = 0."""
    problem, outer, task = golden_quadratic()
    algorithm = VPBGD(1, 0.2, y_lr=0.5, gamma_max=10.0)
    result = estimate(algorithm, problem, outer, task)
    assert_close(result.state.lower_solution, {"y": point(0.4, -0.8)}, 1e-12)
    # (.2, -.4) + 10 * (0 + (.4, -.8)), divided by 10
    assert_close(result.hypergradient, {"x": point(0.42, -0.84)}, 1e-12)
    # -.05 * ((-1, -1) + 10 * (-2, 4))
    assert_close(result.state.inner, {"y": point(1.05, -1.95)}, 1e-12)


@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_closed_form_on_random_quadratics(gamma):
    for index in range(3):
        problem, task = Quadratic(3, 5), quadratic_task(index, num_outer=3, num_inner=5)
        problem.start = y = randn(index, 5)
        outer = problem.init_outer(generator(index))
        (a, b, c, t), x = quadratic_terms(task), outer["x"]
        power = torch.linalg.matrix_power(torch.eye(5, dtype=x.dtype) - 0.2 * a, 4)
        solution = torch.linalg.solve(a, b @ x + c)
        omega = power @ y + solution - power @ solution
        factor = min(1 / gamma, 1)
        algorithm = VPBGD(4, 0.2, y_lr=0.1, gamma_max=gamma)
        result = estimate(algorithm, problem, outer, task)
        expected = factor * (problem.rho * x - gamma * b.T @ (y - omega))
        assert_close(result.hypergradient, {"x": expected})
        step = y - t + gamma * (a @ y - b @ x - c)
        assert_close(result.state.inner, {"y": y - 0.1 * factor * step})


def test_rounds_at_one_x_end_at_the_penalised_closed_form():
    problem, outer, task = golden_quadratic()
    algorithm = VPBGD(2, 0.2, y_lr=0.2, gamma_max=10.0, rounds=150)
    result = estimate(algorithm, problem, outer, task)
    # As the first-order finite difference of F2SA with lam = 10, divided by gamma.
    assert_close(result.hypergradient, {"x": point(0.1109091, -0.0887805)}, 1e-7)


def test_gamma_rises_linearly():
    algorithm = VPBGD(gamma_init=1.0, gamma_max=5.0, gamma_steps=8)
    assert [algorithm.penalty(step) for step in (0, 2, 8, 100)] == [1, 2, 5, 5]
    assert VPBGD(gamma_max=5.0).penalty(0) == 5
    problem, outer, task = golden_quadratic()
    risen = estimate(algorithm, problem, outer, task, step=2)
    constant = estimate(VPBGD(gamma_max=2.0), problem, outer, task)
    assert_close(risen.hypergradient, constant.hypergradient, 1e-13)


def test_on_a_new_task_rounds_give_a_useful_hypergradient():
    assert alignment(VPBGD(5, 0.3, y_lr=0.3, rounds=20)) > 0.95


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.3824), (1.0, 1.2152), (2.6, 2.8296)])
def test_non_convex_toy_ends_in_a_local_minimum(start, end):
    algorithm = VPBGD(1, 0.1, y_lr=0.1, gamma_max=10.0)
    run = run_single(
        algorithm, PBGDToy(), toy_task(), {"x": point(start)}, 600, 0.1, start={"y": point(-start)}
    )
    assert_close(run.outer, {"x": point(end)}, 0.05)
    assert_close(run.state.inner, {"y": point(-end)}, 0.2)


def test_degenerate_lower_level_reaches_the_optimistic_solution():
    algorithm = VPBGD(1, 0.5, y_lr=0.5, gamma_max=3.0)
    run = run_single(algorithm, Degenerate(), toy_task(), {"x": point(0)}, 400, 0.5)
    assert_close(run.outer, {"x": point(1)}, 1e-6)
    assert_close(run.state.inner, {"y": point(1, 1)}, 1e-6)
