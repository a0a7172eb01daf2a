"""IMAML: the closed form, the exact hypergradient by differences, kept states."""

import pytest
import torch

from metadist.algorithms.imaml import IMAML
from metadist.hypergradient import task_hypergradients
from metadist.step_rules import SGD
from metadist.task import Batch, Task
from metadist.trees import flatten, unflatten
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


def start_gradient(result):
    assert result.start_gradient is not None
    return result.start_gradient


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("lam", [0.01, 1.0, 30.0])
def test_the_closed_form_at_the_proximal_solution(index, lam):
    problem, task = Quadratic(3, 5, rho=0.2), quadratic_task(index, 3, 5)
    problem.start = randn(index, 5)
    outer = problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    near = torch.linalg.inv(a + lam * torch.eye(5, dtype=DOUBLE))
    y = near @ (b @ outer["x"] + c + lam * problem.start)
    v = near @ (y - t)
    algorithm = IMAML(150, 1.6 / (3.5 + lam), lam=lam, adjoint_steps=5)
    oracle, context, start = oracle_of(problem, outer, task)
    result = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))
    assert_close(result.state.inner, {"y": y}, 1e-8)
    assert_close(start_gradient(result), {"y": lam * v}, 1e-7)
    assert_close(result.hypergradient, {"x": 0.2 * outer["x"] + b.T @ v}, 1e-7)
    assert_close(algorithm.adapt(oracle, context, start), result.state.inner, 0.0)
    assert result.metrics["adjoint_residual"] < 1e-9


def test_the_gradient_of_the_paper_is_lam_v():
    # (I + H / lam) u = grad_y f.
    problem, outer, task = golden_quadratic()
    oracle, context, start = oracle_of(problem, outer, task)
    algorithm = IMAML(3, 0.1, lam=2.0, damping=0.5)
    result = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))
    b = result.state.inner["y"] - 1
    u = b / torch.tensor([1 + 1.5 / 2, 1 + 4.5 / 2], dtype=DOUBLE)
    assert_close(start_gradient(result), {"y": u}, 1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_inner_steps_are_those_of_the_regularised_loss(momentum):
    problem, task = Smooth(), smooth_task(1)
    outer = problem.init_outer(generator(1))
    oracle, context, start = oracle_of(problem, outer, task)
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in start.items()}
    reference = torch.optim.SGD(leaves.values(), lr=0.1, momentum=momentum)
    for _ in range(4):
        reference.zero_grad()
        near = sum((leaf - start[name]).square().sum() for name, leaf in leaves.items())
        (problem.inner_loss(context, dict(leaves), task.support) + 0.5 * 0.7 * near).backward()
        reference.step()
    end = {name: leaf.detach() for name, leaf in leaves.items()}
    algorithm = IMAML(4, inner_optimizer=SGD(0.1, momentum=momentum), lam=0.7)
    assert_close(algorithm.adapt(oracle, context, start), end, 1e-13)


def test_it_is_exact_at_convergence_in_context_and_start():
    problem, task, lam = Smooth(), smooth_task(2), 2.0
    outer = problem.init_outer(generator(2))
    algorithm = IMAML(300, 0.05, lam=lam, adjoint_steps=6)
    solution = flatten(algorithm.adapt(*oracle_of(problem, outer, task)))

    def objective(outer):
        context, start = problem.encode(outer, task), problem.init_inner(outer, task)
        centre = flatten(start)

        def loss(z):
            near = 0.5 * lam * (z - centre).square().sum()
            return problem.inner_loss(context, unflatten(z, start), task.support) + near

        z = solution
        for _ in range(3):  # Newton's method, from near by
            z = z - torch.linalg.solve(torch.func.hessian(loss)(z), torch.func.grad(loss)(z))
        return problem.outer_loss(context, unflatten(z, start), task.query)

    total = task_hypergradients(problem, algorithm, outer, [task]).total
    assert_close(total, central_difference(objective, outer), 1e-7)


def test_lam_holds_y_at_the_start():
    problem, outer, task = golden_quadratic()
    problem.start = randn(1, 2)
    oracle, context, start = oracle_of(problem, outer, task)
    algorithm = IMAML(5, 1e-6, lam=1e6)
    result = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))
    assert_close(result.state.inner, start, 1e-5)
    assert_close(start_gradient(result), {"y": start["y"] - 1}, 1e-4)


def test_a_kept_state_goes_on_near_its_first_start():
    problem, outer, task = golden_quadratic()
    run = run_single(IMAML(1, 0.2, lam=0.5), problem, task, outer, 100, 0.0)
    solution = outer["x"] / torch.tensor([1.5, 4.5], dtype=DOUBLE)
    assert_close(run.state.inner, {"y": solution}, 1e-9)
    assert_close(run.state.start, {"y": problem.start}, 0.0)
    # With little lam it is the hypergradient of the plain problem.
    run = run_single(IMAML(10, 0.2, lam=1e-8), problem, task, outer, 20, 0.0)
    expected = {"x": true_hypergradient(problem, outer, task)}
    assert_close(run.estimate.hypergradient, expected, 1e-6)


def test_negative_curvature_is_reported_unless_lam_covers_it():
    problem, outer, task = golden_quadratic()
    a, b, c = task.support.tensors
    bent = Task(Batch.of(a * torch.tensor([1.0, -0.25], dtype=DOUBLE), b, c), task.query, 0)
    oracle, context, start = oracle_of(problem, outer, bent)
    for lam, report in ((0.5, 1), (1.5, 0)):
        algorithm = IMAML(5, 0.1, lam=lam)
        result = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))
        assert result.metrics["negative_curvature"] == report
        assert (result.metrics["adjoint_residual"] > 0.1) == (report == 1)
        assert start_gradient(result)["y"].isfinite().all()
