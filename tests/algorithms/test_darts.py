"""DARTS: golden value, T1-T2 on quadratics, costs, degenerate cases, messages."""

import pytest
import torch

from metadist.algorithms.darts import DARTS
from metadist.algorithms.t1t2 import T1T2
from tests.algorithms.toys import assert_vmap_is_loop, counts_of, estimate, point
from tests.problems import (
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
)


def test_golden_value():
    problem, outer, task = golden_quadratic()
    result = estimate(DARTS(200, 0.2), problem, outer, task)
    assert_close(result.hypergradient, {"x": point(1.2, -2.4)}, 1e-10)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0])
def test_it_is_t1t2_on_quadratics_exactly(epsilon):
    for index in range(3):
        problem, task = Quadratic(3, 5), quadratic_task(index, num_outer=3, num_inner=5)
        outer = problem.init_outer(generator(index))
        expected = estimate(T1T2(5, 0.2), problem, outer, task).hypergradient
        result = estimate(DARTS(5, 0.2, epsilon=epsilon), problem, outer, task)
        assert_close(result.hypergradient, expected)


def test_a_zero_v_gives_zero():
    golden, _, golden_task = golden_quadratic()
    golden.rho, golden.start = 0.0, point(1, 1)
    result = estimate(DARTS(), golden, {"x": point(1, 4)}, golden_task)
    assert_close(result.hypergradient, {"x": torch.zeros(2, dtype=torch.float64)})


def test_vmap_is_loop():
    assert_vmap_is_loop(DARTS(4, 0.1))


def test_costs():
    problem, outer, task = golden_quadratic()
    expected = {"inner_grad": 5 + 2, "inner_grad_x": 2, "outer_grads": 1}
    assert counts_of(DARTS(5), problem, outer, task) == expected
