"""SOBA: golden steps, one point for all directions, convergence."""

import pytest
import torch

from metadist.algorithms.soba import SOBA
from metadist.step_rules import SGD
from metadist.trees import add
from tests.algorithms.toys import estimate, point
from tests.problems import (
    Quadratic,
    assert_close,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    randn,
    run_single,
    true_hypergradient,
)


def test_the_golden_steps():
    problem, outer, task = golden_quadratic()
    algorithm, state = SOBA(inner_lr=0.2, adjoint_lr=0.2), None
    for step, (y, v, x) in enumerate(
        [
            ((0.4, -0.8), (-0.2, -0.2), (1.98, -3.96)),
            ((0.716, -0.952), (-0.28, -0.4), (1.9802, -3.9004)),
        ]
    ):
        found = estimate(algorithm, problem, outer, task, state, step=step)
        state, outer = found.state, add(outer, found.hypergradient, -0.1)
        assert_close(state.inner, {"y": point(*y)}, 1e-12)
        assert_close(state.adjoint, {"y": point(*v)}, 1e-12)
        assert_close(outer, {"x": point(*x)}, 1e-12)


def test_all_directions_are_at_the_old_point():
    problem, task = Quadratic(3, 4), quadratic_task(2, num_outer=3)
    x, y, v = randn(1, 3), randn(2, 4), randn(3, 4)
    a, b, c, t = quadratic_terms(task)
    algorithm = SOBA(
        inner_optimizer=SGD(0.2, schedule="power", exponent=0.5), adjoint_lr=0.3, adjoint_decay=1.0
    )
    state = estimate(algorithm, problem, {"x": x}, task).state
    state = state._replace(inner={"y": y}, adjoint={"y": v})
    found = estimate(algorithm, problem, {"x": x}, task, state, step=3)
    assert_close(found.hypergradient, {"x": 0.1 * x + b.T @ v}, 1e-12)
    assert_close(found.state.inner, {"y": y - 0.1 * (a @ y - b @ x - c)}, 1e-12)
    assert_close(found.state.adjoint, {"y": v - 0.075 * (a @ v - (y - t))}, 1e-12)
    residual = (a @ v - (y - t)).norm() / (y - t).norm()
    assert float(found.metrics["adjoint_residual"]) == pytest.approx(float(residual))


@pytest.mark.parametrize(("share", "converges"), [(0.5, True), (2.0, False)])
def test_x_must_be_slower_than_y_and_v(share, converges):
    """They spiral away beyond outer_lr = 2 inner_lr mu^3 / |J|^2, here with mu = |J| = 1."""
    problem, outer, task = golden_quadratic()
    rate = 2 * 0.2 * share
    run = run_single(SOBA(inner_lr=0.2, adjoint_lr=0.2), problem, task, outer, 300, rate)
    end = float(true_hypergradient(problem, run.outer, task).norm())
    assert end < 1e-2 if converges else end > 1e2


def test_state_of_a_new_task_has_no_adjoint():
    _, outer, _ = golden_quadratic()
    state = SOBA().init(None, outer, {"y": torch.ones(2)})  # type: ignore[arg-type]
    assert not state.adjoint["y"].any()
