"""SRBA: whole passes and the recursion by hand, no floor of noise."""

from typing import Any

import pytest
import torch

from metadist.algorithms.saba import SABA
from metadist.algorithms.soba import SOBA
from metadist.algorithms.srba import SRBA
from metadist.autograd import AutogradOracle
from metadist.oracle import CountingOracle
from metadist.task import Batch, Task
from metadist.trees import add, sub
from tests.algorithms.toys import estimate, point
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    quadratic_task,
    randn,
    run_single,
    true_hypergradient,
)


def noisy_task(index):
    return quadratic_task(index, num_support=6, num_query=5, noise=0.4)


@pytest.mark.parametrize(("period", "batch_size"), [(1, 2), (3, None)])
def test_passes_alone_and_whole_sets_alone_are_soba_on_whole_sets(period, batch_size):
    problem, task, outer = Quadratic(2, 4), noisy_task(0), {"x": randn(1, 2)}
    one: Any = None
    two: Any = None
    for step in range(7):
        algorithm = SRBA(inner_lr=0.2, adjoint_lr=0.3, period=period)
        found = estimate(algorithm, problem, outer, task, one, step=step, batch_size=batch_size)
        plain = estimate(SOBA(inner_lr=0.2, adjoint_lr=0.3), problem, outer, task, two, step=step)
        one, two = found.state, plain.state
        assert_close(found.hypergradient, plain.hypergradient, 1e-12)
        assert_close(one.inner, two.inner, 1e-12)
        assert_close(one.adjoint, two.adjoint, 1e-12)
        assert_close(found.metrics, plain.metrics, 1e-9)
        outer = add(outer, found.hypergradient, -0.05)


def test_between_passes_differences_on_one_draw_are_added_up():
    problem, task, x = Quadratic(2, 4), noisy_task(0), {"x": randn(1, 2)}
    algorithm = SRBA(inner_lr=0.2, adjoint_lr=0.3, period=10)
    points: list[Any] = []
    state: Any = None
    expected: Any = None
    for step in range(4):
        y, v = ({"y": problem.start},) * 2 if state is None else (state.inner, state.adjoint)
        points.append((x, y, v))

        def at(oracle, point, inner, outer):
            x, y, v = point
            j_v, h_v = oracle.second_order(x, y, v, inner)
            f_x, f_y = oracle.outer_grads(x, y, outer)
            return oracle.inner_grad(x, y, inner), sub(h_v, f_y), sub(f_x, j_v)

        whole = AutogradOracle(problem, task)
        oracle = AutogradOracle(problem, task, 2, step=step)
        if step == 0:
            expected = at(whole, points[0], whole.draw_inner(), whole.draw_outer())
        else:
            draws = oracle.draw_inner(), oracle.draw_outer()
            new, old = (at(oracle, point, *draws) for point in (points[-1], points[-2]))
            expected = [add(d, sub(n, o)) for d, n, o in zip(expected, new, old, strict=True)]
        found = estimate(algorithm, problem, x, task, state, batch_size=2, step=step)
        state = found.state
        for mine, theirs in zip(state.directions, expected, strict=True):
            assert_close(mine, theirs, 1e-12)
        assert_close(found.hypergradient, expected[2], 1e-12)
        assert_close(state.inner, add(y, expected[0], -0.2), 1e-12)
        assert_close(state.adjoint, add(v, expected[1], -0.3), 1e-12)
        x = add(x, found.hypergradient, -0.05)


def test_costs_of_a_pass_and_of_a_difference():
    problem, task, outer = Quadratic(2, 4), noisy_task(0), {"x": randn(1, 2)}
    counting = CountingOracle(AutogradOracle(problem, task, batch_size=2))
    algorithm = SRBA()
    state = algorithm.init(counting, outer, {"y": problem.start})
    state = algorithm.estimate(counting, outer, state).state
    assert counting.counts == {"inner_grad": 3, "outer_grads": 3, "hvp": 3, "jvp": 3}
    counting.counts.clear()
    algorithm.estimate(counting, outer, state)
    assert counting.counts == {"inner_grad": 2, "outer_grads": 2, "hvp": 2, "jvp": 2}


def test_it_converges_with_constant_rates_where_soba_stops_at_a_floor():
    noise = randn(1, 6, 2, 2)
    eye = torch.eye(2, dtype=DOUBLE)
    support = Batch.of(
        torch.diag(point(1, 2)) + 0.2 * (noise + noise.mT),
        eye + 0.4 * randn(2, 6, 2, 2),
        0.4 * randn(3, 6, 2),
    )
    problem, task = Quadratic(2, 2, rho=1.0), Task(support, Batch.of(1 + randn(4, 4, 2)), 0)
    outer, ends = problem.init_outer(generator(1)), {}
    rates: dict[str, Any] = {"inner_lr": 0.2, "adjoint_lr": 0.2}
    for algorithm in (SRBA(**rates, period=6), SABA(**rates), SOBA(**rates)):
        run = run_single(algorithm, problem, task, outer, 500, 0.05, batch_size=2)
        ends[type(algorithm)] = float(true_hypergradient(problem, run.outer, task).norm())
    assert ends[SRBA] < 1e-6 and ends[SABA] < 1e-6, ends
    assert ends[SOBA] > 1e-2, ends
