"""PZOBO: its differences by hand, unbiased where the inner loop is affine."""

from typing import Any

import pytest
import torch

from metadist.algorithms.itd import ITD
from metadist.algorithms.parts.differences import random_pair
from metadist.algorithms.pzobo import PZOBO
from metadist.autograd import AutogradOracle
from metadist.hypergradient import task_hypergradients
from metadist.step_rules import SGD, Adam
from metadist.trees import add, dot, scale, sub
from tests.algorithms.monte_carlo import assert_mean
from tests.algorithms.test_fg2u import exact, samples
from tests.algorithms.toys import estimate
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    smooth_task,
)


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_optimizer": SGD(0.1, momentum=0.5)}, {"inner_optimizer": Adam(0.1)}],
    ids=str,
)
def test_one_direction_by_hand(options):
    problem, task, mu = Smooth(), smooth_task(0), 0.05
    outer = problem.init_outer(generator(0))
    algorithm = PZOBO(3, mu=mu, num_directions=1, **options)
    x, start = problem.encode(outer, task), problem.init_inner(outer, task)
    oracle = AutogradOracle(problem, task)
    for _ in range(4):
        oracle.draw_inner()  # three for the loop, one for f
    u, s = random_pair(oracle, x, start, "normal")
    y = algorithm.adapt(oracle, x, start)
    moved = algorithm.adapt(oracle, add(x, u, mu), add(start, s, mu))
    direct, right = oracle.outer_grads(x, y, oracle.draw_outer())
    slope = dot(scale(sub(moved, y), 1 / mu), right)
    found = estimate(algorithm, problem, outer, task)
    assert_close(found.hypergradient, add(direct, u, slope), 1e-10)
    assert_close(found.start_gradient, scale(s, slope), 1e-10)
    assert_close(found.state.inner, y, 1e-12)


def test_small_differences_are_slopes_of_itd():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    found = estimate(PZOBO(3, mu=1e-6, num_directions=1), problem, outer, task)
    x, start = problem.encode(outer, task), problem.init_inner(outer, task)
    oracle = AutogradOracle(problem, task)
    for _ in range(4):
        oracle.draw_inner()
    u, s = random_pair(oracle, x, start, "normal")
    itd = estimate(ITD(3, 0.1), problem, outer, task)
    direct, _ = oracle.outer_grads(x, itd.state.inner, oracle.draw_outer())
    slope = dot(sub(itd.hypergradient, direct), u) + dot(itd.start_gradient, s)
    assert_close(found.start_gradient, scale(s, slope), 1e-4)


@pytest.mark.parametrize("mu", [0.01, 3.0])
def test_it_is_unbiased_where_the_inner_loop_is_affine(mu):
    problem, outer, task = golden_quadratic()
    algorithm = PZOBO(2, 0.2, mu=mu, num_directions=1)
    g = exact(problem, outer, task, inner_steps=2, inner_lr=0.2)
    assert_mean(samples(algorithm, problem, outer, task, 200_000), g)


def test_all_runs_are_on_the_same_draws():
    """On other draws for each run the difference over a tiny mu would be huge."""
    problem, task = Quadratic(2, 4), quadratic_task(0, noise=1.0)
    outer = problem.init_outer(generator(0))
    tiny, small = (
        estimate(PZOBO(3, mu=mu), problem, outer, task, batch_size=1).hypergradient
        for mu in (1e-6, 1e-2)
    )
    assert_close(tiny, small, 1e-6)


def test_more_directions_less_noise():
    problem, outer, task = golden_quadratic()
    few, many = (
        samples(PZOBO(2, 0.2, num_directions=b), problem, outer, task, 20_000).var(0)
        for b in (1, 8)
    )
    assert bool((few / many - 8).abs().max() < 1)


def test_parts_of_the_estimate_have_shapes_of_their_own():
    problem, task = Quadratic(3, 4), quadratic_task(0, num_outer=3)
    found = estimate(PZOBO(), problem, problem.init_outer(generator(0)), task)
    assert found.hypergradient["x"].shape == torch.Size([3])
    assert found.start_gradient["y"].shape == torch.Size([4])


@pytest.mark.parametrize("kept", [True, False])
def test_with_one_number_in_x_the_error_does_not_grow_with_y(kept):
    """h is f_x + s mean(u^2), s the exact slope of f through y, u the draws in x alone."""
    for num_inner in (2, 40):
        problem, task = Quadratic(1, num_inner, rho=0.0), quadratic_task(0, 1, num_inner)
        outer = problem.init_outer(generator(0))
        kwargs: dict[str, Any] = {"states": {} if kept else None}
        (exact,) = task_hypergradients(problem, ITD(3, 0.05), outer, [task], **kwargs).total["x"]
        errors = []
        for step in range(40):
            algorithm = PZOBO(3, 0.05, num_directions=8)
            found = task_hypergradients(problem, algorithm, outer, [task], step=step, **kwargs)
            errors.append(float(found.total["x"] / exact) - 1)
        # The mean of 8 squares of normal numbers has a standard deviation of 1/2.
        assert 0.3 < torch.tensor(errors).square().mean().sqrt() < 0.75
