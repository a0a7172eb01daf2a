"""AID: the golden table, closed forms, the exact hypergradient, singular H, draws."""

from typing import Any

import pytest
import torch

from metadist.algorithms.aid import AID
from metadist.algorithms.parts.implicit import AdjointState
from metadist.autograd import AutogradOracle
from metadist.problem import Problem
from metadist.step_rules import SGD, Adam
from metadist.task import Batch, Task
from metadist.trees import flatten, unflatten
from tests.algorithms.toys import estimate, point
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    central_difference,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    randn,
    run_single,
    smooth_task,
    true_hypergradient,
)


@pytest.mark.parametrize(
    ("options", "v", "hypergradient"),
    [
        ({"adjoint_steps": 1}, (0.294118, -0.588235), (0.494118, -0.988235)),
        ({"adjoint_steps": 2}, (1, -0.5), (1.2, -0.9)),
        ({"adjoint_steps": 9}, (1, -0.5), (1.2, -0.9)),
        ({"solver": "neumann", "adjoint_steps": 2}, (0.488, -0.496), (0.688, -0.896)),
        ({"solver": "fixed_point", "adjoint_steps": 3}, (0.488, -0.496), (0.688, -0.896)),
        ({"solver": "fixed_point", "adjoint_steps": 200}, (1, -0.5), (1.2, -0.9)),
    ],
    ids=str,
)
def test_the_golden_table(options, v, hypergradient):
    problem, outer, task = golden_quadratic()
    result = estimate(AID(200, 0.2, **options), problem, outer, task)
    assert_close(result.state.inner, {"y": point(2, -1)}, 1e-12)
    # B = I, so that v = h - rho x.
    assert_close({"v": result.hypergradient["x"] - 0.1 * outer["x"]}, {"v": point(*v)}, 1e-6)
    assert_close(result.hypergradient, {"x": point(*hypergradient)}, 1e-6)
    assert result.start_gradient is None


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_closed_forms_on_random_quadratics(index, damping):
    problem, eta, num_inner = Quadratic(3, 5, rho=0.3), 0.2, 5
    task, outer = quadratic_task(index, 3, num_inner), problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    eye = torch.eye(num_inner, dtype=DOUBLE)
    solution = torch.linalg.solve(a, b @ outer["x"] + c)
    y = solution - torch.linalg.matrix_power(eye - 0.15 * a, 4) @ solution
    damped = torch.linalg.inv(a + damping * eye)
    power = torch.linalg.matrix_power(eye - eta * (a + damping * eye), 4)
    inexact = damped @ (eye - power) @ (y - t)
    cases: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({"adjoint_steps": num_inner}, damped @ (y - t)),
        ({"solver": "neumann", "adjoint_steps": 3, "adjoint_lr": eta}, inexact),
        ({"solver": "fixed_point", "adjoint_steps": 4, "adjoint_lr": eta}, inexact),
    ]
    for options, v in cases:
        result = estimate(AID(4, 0.15, damping=damping, **options), problem, outer, task)
        assert_close(result.state.inner, {"y": y}, 1e-12)
        assert_close(result.hypergradient, {"x": 0.3 * outer["x"] + b.T @ v}, 1e-10)
        residual = (a @ v + damping * v - (y - t)).norm() / (y - t).norm()
        assert float(result.metrics["adjoint_residual"]) == pytest.approx(float(residual), abs=1e-9)


def test_an_ill_conditioned_quadratic():
    problem, outer = Quadratic(2, 6), {"x": point(1, -2)}
    terms = quadratic_terms(quadratic_task(0, 2, 6))
    a = torch.diag(torch.logspace(0, -3, 6, dtype=DOUBLE))
    task = Task(
        Batch.of(a[None], terms[1][None], terms[2][None] * 1e-2), Batch.of(terms[3][None]), 0
    )
    problem.start = torch.linalg.solve(a, terms[1] @ outer["x"] + terms[2] * 1e-2)
    result = estimate(AID(1, 0.5, adjoint_steps=12), problem, outer, task)
    exact = true_hypergradient(problem, outer, task)
    assert_close({"x": result.hypergradient["x"] / exact.norm()}, {"x": exact / exact.norm()}, 1e-8)
    slow = AID(1, 0.5, solver="fixed_point", adjoint_steps=12, adjoint_lr=1.0)
    assert estimate(slow, problem, outer, task).metrics["adjoint_residual"] > 0.1


@pytest.mark.parametrize("optimizer", [SGD(1e-9), Adam(1e-9)], ids=["SGD", "Adam"])
def test_it_is_exact_at_the_lower_solution_of_a_problem_that_is_no_quadratic(optimizer):
    problem, task = Smooth(), smooth_task(3)
    outer = problem.init_outer(generator(3))
    oracle, context, start = oracle_of(problem, outer, task)

    def solve(context, y, num_steps=3):  # Newton's method, from near by
        for _ in range(num_steps):
            flat = flatten(y)
            of_flat = lambda z: problem.inner_loss(context, unflatten(z, start), task.support)  # noqa: E731
            slope, curvature = torch.func.grad(of_flat)(flat), torch.func.hessian(of_flat)(flat)
            y = unflatten(flat - torch.linalg.solve(curvature, slope), start)
        return y

    near = AID(100, 0.2).adapt(oracle, context, start)
    solution = solve(context, near, 8)
    algorithm = AID(2, inner_optimizer=optimizer, adjoint_steps=8)
    result = algorithm.estimate(oracle, context, algorithm.init(oracle, context, solution))
    expected = central_difference(
        lambda x: problem.outer_loss(x, solve(x, solution), task.query), context
    )
    assert_close(result.hypergradient, expected, 1e-8)
    assert result.metrics["adjoint_residual"] < 1e-9
    assert result.metrics["negative_curvature"] == 0


class Degenerate(Problem):
    """g = y_1^2/2 - x y_1, f = (x - y_2)^2/2 + (y_1 - 1)^2/2: y_2 is free, H = diag(1, 0)."""

    def init_outer(self, generator):
        return {"x": point(0.3)}

    def init_inner(self, outer, task):
        return {"y": point(0, 0)}

    def inner_loss(self, context, inner, batch):
        y = inner["y"][0]
        return 0.5 * y * y - context["x"][0] * y

    def outer_loss(self, context, inner, batch):
        y = inner["y"]
        return 0.5 * (context["x"][0] - y[1]).square() + 0.5 * (y[0] - 1).square()


@pytest.mark.parametrize("solver", ["cg", "fixed_point", "neumann"])
def test_a_singular_lower_problem_is_reported_or_damped(solver):
    problem, task = Degenerate(), Task(Batch.of(torch.zeros(1)), Batch.of(torch.zeros(1)), 0)
    outer = problem.init_outer(None)
    options = {"solver": solver, "adjoint_steps": 30, "tolerance": 0.0}
    algorithm = AID(200, 0.3, **options)
    result = estimate(algorithm, problem, outer, task)
    assert result.hypergradient["x"].isfinite().all()
    # b = (y_1 - 1, y_2 - x) = (-.7, -.3): the second part is out of reach.
    assert result.metrics["adjoint_residual"] >= 0.3 / (0.7**2 + 0.3**2) ** 0.5 - 1e-9
    if solver == "cg":
        assert result.metrics["negative_curvature"] == 1
    damped = AID(200, 0.3, damping=0.1, **{**options, "adjoint_steps": 400})
    result = estimate(damped, problem, outer, task)
    assert result.metrics["adjoint_residual"] < 1e-4
    # grad_x f + v_1 with (1 + .1) v_1 = -.7
    assert_close(result.hypergradient, {"x": point(0.3 - 0.7 / 1.1)}, 1e-6)


def test_a_head_with_more_numbers_than_examples_needs_damping():
    """g = |F y - x|^2 / 2 on 5 examples for 20 numbers: H = F'F has rank 5, b has more."""
    features, b = randn(1, 5, 20), randn(2, 20)
    problem, outer = Quadratic(5, 20), {"x": randn(3, 5)}
    a, cross = features.T @ features, features.T
    support = Batch.of(a[None], cross[None], torch.zeros(1, 20, dtype=DOUBLE))
    task = Task(support, Batch.of(-b[None]), 0)
    best = problem.rho * outer["x"] + cross.T @ torch.linalg.pinv(a, rtol=1e-9) @ b
    result = estimate(AID(1, 1e-12), problem, outer, task)
    assert result.metrics["adjoint_residual"] > 10
    assert result.hypergradient["x"].norm() > 100 * best.norm()
    damped = estimate(AID(1, 1e-12, damping=1e-2), problem, outer, task)
    assert damped.metrics["adjoint_residual"] < 1e-6
    assert_close(damped.hypergradient, {"x": best}, 1e-2)


def test_it_finds_the_golden_solution():
    problem, outer, task = golden_quadratic()
    for algorithm in (
        AID(6, 0.4, adjoint_steps=2),
        AID(6, 0.4, solver="fixed_point", adjoint_steps=6, warm_start=True),
    ):
        run = run_single(algorithm, problem, task, outer, 60, 1.5)
        assert true_hypergradient(problem, run.outer, task).norm() < 1e-6


def test_indefinite_lower_problems_are_reported():
    problem, outer, task = golden_quadratic()
    a, b, c = task.support.tensors
    bent = Task(Batch.of(a * point(1, -0.25), b, c), task.query, 0)
    for solver in ("cg", "fixed_point"):
        algorithm = AID(3, 0.1, solver=solver, adjoint_steps=20)
        result = estimate(algorithm, problem, outer, bent)
        assert result.hypergradient["x"].isfinite().all()
        assert result.metrics["adjoint_residual"] > 0.3
        if solver == "cg":
            assert result.metrics["negative_curvature"] == 1


def test_a_warm_start_goes_on_from_the_last_v():
    problem, outer, task = golden_quadratic()
    problem.start = point(2, -1)
    for solver in ("cg", "fixed_point"):
        algorithm = AID(1, 0.2, solver=solver, adjoint_steps=1, warm_start=True)
        run = run_single(algorithm, problem, task, outer, 200, 0.0)
        assert isinstance(run.state, AdjointState)
        assert_close(run.state.adjoint, {"y": point(1, -0.5)}, 1e-9)
        cold = AID(1, 0.2, solver=solver, adjoint_steps=1)
        run = run_single(cold, problem, task, outer, 200, 0.0)
        assert run.estimate.metrics["adjoint_residual"] > 0.1


def test_one_solve_is_on_one_mini_batch_and_j_on_another():
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=7)
    outer = problem.init_outer(generator(0))
    used = []

    class Recording(AutogradOracle):
        def hvp(self, x, y, v, draw):
            used.append(draw)
            return super().hvp(x, y, v, draw)

        def second_order(self, x, y, v, draw):
            used.append(draw)
            return super().second_order(x, y, v, draw)

    oracle = Recording(problem, task, batch_size=3)
    algorithm = AID(inner_steps=2, adjoint_steps=3)
    algorithm.estimate(
        oracle, outer, algorithm.init(oracle, outer, problem.init_inner(outer, task))
    )
    assert len(set(used[:-1])) == 1 and len(used) == 4
    assert used[-1] != used[0]
