"""PBGD-Free: what it leaves out, where that is nothing, and where it is refused."""

import pytest
import torch

from metadist.algorithms.f2sa import F2SA
from metadist.algorithms.free_pbgd import FreePBGD
from metadist.trees import add, scale, sub
from tests.algorithms.toys import estimate, point
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    randn,
    smooth_task,
)


def test_one_step_on_the_golden_instance():
    problem, outer, task = golden_quadratic()
    found = estimate(FreePBGD(inner_lr=0.2, gamma=10.0), problem, outer, task)
    # -.2 ((-2, 4) + (-1, -1) / 10)
    assert_close(found.state.inner, {"y": point(0.42, -0.78)}, 1e-12)
    assert_close(found.hypergradient, {"x": point(0.2, -0.4)}, 1e-12)


@pytest.mark.parametrize("gamma", [2.0, 50.0])
def test_y_ends_where_the_penalty_method_says(gamma):
    problem, task = Quadratic(3, 5), quadratic_task(1, num_outer=3, num_inner=5)
    outer = problem.init_outer(generator(1))
    (a, b, c, t), x = quadratic_terms(task), outer["x"]
    eye = torch.eye(5, dtype=x.dtype)
    y = torch.linalg.solve(a + eye / gamma, b @ x + c + t / gamma)
    found = estimate(FreePBGD(200, 0.3, gamma=gamma), problem, outer, task)
    assert_close(found.state.inner, {"y": y})


def test_it_is_f2sa_without_the_difference_of_the_gradients_of_g():
    problem, task = Smooth(), smooth_task(3)
    outer = problem.init_outer(generator(3))
    lam = 5.0
    # Both make their steps on g + f / lam; F2SA's other variable follows g.
    mine = estimate(FreePBGD(8, 0.1, gamma=lam), problem, outer, task)
    theirs = estimate(F2SA(8, 0.1, lam=lam, y_lr=0.1 * (1 + 1 / lam)), problem, outer, task)
    y = add(theirs.state.inner, theirs.state.offset)
    assert_close(mine.state.inner, y, 1e-12)
    oracle, context, _ = oracle_of(problem, outer, task)
    g_x, _ = oracle.inner_grads(context, y, oracle.draw_inner())
    g_x_at_z, _ = oracle.inner_grads(context, theirs.state.inner, oracle.draw_inner())
    left_out = scale(sub(g_x, g_x_at_z), lam)
    assert_close(add(mine.hypergradient, left_out), theirs.hypergradient, 1e-10)


class Unused(Quadratic):
    """The outer loss does not depend on x, but through y."""

    def outer_loss(self, context, inner, batch):
        return (inner["y"] - batch.tensors[0]).square().sum(1).mean()


def test_an_outer_variable_that_f_does_not_see_is_refused():
    problem, task = Unused(2, 4), quadratic_task(0)
    outer = {"x": randn(0, 2)}
    with pytest.raises(ValueError, match=r"FreePBGD needs an outer loss in .* zero in x: .* F2SA"):
        FreePBGD().check(problem, outer, task)
    FreePBGD().check(Quadratic(2, 4), outer, task)
    FreePBGD().check(Smooth(), Smooth().init_outer(generator(0)), smooth_task(0))
