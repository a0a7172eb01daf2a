"""AmIGO: closed forms, its quadratic toy, draws, unbiasedness."""

import pytest
import torch
from torch.func import vmap

from metadist.algorithms.amigo import AmIGO
from metadist.algorithms.parts.implicit import AdjointState
from metadist.autograd import AutogradOracle
from metadist.task import Batch, Task
from metadist.tasks.synthetic.toys import AmigoToy
from tests.algorithms.toys import toy_task
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


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("solver", ["gd", "cg"])
def test_closed_forms_from_a_kept_state(index, solver):
    problem, task = Quadratic(3, 5, rho=0.2), quadratic_task(index, 3, 5)
    outer = problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    y0, v0, eye = randn(index, 5), randn(index + 9, 5), torch.eye(5, dtype=DOUBLE)
    solution = torch.linalg.solve(a, b @ outer["x"] + c)
    y = solution + torch.linalg.matrix_power(eye - 0.2 * a, 3) @ (y0 - solution)
    exact = torch.linalg.solve(a, y - t)
    v = exact
    if solver == "gd":
        v = exact + torch.linalg.matrix_power(eye - 0.1 * a, 5) @ (v0 - exact)
    rate = 0.1 if solver == "gd" else None
    algorithm = AmIGO(3, 0.2, solver=solver, adjoint_steps=5, adjoint_lr=rate)
    oracle = AutogradOracle(problem, task)
    result = algorithm.estimate(oracle, outer, AdjointState({"y": y0}, {"y": v0}))
    assert_close(result.state.inner, {"y": y}, 1e-12)
    assert_close(result.state.adjoint, {"y": v}, 1e-10)
    assert_close(result.hypergradient, {"x": 0.2 * outer["x"] + b.T @ v}, 1e-10)
    residual = (a @ v - (y - t)).norm() / (y - t).norm()
    assert float(result.metrics["adjoint_residual"]) == pytest.approx(float(residual), abs=1e-10)


@pytest.mark.parametrize("solver", ["gd", "cg"])
def test_one_step_of_each_loop_finds_the_golden_solution(solver):
    problem, outer, task = golden_quadratic()
    algorithm = AmIGO(1, 0.2, solver=solver, adjoint_steps=1)
    run = run_single(algorithm, problem, task, outer, 250, 0.0)
    assert_close(run.state.inner, {"y": torch.tensor([2.0, -1.0], dtype=DOUBLE)}, 1e-10)
    assert_close(run.state.adjoint, {"y": torch.tensor([1.0, -0.5], dtype=DOUBLE)}, 1e-10)
    assert_close(run.estimate.hypergradient, {"x": torch.tensor([1.2, -0.9], dtype=DOUBLE)}, 1e-10)
    run = run_single(algorithm, problem, task, outer, 450, 0.25)
    assert true_hypergradient(problem, run.outer, task).norm() < 1e-6


@pytest.mark.parametrize("solver", ["gd", "cg"])
def test_the_quadratic_toy_of_the_paper(solver):
    problem = AmigoToy(3, 6, condition=4.0)
    outer = problem.init_outer(generator(0))
    algorithm = AmIGO(1, 0.9, solver=solver, adjoint_steps=1)
    run = run_single(algorithm, problem, toy_task(), outer, 150, 0.8)
    assert_close(run.outer, {"x": problem.solution}, 1e-8)


def draws_of(algorithm):
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=7)
    used: dict[str, list[int]] = {"inner_grad": [], "outer_grads": [], "hvp": [], "J": []}

    class Recording(AutogradOracle):
        def inner_grad(self, x, y, draw):
            used["inner_grad"].append(draw.counter)
            return super().inner_grad(x, y, draw)

        def outer_grads(self, x, y, draw):
            used["outer_grads"].append(draw.counter)
            return super().outer_grads(x, y, draw)

        def hvp(self, x, y, v, draw):
            used["hvp"].append(draw.counter)
            return super().hvp(x, y, v, draw)

        def second_order(self, x, y, v, draw):
            used["J"].append(draw.counter)
            return super().second_order(x, y, v, draw)

    oracle, outer = Recording(problem, task, batch_size=3), problem.init_outer(generator(0))
    state = algorithm.init(oracle, outer, problem.init_inner(outer, task))
    algorithm.estimate(oracle, outer, state)
    return used


def test_every_step_has_a_mini_batch_of_its_own():
    used = draws_of(AmIGO(3, 0.1, adjoint_steps=4))
    assert [len(draws) for draws in used.values()] == [3, 1, 4, 1]
    assert len({draw for draws in used.values() for draw in draws}) == 9
    used = draws_of(AmIGO(3, 0.1, solver="cg", adjoint_steps=3))
    assert len(used["hvp"]) == 4 and len(set(used["hvp"])) == 1
    assert used["J"][0] not in used["hvp"]


def test_the_steps_on_v_are_unbiased():
    # v from 0 is linear in independent factors: its mean has the mean of H.
    problem, task = Quadratic(2, 3, rho=0.2), quadratic_task(1, 2, 3, num_support=4, noise=0.5)
    outer = problem.init_outer(generator(1))
    a, b, _, t = quadratic_terms(task)
    y, eye = randn(1, 3), torch.eye(3, dtype=DOUBLE)
    algorithm = AmIGO(1, 1e-12, adjoint_steps=4, adjoint_lr=0.2)
    num_runs, batch = 4000, 1

    def one(number):
        oracle = AutogradOracle(problem, Task(task.support, Batch(*task.query), number), batch)
        state = AdjointState({"y": y}, {"y": torch.zeros_like(y)})
        return algorithm.estimate(oracle, outer, state).hypergradient["x"]

    runs = vmap(one)(torch.arange(num_runs))
    power = torch.linalg.matrix_power(eye - 0.2 * a, 4)
    expected = 0.2 * outer["x"] + b.T @ torch.linalg.solve(a, (eye - power) @ (y - t))
    error = runs.std(0) / num_runs**0.5
    assert ((runs.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.1).all()
