"""BVFSM: its smooth problem by other means, the limit of its penalty, its toy."""

import pytest
import torch

from metadist.algorithms.bvfsm import BVFSM, BVFSMState
from metadist.tasks.synthetic.toys import Degenerate
from tests.algorithms.toys import alignment, estimate, point, toy_task
from tests.problems import (
    Quadratic,
    assert_close,
    central_difference,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    run_single,
    true_hypergradient,
)

LONG = BVFSM(100, 0.3, y_steps=500, y_lr=0.1, sigma=0.01, mu=0.05, theta=0.02)


def test_one_estimate_by_hand():
    problem, outer, task = golden_quadratic()
    algorithm = BVFSM(1, 0.2, y_steps=1, y_lr=0.5, sigma=0.5, mu=0.1, theta=0.2)
    state = BVFSMState(inner={"y": point(1, 1)}, lower_solution={"y": point(0, 0)})
    found = estimate(algorithm, problem, outer, task, state)
    assert_close(found.state.lower_solution, {"y": point(0.4, -0.8)}, 1e-12)
    # v = .08 + 1.28 - .8 - 3.2 + .05 * .8 = -2.6;  g = .5 + 2 - 2 + 4 = 4.5;  lam = 14.2
    # f_y + .2 y + lam (-1, 8) = (-14, 113.8), divided by 15.2, times .5
    y = point(1 + 7 / 15.2, 1 - 56.9 / 15.2)
    assert_close(found.state.inner, {"y": y}, 1e-12)
    value = 0.5 * (y[0] ** 2 + 4 * y[1] ** 2) - y @ outer["x"] + 2.6
    assert float(found.metrics["value_gap"]) == pytest.approx(float(value), abs=1e-12)
    lam = value / 0.5
    assert_close(found.hypergradient, {"x": 0.1 * outer["x"] - lam * (y - point(0.4, -0.8))}, 1e-11)


def test_it_is_the_gradient_of_its_smooth_problem():
    """phi by Newton's method on y, with a value function in closed form."""
    problem, task = Quadratic(2, 3), quadratic_task(1, num_inner=3)
    outer = problem.init_outer(generator(1))
    a, b, c, t = quadratic_terms(task)
    eye = torch.eye(3, dtype=a.dtype)

    def phi(outer):
        x = outer["x"]
        linear = b @ x + c
        value = -0.5 * linear @ torch.linalg.solve(a + 0.05 * eye, linear)

        def objective(y):
            gap = 0.5 * y @ a @ y - y @ linear - value
            upper = 0.5 * (y - task.query.tensors[0]).square().sum(1).mean() + 0.05 * x @ x
            return upper + 0.01 * y @ y + gap.relu() ** 2 / 0.02

        y = torch.linalg.solve(a, linear) + 0.2 * (t - torch.linalg.solve(a, linear))
        for _ in range(40):
            gradient = torch.func.grad(objective)(y)
            y = y - 0.7 * torch.linalg.solve(torch.func.hessian(objective)(y), gradient)
        assert float(gradient.norm()) < 1e-9
        return objective(y)

    found = estimate(LONG, problem, outer, task)
    assert float(found.metrics["lam"]) > 0.5
    assert_close(found.hypergradient, central_difference(phi, outer), 1e-6)


def test_the_bias_falls_with_the_cube_root_of_sigma():
    problem, task = Quadratic(2, 4), quadratic_task(2)
    outer = problem.init_outer(generator(2))
    truth, errors = true_hypergradient(problem, outer, task), []
    for sigma in (1e-3, 1e-6):
        algorithm = BVFSM(100, 0.3, y_steps=500, y_lr=0.1, sigma=sigma, mu=0.0, theta=0.0)
        h = estimate(algorithm, problem, outer, task).hypergradient["x"]
        errors.append(float((h - truth).norm()))
    assert 9 < errors[0] / errors[1] < 11, errors


def test_the_weights_fall_with_the_outer_step():
    problem, outer, task = golden_quadratic()
    fallen = estimate(BVFSM(2, decay=0.5), problem, outer, task, step=3)
    constant = estimate(BVFSM(2, sigma=0.005, mu=0.0005, theta=0.0005), problem, outer, task)
    assert_close(fallen.hypergradient, constant.hypergradient, 1e-13)
    assert_close(fallen.state.inner, constant.state.inner, 1e-13)


def test_on_a_new_task_it_gives_a_useful_hypergradient():
    assert alignment(BVFSM(20, 0.3, y_steps=100, sigma=1e-3)) > 0.95


def test_degenerate_lower_level_comes_near_the_optimistic_solution():
    algorithm = BVFSM(5, 0.5, y_steps=10, y_lr=0.3, sigma=0.01, mu=0.0, theta=0.0)
    run = run_single(algorithm, Degenerate(), toy_task(), {"x": point(0)}, 400, 0.2)
    assert_close(run.outer, {"x": point(1)}, 0.05)
    assert_close(run.state.inner, {"y": point(1, 1)}, 0.05)
