"""Nystrom: the golden table, full rank, the columns that are drawn."""

import pytest
import torch

from metadist.algorithms.nystrom import Nystrom, choose
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
)


def estimate(algorithm, problem, outer, task, seed=0):
    return run_single(algorithm, problem, task, outer, 1, 0.0, seed=seed).estimate


def columns_of(seed, count, size):
    problem, _, task = golden_quadratic()
    return choose(AutogradOracle(problem, task, seed=seed), count, size)


@pytest.mark.parametrize(
    ("rank", "table"),
    [(2, {(0.909091, -0.487805)}), (1, {(10.0, -0.487805), (0.909091, -20.0)})],
)
def test_the_golden_table(rank, table):
    problem, outer, task = golden_quadratic()
    problem.start = point(2, -1)
    found = set()
    for seed in range(20):  # which of two columns is drawn
        result = estimate(Nystrom(1, 0.2, rank=rank), problem, outer, task, seed)
        v = result.hypergradient["x"] - 0.1 * outer["x"]
        found.add(tuple(round(number, 6) for number in v.tolist()))
    assert found == table
    assert result.start_gradient is None


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("rank", [5, 50])
def test_full_rank_is_the_damped_solution(index, rank):
    problem, task = Quadratic(3, 5, rho=0.2), quadratic_task(index, 3, 5)
    problem.start = randn(index, 5)
    outer = problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    y = problem.start - 0.1 * (a @ problem.start - b @ outer["x"] - c)
    v = torch.linalg.solve(a + 0.3 * torch.eye(5, dtype=DOUBLE), y - t)
    result = estimate(Nystrom(1, 0.1, rank=rank, damping=0.3), problem, outer, task)
    assert_close(result.hypergradient, {"x": 0.2 * outer["x"] + b.T @ v}, 1e-10)
    assert result.metrics["adjoint_residual"] < 1e-10


def test_a_lower_problem_of_low_rank_needs_no_more_columns():
    problem, outer = Quadratic(2, 8, rho=0.2), {"x": point(1, -1)}
    basis, b, c, t = randn(1, 8, 3), randn(2, 8, 2), randn(3, 8), randn(4, 8)
    a = basis @ basis.T
    task = Task(Batch.of(a[None], b[None], c[None]), Batch.of(t[None]), 0)
    y = 0.01 * (b @ outer["x"] + c)
    exact = torch.linalg.solve(a + 0.1 * torch.eye(8, dtype=DOUBLE), y - t)
    result = estimate(Nystrom(1, 0.01, rank=3), problem, outer, task)
    assert_close(result.hypergradient, {"x": 0.2 * outer["x"] + b.T @ exact}, 1e-7)
    assert result.metrics["negative_curvature"] == 0


def test_an_indefinite_lower_problem_is_reported_and_bounded():
    problem, outer, task = golden_quadratic()
    a, b, c = task.support.tensors
    bent = Task(Batch.of(a * point(1, -0.025), b, c), task.query, 0)  # eigenvalues 1 and -.1
    problem.start = point(2, -1)
    result = estimate(Nystrom(1, 1e-9, rank=2), problem, outer, bent)
    assert result.metrics["negative_curvature"] == 1
    v = result.hypergradient["x"] - 0.1 * outer["x"]
    assert_close({"v": v}, {"v": point(1 / 1.1, -2 / 0.1)}, 1e-6)


@pytest.mark.parametrize(("count", "size"), [(3, 7), (1, 5), (5, 5), (9, 4)])
def test_columns_are_drawn_uniformly_without_replacement(count, size):
    hits = torch.zeros(size)
    num_runs = 400
    for seed in range(num_runs):
        columns = columns_of(seed, count, size)
        assert len(columns) == len(set(columns)) == min(count, size)
        hits[columns] += 1
    share = min(count / size, 1.0)
    error = (share * (1 - share) / num_runs) ** 0.5
    assert ((hits / num_runs - share).abs() <= 4 * error).all()


def test_columns_are_those_of_the_step_and_of_no_task():
    problem, _, task = golden_quadratic()
    other = Task(task.support, task.query, 5)
    cases = ((task, 0), (other, 0), (task, 1))
    oracles = [AutogradOracle(problem, of, seed=1, step=step) for of, step in cases]
    one, two, three = (choose(oracle, 10, 1000) for oracle in oracles)
    assert one == two != three
