"""LancBiO: conjugate gradients on a frozen system, windows, and its synthetic problem."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from metadist.algorithms.aid import AID
from metadist.algorithms.lancbio import LancBiO
from metadist.algorithms.parts.linear import conjugate_gradient
from metadist.algorithms.subbio import SubBiO
from metadist.autograd import AutogradOracle
from metadist.oracle import CountingOracle
from metadist.task import Batch, Task
from metadist.tasks import LancBiOData, LancBiOSynthetic
from metadist.trees import add
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    randn,
    run_single,
    true_hypergradient,
)


def frozen(index, size=12):
    """A quadratic at its lower solution, where nothing but v moves; (.., product, b)."""
    problem, task = Quadratic(3, size, rho=0.2), quadratic_task(index, 3, size)
    outer = problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    problem.start = torch.linalg.solve(a, b @ outer["x"] + c)
    return problem, outer, task, lambda v: {"y": a @ v["y"]}, {"y": problem.start - t}


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("num_steps", range(1, 9))
def test_it_is_conjugate_gradients_on_a_frozen_system(index, num_steps):
    problem, outer, task, product, b = frozen(index)
    expected = conjugate_gradient(product, b, num_steps).v
    # One vector per estimate, or all in one.
    slow = LancBiO(1, 0.1, adjoint_steps=1, subspace_start=8, subspace_cap=8)
    run = run_single(slow, problem, task, outer, num_steps, 0.0)
    assert_close(run.state.adjoint, expected, 1e-10)
    fast = LancBiO(1, 0.1, adjoint_steps=num_steps)
    assert_close(run_single(fast, problem, task, outer, 1, 0.0).state.adjoint, expected, 1e-10)


@pytest.mark.parametrize("m", [1, 3])
def test_a_new_window_is_conjugate_gradients_from_the_last_v(m):
    problem, outer, task, product, b = frozen(1)
    expected: Any = None
    for _ in range(4):
        expected = conjugate_gradient(product, b, m, expected).v
    algorithm = LancBiO(1, 0.1, adjoint_steps=1, subspace_start=m, subspace_growth=1.0)
    run = run_single(algorithm, problem, task, outer, 4 * m, 0.0)
    assert_close(run.state.adjoint, expected, 1e-10)
    per_window = LancBiO(1, 0.1, adjoint_steps=m, subspace_start=m, subspace_growth=1.0)
    assert_close(
        run_single(per_window, problem, task, outer, 4, 0.0).state.adjoint, expected, 1e-10
    )


def test_the_golden_table():
    problem, outer, task = golden_quadratic()
    problem.start = torch.tensor([2.0, -1.0], dtype=DOUBLE)
    for num_steps, v, h in (
        (1, (0.294118, -0.588235), (0.494118, -0.988235)),
        (2, (1.0, -0.5), (1.2, -0.9)),
    ):
        algorithm = LancBiO(1, 0.2, adjoint_steps=num_steps)
        result = run_single(algorithm, problem, task, outer, 1, 0.0).estimate
        assert_close(result.state.adjoint, {"y": torch.tensor(v, dtype=DOUBLE)}, 1e-6)
        assert_close(result.hypergradient, {"x": torch.tensor(h, dtype=DOUBLE)}, 1e-6)
        assert result.start_gradient is None


@pytest.mark.parametrize("adjoint_steps", [1, 3, 40])
def test_more_room_than_dimensions_and_windows_that_begin_at_the_solution(adjoint_steps):
    problem, outer, task, _, _ = frozen(0, size=4)
    algorithm = LancBiO(1, 0.1, adjoint_steps=adjoint_steps, subspace_start=7, subspace_cap=40)
    run = run_single(algorithm, problem, task, outer, 23, 0.0)
    expected = {"x": true_hypergradient(problem, outer, task)}
    assert_close(run.estimate.hypergradient, expected, 1e-10)
    assert run.state.krylov.basis.shape == (4, 4)
    # Once solved it goes on when b moves.
    algorithm = replace(algorithm, inner_steps=20, inner_lr=0.3)
    run = run_single(algorithm, problem, task, add(outer, outer), 100, 0.02)
    assert run.estimate.metrics["adjoint_residual"] < 5e-3


def test_nothing_to_solve_and_then_something():
    problem, _, task = golden_quadratic()
    algorithm = LancBiO(50, 0.2, adjoint_steps=1, subspace_start=8, subspace_cap=8)
    problem.start = torch.ones(2, dtype=DOUBLE)
    outer = {"x": torch.tensor([1.0, 4.0], dtype=DOUBLE)}  # y* = t, b = 0
    state = algorithm.init(AutogradOracle(problem, task), outer, {"y": problem.start})
    for step in range(8):
        if step == 3:
            outer = {"x": torch.tensor([2.0, -4.0], dtype=DOUBLE)}
        result = algorithm.estimate(AutogradOracle(problem, task, step=step), outer, state)
        state = result.state
        assert result.hypergradient["x"].isfinite().all()
        if step < 3:
            assert result.metrics["adjoint_residual"] == 0
    assert_close(result.hypergradient, {"x": torch.tensor([1.2, -0.9], dtype=DOUBLE)}, 1e-6)


def test_indefinite_and_singular_lower_problems_are_reported():
    problem, outer, task = golden_quadratic()
    a, b, c = task.support.tensors
    for last in (0.0, -0.1):
        factor = torch.tensor([1.0, last], dtype=DOUBLE)
        bent = Task(Batch.of(a * factor, b, c), task.query, 0)
        result = run_single(LancBiO(2, 0.2), problem, bent, outer, 5, 0.0).estimate
        assert result.hypergradient["x"].isfinite().all()
        assert result.metrics["negative_curvature"] == 1 or result.metrics["adjoint_residual"] > 0.1


def test_the_schedule_of_the_dimension():
    paper = LancBiO(adjoint_steps=1, subspace_cap=80)
    assert [paper.dimension(step) for step in (0, 19, 20, 40, 199)] == [1, 1, 2, 3, 10]
    # From 10 on 1.1 m is more than m + 1.
    assert [paper.dimension(step) for step in (200, 220, 10**6)] == [11, 13, 80]
    images = LancBiO(adjoint_steps=1, subspace_growth=1.3, subspace_every=50, subspace_cap=10)
    assert [images.dimension(step) for step in (0, 50, 100, 150, 200, 250, 300)] == [
        1, 2, 3, 4, 6, 8, 10,
    ]  # fmt: skip
    assert LancBiO(adjoint_steps=4).dimension(0) == 4
    assert LancBiO(adjoint_steps=1, subspace_growth=1.0).dimension(10**9) == 1


def synthetic(size, seed=0, condition=100.0):
    """(problem, task, x, y) of the synthetic problem of the paper."""
    task = LancBiOData(size, condition, seed=seed).sample(0)
    start = torch.zeros(size, dtype=DOUBLE)
    return LancBiOSynthetic(size), task, {"x": randn(seed, size)}, {"y": start}


@pytest.mark.parametrize("seed", range(2))
def test_lancbio_has_the_smallest_residual_on_the_synthetic_problem(seed):
    problem, task, first, start = synthetic(40, seed)
    rate, num_steps = 1 / 110, 60
    inner: dict[str, Any] = {"inner_steps": 5, "inner_lr": rate}
    algorithms = {
        "lancbio": LancBiO(adjoint_steps=2, subspace_start=10, **inner),
        "subbio": SubBiO(adjoint_lr=rate, **inner),
        "neumann": AID(solver="neumann", adjoint_steps=3, adjoint_lr=rate, **inner),
    }
    residuals, products = {}, {}
    for name, algorithm in algorithms.items():
        x = first
        history, products[name] = [], 0
        state = algorithm.init(AutogradOracle(problem, task), x, start)
        for step in range(num_steps):
            oracle = CountingOracle(AutogradOracle(problem, task, eager=True, step=step))
            result = algorithm.estimate(oracle, x, state)
            state, x = result.state, add(x, result.hypergradient, -0.1)
            history.append(float(result.metrics["adjoint_residual"]))
            products[name] += oracle.counts["hvp"] - 1
        residuals[name] = sum(history[-20:]) / 20
    assert products["lancbio"] < products["subbio"] == products["neumann"] == 3 * num_steps
    assert 1.5 * residuals["lancbio"] < residuals["subbio"] < residuals["neumann"], residuals


def three_term_recursion(problem, task, x, num_steps, rate, dimension):
    """The residual after each outer step of the paper's recursion: nothing orthogonalised again."""
    outer, y = {"x": x}, torch.zeros_like(x)
    v = anchor = image = y
    basis: list[Any] = []
    diagonal: list[Any] = []
    beside: list[Any] = []
    residuals = []
    for step in range(num_steps):
        oracle = AutogradOracle(problem, task, eager=True)
        draw = oracle.draw_inner()
        for _ in range(5):
            y = y - rate * oracle.inner_grad(outer, {"y": y}, draw)["y"]
        direct, b = (
            tree[key]
            for tree, key in zip(
                oracle.outer_grads(outer, {"y": y}, oracle.draw_outer()), "xy", strict=True
            )
        )

        def second_order(u, oracle=oracle, outer=outer, y=y, draw=draw):
            j_u, h_u = oracle.second_order(outer, {"y": y}, {"y": u}, draw)
            return j_u["x"], h_u["y"]

        if not basis or len(diagonal) == dimension(step):
            anchor, image = v, second_order(v)[1]
            basis, diagonal, beside = [(b - image) / (b - image).norm()], [], []
        u = second_order(basis[-1])[1] - (beside[-1] * basis[-2] if beside else 0)
        diagonal.append(basis[-1] @ u)
        t = torch.diag(torch.stack(diagonal))
        for i, beta in enumerate(beside):
            t[i, i + 1] = t[i + 1, i] = beta
        q = torch.stack(basis)
        v = anchor + q.T @ torch.linalg.solve(t, q @ (b - image))
        rest = u - diagonal[-1] * basis[-1]
        beside.append(rest.norm())
        basis.append(rest / rest.norm())
        j_v, h_v = second_order(v)
        outer = {"x": outer["x"] - direct + j_v}
        residuals.append(float((h_v - b).norm() / b.norm()))
    return residuals


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_it_is_the_recursion_of_the_paper(condition):
    problem, task, outer, start = synthetic(60, condition=condition)
    rate, num_steps = 1 / condition, 160
    algorithm = LancBiO(5, rate, adjoint_steps=1, subspace_cap=80)
    expected = three_term_recursion(problem, task, outer["x"], num_steps, rate, algorithm.dimension)
    state = algorithm.init(AutogradOracle(problem, task), outer, start)
    found = []
    for step in range(num_steps):
        result = algorithm.estimate(
            AutogradOracle(problem, task, eager=True, step=step), outer, state
        )
        state, outer = result.state, add(outer, result.hypergradient, -1.0)
        found.append(float(result.metrics["adjoint_residual"]))
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("adjoint_steps", "cap", "products"), [(1, 3, [1, 1, 1, 2, 1, 1, 2]), (2, 4, [2, 2, 3, 2, 3])]
)
def test_costs(adjoint_steps, cap, products):
    problem, task = Quadratic(2, 6), quadratic_task(0, 2, 6)
    oracle, context, start = oracle_of(problem, problem.init_outer(generator(0)), task)
    counting = CountingOracle(oracle)
    algorithm = LancBiO(6, adjoint_steps=adjoint_steps, subspace_start=cap, subspace_cap=cap)
    state = algorithm.init(counting, context, start)
    assert not counting.counts
    for expected in products:
        counting.counts.clear()
        state = algorithm.estimate(counting, context, state).state
        # The pass for J v gives one more H v.
        expected_counts = {"inner_grad": 6, "outer_grads": 1, "hvp": expected + 1, "jvp": 1}
        assert counting.counts == expected_counts
