"""F2SA and F2SA-2: golden values, closed forms, how the bias falls with lam."""

from itertools import pairwise
from typing import Literal

import pytest
import torch

from metadist.algorithms.f2sa import F2SA
from metadist.algorithms.reptile import Reptile
from metadist.trees import add
from tests.algorithms.toys import alignment, estimate, point, steep_quadratic
from tests.problems import (
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    run_single,
    true_hypergradient,
)


def test_one_golden_step():
    problem, outer, task = golden_quadratic()
    # a_k = y_lr / (1 + lam) = 0.05
    algorithm = F2SA(inner_steps=1, inner_lr=0.2, y_lr=0.55, lam=10.0)
    result = estimate(algorithm, problem, outer, task)
    assert_close(result.state.inner, {"y": point(0.4, -0.8)}, 1e-12)
    assert_close(add(result.state.inner, result.state.offset), {"y": point(1.05, -1.95)}, 1e-12)
    assert_close(result.hypergradient, {"x": point(-6.3, 11.1)}, 1e-12)


def test_golden_values_at_the_solutions():
    problem, outer, task = golden_quadratic()
    result = estimate(F2SA(200, 0.2, lam=10.0), problem, outer, task)
    assert_close(result.hypergradient, {"x": point(1.109091, -0.887805)}, 1e-6)
    assert_close(result.state.inner, {"y": point(2, -1)}, 1e-10)
    y = add(result.state.inner, result.state.offset)
    assert_close(y, {"y": point(1.909091, -0.951220)}, 1e-6)
    result = estimate(F2SA(200, 0.2, lam=10.0, order=2), problem, outer, task)
    assert_close(result.hypergradient, {"x": point(1.210101, -0.900313)}, 1e-6)


@pytest.mark.parametrize("y_lr", [None, 0.5])
def test_closed_forms_on_random_quadratics(y_lr):
    for index in range(2):
        problem, task = Quadratic(3, 5), quadratic_task(index, num_outer=3, num_inner=5)
        outer, nu = problem.init_outer(generator(index)), 0.125
        (a, b, c, t), x = quadratic_terms(task), outer["x"]
        identity, solution = torch.eye(5, dtype=x.dtype), torch.linalg.solve(a, b @ x + c)
        inverses = (
            torch.linalg.inv(a + nu * identity),
            a @ torch.linalg.inv(a @ a - nu**2 * identity),
        )
        orders: tuple[Literal[1, 2], ...] = (1, 2)
        for order, inverse in zip(orders, inverses, strict=True):
            algorithm = F2SA(160, 0.35, y_lr=y_lr, lam=8.0, order=order)
            result = estimate(algorithm, problem, outer, task)
            expected = problem.rho * x + b.T @ inverse @ (solution - t)
            assert_close(result.hypergradient, {"x": expected}, 1e-9)
            expected = (
                solution
                if order == 1
                else solution + nu**2 * torch.linalg.solve(a @ a - nu**2 * identity, solution - t)
            )
            assert_close(result.state.inner, {"y": expected}, 1e-9)


@pytest.mark.parametrize(("order", "ratio"), [(1, 2.0), (2, 4.0)])
def test_the_error_falls_with_lam_as_the_order_says(order, ratio):
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    truth = true_hypergradient(problem, outer, task)
    errors = []
    for lam in (40.0, 80.0, 160.0):
        algorithm = F2SA(150, 0.5, lam=lam, order=order)
        h = estimate(algorithm, problem, outer, task).hypergradient["x"]
        errors.append(float((h - truth).norm()))
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(ratio, rel=0.05)


def test_steps_are_stable_for_every_lam():
    problem, outer, task = golden_quadratic()
    for lam in (0.1, 1.0, 1e6):
        result = estimate(F2SA(60, 0.3, y_lr=0.3, lam=lam), problem, outer, task)
        assert result.hypergradient["x"].abs().max() < 10


def test_few_steps_from_a_common_start_are_a_neumann_series():
    """With y_lr=None, lam * (y - z) is a truncated series and not a difference of speeds."""
    problem, task = Quadratic(2, 4), quadratic_task(1)
    outer = problem.init_outer(generator(1))
    a, b, _, t = quadratic_terms(task)
    steps, rate, lam = 5, 0.2, 1e5
    result = estimate(F2SA(steps, rate, lam=lam), problem, outer, task)
    v, y = torch.zeros_like(t), torch.zeros_like(t)
    contraction = torch.eye(4, dtype=t.dtype) - rate * a
    for _ in range(steps):  # both at first order in 1 / lam
        v = contraction @ v + rate * (y - t)
        y = contraction @ y + rate * (b @ outer["x"] + quadratic_terms(task)[2])
    assert_close(result.hypergradient, {"x": problem.rho * outer["x"] + b.T @ v}, 1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_on_a_new_task_one_estimate_is_useful(order):
    assert alignment(F2SA(30, 0.3, order=order)) > 0.95


def test_ill_conditioned_problems_need_many_steps_only():
    problem, task = Quadratic(3, 5), steep_quadratic(4)
    outer = problem.init_outer(generator(0))
    a, b, c, t = quadratic_terms(task)
    solution = torch.linalg.solve(a, b @ outer["x"] + c)
    shifted = a + torch.eye(5, dtype=a.dtype) / 100
    expected = problem.rho * outer["x"] + b.T @ torch.linalg.solve(shifted, solution - t)
    result = estimate(F2SA(1500, 1.8, lam=100.0), problem, outer, task, eager=True)
    assert_close(result.hypergradient, {"x": expected}, 1e-7)


def test_lam_grows_with_the_outer_step():
    problem, outer, task = golden_quadratic()
    grown = estimate(F2SA(lam=3.0, lam_growth=0.5), problem, outer, task, step=8)
    assert_close(
        grown.hypergradient, estimate(F2SA(lam=9.0), problem, outer, task).hypergradient, 1e-12
    )


def test_kept_states_converge_to_the_biased_solution():
    problem, outer, task = golden_quadratic()
    cases: list[tuple[Literal[1, 2], float]] = [(1, 0.03), (2, 5e-4)]
    for order, bound in cases:
        run = run_single(F2SA(3, 0.2, lam=100.0, order=order), problem, task, outer, 250, 0.2)
        assert float(true_hypergradient(problem, run.outer, task).norm()) < bound


def test_adaptation_is_gradient_descent_on_g():
    problem, outer, task = golden_quadratic()
    oracle, context, start = oracle_of(problem, outer, task)
    expected = Reptile(7, 0.2).adapt(oracle, context, start)
    assert_close(F2SA(7, 0.2, lam=3.0).adapt(oracle, context, start), expected, 1e-14)
