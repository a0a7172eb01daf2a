"""MEHA: golden values, closed forms, the toys of its paper."""

from typing import Any

import pytest
import torch

from metadist.algorithms.meha import MEHA, MEHAState
from metadist.step_rules import SGD
from metadist.tasks.synthetic.toys import SINE_SOLUTION, Lasso, MerelyConvex, Sine
from metadist.trees import add
from tests.algorithms.toys import alignment, counts_of, estimate, point, toy_task
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

GOLDEN = MEHA(inner_lr=0.1, y_lr=0.1, gamma=0.5, c=1.0, c_power=0.0)


def test_one_golden_step():
    problem, outer, task = golden_quadratic()
    first = estimate(GOLDEN, problem, outer, task)
    assert_close(first.state.proximal_point, {"y": point(0.2, -0.4)}, 1e-12)
    assert_close(first.hypergradient, {"x": point(0.4, -0.8)}, 1e-12)
    assert_close(first.state.inner, {"y": point(0, 0)})
    outer = add(outer, first.hypergradient, -0.1)
    assert_close(outer, {"x": point(1.96, -3.92)}, 1e-12)
    # y moves at the x that the first step led to.
    second = estimate(GOLDEN, problem, outer, task, first.state, step=1)
    assert_close(second.state.inner, {"y": point(0.256, -0.212)}, 1e-12)
    assert second.state.moved_at == 1


def test_the_step_of_y_has_the_rate_of_the_outer_step_it_belongs_to():
    problem, outer, task = golden_quadratic()
    algorithm = MEHA(
        inner_optimizer=SGD(0.1, schedule="power", exponent=1.0),
        y_lr=0.2,
        gamma=0.5,
        c=1.0,
        c_power=0.0,
    )
    # Of step 1 are both its theta and its y, rates 0.05 and 0.1, though y is moved at step 2.
    state = MEHAState({"y": point(0, 0)}, {"y": point(0, 0)}, -1)
    first = estimate(algorithm, problem, outer, task, state, step=1)
    assert_close(first.state.proximal_point, {"y": point(0.1, -0.2)}, 1e-12)
    second = estimate(algorithm, problem, outer, task, first.state, step=2)
    # -0.1 * ((-1, -1) + (-2, 4) - (0 - (0.1, -0.2)) / 0.5)
    assert_close(second.state.inner, {"y": point(0.28, -0.26)}, 1e-12)


def test_theta_is_the_proximal_point_and_gives_the_gradients_of_the_envelope():
    problem, outer, task = golden_quadratic()
    algorithm = MEHA(y_lr=1e-15, inner_lr=0.1, gamma=0.5, inner_steps=300)
    state = estimate(algorithm, problem, outer, task).state
    assert_close(state.proximal_point, {"y": point(0.666667, -0.666667)}, 1e-6)
    oracle, _, _ = oracle_of(problem, outer, task)
    draw = oracle.draw_inner()
    theta = state.proximal_point["y"]
    envelope = oracle.inner_value(outer, state.proximal_point, draw) + theta @ theta
    assert float(envelope) == pytest.approx(-2, abs=1e-9)
    gradient_x, _ = oracle.inner_grads(outer, state.proximal_point, draw)
    assert_close(gradient_x, {"x": point(-0.666667, 0.666667)}, 1e-6)
    assert_close({"y": -theta / 0.5}, {"y": point(-1.333333, 1.333333)}, 1e-6)


@pytest.mark.parametrize("index", range(3))
def test_moves_at_one_x_end_where_the_closed_form_says(index):
    """There A (y - theta) = -grad_y f / c and (y - theta) / gamma = grad_y g(theta)."""
    problem, task, gamma, c = Quadratic(2, 4), quadratic_task(index), 0.8, 20.0
    outer = problem.init_outer(generator(index))
    (a, b, shift, t), x = quadratic_terms(task), outer["x"]
    linear, identity = b @ x + shift, torch.eye(4, dtype=x.dtype)
    # Unknowns (y, theta).
    system = torch.cat(
        [
            torch.cat([a + identity / c, -a], 1),
            torch.cat([-identity / gamma, a + identity / gamma], 1),
        ]
    )
    y, theta = torch.linalg.solve(system, torch.cat([t / c, linear])).chunk(2)
    algorithm = MEHA(350, 0.3, y_lr=0.3, gamma=gamma, c=c, c_power=0.0)
    result = estimate(algorithm, problem, outer, task)
    assert_close(result.state.inner, {"y": y}, 1e-6)
    assert_close(result.state.proximal_point, {"y": theta}, 1e-6)
    expected = problem.rho * x / c - b.T @ (y - theta)
    assert_close(result.hypergradient, {"x": expected}, 1e-6)
    truth = true_hypergradient(problem, outer, task)
    assert float((c * expected - truth).norm()) < 0.5 * float(truth.norm())


def test_several_moves_are_several_estimates_at_one_x():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    state: Any = None
    for _ in range(5):
        result = estimate(MEHA(1), problem, outer, task, state, step=3)
        state = result.state
    together = estimate(MEHA(5), problem, outer, task, step=3)
    assert_close(together.hypergradient, result.hypergradient, 1e-13)
    assert_close(together.state.inner, state.inner, 1e-13)


def test_the_weight_grows_with_the_outer_step_and_divides_f():
    _, outer, task = golden_quadratic()
    algorithm = MEHA(c=2.0, c_power=0.25)
    with_f, without_f = (
        estimate(algorithm, Quadratic(2, 2, rho), outer, task, step=15).hypergradient["x"]
        for rho in (0.1, 0.0)
    )
    assert_close({"x": with_f - without_f}, {"x": 0.1 * outer["x"] / (2 * 16**0.25)}, 1e-12)


def test_on_a_new_task_moves_give_a_useful_hypergradient():
    assert alignment(MEHA(inner_lr=0.2, inner_steps=30)) > 0.95


def test_sine_from_every_start_ends_at_the_bilevel_solution():
    # Four starts at once, as copies.
    problem = Sine(4)
    algorithm = MEHA(1, 0.1, y_lr=0.1, gamma=0.4, c=1.0, c_power=0.49)
    outer, start = {"x": point(0, 2, -6, 1)}, {"y": point(0, 3, 0, 5)}
    run = run_single(algorithm, problem, toy_task(), outer, 1500, 0.1, start=start)
    x, y = run.outer["x"], run.state.inner["y"]
    assert (x + y - 2).sin().max() < -0.995
    assert_close({"x": x}, {"x": torch.full_like(x, SINE_SOLUTION[0])}, 0.04)
    assert_close({"y": y}, {"y": torch.full_like(y, SINE_SOLUTION[1])}, 0.04)


def test_sine_with_one_x_for_several_y():
    algorithm = MEHA(1, 0.1, y_lr=0.1, gamma=0.4, c=1.0, c_power=0.49)
    start = {"y": point(0, 0)}
    run = run_single(algorithm, Sine(1, 2), toy_task(), {"x": point(0)}, 800, 0.1, start=start)
    assert_close(run.outer, {"x": point(2.474926)}, 0.05)
    assert_close(run.state.inner, {"y": point(4.237463, 4.237463)}, 0.05)


@pytest.mark.slow
def test_sine_ends_where_the_reference_does():
    outer, start = {"x": point(0, 2, -6, 1)}, {"y": point(0, 3, 0, 5)}
    for gamma, x, y in ((0.4, 2.3379, 4.3380), (1.0, 2.3456, 4.3455)):
        algorithm = MEHA(1, 0.1, y_lr=0.1, gamma=gamma, c=1.0, c_power=0.49)
        run = run_single(algorithm, Sine(4), toy_task(), outer, 5000, 0.1, start=start)
        assert_close(run.outer, {"x": torch.full((4,), x, dtype=torch.float64)}, 2e-4)
        assert_close(run.state.inner, {"y": torch.full((4,), y, dtype=torch.float64)}, 2e-4)


def test_merely_convex_lower_level():
    problem = MerelyConvex(10)
    algorithm = MEHA(1, 0.1, y_lr=0.1, gamma=1.0, c=2.0, c_power=0.3)
    run = run_single(algorithm, problem, toy_task(), problem.init_outer(generator(0)), 1200, 0.5)
    assert_close(run.outer, {"x": torch.ones(10, dtype=torch.float64)}, 0.05)
    assert_close(run.state.inner, {"y": torch.ones(20, dtype=torch.float64)}, 0.05)


def test_lasso_finds_the_thresholds():
    problem = Lasso(4)
    algorithm = MEHA(1, 0.1, y_lr=0.1, gamma=1.0, c=5.0, c_power=0.3)
    outer = {"x": torch.full((4,), 0.1, dtype=torch.float64)}
    run = run_single(algorithm, problem, toy_task(), outer, 800, 0.5)
    x, y = run.outer["x"], run.state.inner["y"]
    assert float(problem.upper(x, y)) < -0.49
    assert_close({"y": y}, {"y": point(0, 0, -0.25, -0.25)}, 0.06)
    assert x[:2].min() > 0.25 and x[2:].max() < 1e-6


def test_lasso_gradients_contain_the_non_smooth_part():
    problem, outer = Lasso(2), {"x": point(0.1, 0.2)}
    algorithm = MEHA(1, 0.5, gamma=1.0, c=1.0, c_power=0.0)
    result = estimate(algorithm, problem, outer, toy_task())
    # From 0 along (0.5, -0.5) by 0.5, then thresholds of 0.5 x.
    assert_close(result.state.proximal_point, {"y": point(0.2, -0.15)}, 1e-14)
    assert_close(result.hypergradient, {"x": point(-0.2, -0.15)}, 1e-14)


def test_adaptation_is_the_proximal_gradient_method():
    problem, outer = Lasso(4), {"x": point(0.05, 0.5, 0.1, 0.3)}
    oracle, context, start = oracle_of(problem, outer, toy_task())
    adapted = MEHA(200, 0.3).adapt(oracle, context, start)
    assert_close(adapted, {"y": point(0.2, 0, -0.15, 0)}, 1e-12)
    golden, golden_outer, task = golden_quadratic()
    oracle, context, start = oracle_of(golden, golden_outer, task)
    assert_close(MEHA(300, 0.3).adapt(oracle, context, start), {"y": point(2, -1)}, 1e-12)


def test_costs():
    problem, outer, task = golden_quadratic()
    # The first move of a new state has no step of y pending.
    first = {"inner_grad": 3, "inner_grad_x": 2, "outer_grads": 1}
    assert counts_of(MEHA(), problem, outer, task) == first
    state = estimate(MEHA(), problem, outer, task).state
    later = {"inner_grad": 4, "inner_grad_x": 2, "outer_grads": 2}
    assert counts_of(MEHA(), problem, outer, task, state) == later
    three = {"inner_grad": 12, "inner_grad_x": 6, "outer_grads": 6}
    assert counts_of(MEHA(3), problem, outer, task, state) == three


def test_takes_a_prox():
    assert MEHA.takes_prox and MEHA.trains == "context"
