"""SubBiO: the golden table, the best of the subspace, degenerate subspaces."""

import pytest
import torch

from metadist.algorithms.parts.implicit import AdjointState
from metadist.algorithms.subbio import SubBiO
from metadist.autograd import AutogradOracle
from metadist.task import Batch, Task
from tests.algorithms.toys import point
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
    true_hypergradient,
)


def step(algorithm, problem, outer, task, y, v):
    oracle = AutogradOracle(problem, task)
    return algorithm.estimate(oracle, outer, AdjointState({"y": y}, {"y": v}))


def test_the_golden_table():
    problem, outer, task = golden_quadratic()
    result = step(SubBiO(1, 0.2), problem, outer, task, point(2, -1), point(1, 0))
    assert_close(result.state.adjoint, {"y": point(1, -0.5)}, 1e-12)
    assert_close(result.hypergradient, {"x": point(1.2, -0.9)}, 1e-12)
    # From v = 0 the space is that of b: the first step of conjugate gradients.
    result = step(SubBiO(1, 0.2), problem, outer, task, point(2, -1), point(0, 0))
    assert_close(result.state.adjoint, {"y": point(0.294118, -0.588235)}, 1e-6)
    assert result.metrics["negative_curvature"] == 0


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_v_is_the_best_of_the_subspace(index, spread):
    problem, outer = Quadratic(3, 5, rho=0.2), {"x": randn(index, 3)}
    terms = quadratic_terms(quadratic_task(index, 3, 5))
    spectrum = torch.linspace(1, spread**0.5, 5, dtype=DOUBLE).square() / spread
    a, b = terms[0] @ torch.diag(spectrum) @ terms[0], terms[1]
    task = Task(Batch.of(a[None], b[None], terms[2][None]), Batch.of(terms[3][None]), 0)
    y, v, eta = randn(index + 1, 5), randn(index + 2, 5), 0.02
    result = step(SubBiO(1, 1e-12, adjoint_lr=eta), problem, outer, task, y, v)
    rhs = y - terms[3]
    w = torch.stack([rhs, v - eta * a @ v], dim=1)
    expected = w @ torch.linalg.solve(w.T @ a @ w, w.T @ rhs)
    assert_close(result.state.adjoint, {"y": expected}, 1e-8)
    h = 0.2 * outer["x"] + b.T @ expected
    assert_close(result.hypergradient, {"x": h}, 1e-8)
    # No worse in the norm of A than the step of fixed point, or than the last v.
    exact = torch.linalg.solve(a, rhs)

    def distance(v):
        return float((v - exact) @ a @ (v - exact))

    assert distance(expected) <= distance(v - eta * (a @ v - rhs)) + 1e-12


def test_subspaces_of_less_than_two_dimensions():
    problem, outer, task = golden_quadratic()
    algorithm = SubBiO(1, 1e-12, adjoint_lr=0.2)
    a, b = torch.diag(point(1, 4)), point(1, -2)
    best = b * (b @ b) / (b @ a @ b)
    for v in (
        point(0, 0),
        torch.linalg.solve(torch.eye(2, dtype=DOUBLE) - 0.2 * a, 3 * b),  # (I - eta A) v = 3 b
    ):
        result = step(algorithm, problem, outer, task, point(2, -1), v)
        assert_close(result.state.adjoint, {"y": best}, 1e-9)
    # b = 0 has the solution 0, whatever v was.
    for v in (point(0, 0), point(1, 2)):
        result = step(algorithm, problem, {"x": point(1, 4)}, task, point(1, 1), v)
        assert_close(result.state.adjoint, {"y": point(0, 0)}, 1e-12)
        assert result.metrics["adjoint_residual"] == 0


def test_singular_and_indefinite_lower_problems_give_finite_numbers():
    problem, outer, task = golden_quadratic()
    a, b, c = task.support.tensors
    for last, report in ((0.0, 0), (-0.1, 1)):
        flat = Task(Batch.of(a * point(1, last), b, c), task.query, 0)
        result = run_single(SubBiO(2, 0.2), problem, flat, outer, 5, 0.0).estimate
        assert result.hypergradient["x"].isfinite().all()
        assert result.metrics["negative_curvature"] == report
    assert result.metrics["adjoint_residual"] < 1e-9  # an indefinite plane is solved in the plane
    flat = Task(Batch.of(0.0 * a, b, c), task.query, 0)
    result = run_single(SubBiO(2, 0.2), problem, flat, outer, 5, 0.0).estimate
    assert result.hypergradient["x"].isfinite().all()
    assert result.metrics["adjoint_residual"] == 1


@pytest.mark.parametrize("index", range(3))
def test_repeated_estimates_and_repeated_steps_find_the_hypergradient(index):
    problem, task = Quadratic(2, 4), quadratic_task(index)
    outer = problem.init_outer(generator(index))
    expected = {"x": true_hypergradient(problem, outer, task)}
    run = run_single(SubBiO(10, 0.3), problem, task, outer, 60, 0.0)
    assert_close(run.estimate.hypergradient, expected, 1e-9)
    once = run_single(SubBiO(600, 0.3, adjoint_steps=60), problem, task, outer, 1, 0.0)
    assert_close(once.estimate.hypergradient, expected, 1e-9)
