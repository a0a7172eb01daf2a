"""SUSTAIN: golden values of the random chain, its mean, the same p at both points, messages."""

import pytest
import torch

from metadist.algorithms.stocbio import draw_bundle, neumann_sample, truncated_sample
from metadist.algorithms.sustain import SUSTAIN
from metadist.autograd import AutogradOracle
from metadist.trees import add
from tests.algorithms.monte_carlo import assert_mean, by_draws, one_estimate, vector
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    randn,
)


def test_the_golden_rows():
    problem, outer, task = golden_quadratic()
    oracle, x, _ = oracle_of(problem, outer, task)
    y = {"y": vector(2, -1)}
    zero, one = (truncated_sample(oracle, x, y, draw_bundle(oracle, p), 0.2, 2) for p in (0, 1))
    assert_close(zero.adjoint, {"y": vector(0.4, -0.8)}, 1e-12)
    assert_close(one.adjoint, {"y": vector(0.32, -0.16)}, 1e-12)
    mean = 0.5 * (zero.adjoint["y"] + one.adjoint["y"])
    assert_close({"y": mean}, {"y": vector(0.36, -0.48)}, 1e-12)
    series = neumann_sample(oracle, x, y, draw_bundle(oracle, 1), 0.2)
    assert_close({"y": mean}, series.adjoint, 1e-12)


def test_the_mean_over_lengths_and_draws_is_the_series():
    problem, task, eta, terms = Quadratic(2, 4), quadratic_task(0, noise=0.6), 0.4, 3
    x, y = {"x": randn(1, 2)}, {"y": randn(2, 4)}
    a, _, _, t = quadratic_terms(task)

    def mean_over_lengths(oracle):
        return {
            str(p): truncated_sample(oracle, x, y, draw_bundle(oracle, p), eta, terms).adjoint["y"]
            / terms
            for p in range(terms)
        }

    samples = by_draws(mean_over_lengths, problem, task, 70_000, 1).reshape(-1, terms, 4).sum(1)
    identity = torch.eye(4, dtype=DOUBLE)
    power = torch.linalg.matrix_power(identity - eta * a, terms)
    assert_mean(samples, torch.linalg.solve(a, (identity - power) @ (y["y"] - t)))


def test_all_lengths_occur_equally_often():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    algorithm, counts = SUSTAIN(adjoint_steps=4), [0] * 4
    for step in range(2000):
        oracle = AutogradOracle(problem, task, step=step)
        before = oracle.draw_inner().counter
        algorithm.draw_estimator(oracle)
        num_draws = oracle.draw_inner().counter - before - 1
        counts[num_draws - 3] += 1  # beside p factors: the coin, f and J
    assert min(counts) > 500 - 4 * (2000 * 0.25 * 0.75) ** 0.5, counts


def test_without_noise_in_draws_both_points_have_the_same_length():
    """x and y at rest: then w - h_old is 0 only if both points took the same p."""
    problem, outer, task = golden_quadratic()
    problem.start = vector(2, -1)
    algorithm = SUSTAIN(adjoint_steps=2, adjoint_lr=0.2, outer_weight=0.3, weight_decay=0.0)
    lengths, state, w = {0.4: 0, 0.32: 1}, None, None
    for step in range(20):
        found = one_estimate(algorithm, problem, outer, task, state, step=step)
        state = found.state
        fresh = one_estimate(algorithm, problem, outer, task, step=step).hypergradient["x"]
        assert min(abs(float(fresh[0]) - 0.2 - v) for v in lengths) < 1e-12
        w = fresh if w is None else 0.3 * fresh + 0.7 * w
        assert_close(found.hypergradient, {"x": w}, 1e-12)


def test_it_nears_the_solution():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer, state = problem.init_outer(generator(0)), None
    algorithm = SUSTAIN(inner_lr=0.5, adjoint_steps=5, adjoint_lr=0.5)
    a, b, c, t = quadratic_terms(task)

    def gradient(x):
        y = torch.linalg.solve(a, b @ x["x"] + c)
        return 0.1 * x["x"] + b.T @ torch.linalg.solve(a, y - t)

    first = float(gradient(outer).norm())
    for step in range(150):
        found = one_estimate(algorithm, problem, outer, task, state, step=step)
        state, outer = found.state, add(outer, found.hypergradient, -0.04)
    assert float(gradient(outer).norm()) < 0.2 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjoint_steps": 0}, r"adjoint_steps must be >= 1, got 0"),
        ({"adjoint_lr": 0.0}, r"adjoint_lr must be > 0 and finite, got 0.0"),
        ({"outer_weight": -1.0}, r"outer_weight must be > 0 and finite, got -1.0"),
    ],
    ids=str,
)
def test_messages(options, message):
    with pytest.raises(ValueError, match=message):
        SUSTAIN(**options)
