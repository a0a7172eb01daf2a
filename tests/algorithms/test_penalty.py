"""Penalty method: its steps by hand, convergence of multipliers, its toys."""

from typing import Any

import pytest
import torch

from metadist.algorithms.penalty import Penalty, PenaltyState
from metadist.tasks.synthetic.toys import PenaltyToy
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
    true_hypergradient,
)


def test_closed_form_on_random_quadratics():
    for index in range(3):
        problem, task = Quadratic(3, 5), quadratic_task(index, num_outer=3, num_inner=5)
        outer, rho, lam = problem.init_outer(generator(index)), 0.7, 0.3
        (a, b, c, t), x = quadratic_terms(task), outer["x"]
        y, nu = randn(index, 5), randn(index + 10, 5)
        state = PenaltyState({"y": y}, {"y": nu}, torch.zeros((), dtype=y.dtype))
        result = estimate(Penalty(3, 0.05, rho=rho, lam=lam), problem, outer, task, state)
        for _ in range(3):
            g_y = a @ y - b @ x - c
            y = y - 0.05 * (y - t + a @ (nu + rho * g_y) + lam * g_y)
        w = nu + rho * (a @ y - b @ x - c)
        assert_close(result.state.inner, {"y": y})
        assert_close(result.hypergradient, {"x": problem.rho * x - b.T @ w})
        residual = float((a @ w + y - t).norm() / (y - t).norm())
        assert float(result.metrics["adjoint_residual"]) == pytest.approx(residual)


def test_the_test_compares_squared_norms_with_eps_squared():
    """Squared once more, as in the official code, a gradient of 1/2 would pass eps = 1/4."""
    problem, outer, task = golden_quadratic()
    h = estimate(Penalty(150, 0.05, lam=0.0, eps=1e-30), problem, outer, task)
    size = float(h.hypergradient["x"].norm())  # grad_y h_low is 0 after so many steps
    for eps, met in ((0.99 * size, 0), (1.01 * size, 1)):
        algorithm = Penalty(150, 0.05, lam=0.0, eps=eps)
        state = estimate(algorithm, problem, outer, task).state
        assert float(state.num_updates) == met


def test_an_update_moves_the_multipliers_by_the_old_rho_and_scales_the_weights():
    problem, outer, task = golden_quadratic()
    (a, b, _, t), x = quadratic_terms(task), outer["x"]
    options: Any = {"rho_factor": 2.0, "lam_factor": 0.5, "eps_factor": 0.1, "lr_factor": 0.25}
    algorithm = Penalty(1, 0.01, rho=0.5, lam=0.2, eps=1e3, **options)
    state = estimate(algorithm, problem, outer, task).state
    y = state.inner["y"]
    nu = 0.5 * (a @ y - b @ x)
    assert_close(state.multipliers, {"y": nu})
    assert float(state.num_updates) == 1
    # The next step has rho = 1, lam = 0.1 and a quarter of the rate.
    g_y = a @ y - b @ x
    expected = y - 0.01 * 0.25 * (y - t + a @ (nu + g_y) + 0.1 * g_y)
    second = estimate(algorithm, problem, outer, task, state).state
    assert_close(second.inner, {"y": expected})


def test_at_one_x_the_multipliers_converge_to_the_adjoint():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    state: Any = None
    algorithm = Penalty(5, 0.1, eps=1e6, eps_factor=1.0)  # always met
    for _ in range(150):
        result = estimate(algorithm, problem, outer, task, state, eager=True)
        state = result.state
    assert_close(result.hypergradient, {"x": true_hypergradient(problem, outer, task)}, 1e-6)
    a, b, c, t = quadratic_terms(task)
    solution = torch.linalg.solve(a, b @ outer["x"] + c)
    assert_close(state.inner, {"y": solution}, 1e-6)
    assert_close(state.multipliers, {"y": -torch.linalg.solve(a, solution - t)}, 1e-6)


def test_golden_values_are_reached_by_rho_alone():
    """With nu = 0 the bias is O(1/rho)."""
    problem, outer, task = golden_quadratic()
    truth, errors = point(1.2, -0.9), []
    for rho in (10.0, 20.0):
        algorithm = Penalty(400, 1.5 / (16 * rho + 1), rho=rho, lam=0.0, eps=1e-9)
        h = estimate(algorithm, problem, outer, task, eager=True).hypergradient["x"]
        errors.append(float((h - truth).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] < 0.1


def test_on_a_new_task_one_estimate_is_useful():
    assert alignment(Penalty(30, 0.02, rho=5.0)) > 0.95


@pytest.mark.parametrize(("kind", "solution"), [("sum", 0.5), ("difference", 0.0)])
def test_the_toys_of_the_paper(kind, solution):
    algorithm = Penalty(10, 0.05, eps=0.1)
    outer, start = {"x": randn(1, 20)}, {"y": randn(2, 20)}
    run = run_single(algorithm, PenaltyToy(kind), toy_task(), outer, 150, 0.1, start=start)
    expected = torch.full((20,), solution, dtype=torch.float64)
    assert_close(run.outer, {"x": expected}, 1e-3)
    assert_close(run.state.inner, {"y": expected}, 1e-3)
