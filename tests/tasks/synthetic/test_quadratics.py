"""Synthetic problems against their formulas in the literature, and training on their shards."""

import pytest
import torch

from metadist import Batch, OuterOptimizer, Trainer, check_hypergradient
from metadist.algorithms import AID, SOBA, LancBiO
from metadist.tasks import check_sampler
from metadist.tasks.synthetic.dense import DenseTask, implicit_hypergradient
from metadist.tasks.synthetic.lancbio import (
    LancBiOData,
    LancBiOMatrixFree,
    LancBiOMatrixFreeData,
    LancBiOSynthetic,
)
from metadist.tasks.synthetic.quadratics import QuadraticData, Quadratics
from tests.problems import DOUBLE, assert_close, central_difference, oracle_of, randn
from tests.tasks.helpers import assert_shards_add_up, refusal

LANCBIO = LancBiOSynthetic(6, gamma=0.5), LancBiOData(6, condition=10, seed=3)
QUADRATICS = Quadratics(3, 4), QuadraticData(3, 4, num_examples=8, cross=0.7, seed=1)
both = pytest.mark.parametrize(("problem", "data"), [LANCBIO, QUADRATICS], ids=["lancbio", "quad"])


def at(problem, data, seed=0):
    """(oracle, x, y, v) at random points."""
    x, y = {"x": randn(seed, problem.num_outer)}, {"y": randn(seed + 1, problem.num_inner)}
    oracle, _, _ = oracle_of(problem, x, data.sample(0))
    return oracle, x, y, {"y": randn(seed + 2, problem.num_inner)}


def test_the_derivatives_of_lancbio_are_those_of_its_paper():
    """With G here the matrix E + G."""
    problem, data = LANCBIO
    oracle, outer, inner, direction = at(problem, data)
    x, y, v = outer["x"], inner["y"], direction["y"]
    (rows,), (c, d) = data.support.tensors, (t[0] for t in data.query.tensors)
    matrix = rows.T @ rows / len(rows)
    sine = 0.1 * (x @ (c * y)).sin()
    p, gamma = (x * y).softmax(0), problem.gamma
    f_x, f_y = oracle.outer_grads(outer, inner, oracle.draw_outer())
    assert torch.allclose(f_x["x"], -sine * c * y + d * (d * x - y))
    assert torch.allclose(f_y["y"], -sine * c * x - (d * x - y))
    g_x, g_y = oracle.inner_grads(outer, inner, oracle.draw_inner())
    assert torch.allclose(g_x["x"], gamma * (x + y).cos() + y * p)
    assert torch.allclose(g_y["y"], gamma * (x + y).cos() + x * p + matrix @ y)
    j_v, h_v = oracle.second_order(outer, inner, direction, oracle.draw_inner())
    wave = -gamma * (x + y).sin() * v
    expected = wave + x.square() * p * v - (x * p) @ v * (x * p) + matrix @ v
    assert torch.allclose(h_v["y"], expected)
    assert torch.allclose(j_v["x"], wave + (1 + x * y) * p * v - (x * p) @ v * (y * p))


def test_the_matrix_free_problem_is_that_with_its_dense_matrix():
    free, data = LancBiOMatrixFree(9, rotation=5), LancBiOMatrixFreeData(9, condition=40, seed=3)
    identity = torch.eye(9, dtype=DOUBLE)
    assert torch.allclose(free.rotated_back(free.rotated(identity)), identity)
    q = free.rotated(identity)  # rows are Q' e_i: this is Q itself
    assert (q.abs() > 1e-3).double().mean() > 0.9
    (values, e), (c, d) = data.support.tensors, data.query.tensors
    matrix = (q * values) @ q.T + e.diag()
    assert torch.allclose(values, torch.linspace(1, 40, 9, dtype=DOUBLE))
    rows = torch.linalg.cholesky(matrix).T * 3
    dense = LancBiOSynthetic(9), DenseTask(Batch.of(rows), Batch.of(c, d))
    oracle, outer, inner, v = at(free, data)
    reference, *_ = at(*dense)
    for one, two in zip(
        oracle.second_order(outer, inner, v, oracle.draw_inner()),
        reference.second_order(outer, inner, v, reference.draw_inner()),
        strict=True,
    ):
        assert_close(one, two, 1e-10)
    expected = dense[1].solution_metrics(dense[0], outer, inner)
    assert data.solution_metrics(free, outer, inner) == pytest.approx(expected, rel=1e-8)
    check_sampler(data, processes=False)
    assert_shards_add_up(free, data.sample(0), outer, inner, v, 4)
    batch = data.support.take(torch.tensor([1, 7]))
    both = [free.quadratic(inner["y"], data.support.take(torch.tensor([i]))) for i in (1, 7)]
    assert torch.allclose(free.quadratic(inner["y"], batch), torch.stack(both).mean())


def test_the_matrix_free_problem_is_judged_at_any_condition():
    problem, data = LancBiOMatrixFree(500), LancBiOMatrixFreeData(500, seed=1)
    x = problem.init_outer(torch.Generator())
    y = problem.init_inner(x, data.sample(0))
    metrics = data.solution_metrics(problem, x, y)
    assert 0 < metrics["hypergradient_norm"] < 1e3 and 0 < metrics["inner_distance"] < 1e3


def test_the_matrix_of_lancbio_has_the_condition_asked_for():
    data = LancBiOData(6, condition=50, gamma=0.0, seed=2)
    (rows,) = data.support.tensors
    eigenvalues = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
    assert torch.allclose(eigenvalues, torch.linspace(1, 50, 6, dtype=DOUBLE))
    c, d = data.query.tensors
    assert c.abs().max() <= 5 and d.min() >= 0.1 and d.max() <= 1.1


def test_the_figures_of_the_quadratics_are_those_of_the_closed_form():
    problem, data = QUADRATICS
    _, outer, inner, _ = at(problem, data)

    def moments(batch):
        u, w, t = batch.tensors
        n = len(t)
        return u.T @ u / n, w.T @ w / n, w.T @ u / n, u.T @ t / n, w.T @ t / n

    a, _, c, ut, _ = moments(data.support)
    f, h, k, pt, qt = moments(data.query)
    a = a + problem.mu * torch.eye(4, dtype=DOUBLE)
    h = h + problem.mu * torch.eye(3, dtype=DOUBLE)
    x = outer["x"]
    solution = torch.linalg.solve(a, ut - c.T @ x)
    w = torch.linalg.solve(a, f @ solution + k.T @ x - pt)
    hypergradient = h @ x + k @ solution - qt - c @ w
    metrics = data.solution_metrics(problem, outer, inner)
    assert metrics["hypergradient_norm"] == pytest.approx(float(hypergradient.norm()), rel=1e-9)
    distance = float((inner["y"] - solution).norm())
    assert metrics["inner_distance"] == pytest.approx(distance, rel=1e-9)


@both
def test_the_hypergradient_of_the_figures_is_that_of_central_differences(problem, data):
    outer = {"x": 1 + 0.1 * randn(5, problem.num_outer)}
    start = torch.zeros(problem.num_inner, dtype=DOUBLE)
    found, _ = implicit_hypergradient(problem, data.sample(0), outer, start)

    def phi(x):
        _, y = implicit_hypergradient(problem, data.sample(0), x, start)
        return problem.outer_loss(x, {"y": y}, data.query)

    assert torch.allclose(found, central_difference(phi, outer)["x"], atol=1e-7)


@both
def test_check_hypergradient_finds_an_implicit_method_exact(problem, data):
    largest = {LANCBIO[0]: 12.0, QUADRATICS[0]: 3.0}[problem]
    algorithm = AID(inner_steps=120, inner_lr=1.8 / largest, adjoint_steps=10)
    assert check_hypergradient(problem, data, algorithm, repeats=[]).error < 1e-2


@both
def test_shards_add_up_to_the_whole(problem, data):
    _, outer, inner, direction = at(problem, data)
    assert_shards_add_up(problem, data.sample(0), outer, inner, direction, 2)


@pytest.mark.parametrize(
    ("problem", "data", "algorithm", "lr"),
    [
        (*LANCBIO, LancBiO(inner_steps=5, inner_lr=0.1), 0.3),
        (*LANCBIO, AID(inner_steps=5, inner_lr=0.1), 0.3),
        (*QUADRATICS, SOBA(inner_lr=0.5), 0.2),
        (*QUADRATICS, AID(inner_steps=5, inner_lr=0.5), 0.5),
    ],
)
def test_training_brings_the_hypergradient_down(problem, data, algorithm, lr):
    trainer = Trainer(
        problem,
        data,
        algorithm,
        outer_optimizer=OuterOptimizer("sgd", lr=lr),
        quiet=True,
    )
    start = problem.init_inner(trainer.outer, data.sample(0))
    before = data.solution_metrics(problem, trainer.outer, start)["hypergradient_norm"]
    trainer.fit(80)
    after = data.solution_metrics(problem, trainer.outer, trainer.inner(0))
    assert after["hypergradient_norm"] < 0.2 * before


@both
def test_the_sampler_keeps_its_contract(problem, data):
    check_sampler(data, 2, processes=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LancBiOSynthetic(gamma=1.0), "gamma must be in [0, 1), got 1.0"),
        (lambda: LancBiOSynthetic(0), "size must be an integer >= 1, got 0"),
        (lambda: LancBiOData(5, condition=0), "condition must be >= 1, got 0"),
        (lambda: Quadratics(mu=0.0), "mu must be > 0 and finite, got 0.0"),
        (lambda: QuadraticData(cross=-1.0), "cross must be >= 0 and finite, got -1.0"),
        (lambda: QuadraticData(3, 0), "num_inner must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(call, message):
    assert refusal(call) == message
