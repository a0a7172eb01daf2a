"""UFOM: ITD at q = 1, unbiased over the coin, recomputation."""

from typing import Any

import pytest

from metadist.algorithms.itd import ITD
from metadist.algorithms.ufom import UFOM
from metadist.autograd import AutogradOracle
from metadist.trees import add, sub
from tests.algorithms.toys import estimate, point
from tests.problems import Smooth, assert_close, generator, golden_quadratic, smooth_task


def smooth():
    problem = Smooth()
    return problem, problem.init_outer(generator(0)), smooth_task(0)


def test_the_golden_row():
    problem, outer, task = golden_quadratic()
    found = estimate(UFOM(2, 0.2, exact_probability=1.0), problem, outer, task)
    assert_close(found.state.inner, {"y": point(0.72, -0.96)}, 1e-12)
    assert_close(found.hypergradient, {"x": point(0.0992, -0.8704)}, 1e-12)


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
    found = estimate(algorithm, problem, outer, task, batch_size=batch_size)
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
            found = estimate(UFOM(3, 0.1, exact_probability=q), problem, outer, task, step=step)
            faces[exact] = found
            assert float(found.metrics["exact_steps"]) == exact
    assert abs(counts[True] - 400 * q) < 4 * (400 * q * (1 - q)) ** 0.5
    first_order = estimate(ITD(3, 0.1, first_order=True), problem, outer, task)
    itd = estimate(ITD(3, 0.1), problem, outer, task)
    for name in ("hypergradient", "start_gradient"):
        cheap, full = getattr(faces[False], name), getattr(faces[True], name)
        assert_close(cheap, getattr(first_order, name), 1e-12)
        assert_close(add(cheap, sub(full, cheap), q), getattr(itd, name), 1e-12)
