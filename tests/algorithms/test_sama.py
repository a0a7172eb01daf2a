"""SAMA: golden values, the derivative of Adam's update, costs, degenerate cases."""

import pytest
import torch

from metadist import Trainer, check_hypergradient
from metadist.algorithms.darts import DARTS
from metadist.algorithms.sama import SAMA
from metadist.step_rules import SGD, Adam, Memory
from metadist.trees import add, multiply, norm, scale, sub
from tests.algorithms.toys import estimate, point
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    randn,
    smooth_task,
)


def test_golden_value_with_sgd():
    problem, outer, task = golden_quadratic()
    result = estimate(SAMA(200, 0.2), problem, outer, task)
    assert_close(result.hypergradient, {"x": point(1.2, -2.4)}, 1e-10)


def test_with_sgd_it_is_darts_without_the_rate():
    problem, task = Quadratic(2, 4), quadratic_task(0)  # J is the same everywhere
    outer = problem.init_outer(generator(0))
    expected = estimate(
        DARTS(4, inner_optimizer=SGD(0.1, momentum=0.5), adjoint_lr=1.0), problem, outer, task
    )
    result = estimate(SAMA(4, inner_optimizer=SGD(0.1, momentum=0.5)), problem, outer, task)
    assert_close(result.hypergradient, expected.hypergradient, 1e-11)


def test_golden_slope_of_adam():
    one = {"y": point(1)}
    moments = Memory((scale(one, 0.3), scale(one, 0.2)), 10**6)  # no bias left to correct
    assert_close(Adam(1.0).slope(moments, scale(one, 0.7), 1.0), {"y": point(0.220790)}, 1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 100])
def test_the_slope_is_the_derivative_of_the_step_of_adam(num_steps):
    inner, lr = {"y": randn(0, 6)}, 0.3
    moments = Memory(({"y": randn(1, 6)}, {"y": randn(2, 6).square()}), num_steps)
    gradient, eps = {"y": randn(3, 6)}, {"y": torch.full((6,), 1e-6, dtype=torch.float64)}
    above, below = (
        Adam(lr).step(inner, moments, add(gradient, eps, sign), lr)[0]["y"] for sign in (1, -1)
    )
    # The step is y - u(gradient).
    expected = {"y": -(above - below) / 2e-6}
    assert_close(Adam(lr).slope(moments, gradient, lr), expected, 1e-6)


def test_the_slope_is_zero_at_the_first_step_and_where_no_gradient_ever_was():
    zero = {"y": point(0, 0)}
    slope = Adam(0.1).slope(Memory((zero, zero), 0), {"y": point(2.0, 0.0)}, 0.1)
    assert_close(slope, zero, 0.0)
    assert_close(Adam(0.1).slope(Memory((zero, zero), 50), zero, 0.1), zero, 0.0)


def test_with_adam_v_is_the_slope_times_the_query_gradient():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    _, b, _, t = quadratic_terms(task)
    oracle, context, y = oracle_of(problem, outer, task)
    steps = Adam(0.05)
    moments = steps.start(y)
    for _ in range(6):
        gradient, before = oracle.inner_grad(context, y, oracle.draw_inner()), moments
        y, moments = steps.step(y, moments, gradient, 0.05)
    v = multiply(steps.slope(before, gradient, 0.05), {"y": y["y"] - t})["y"]
    result = estimate(SAMA(6, inner_optimizer=Adam(0.05)), problem, outer, task)
    assert_close(result.hypergradient, {"x": problem.rho * outer["x"] + b.T @ v})
    assert_close(result.state.inner, y, 1e-13)


def test_adam_goes_on_from_one_estimate_to_the_next():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    algorithm = SAMA(2, inner_optimizer=Adam(0.05, carry=True))
    state = estimate(algorithm, problem, outer, task).state
    twice = estimate(algorithm, problem, outer, task, state)
    once = estimate(SAMA(4, inner_optimizer=Adam(0.05)), problem, outer, task)
    assert twice.state.memory.num_steps == 4
    assert_close(twice.state.inner, once.state.inner, 1e-13)
    assert_close(twice.hypergradient, once.hypergradient, 1e-12)
    # Adaptation alone is the plain loop of Adam.
    oracle, context, start = oracle_of(problem, outer, task)
    expected = SAMA(4, inner_optimizer=Adam(0.05)).adapt(oracle, context, start)
    assert_close(once.state.inner, expected, 1e-13)


def test_one_step_of_adam_needs_a_kept_state():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    one_step = SAMA(1, inner_optimizer=Adam(0.05, carry=True))
    first = estimate(one_step, problem, outer, task)
    second = estimate(one_step, problem, outer, task, first.state)
    assert first.state.memory.num_steps == 1
    assert norm(sub(second.hypergradient, first.hypergradient)) > 0
    with pytest.raises(
        ValueError, match=r"keep_state must be True with SAMA\(.* first step of Adam"
    ):
        Trainer(problem, FewTasks(), one_step, quiet=True)
    check_hypergradient(problem, task, one_step)
    for accepted in (one_step, SAMA(2, inner_optimizer=Adam(0.05))):
        assert bool(accepted.needs_kept_state) == (accepted is one_step)


class FewTasks:
    def sample(self, index):
        return smooth_task(index)
