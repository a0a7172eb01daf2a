"""J v by central differences, and directions of one's own for every task."""

import pytest
import torch
from torch.func import vmap

from metadist.algorithms.parts.differences import difference_product, random_pair
from metadist.autograd import AutogradOracle
from metadist.trees import flatten, scale, sub, zeros_like
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    oracle_of,
    quadratic_task,
    random_like,
    smooth_task,
)


def test_the_difference_has_second_order():
    problem, task = Smooth(), smooth_task(0)
    oracle, context, y = oracle_of(problem, problem.init_outer(generator(0)), task)
    v, draw = random_like(y, 3), oracle.draw_inner()
    truth, _ = oracle.second_order(context, y, v, draw)
    errors = [
        float(flatten(sub(difference_product(oracle, context, y, v, draw, radius), truth)).norm())
        for radius in (0.04, 0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("size", [1e-150, 1e-12, 1e12])
def test_the_product_is_linear_however_long_v_is(size):
    problem, task = Smooth(), smooth_task(0)
    oracle, context, y = oracle_of(problem, problem.init_outer(generator(0)), task)
    v, draw = random_like(y, 3), oracle.draw_inner()
    one = difference_product(oracle, context, y, v, draw, 0.01)
    scaled = difference_product(oracle, context, y, scale(v, size), draw, 0.01)
    assert_close(scale(scaled, 1 / size), one, 1e-8)


def test_a_zero_v_gives_zero():
    problem, task = Smooth(), smooth_task(0)
    oracle, context, y = oracle_of(problem, problem.init_outer(generator(0)), task)
    product = difference_product(oracle, context, y, zeros_like(y), oracle.draw_inner(), 0.01)
    assert_close(product, zeros_like(context))


def test_directions_are_fresh_and_the_tasks_own():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    x, y = problem.init_outer(generator(0)), {"y": problem.start}

    def pair(number):
        oracle = AutogradOracle(problem, task._replace(id=number))
        return torch.cat([flatten(tree) for tree in random_pair(oracle, x, y, "normal")])

    rows = vmap(pair)(torch.arange(5))
    assert rows.shape == (5, 6) and len(rows.unique()) == 30
