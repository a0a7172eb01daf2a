"""`check_hypergradient`: closed forms, wrong algorithms, and what cannot be compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from metadist import HypergradientReport, Task, check_hypergradient
from metadist.algorithms import AID, ITD, Reptile
from metadist.algorithms.noloop_aid import NoLoopAID
from metadist.trees import add, scale
from tests.helpers import curves, regression, with_compute
from tests.problems import (
    Quadratic,
    QuadraticSampler,
    Smooth,
    golden_quadratic,
    quadratic_task,
    smooth_task,
    true_hypergradient,
    vector_task,
)

UNROLLED = "the unrolled map x -> f(x, A(x))"
SOLUTION = "the solution x -> f(x, y*(x))"


def check(problem: Any, tasks: Any, algorithm: Any, *args: Any, **options: Any) -> Any:
    return check_hypergradient(
        problem, tasks, algorithm, *args, **{"repeats": ()} | with_compute(options)
    )


def errors(report: HypergradientReport) -> dict[str, float]:
    return {comparison.reference: comparison.error for comparison in report.comparisons}


def only_note(report: HypergradientReport) -> str:
    (note,) = report.notes
    return note


def test_both_references_of_the_quadratic_are_those_of_the_closed_forms():
    problem, outer, task = golden_quadratic()
    report = check(problem, task, ITD(inner_steps=2, inner_lr=0.2), outer)
    unrolled, solution = report.comparisons
    assert unrolled.reference == UNROLLED and unrolled.error < 1e-8 and unrolled.cosine > 1 - 1e-12
    assert unrolled.uncertainty < 1e-8
    # h = (.0992, -.8704) beside grad Phi = (1.2, -.9)
    assert solution.reference == SOLUTION and solution.uncertainty == 0
    assert solution.error == pytest.approx(1.1011971 / 1.5, rel=1e-6)
    assert solution.cosine == pytest.approx(0.9024 / (0.8760348 * 1.5), rel=1e-6)
    assert report.error == unrolled.error
    assert report.metrics["|grad_y g| at the start"] == pytest.approx(20**0.5)
    assert report.metrics["|grad_y g| after adaptation"] == pytest.approx(
        (1.28**2 + 0.16**2) ** 0.5
    )
    assert report.metrics["|y - y*| / |y*| after adaptation"] == pytest.approx(
        (1.28**2 + 0.04**2) ** 0.5 / 5**0.5
    )
    assert report.metrics["smallest eigenvalue of H at y*"] == pytest.approx(1)
    assert report.metrics["largest eigenvalue of H at y*"] == pytest.approx(4)
    assert report.counts == {"inner_grad": 2, "outer_grads": 1, "hvp": 2, "jvp": 2}
    assert report.notes == ()


def test_the_solution_s_hypergradient_is_that_of_many_steps():
    problem, task = Quadratic(3, 5), quadratic_task(1, 3, 5)
    exact = check(problem, task, ITD(inner_steps=400, inner_lr=0.3))
    assert set(errors(exact)) == {UNROLLED, SOLUTION}
    assert max(errors(exact).values()) < 1e-8
    few = check(Quadratic(2, 4), QuadraticSampler(), ITD(inner_steps=3, inner_lr=0.3), seed=4)
    assert errors(few)[UNROLLED] < 1e-8 < 1e-2 < errors(few)[SOLUTION]


@dataclass(frozen=True)
class Wrong(ITD):
    """ITD with another sign before its second derivatives."""

    def estimate(self, oracle, context, state):
        estimate = super().estimate(oracle, context, state)
        direct = oracle.outer_grads(context, estimate.state.inner, oracle.draw_outer())[0]
        flipped = add(scale(direct, 2.0), estimate.hypergradient, -1.0)
        return estimate._replace(hypergradient=flipped)


def test_a_sign_error_is_found_on_every_kind_of_problem():
    report = check(*golden_quadratic()[::2], Wrong(inner_steps=20, inner_lr=0.2))
    assert report.error > 1 and all(error > 1 for error in errors(report).values())
    report = check(Smooth(), smooth_task(2), Wrong(inner_steps=3))
    assert report.error > 0.3
    assert report.comparisons[0].cosine < 0.95


def test_context_start_and_own_variables_are_all_compared():
    report = check(Smooth(), smooth_task(0), ITD(inner_steps=3, learn_lr="per_element"))
    assert errors(report)[UNROLLED] < 1e-6
    assert report.setting == {"x, y": "14 and 5 numbers in float64"}


def test_of_a_large_x_random_directions_are_compared():
    from metadist.models import MLP
    from metadist.tasks import FewShotProblem

    problem = FewShotProblem(MLP(3, 2, (20, 20)), adapt="all", loss="mse")
    good, bad = (
        check(problem, vector_task(0), algorithm(inner_steps=3), num_directions=7)
        for algorithm in (ITD, Reptile)
    )
    assert good.comparisons[0].reference == UNROLLED + ", along 7 random directions"
    assert good.error < 1e-6 < 0.1 < bad.error
    assert bad.comparisons[0].reference == (
        UNROLLED + ", the context held constant, along 7 random directions"
    )


def test_an_algorithm_that_takes_the_start_for_a_constant_is_judged_so():
    problem, task = Smooth(), smooth_task(3)
    report = check(problem, task, NoLoopAID(inner_steps=5))
    assert report.comparisons[0].reference == UNROLLED + ", its start held constant"


def test_a_kept_state_comes_nearer_to_the_solution():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    report = check(problem, task, NoLoopAID(inner_lr=0.3), repeats=(100, 1, 10))
    (found,) = report.repetitions
    assert found.what == "state kept: the last, of the solution"
    first, tenth, last = found.errors.values()
    assert list(found.errors) == [1, 10, 100]
    assert first == pytest.approx(report.comparisons[1].error)
    assert first > tenth > last and last < 1e-2
    assert report.error == last


def test_an_algorithm_is_judged_by_the_reference_it_stands_for():
    """One implicit step from v = 0 is one step unrolled, which is not what it stands for."""
    problem, task = Quadratic(2, 4), quadratic_task(0)
    report = check(problem, task, NoLoopAID(inner_lr=0.3))
    assert report.measure == "the solution"
    assert [comparison.judged for comparison in report.comparisons] == [False, True]
    unrolled, solution = report.comparisons
    assert unrolled.error < 1e-6 < 0.1 < report.error == solution.error
    assert "holds the start of adaptation constant" in str(report)
    report = check(problem, task, ITD(inner_steps=3))
    assert report.measure == "the unrolled map"
    assert report.error == report.comparisons[0].error < 1e-6
    assert "trains the start of adaptation" in str(report)


def test_where_v_does_not_solve_its_system_a_note_says_so():
    problem, outer, task = golden_quadratic()
    message = "v does not solve H v = grad_y f"
    assert message in only_note(check(problem, task, AID(50, 0.2, adjoint_steps=1), outer))
    assert check(problem, task, AID(50, 0.2, adjoint_steps=2), outer).notes == ()


@dataclass(frozen=True)
class Noisy(ITD):
    """ITD with noise of mean 0 on its hypergradient."""

    def estimate(self, oracle, context, state):
        estimate = super().estimate(oracle, context, state)
        noise = oracle.random_like(context, "normal")
        return estimate._replace(hypergradient=add(estimate.hypergradient, noise))


def test_of_a_random_algorithm_the_mean_is_told():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    method = Noisy(inner_steps=25, inner_lr=0.3)
    report = check(problem, task, method, repeats=(1, 25))
    assert [found.what for found in report.repetitions] == [
        "state kept: the last, of the solution",
        "state new, other draws: their mean, of the unrolled map",
        "state new, other draws: their mean, of the solution",
    ]
    assert all(error > 0.05 for error in report.repetitions[0].errors.values())
    for found in report.repetitions[1:]:
        assert found.errors[25] < 0.05 < found.errors[1]
    again, once = (check(problem, task, method, repeats=(1, 5)) for _ in range(2))
    assert again == once


def test_mini_batches_are_compared_with_the_whole_sets():
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=6)
    report = check(problem, task, ITD(inner_steps=10), batch_size=3, repeats=(1, 40))
    mean = report.repetitions[1].errors
    assert report.comparisons[0].error > 1e-3
    assert mean[40] < 0.5 * mean[1]


# What cannot be compared


class Lower(Quadratic):
    """A quadratic with another lower objective of y in R^2."""

    def __init__(self, loss: Any) -> None:
        super().__init__(2, 2)
        self.loss = loss

    def inner_loss(self, context, inner, batch):
        return self.loss(context["x"], inner["y"])


LOWER: dict[str, tuple[Any, str]] = {
    "flat in one direction": (
        lambda x, y: (y[0] - x[0]).square(),
        r"not positive definite where .* eigenvalues go from \S*(0|e-\d+) to 2: g has no strict",
    ),
    "saddle": (
        lambda x, y: (y[0] - x[0]).square() - 0.1 * (y[1] - 1 - x[1]).square(),
        "is not positive definite",
    ),
    "no minimum": (
        lambda x, y: (-(y - 0.01 * x)).exp().sum(),
        "no stationary point of g was reached|is not positive definite",
    ),
}


@pytest.mark.parametrize("name", LOWER)
def test_a_lower_problem_without_strict_minimum_has_no_exact_hypergradient(name):
    loss, message = LOWER[name]
    outer = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    report = check(Lower(loss), golden_quadratic()[2], ITD(), outer, repeats=(1, 10))
    assert list(errors(report)) == [UNROLLED] and report.error < 1e-6
    implicit = check(Lower(loss), golden_quadratic()[2], AID(damping=5.0), outer)
    assert implicit.error == float("inf")
    note = only_note(report)
    assert note.startswith("no exact hypergradient of the solution y*(x): ")
    assert re.search(message, note), note
    assert report.repetitions == ()


class Nonsmooth(Quadratic):
    def prox_inner(self, context, inner, step_size):
        return inner


def test_other_reasons_are_told():
    problem, outer, task = golden_quadratic()
    report = check(problem, task, ITD(), outer, max_dense=1)
    assert only_note(report).endswith("y has 2 numbers, more than max_dense = 1")
    report = check(regression(), curves(), Reptile(inner_steps=2, inner_lr=0.01))
    assert "trains the start of adaptation, which y*(x) does not depend on" in only_note(report)

    @dataclass(frozen=True)
    class Proximal(ITD):
        takes_prox = True

    report = check(Nonsmooth(2, 2), task, Proximal(), outer)
    assert only_note(report).endswith("the lower objective has a non-smooth part")


class Single(Quadratic):
    """It has a constant in float32, which torch does not multiply with float64."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.basis = torch.eye(4)

    def init_outer(self, generator):
        return {"x": torch.randn(2, generator=generator)}

    def init_inner(self, outer, task):
        return {"y": outer["x"].new_zeros(4)}

    def inner_loss(self, context, inner, batch):
        return super().inner_loss(context, {"y": self.basis @ inner["y"]}, batch)


def test_a_problem_with_constants_in_float32_is_checked_in_float32():
    report = check(Single(), QuadraticSampler(), ITD(inner_steps=60, inner_lr=0.3))
    assert report.setting["x, y"].endswith("numbers in float32")
    assert re.search(r"^computed in float32, .*\.double\(\)\): RuntimeError: ", only_note(report))
    assert max(errors(report).values()) < 1e-2
    report = check(regression(), curves(), ITD(inner_steps=2, inner_lr=0.01))
    assert report.setting["x, y"].endswith("numbers in float64")
    assert not any(note.startswith("computed") for note in report.notes)


# What is refused


@dataclass(frozen=True)
class Exploding(ITD):
    """Fine on a new state, infinite on one that was kept."""

    def estimate(self, oracle, context, state):
        estimate = super().estimate(oracle, context, state)
        factor = 1.0 if oracle.step == 0 else float("inf")
        return estimate._replace(hypergradient=scale(estimate.hypergradient, factor))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 0}, "num_directions must be >= 1, got 0"),
        ({"max_dense": 0}, "max_dense must be >= 1, got 0"),
        ({"repeats": (1, 0)}, r"repeats must hold numbers >= 1, got \[1, 0\]"),
        ({"batch_size": 0}, "batch_size must be >= 1 or None, got 0"),
        ({"tasks": 3}, "sampler must have a method sample"),
        ({"tasks": QuadraticSampler(broken=(0,))}, "outer_loss must be finite on task 0"),
        ({"algorithm": ITD(inner_lr=1e200)}, "the hypergradient of task 0 must be finite"),
        ({"algorithm": object()}, "algorithm must have the methods init, estimate, adapt"),
        ({"problem": object()}, "problem must have the methods init_outer"),
        (
            {"algorithm": Exploding(), "repeats": (1, 5)},
            "the hypergradient must be finite, got NaN or Inf in estimate 2 at the same x: the "
            "kept state diverges",
        ),
        (
            {"outer": {"x": torch.zeros(2, dtype=torch.int64)}},
            "outer must hold tensors of one floating dtype",
        ),
    ],
)
def test_it_refuses_what_it_cannot_check(options, message):
    arguments: dict[str, Any] = {
        "problem": Quadratic(2, 4),
        "tasks": QuadraticSampler(),
        "algorithm": ITD(),
    }
    with pytest.raises(ValueError, match=message):
        check(**arguments | options)


def test_nothing_that_was_given_is_changed():
    problem, outer, task = golden_quadratic()
    before = outer["x"].clone()
    check(problem, task, NoLoopAID(), outer, repeats=(3,))
    assert torch.equal(outer["x"], before) and outer["x"].grad is None
    assert isinstance(task, Task) and not task.support.tensors[0].requires_grad


def test_the_report_is_readable():
    problem, outer, task = golden_quadratic()
    text = str(check(problem, task, Noisy(inner_steps=4), outer, repeats=(1, 3)))
    assert text.startswith("Noisy(inner_steps=4, inner_lr=0.1,")
    assert max(map(len, text.splitlines())) <= 100
    for expected in (
        "the unrolled map x -> f(x, A(x))",
        "the solution x -> f(x, y*(x))",
        "state kept: the last, of the solution",
        "|grad_y g| after adaptation:",
        "4 inner_grad, 1 outer_grads, 4 hvp, 4 jvp",
    ):
        assert expected in text, text


def test_what_the_algorithm_reports_is_not_taken_for_markup():
    metrics, notes = {"[red] x": 0.5}, ("[/] y",)
    strange = HypergradientReport("A(['b'])", "the solution", {}, (), (), metrics, {}, notes)
    assert "A(['b'])" in str(strange) and "[red] x:" in str(strange) and "[/] y" in str(strange)
    assert "no derivative" in str(strange) and strange.error == float("inf")


def test_at_a_solution_where_the_hypergradient_is_zero_nothing_is_nan():
    problem, outer, task = golden_quadratic()
    a, b, c, t = (tensor.mean(0) for tensor in (*task.support.tensors, task.query.tensors[0]))
    inverse = torch.linalg.inv(a)
    matrix = problem.rho * torch.eye(2, dtype=a.dtype) + b.T @ inverse @ inverse @ b
    outer = {"x": torch.linalg.solve(matrix, b.T @ inverse @ (t - inverse @ c))}
    assert float(true_hypergradient(problem, outer, task).norm()) < 1e-12
    report = check(problem, task, ITD(inner_steps=5, inner_lr=0.2), outer)
    assert all(error == error for error in errors(report).values())


def test_a_report_is_text_in_a_notebook_too(monkeypatch):
    """Where rich finds Jupyter it would display the report, and leave the text empty."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    report = check(Quadratic(2, 4), quadratic_task(0), ITD(inner_steps=3))
    assert "the unrolled map" in str(report)
