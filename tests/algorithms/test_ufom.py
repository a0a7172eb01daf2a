"""UFOM: ITD at q = 1, unbiased over the coin, recomputation, costs, messages."""

from typing import Any

import pytest

from metadist.algorithms.itd import ITD
from metadist.algorithms.ufom import UFOM
from metadist.autograd import AutogradOracle
from metadist.oracle import CountingOracle
from metadist.trees import add, sub
from tests.algorithms.monte_carlo import one_estimate, vector
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    smooth_task,
)


def smooth():
    problem = Smooth()
    return problem, problem.init_outer(generator(0)), smooth_task(0)


def test_the_golden_row():
    problem, outer, task = golden_quadratic()
    found = one_estimate(UFOM(2, 0.2, exact_probability=1.0), problem, outer, task)
    assert_close(found.state.inner, {"y": vector(0.72, -0.96)}, 1e-12)
    assert_close(found.hypergradient, {"x": vector(0.0992, -0.8704)}, 1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_without_the_coin_it_is_itd(recompute, batch_size):
    problem, outer, task = smooth()
    algorithm = UFOM(4, 0.1, exact_probability=1.0, recompute=recompute)
    oracle = AutogradOracle(problem, task, batch_size)
    oracle.uniform()  # the coin takes a number, so draws are the same from here on
    itd, context = ITD(4, 0.1), problem.encode(outer, task)
    state = itd.init(oracle, context, problem.init_inner(outer, task))
    expected: Any = itd.estimate(oracle, context, state)
    found = one_estimate(algorithm, problem, outer, task, batch_size=batch_size)
    assert_close(found.hypergradient, expected.hypergradient, 1e-12)
    assert_close(found.start_gradient, expected.start_gradient, 1e-12)
    assert_close(found.state.inner, expected.state.inner, 1e-12)


def test_its_mean_is_itd():
    """Both faces of the coin, weighted by their probability, and how often each shows."""
    problem, outer, task = smooth()
    q, faces, counts = 0.3, {}, {False: 0, True: 0}
    for step in range(400):
        exact = AutogradOracle(problem, task, step=step).uniform() < q
        counts[exact] += 1
        if exact not in faces:
            found = one_estimate(UFOM(3, 0.1, q), problem, outer, task, step=step)
            faces[exact] = found
            assert float(found.metrics["exact_steps"]) == exact
    assert abs(counts[True] - 400 * q) < 4 * (400 * q * (1 - q)) ** 0.5
    first_order = one_estimate(ITD(3, 0.1, first_order=True), problem, outer, task)
    itd = one_estimate(ITD(3, 0.1), problem, outer, task)
    for name in ("hypergradient", "start_gradient"):
        cheap, full = getattr(faces[False], name), getattr(faces[True], name)
        assert_close(cheap, getattr(first_order, name), 1e-12)
        assert_close(add(cheap, sub(full, cheap), q), getattr(itd, name), 1e-12)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"exact_probability": 1e-9}, {"inner_grad": 4, "outer_grads": 1}),
        (
            {"exact_probability": 1.0},
            {"inner_grad": 4, "outer_grads": 1, "hvp": 4, "jvp": 4},
        ),
        (
            {"exact_probability": 1.0, "recompute": True},
            {"inner_grad": 4 + 6, "outer_grads": 1, "hvp": 4, "jvp": 4},
        ),
    ],
    ids=str,
)
def test_costs(options, counts):
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    counting = CountingOracle(AutogradOracle(problem, task))
    algorithm = UFOM(inner_steps=4, **options)
    algorithm.estimate(counting, outer, algorithm.init(counting, outer, {"y": problem.start}))
    assert counting.counts == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exact_probability": 0.0},
            r"exact_probability must be in \(0, 1\], got 0.0: .* ITD with first_order=True",
        ),
        ({"exact_probability": 1.1}, r"exact_probability must be in \(0, 1\], got 1.1"),
    ],
    ids=str,
)
def test_messages(options, message):
    with pytest.raises(ValueError, match=message):
        UFOM(**options)
