"""NoLoopAID: one step by hand, the limit, schedules."""

import pytest
import torch

from metadist.algorithms.noloop_aid import NoLoopAID
from metadist.autograd import AutogradOracle
from metadist.step_rules import SGD
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    randn,
    run_single,
)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("step", [0, 3])
def test_two_steps_are_the_formula(index, step):
    problem, task = Quadratic(3, 5, rho=0.2), quadratic_task(index, 3, 5)
    problem.start = randn(index, 5)
    outer = problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    algorithm = NoLoopAID(inner_optimizer=SGD(0.2, schedule="power"), adjoint_lr=0.1, inner_steps=2)
    oracle = AutogradOracle(problem, task, step=step)
    state = algorithm.init(oracle, outer, problem.init_inner(outer, task))
    result = algorithm.estimate(oracle, outer, state)
    alpha, eta = 0.2 * (step + 1) ** -0.5, 0.1 * (step + 1) ** -0.5
    y, v = problem.start, torch.zeros(5, dtype=DOUBLE)
    for _ in range(2):
        y = y - alpha * (a @ y - b @ outer["x"] - c)
        v = v - eta * (a @ v - (y - t))
    assert_close(result.state.inner, {"y": y}, 1e-12)
    assert_close(result.state.adjoint, {"y": v}, 1e-12)
    assert_close(result.hypergradient, {"x": 0.2 * outer["x"] + b.T @ v}, 1e-12)
    residual = (a @ v - (y - t)).norm() / (y - t).norm()
    assert float(result.metrics["adjoint_residual"]) == pytest.approx(float(residual))


def test_at_rest_it_reaches_the_golden_hypergradient():
    problem, outer, task = golden_quadratic()
    run = run_single(NoLoopAID(inner_lr=0.2), problem, task, outer, 250, 0.0)
    assert_close(run.state.inner, {"y": torch.tensor([2.0, -1.0], dtype=DOUBLE)}, 1e-12)
    assert_close(run.state.adjoint, {"y": torch.tensor([1.0, -0.5], dtype=DOUBLE)}, 1e-12)
    assert_close(run.estimate.hypergradient, {"x": torch.tensor([1.2, -0.9], dtype=DOUBLE)}, 1e-12)
