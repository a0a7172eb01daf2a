"""Sparse regression: its prox, its lower solutions in closed form, training with MEHA."""

import math
from typing import Any

import pytest
import torch

from metadist import Batch, OuterOptimizer, Trainer
from metadist.algorithms import AID, MEHA
from metadist.problem import is_constrained, is_nonsmooth
from metadist.tasks import SparseRegression, SparseRegressionData, check_sampler
from tests.problems import DOUBLE, assert_close, central_difference, oracle_of, randn
from tests.tasks.helpers import assert_shards_add_up, refusal

ALL: Any = ("groups", "lasso", "ridge")


def strengths(problem, *values):
    """x with these strengths, one value for all groups."""
    start = problem.init_outer(torch.Generator())
    return {
        name: torch.full_like(leaf, math.log(value))
        for (name, leaf), value in zip(start.items(), values, strict=True)
    }


def orthonormal(size):
    """Examples with A'A / n = 1, and A'b / n."""
    n = 2 * size
    inputs = torch.linalg.qr(randn(0, n, size))[0] * math.sqrt(n)
    targets = 2 * randn(1, n)
    return Batch.named(inputs=inputs, targets=targets), inputs.T @ targets / n


def soft(values, threshold):
    return values.sign() * (values.abs() - threshold).relu()


def test_lower_solutions_are_those_of_the_closed_form():
    batch, a = orthonormal(6)
    start = {"weight": torch.zeros(6, dtype=DOUBLE)}

    elastic = SparseRegression(6, 2, ("lasso", "ridge"))
    found = elastic.solve(strengths(elastic, 0.1, 0.7), start, batch)["weight"]
    assert torch.allclose(found, soft(a, 0.1) / 1.7, atol=1e-8)

    sparse = SparseRegression(6, 2, ALL)
    x = strengths(sparse, 1.0, 0.1, 0.7)
    x["log_groups"] = torch.tensor([0.2, 0.3], dtype=DOUBLE).log()
    kept = soft(a, 0.1).view(2, 3)
    shrunk = [(1 - s / row.norm()).relu() * row for s, row in zip((0.2, 0.3), kept, strict=True)]
    found = sparse.solve(x, start, batch)["weight"]
    assert torch.allclose(found, torch.cat(shrunk) / 1.7, atol=1e-8)
    assert found.count_nonzero() > 0

    x["log_groups"][0] = math.log(100)
    found = sparse.solve(x, {"weight": torch.ones(6, dtype=DOUBLE)}, batch)["weight"]
    assert not found[:3].any() and found.isfinite().all()


@pytest.mark.parametrize("terms", [ALL, ("groups",), ("lasso", "ridge")], ids=" ".join)
def test_the_prox_is_a_minimiser_and_gradients_are_right(terms):
    problem, data = SparseRegression(6, 2, terms), SparseRegressionData(6, 2, 1, (1, -2))
    x = {
        name: randn(1, *leaf.shape) - 1
        for name, leaf in strengths(problem, *[1.0] * len(terms)).items()
    }
    inner, step = {"weight": randn(2, 6)}, 0.3

    def objective(z):
        distance = (z["weight"] - inner["weight"]).square().sum()
        return problem.nonsmooth_loss(x, z) + distance / (2 * step)

    best = problem.prox_inner(x, inner, step)
    for seed in range(20):
        moved = {"weight": best["weight"] + 0.05 * randn(seed, 6)}
        assert objective(moved) > objective(best)

    oracle, context, _ = oracle_of(problem, x, data.sample(0))
    g_x, g_y = oracle.inner_grads(context, inner, oracle.draw_inner())
    r_x = oracle.nonsmooth_grad(context, inner)

    def lower(at):
        return problem.inner_loss(at, inner, data.support) + problem.nonsmooth_loss(at, inner)

    total = {name: g_x[name] + r_x[name] for name in x}
    assert_close(total, central_difference(lower, x), 1e-7)
    smooth = central_difference(lambda y: problem.inner_loss(x, y, data.support), inner)
    assert_close(g_y, smooth, 1e-7)
    assert_shards_add_up(problem, data.sample(0), x, inner, {"weight": randn(3, 6)}, 40)


def test_meha_learns_the_strengths_of_groups():
    data = SparseRegressionData(24, 4, 1, (2, -2), snr=3, num_train=24, num_val=40, num_test=100)
    problem = SparseRegression(24, 4, strength=0.05)
    assert is_nonsmooth(problem) and is_constrained(problem)
    trainer = Trainer(
        problem,
        data,
        MEHA(inner_lr=0.2, y_lr=0.2, gamma=10.0, c=100.0),
        outer_optimizer=OuterOptimizer("adam", lr=0.03),
        quiet=True,
    )
    start = trainer.outer, problem.init_inner(trainer.outer, data.sample(0))
    before = data.solution_metrics(problem, *start)
    trainer.fit(300)
    after = data.solution_metrics(problem, trainer.outer, trainer.inner(0))
    assert after["solved_val_loss"] < 0.8 * before["solved_val_loss"]
    assert after["solved_test_loss"] < before["solved_test_loss"]
    assert after["precision"] > before["precision"] and after["recall"] == 1
    groups = trainer.outer["log_groups"]
    assert groups[0] < groups[1:].min()  # the only one that matters


def test_the_data_is_what_it_says():
    data = SparseRegressionData(60, 6, 2, (1, 2), correlation=0.5, num_train=4000, seed=3)
    inputs, targets = data.support.tensors
    assert data.truth.nonzero()[:, 0].tolist() == [0, 1, 10, 11]
    noise = targets - inputs @ data.truth
    assert float(noise.std()) == pytest.approx(0.5, rel=0.1)
    assert float((inputs @ data.truth).std()) == pytest.approx(1, rel=0.1)
    correlations = torch.corrcoef(inputs.T)
    assert float(correlations.diagonal(1).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(correlations.diagonal(3).mean()) == pytest.approx(0.125, abs=0.02)
    check_sampler(SparseRegressionData(6, 2, 1, (1.0,)), processes=False)


def test_a_method_without_a_prox_is_refused_and_arguments_are_checked():
    data = SparseRegressionData(6, 2, 1, (1.0,))
    message = refusal(lambda: Trainer(SparseRegression(6, 2), data, AID(), quiet=True).fit(1))
    assert "must take a prox" in message
    word: Any = "lasso"
    for call, expected in (
        (
            lambda: SparseRegression(6, 4),
            "num_features must be a multiple of num_groups (4), got 6",
        ),
        (
            lambda: SparseRegression(terms=()),
            "terms must be a list of groups, lasso, ridge, got ()",
        ),
        (lambda: SparseRegression(terms=word), "terms must be a list of "),
        (lambda: SparseRegression(strength=2.0, max_strength=1.0), "max_strength must be >= "),
        (
            lambda: SparseRegressionData(6, 2, 1, (1, 2, 3, 4)),
            "coefficients must be 1 to 3 numbers, the features of a group, got 4",
        ),
        (lambda: SparseRegressionData(num_active=31), "num_active must be <= num_groups (30)"),
        (lambda: SparseRegressionData(correlation=1.0), "correlation must be in [0, 1), got 1.0"),
    ):
        assert refusal(call).startswith(expected)
