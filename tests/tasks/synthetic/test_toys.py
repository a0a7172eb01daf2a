"""Toys: derivatives, known solutions, training."""

import math

import pytest
import torch

from metadist import OuterOptimizer, Trainer, check_hypergradient
from metadist.algorithms import AID, BOME, MEHA, VPBGD
from metadist.problem import is_constrained, is_nonsmooth
from metadist.tasks import check_sampler
from metadist.tasks.synthetic.toys import (
    SINE_SOLUTION,
    AmigoToy,
    Coreset,
    Degenerate,
    Lasso,
    MerelyConvex,
    Minimax,
    NoData,
    PBGDToy,
    PenaltyToy,
    Sine,
)
from tests.algorithms.toys import point
from tests.problems import DOUBLE, assert_close, central_difference, generator, oracle_of, randn
from tests.tasks.helpers import refusal

TOYS = {
    "sine": Sine(3),
    "sine, one x": Sine(1, 3),
    "coreset": Coreset(),
    "minimax": Minimax(),
    "degenerate": Degenerate(),
    "merely convex": MerelyConvex(3),
    "pbgd": PBGDToy(),
    "lasso": Lasso(),
    "penalty, sum": PenaltyToy("sum"),
    "penalty, difference": PenaltyToy("difference"),
    "amigo": AmigoToy(3, 4),
}
each = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


@each
def test_its_gradients_are_those_of_central_differences(toy):
    outer, task = {"x": randn(1, toy.num_outer)}, NoData().sample(0)
    inner = {"y": randn(2, toy.num_inner)}
    oracle, context, _ = oracle_of(toy, outer, task)
    for gradients, value in (
        (oracle.inner_grads(context, inner, oracle.draw_inner()), toy.lower),
        (oracle.outer_grads(context, inner, oracle.draw_outer()), toy.upper),
    ):

        def in_x(tree, value=value):
            return value(tree["x"], inner["y"])

        def in_y(tree, value=value):
            return value(outer["x"], tree["y"])

        along_x, along_y = gradients
        assert_close(along_x, central_difference(in_x, outer), 1e-7)
        assert_close(along_y, central_difference(in_y, inner), 1e-7)


FAR = 60.0
"""A logit that is as good as infinite."""

SOLUTIONS = {
    "sine": ([SINE_SOLUTION[0]] * 3, [SINE_SOLUTION[1]] * 3, 3 * 0.253749),
    "sine, one x": (
        [(-4 + 4.5 * math.pi) / 4],
        [2 + 1.5 * math.pi - (-4 + 4.5 * math.pi) / 4] * 3,
        0.75 * (1.5 * math.pi - 4) ** 2,
    ),
    "coreset": ([-FAR, math.log(0.8), -FAR, math.log(0.2)], [1.8, 0.4], 0.72),
    "minimax": ([0.0], [4.0], 0.0),
    "degenerate": ([1.0], [1.0, 1.0], 0.0),
    "merely convex": ([1.0] * 3, [1.0] * 6, 0.0),
    "pbgd": ([PBGDToy.best], [-PBGDToy.best], 0.1999),
    "lasso": ([0.5, 0.25, 0.0, 0.0], [0.0, 0.0, -0.25, -0.25], -0.5),
    "penalty, sum": ([0.5] * 20, [0.5] * 20, 9.0),
    "penalty, difference": ([0.0] * 20, [0.0] * 20, 0.0),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_its_solution_is_lower_optimal_and_has_the_value_of_the_literature(name):
    toy = TOYS[name]
    x, y, value = SOLUTIONS[name]
    outer, inner = {"x": point(*x)}, {"y": point(*y)}
    metrics = toy.solution_metrics(outer, inner)
    assert metrics["distance"] < 1e-9
    assert metrics["outer_loss"] == pytest.approx(value, abs=5e-5)
    oracle, context, _ = oracle_of(toy, outer, NoData().sample(0))
    gradient = oracle.inner_grad(context, inner, oracle.draw_inner())
    stepped = {"y": inner["y"] - 0.1 * gradient["y"]}
    moved = toy.prox_inner(context, stepped, 0.1)["y"] - inner["y"]
    assert moved.abs().max() < 1e-9
    elsewhere = toy.solution_metrics({"x": outer["x"] + 0.1}, {"y": inner["y"] + 0.1})
    assert elsewhere["distance"] > 0.05


def test_no_neighbour_of_the_pbgd_solution_is_better():
    toy = PBGDToy()
    x = torch.linspace(0, 3, 3001, dtype=DOUBLE)
    values = torch.stack([toy.upper(point, -point) for point in x])
    assert float(x[values.argmin()]) == pytest.approx(toy.best, abs=1e-3)
    lower = torch.stack([toy.lower(x[1000], -x[1000] + e) for e in point(-0.5, -0.1, 0.1, 0.5)])
    assert (lower > toy.lower(x[1000], -x[1000])).all()


def test_the_solution_of_the_amigo_toy_is_one():
    toy, task = AmigoToy(3, 4), NoData().sample(0)
    outer = {"x": toy.solution}
    inner = {"y": torch.linalg.solve(toy.a, -toy.b @ toy.solution)}
    assert toy.solution_metrics(outer, inner)["distance"] < 1e-12

    def phi(outer):
        return toy.upper(outer["x"], torch.linalg.solve(toy.a, -toy.b @ outer["x"]))

    assert central_difference(phi, outer)["x"].abs().max() < 1e-8
    assert toy.inner_loss(outer, inner, task.support) < toy.lower(outer["x"], inner["y"] + 0.1)


def test_which_are_non_smooth_and_which_are_constrained():
    assert [name for name, toy in TOYS.items() if is_nonsmooth(toy)] == ["lasso"]
    assert [name for name, toy in TOYS.items() if is_constrained(toy)] == [
        *("minimax", "pbgd", "lasso", "penalty, sum", "penalty, difference")
    ]
    outside = {"x": point(-20.0, 20.0)}
    for name, low, high in (("minimax", -10, 10), ("pbgd", 0, 3), ("lasso", 0, 1)):
        assert TOYS[name].project_outer(outside)["x"].tolist() == [low, high]


@pytest.mark.parametrize("name", ["coreset", "penalty, sum", "amigo", "pbgd"])
def test_a_hypergradient_of_it_is_exact_in_the_limit(name):
    toy = TOYS[name]
    outer = {"x": 0.5 + 0.3 * torch.rand(toy.num_outer, generator=generator(3), dtype=DOUBLE)}
    algorithm = AID(inner_steps=60, inner_lr=0.2)
    report = check_hypergradient(toy, NoData(), algorithm, outer, repeats=[])
    assert report.error < 1e-5


@pytest.mark.parametrize(
    ("toy", "algorithm", "lr", "num_steps", "distance"),
    [
        (Coreset(), BOME(), 0.5, 150, 0.9),
        (Coreset(), AID(inner_steps=5, inner_lr=0.2), 0.5, 150, 0.9),
        (Degenerate(), BOME(), 0.1, 150, 0.5),
        (AmigoToy(3, 4), AID(inner_steps=20, inner_lr=1.0), 1.0, 100, 1e-2),
        (AmigoToy(3, 4), VPBGD(), 0.1, 100, None),
        (Lasso(), MEHA(), 0.05, 30, None),
    ],
)
def test_it_is_trained(toy, algorithm, lr, num_steps, distance):
    trainer = Trainer(
        toy,
        NoData(),
        algorithm,
        outer_optimizer=OuterOptimizer("sgd", lr=lr),
        quiet=True,
    )
    before = toy.solution_metrics(trainer.outer, toy.init_inner(trainer.outer, NoData().sample(0)))
    trainer.fit(num_steps)
    after = toy.solution_metrics(trainer.outer, trainer.inner(0))
    assert after["distance"] < (before["distance"] if distance is None else distance)


def test_the_sampler_keeps_its_contract():
    check_sampler(NoData(), 2, processes=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sine(2, 3), "num_outer must be 1 or num_inner (3), got 2"),
        (lambda: MerelyConvex(0), "size must be an integer >= 1, got 0"),
        (lambda: Lasso(1), "size must be an integer >= 2, got 1"),
        (lambda: PenaltyToy("both"), "kind must be 'sum' or 'difference', got 'both'"),
        (lambda: AmigoToy(condition=0.5), "condition must be >= 1 and finite, got 0.5"),
    ],
)
def test_bad_arguments(call, message):
    assert refusal(call) == message
