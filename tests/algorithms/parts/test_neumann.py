"""The stochastic Neumann chain: golden values, unbiased estimates, whole sets in parts."""

import pytest
import torch

from metadist.algorithms.parts.neumann import (
    Bundle,
    average,
    draw_bundle,
    neumann_estimate,
    whole_bundle,
)
from metadist.autograd import AutogradOracle
from metadist.task import Batch, Task
from tests.algorithms.monte_carlo import assert_mean, by_draws
from tests.algorithms.toys import point
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    quadratic_terms,
    randn,
)


def test_the_golden_row():
    problem, outer, task = golden_quadratic()
    oracle, x, _ = oracle_of(problem, outer, task)
    y = {"y": point(2.0, -1.0)}  # the solution, so b = (1, -2)
    sample = neumann_estimate(oracle, x, y, draw_bundle(oracle, 2), 0.2)
    assert_close(sample.adjoint, {"y": point(0.488, -0.496)}, 1e-12)
    assert_close(sample.hypergradient, {"x": point(0.688, -0.896)}, 1e-12)
    # Summing the propagated vectors without the rate gives (1.568, -0.496) instead.
    assert abs(float(sample.adjoint["y"][0]) - 1.568) > 1
    residual = (point(0.488, -1.984) - point(1.0, -2.0)).norm() / point(1.0, -2.0).norm()
    assert float(sample.metrics["adjoint_residual"]) == pytest.approx(float(residual), rel=1e-12)


def test_the_golden_rows_of_a_truncated_chain():
    problem, outer, task = golden_quadratic()
    oracle, x, _ = oracle_of(problem, outer, task)
    y = {"y": point(2, -1)}
    zero, one = (neumann_estimate(oracle, x, y, draw_bundle(oracle, p), 0.2, 2) for p in (0, 1))
    assert_close(zero.adjoint, {"y": point(0.4, -0.8)}, 1e-12)
    assert_close(one.adjoint, {"y": point(0.32, -0.16)}, 1e-12)
    mean = 0.5 * (zero.adjoint["y"] + one.adjoint["y"])
    assert_close({"y": mean}, {"y": point(0.36, -0.48)}, 1e-12)
    series = neumann_estimate(oracle, x, y, draw_bundle(oracle, 1), 0.2)
    assert_close({"y": mean}, series.adjoint, 1e-12)


def test_independent_draws_are_unbiased():
    problem, task, eta = Quadratic(2, 4), quadratic_task(0, num_support=4, noise=0.6), 0.4
    x, y = {"x": randn(1, 2)}, {"y": randn(2, 4)}
    a, b, _, t = quadratic_terms(task)

    def sample(oracle):
        bundle = draw_bundle(oracle, 3)
        found = neumann_estimate(oracle, x, y, bundle, eta)
        return {**found.adjoint, **found.hypergradient}

    identity = torch.eye(4, dtype=DOUBLE)
    power = torch.linalg.matrix_power(identity - eta * a, 4)
    v = torch.linalg.solve(a, (identity - power) @ (y["y"] - t))
    h = 0.1 * x["x"] + b.T @ v
    # A draw of f is for both gradients, one of J is another: so J v too is a product of means.
    assert_mean(by_draws(sample, problem, task, 200_000, 1), torch.cat([v, h]))


def test_one_draw_for_all_factors_would_be_biased():
    """Curvatures 0.5 or 1.5: two factors (1 - h / 2) have mean 0.25, on one draw 0.3125."""
    support = Batch.of(
        torch.tensor([0.5, 1.5], dtype=DOUBLE).reshape(2, 1, 1),
        torch.zeros(2, 1, 1, dtype=DOUBLE),
        torch.zeros(2, 1, dtype=DOUBLE),
    )
    problem, task = Quadratic(1, 1), Task(support, Batch.of(torch.zeros(1, 1, dtype=DOUBLE)), 0)
    x, y = {"x": point(0.0)}, {"y": point(1.0)}

    def last(oracle, shared):
        bundle = draw_bundle(oracle, 2)
        if shared:
            bundle = bundle._replace(factors=[bundle.factors[0]] * 2)
        return neumann_estimate(oracle, x, y, bundle, 0.5, 2).adjoint

    independent = by_draws(lambda oracle: last(oracle, False), problem, task, 20_000, 1)
    assert_mean(independent, point(0.25))
    shared = by_draws(lambda oracle: last(oracle, True), problem, task, 20_000, 1)
    assert_mean(shared, point(0.3125))
    assert float(shared.mean()) > 0.3


def test_the_mean_over_lengths_and_draws_is_the_series():
    problem, task, eta, terms = Quadratic(2, 4), quadratic_task(0, noise=0.6), 0.4, 3
    x, y = {"x": randn(1, 2)}, {"y": randn(2, 4)}
    a, _, _, t = quadratic_terms(task)

    def mean_over_lengths(oracle):
        found = {}
        for p in range(terms):
            bundle = draw_bundle(oracle, p)
            v = neumann_estimate(oracle, x, y, bundle, eta, terms).adjoint["y"]
            found[str(p)] = v / terms
        return found

    samples = by_draws(mean_over_lengths, problem, task, 70_000, 1).reshape(-1, terms, 4).sum(1)
    identity = torch.eye(4, dtype=DOUBLE)
    power = torch.linalg.matrix_power(identity - eta * a, terms)
    assert_mean(samples, torch.linalg.solve(a, (identity - power) @ (y["y"] - t)))


def test_a_bundle_is_the_same_examples_at_every_point():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    x, y = {"x": randn(1, 2)}, {"y": randn(2, 4)}
    oracle = AutogradOracle(problem, task, 1)
    bundle = draw_bundle(oracle, 4)
    numbers = [batch[0].counter for batch in (bundle.outer, bundle.cross, *bundle.factors)]
    assert len(set(numbers)) == 6
    first, second = (neumann_estimate(oracle, x, y, bundle, 0.2) for _ in range(2))
    assert torch.equal(first.hypergradient["x"], second.hypergradient["x"])


def test_whole_sets_in_parts():
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=6, num_query=4)
    x, y = {"x": randn(1, 2)}, {"y": randn(2, 4)}
    oracle = AutogradOracle(problem, task, 2)
    assert [len(batch) for batch in whole_bundle(oracle, 1).factors] == [3]
    found = neumann_estimate(oracle, x, y, whole_bundle(oracle, 5), 0.2)
    whole = AutogradOracle(problem, task)
    expected = neumann_estimate(whole, x, y, draw_bundle(whole, 5), 0.2)
    assert_close(found.hypergradient, expected.hypergradient, 1e-12)


def test_parts_count_by_their_share():
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=3)
    x, y = {"x": randn(1, 2)}, {"y": randn(2, 4)}
    oracle = AutogradOracle(problem, task, 2)
    (found,) = average(oracle.parts("support"), lambda draw: (oracle.inner_grad(x, y, draw),))
    whole = AutogradOracle(problem, task)
    assert_close(found, whole.inner_grad(x, y, whole.draw_inner()), 1e-12)


def test_nothing_to_solve_is_no_residual():
    problem, outer, task = golden_quadratic()
    oracle, x, _ = oracle_of(problem, outer, task)
    sample = neumann_estimate(oracle, x, {"y": point(1, 1)}, draw_bundle(oracle, 2), 0.2)
    assert float(sample.metrics["adjoint_residual"]) == 0
    assert isinstance(draw_bundle(oracle, 0), Bundle) and not draw_bundle(oracle, 0).factors
