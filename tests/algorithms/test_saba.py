"""SABA: tables by hand, unbiased directions, no floor of noise."""

from typing import Any

import torch

from metadist.algorithms import saba
from metadist.algorithms.saba import SABA
from metadist.algorithms.soba import SOBA
from metadist.autograd import AutogradOracle
from metadist.draws import Draw
from metadist.oracle import CountingOracle
from tests.algorithms.toys import estimate, point
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    randn,
)


def noisy_task(index):
    return quadratic_task(index, num_support=6, num_query=4, noise=0.4)


def test_one_part_is_soba():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    one, two = None, None
    for step in range(4):
        found = estimate(SABA(inner_lr=0.2), problem, outer, task, one, step=step)
        plain = estimate(SOBA(inner_lr=0.2), problem, outer, task, two, step=step)
        one, two = found.state, plain.state
        assert_close(found.hypergradient, plain.hypergradient, 1e-12)
        assert_close(one.inner, two.inner, 1e-12)
        assert_close(one.adjoint, two.adjoint, 1e-12)


def test_the_golden_steps():
    problem, outer, task = golden_quadratic()
    found = estimate(SABA(inner_lr=0.2, adjoint_lr=0.2), problem, outer, task)
    assert_close(found.state.inner, {"y": point(0.4, -0.8)}, 1e-12)
    assert_close(found.state.adjoint, {"y": point(-0.2, -0.2)}, 1e-12)
    assert_close(found.hypergradient, {"x": point(0.2, -0.4)}, 1e-12)


def test_tables_hold_the_last_derivatives_of_each_part():
    problem, task, x = Quadratic(2, 4), noisy_task(0), {"x": randn(1, 2)}
    state: Any = None
    last = {}
    for step in range(12):
        oracle = AutogradOracle(problem, task, 2, step=step)
        y = {"y": problem.start} if state is None else state.inner
        i, j = int(oracle.uniform() * 3), int(oracle.uniform() * 2)
        last["support", i] = oracle.inner_grad(x, y, oracle.parts("support")[i])["y"]
        last["query", j] = oracle.outer_grads(x, y, oracle.parts("query")[j])[1]["y"]
        state = estimate(SABA(), problem, x, task, state, batch_size=2, step=step).state
        for (source, part), value in last.items():
            table = state.g_y_table if source == "support" else state.f_y_table
            assert_close({"y": table["y"][part]}, {"y": value}, 1e-12)
    assert len(last) == 5 and state.age == 12


def test_directions_are_unbiased_with_parts_of_unequal_size():
    weights = [0.4, 0.4, 0.2]
    table, values = {"y": randn(0, 3, 2)}, randn(1, 3, 2)
    parts = [Draw("support", i, share) for i, share in enumerate(weights)]
    directions = [saba.saga({"y": values[i]}, table, parts, i)[0]["y"] for i in range(3)]
    expected = torch.tensor(weights, dtype=DOUBLE) @ values
    assert_close({"y": torch.stack(directions).mean(0)}, {"y": expected}, 1e-12)


def test_full_pass_starts_from_exact_directions():
    problem, task = Quadratic(2, 4), noisy_task(0)
    outer = problem.init_outer(generator(0))
    found = estimate(SABA(full_pass=True), problem, outer, task, batch_size=2)
    exact = estimate(SOBA(), problem, outer, task)
    assert_close(found.hypergradient, exact.hypergradient, 1e-12)
    assert_close(found.state.inner, exact.state.inner, 1e-12)
    assert_close(found.state.adjoint, exact.state.adjoint, 1e-12)
    algorithm = SABA(full_pass=True, inner_steps=2)
    counting = CountingOracle(AutogradOracle(problem, task, batch_size=2))
    algorithm.estimate(counting, outer, algorithm.init(counting, outer, {"y": problem.start}))
    assert counting.counts == {"inner_grad": 5, "outer_grads": 4, "hvp": 2, "jvp": 2}
