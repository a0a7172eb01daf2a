"""The derivatives of `AutogradOracle`, and what `CountingOracle` counts."""

import pytest
import torch
from torch.func import vmap

from metadist.autograd import AutogradOracle
from metadist.oracle import DERIVATIVES, CountingOracle
from metadist.task import stack_tasks
from metadist.trees import dot
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    central_difference,
    generator,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    random_like,
    smooth_task,
)


@pytest.fixture(params=[False, True], ids=["torch.func", "torch.autograd"])
def eager(request):
    return request.param


@pytest.fixture(params=[0, 1])
def smooth(request, eager):
    problem = Smooth()
    outer = problem.init_outer(generator(request.param))
    return oracle_of(problem, outer, smooth_task(request.param), eager=eager)


def test_every_gradient_agrees_with_central_differences(smooth):
    oracle, x, y = smooth
    draw = oracle.draw_inner()
    g_x = central_difference(lambda x: oracle.inner_value(x, y, draw), x)
    g_y = central_difference(lambda y: oracle.inner_value(x, y, draw), y)
    assert_close(oracle.inner_grad(x, y, draw), g_y, 1e-8)
    assert_close(oracle.kept_grad(x, y, draw), g_y, 1e-8)
    for actual, expected in zip(oracle.inner_grads(x, y, draw), (g_x, g_y), strict=True):
        assert_close(actual, expected, 1e-8)
    draw = oracle.draw_outer()
    f_x = central_difference(lambda x: oracle.outer_value(x, y, draw), x)
    f_y = central_difference(lambda y: oracle.outer_value(x, y, draw), y)
    for actual, expected in zip(oracle.outer_grads(x, y, draw), (f_x, f_y), strict=True):
        assert_close(actual, expected, 1e-8)


def test_second_order_products_agree_with_central_differences(smooth):
    oracle, x, y = smooth
    draw = oracle.draw_inner()
    v = random_like(y, 5)
    # J v = grad_x <grad_y g, v> and H v = grad_y <grad_y g, v>.
    j_v = central_difference(lambda x: dot(oracle.inner_grad(x, y, draw), v), x)
    h_v = central_difference(lambda y: dot(oracle.inner_grad(x, y, draw), v), y)
    actual = oracle.second_order(x, y, v, draw)
    assert_close(actual[0], j_v, 1e-8)
    assert_close(actual[1], h_v, 1e-8)
    assert_close(oracle.hvp(x, y, v, draw), h_v, 1e-8)
    assert_close(oracle.cross(x, y, v, draw), j_v, 1e-8)
    draw = oracle.draw_outer()
    j_v = central_difference(lambda x: dot(oracle.outer_grads(x, y, draw)[1], v), x)
    h_v = central_difference(lambda y: dot(oracle.outer_grads(x, y, draw)[1], v), y)
    actual = oracle.outer_second_order(x, y, v, draw)
    assert_close(actual[0], j_v, 1e-8)
    assert_close(actual[1], h_v, 1e-8)


@pytest.mark.parametrize(("num_outer", "num_inner"), [(2, 5), (4, 3)])
def test_derivatives_of_a_quadratic_are_its_closed_forms(num_outer, num_inner, eager):
    problem = Quadratic(num_outer, num_inner, rho=0.3)
    task = quadratic_task(1, num_outer, num_inner)
    outer = problem.init_outer(generator(0))
    oracle, outer, _ = oracle_of(problem, outer, task, eager=eager)
    inner = random_like({"y": torch.empty(num_inner)}, 1)
    a, b, c, t = quadratic_terms(task)
    x, y, v = outer["x"], inner["y"], random_like(inner, 2)["y"]
    draw = oracle.draw_inner()
    expected_y = a @ y - b @ x - c
    assert_close(oracle.inner_grad(outer, inner, draw), {"y": expected_y}, 1e-12)
    g_x, g_y = oracle.inner_grads(outer, inner, draw)
    assert_close(g_x, {"x": -b.T @ y}, 1e-12)
    assert_close(g_y, {"y": expected_y}, 1e-12)
    f_x, f_y = oracle.outer_grads(outer, inner, oracle.draw_outer())
    assert_close(f_x, {"x": 0.3 * x}, 1e-12)
    assert_close(f_y, {"y": y - t}, 1e-12)
    j_v, h_v = oracle.second_order(outer, inner, {"y": v}, draw)
    assert_close(j_v, {"x": -b.T @ v}, 1e-12)
    assert_close(h_v, {"y": a @ v}, 1e-12)
    assert_close(oracle.hvp(outer, inner, {"y": v}, draw), {"y": a @ v}, 1e-12)


def test_derivatives_are_detached_and_values_are_differentiable(smooth):
    oracle, x, y = smooth
    x = {name: leaf.detach().requires_grad_() for name, leaf in x.items()}
    y = {name: leaf.detach().requires_grad_() for name, leaf in y.items()}
    assert oracle.inner_value(x, y, oracle.draw_inner()).requires_grad
    assert oracle.outer_value(x, y, oracle.draw_outer()).requires_grad


def test_derivatives_of_a_stack_of_tasks_are_those_of_its_tasks():
    problem = Smooth()
    outer = problem.init_outer(generator(0))
    tasks = [smooth_task(index, num_support=9) for index in range(3)]

    def derivatives(task):
        oracle, x, y = oracle_of(problem, outer, task, batch_size=4)
        v = {name: torch.ones_like(leaf) for name, leaf in y.items()}
        return oracle.second_order(x, y, v, oracle.draw_inner()), oracle.outer_grads(
            x, y, oracle.draw_outer()
        )

    together = vmap(derivatives)(stack_tasks(tasks))
    for b, task in enumerate(tasks):
        for many, one in zip(together, derivatives(task), strict=True):
            for tree_many, tree_one in zip(many, one, strict=True):
                assert_close({name: leaf[b] for name, leaf in tree_many.items()}, tree_one)


def test_a_mini_batch_gradient_is_that_of_its_examples():
    task = quadratic_task(2, num_support=7)
    oracle = AutogradOracle(Quadratic(2, 4), task, batch_size=3)
    draw = oracle.draw_inner()
    part = task._replace(support=task.support.take(oracle.batch(draw).index))
    whole = AutogradOracle(Quadratic(2, 4), part)
    x, y = {"x": torch.ones(2, dtype=DOUBLE)}, {"y": torch.ones(4, dtype=DOUBLE)}
    assert_close(oracle.inner_grad(x, y, draw), whole.inner_grad(x, y, whole.draw_inner()), 1e-14)


def test_a_gradient_in_x_alone_is_that_of_both_and_asks_nothing_without_an_x(smooth):
    oracle, x, y = smooth
    draw = oracle.draw_inner()
    assert_close(oracle.inner_grad_x(x, y, draw), oracle.inner_grads(x, y, draw)[0], 0)
    assert oracle.inner_grad_x({}, y, draw) == {}


def test_counting_oracle_counts_each_kind_of_call_and_changes_no_result(smooth):
    oracle, x, y = smooth
    counting = CountingOracle(oracle)
    inner, outer = counting.draw_inner(), counting.draw_outer()
    v = random_like(y, 0)
    calls = {
        "inner_grad": ((x, y, inner), {"inner_grad": 1}),
        "kept_grad": ((x, y, inner), {"inner_grad": 1}),
        "inner_grads": ((x, y, inner), {"inner_grad": 1, "inner_grad_x": 1}),
        "inner_grad_x": ((x, y, inner), {"inner_grad": 1, "inner_grad_x": 1}),
        "outer_grads": ((x, y, outer), {"outer_grads": 1}),
        "second_order": ((x, y, v, inner), {"hvp": 1, "jvp": 1}),
        "cross": ((x, y, v, inner), {"hvp": 1, "jvp": 1}),
        "outer_second_order": ((x, y, v, outer), {"outer_hvp": 1, "outer_jvp": 1}),
        "hvp": ((x, y, v, inner), {"hvp": 1}),
        "directional": ((x, y, random_like(x, 1), v, inner), {"directional": 1}),
        "inner_value": ((x, y, inner), {"inner_value": 1}),
        "outer_value": ((x, y, outer), {"outer_value": 1}),
    }
    of_losses = {name for name, row in DERIVATIVES.items() if row.loss != "inner_map"}
    assert calls.keys() == of_losses
    for name, (arguments, counts) in calls.items():
        counting.counts.clear()
        counted = getattr(counting, name)(*arguments)
        assert dict(counting.counts) == counts, name
        assert repr(counted) == repr(getattr(oracle, name)(*arguments)), name
