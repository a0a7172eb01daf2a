"""MRBO: its recursion by hand, kept and new tasks, less noise than StocBiO."""

import pytest
import torch

from metadist.algorithms.mrbo import MRBO
from metadist.algorithms.stocbio import StocBiO
from metadist.autograd import AutogradOracle
from metadist.oracle import CountingOracle
from metadist.trees import add, sub
from tests.algorithms.toys import estimate, point
from tests.problems import (
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    randn,
)


def test_the_golden_quadratic():
    problem, outer, task = golden_quadratic()
    algorithm = MRBO(inner_lr=0.2, adjoint_steps=2, adjoint_lr=0.2)
    problem.start = point(2, -1)  # the solution, so y stays and h is that of StocBiO
    first = estimate(algorithm, problem, outer, task)
    assert_close(first.hypergradient, {"x": point(0.688, -0.896)}, 1e-12)
    second = estimate(algorithm, problem, outer, task, first.state, step=1)
    assert_close(second.hypergradient, {"x": point(0.688, -0.896)}, 1e-12)


def test_the_recursion_by_hand():
    """No Hessian products and noisy draws: h = rho x + eta B_i'(y - t_j), by the same i and j."""
    problem, task, eta = Quadratic(2, 4), quadratic_task(0), 0.3
    algorithm = MRBO(
        inner_lr=0.2, adjoint_steps=0, adjoint_lr=eta, outer_weight=0.4, inner_weight=0.7
    )
    points, state = [{"x": randn(seed, 2)} for seed in range(4)], None
    y = before = {"y": problem.start}
    u, w = {"y": randn(8, 4)}, {"x": randn(9, 2)}  # not used before they are set
    for k, x in enumerate(points):
        oracle = AutogradOracle(problem, task, batch_size=1, step=k)
        inner, outer, cross = oracle.draw_inner(), oracle.draw_outer(), oracle.draw_inner()

        def h(x, y, outer=outer, cross=cross, oracle=oracle):
            direct, right = oracle.outer_grads(x, y, outer)
            j_v, _ = oracle.second_order(x, y, {"y": eta * right["y"]}, cross)
            return sub(direct, j_v)

        new_u, new_w = oracle.inner_grad(x, y, inner), h(x, y)
        if k:
            a, b = 0.4 * k ** (-2 / 3), 0.7 * k ** (-2 / 3)
            old_u = oracle.inner_grad(points[k - 1], before, inner)
            u = add(new_u, sub(u, old_u), 1 - b)
            w = add(new_w, sub(w, h(points[k - 1], before)), 1 - a)
        else:
            u, w = new_u, new_w
        found = estimate(algorithm, problem, x, task, state, batch_size=1, step=k)
        assert_close(found.hypergradient, w, 1e-12)
        assert_close(found.state.inner_direction, u, 1e-12)
        before, y, state = y, add(y, u, -0.2), found.state
        assert_close(state.inner, y, 1e-12)


def test_without_noise_the_recursion_changes_nothing():
    problem, task = Quadratic(2, 4), quadratic_task(1)
    outer = problem.init_outer(generator(1))
    a, b, _, t = quadratic_terms(task)
    state = None
    for k in range(3):
        algorithm = MRBO(inner_steps=2, inner_lr=0.2, adjoint_steps=1, adjoint_lr=0.3)
        found = estimate(algorithm, problem, outer, task, state, step=k)
        y = found.state.previous_inner["y"]
        v = 0.3 * (2 * (y - t) - 0.3 * a @ (y - t))
        assert_close(found.hypergradient, {"x": 0.1 * outer["x"] + b.T @ v}, 1e-12)
        assert found.state.age == 2 * (k + 1)
        state, outer = found.state, add(outer, found.hypergradient, -0.1)


def test_a_new_task_gets_the_plain_estimate_after_its_steps():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    mrbo = MRBO(inner_steps=4, inner_lr=0.2, adjoint_steps=3)
    found = estimate(mrbo, problem, outer, task, step=7)
    plain = estimate(StocBiO(3, 0.2, adjoint_steps=3), problem, outer, task, step=7)
    assert_close(found.hypergradient, plain.hypergradient, 1e-12)
    counting = CountingOracle(AutogradOracle(problem, task, step=7))
    mrbo.estimate(counting, outer, mrbo.init(counting, outer, {"y": problem.start}))
    assert counting.counts == {"inner_grad": 7, "outer_grads": 1, "hvp": 4, "jvp": 1}


def test_weights():
    algorithm = MRBO(outer_weight=0.5)
    assert algorithm.recursive_weight(0) == 1
    assert algorithm.recursive_weight(1) == 0.5
    assert algorithm.recursive_weight(8) == pytest.approx(0.125)
    assert MRBO(outer_weight=9.0).recursive_weight(1) == 1


def test_its_direction_has_less_noise_than_that_of_stocbio():
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=8, num_query=8, noise=0.3)
    outer, errors = problem.init_outer(generator(0)), {}
    for algorithm in (
        MRBO(inner_lr=0.3, adjoint_steps=2, adjoint_lr=0.3),
        StocBiO(1, 0.3, adjoint_steps=2, adjoint_lr=0.3),
    ):
        state, x, squares = None, outer, []
        for k in range(100):
            found = estimate(algorithm, problem, x, task, state, batch_size=1, step=k, eager=True)
            exact = neumann_gradient(problem, x, task, 2, 0.3)
            squares.append(float((found.hypergradient["x"] - exact).square().sum()))
            state, x = found.state, add(x, found.hypergradient, -0.05 * (k + 1) ** (-1 / 3))
        errors[type(algorithm)] = sum(squares[-60:]) / 60
    assert errors[MRBO] < 0.5 * errors[StocBiO], errors


def neumann_gradient(problem, x, task, num_steps, rate):
    a, b, c, t = quadratic_terms(task)
    identity = torch.eye(4, dtype=a.dtype)
    y = torch.linalg.solve(a, b @ x["x"] + c)
    power = torch.linalg.matrix_power(identity - rate * a, num_steps + 1)
    return problem.rho * x["x"] + b.T @ torch.linalg.solve(a, (identity - power) @ (y - t))
