"""BOME: golden values, the toys of its paper, degenerate cases."""

from typing import Any

import pytest
import torch

from metadist.algorithms.bome import BOME
from metadist.tasks.synthetic.toys import Coreset, Degenerate, Minimax, Toy
from metadist.trees import add
from tests.algorithms.toys import alignment, estimate, point, steep_quadratic, toy_task
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    randn,
    run_single,
    smooth_task,
    true_hypergradient,
)


@pytest.mark.parametrize(
    ("phi", "lam", "direction_y", "direction_x"),
    [
        ("gradient", 0.576923, (-2.153846, 1.307692), (0.430769, -0.861538)),
        ("value", 0.140385, (-1.280769, -0.438462), (0.256154, -0.512308)),
    ],
)
def test_golden_values(phi, lam, direction_y, direction_x):
    problem, outer, task = golden_quadratic()
    algorithm = BOME(inner_steps=1, inner_lr=0.2, y_lr=0.1, phi=phi, epsilon=1e-12)
    result = estimate(algorithm, problem, outer, task)
    assert float(result.metrics["lam"]) == pytest.approx(lam, abs=1e-6)
    assert_close(result.hypergradient, {"x": point(*direction_x)}, 1e-6)
    assert_close(result.state.inner, {"y": -0.1 * point(*direction_y)}, 1e-6)
    assert result.start_gradient is None


@pytest.mark.parametrize("task_of", [quadratic_task, steep_quadratic])
@pytest.mark.parametrize("phi", ["gradient", "value"])
def test_closed_form_on_random_quadratics(task_of, phi):
    for index in range(3):
        task = task_of(index, num_outer=3, num_inner=5)
        problem = Quadratic(3, 5, rho=0.3)
        problem.start = y = randn(index, 5)
        outer = problem.init_outer(generator(index))
        (a, b, c, t), x = quadratic_terms(task), outer["x"]
        linear, identity = b @ x + c, torch.eye(5, dtype=x.dtype)
        power = torch.linalg.matrix_power(identity - 0.2 * a, 4)
        y_t = power @ y + (identity - power) @ torch.linalg.solve(a, linear)
        q_x, q_y, f_x, f_y = -b.T @ (y - y_t), a @ y - linear, 0.3 * x, y - t
        square = q_x @ q_x + q_y @ q_y
        gap = 0.5 * y @ a @ y - y @ linear - (0.5 * y_t @ a @ y_t - y_t @ linear)
        wanted = 0.7 * (square if phi == "gradient" else gap)
        lam = ((wanted - f_x @ q_x - f_y @ q_y) / (square + 1e-8)).clamp(min=0)
        algorithm = BOME(4, 0.2, y_lr=0.05, eta=0.7, phi=phi)
        result = estimate(algorithm, problem, outer, task)
        assert_close(result.hypergradient, {"x": f_x + lam * q_x})
        assert_close(result.state.inner, {"y": y - 0.05 * (f_y + lam * q_y)})


def test_rounds_are_moves_of_y_at_one_x():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    once = BOME(3, 0.1)
    state: Any = None
    for _ in range(4):
        expected = estimate(once, problem, outer, task, state)
        state = expected.state
    result = estimate(BOME(3, 0.1, rounds=4), problem, outer, task)
    assert_close(result.hypergradient, expected.hypergradient, 1e-13)
    assert_close(result.state.inner, state.inner, 1e-13)


def test_on_a_new_task_rounds_give_a_useful_hypergradient():
    assert alignment(BOME(inner_lr=0.3, rounds=30), 3) > 0.9
    assert alignment(BOME(inner_lr=0.3, rounds=30, phi="value"), 3) > 0.85


def test_coreset():
    algorithm = BOME(10, 0.05, y_lr=0.05, epsilon=1e-4)
    problem = Coreset()
    run = run_single(algorithm, problem, toy_task(), {"x": point(0, 0, 0, 0)}, 400, 0.05)
    assert float(problem.upper(run.outer["x"], run.state.inner["y"])) < 1.0
    assert float(run.outer["x"].softmax(0)[[0, 2]].sum()) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("start", [(0, 3), (-3, 1), (3.5, -1)])
def test_coreset_ends_where_the_reference_does(start):
    problem = Coreset()
    run = run_single(
        BOME(10, 0.05, y_lr=0.05, epsilon=1e-4),
        problem,
        toy_task(),
        {"x": point(0, 0, 0, 0)},
        5000,
        0.05,
        start={"y": point(*start)},
    )
    x, y = run.outer["x"], run.state.inner["y"]
    assert_close({"y": y}, {"y": point(1.817, 0.385)}, 2e-3)
    assert_close({"weights": x.softmax(0)}, {"weights": point(0.002, 0.799, 0.002, 0.197)}, 2e-3)
    assert float(problem.upper(x, y)) == pytest.approx(0.709, abs=2e-3)
    assert float(problem.lower(x, y)) == pytest.approx(1.1e-3, rel=0.1)


def test_minimax_converges_and_stays_in_the_box():
    algorithm = BOME(10, 0.05, y_lr=0.05, epsilon=1e-12)
    problem = Minimax()
    state: Any = None
    outer, largest = problem.init_outer(generator(0)), 0.0
    for step in range(500):
        result = estimate(algorithm, problem, outer, toy_task(), state, step=step, eager=True)
        state = result.state
        outer = problem.project_outer(add(outer, result.hypergradient, -0.05))
        largest = max(largest, float(state.inner["y"].abs().max()))
    assert float(outer["x"].abs()) < 1.1e-4
    assert largest < 10  # the box of the paper is never met


@pytest.mark.parametrize("inner_steps", [1, 10])
def test_degenerate_lower_level_reaches_the_optimistic_solution(inner_steps):
    algorithm = BOME(inner_steps, 0.5, y_lr=0.5, epsilon=1e-30)
    run = run_single(algorithm, Degenerate(), toy_task(), {"x": point(0)}, 300, 0.5)
    assert_close(run.outer, {"x": point(1)}, 1e-9)
    assert_close(run.state.inner, {"y": point(1, 1)}, 1e-9)


def test_smaller_steps_leave_a_smaller_gap_and_epsilon_bounds_what_can_be_reached():
    problem, outer, task = golden_quadratic()
    gaps = []
    for lr, num_steps in ((0.1, 150), (0.02, 400)):
        run = run_single(BOME(5, 0.2, y_lr=lr), problem, task, outer, num_steps, lr)
        gaps.append(float(run.estimate.metrics["inner_gradient_norm"]))
        assert float(true_hypergradient(problem, run.outer, task).norm()) < 0.3
    assert gaps[1] < gaps[0]
    ends = []
    for epsilon in (1e-8, 1e-16):
        algorithm = BOME(1, 0.5, y_lr=0.5, epsilon=epsilon)
        run = run_single(algorithm, Degenerate(), toy_task(), {"x": point(0)}, 200, 0.5)
        ends.append(float((run.outer["x"] - 1).abs()))
    assert ends[1] < ends[0] / 100


class Flat(Toy):
    """g does not depend on y."""

    def lower(self, x, y):
        return x.square().sum() + 0 * y.sum()

    upper = lower

    def error(self, x, y):
        return x


class FlatAtTheStart(Flat):
    """The gradient of g is 0 where adaptation starts, not elsewhere."""

    def lower(self, x, y):
        return y.square().sum()


def test_refuses_an_inner_loss_that_does_not_depend_on_y():
    outer = {"x": point(1)}
    message = "algorithm BOME needs an inner loss that depends on the inner variable, but"
    with pytest.raises(ValueError, match=message):
        BOME().check(Flat(), outer, toy_task())
    for problem in (FlatAtTheStart(), Degenerate()):
        BOME().check(problem, outer, toy_task())
    golden, golden_outer, task = golden_quadratic()
    BOME().check(golden, golden_outer, task)
