"""Evaluation: the numbers one gets by hand, and the protocol they come with."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from metadist import AutogradOracle, LocalExecutor, best_inner_steps, evaluate, predict
from metadist.algorithms import ITD, Reptile
from metadist.compute import AS_TORCH_IS_SET, Compute
from metadist.evaluation import EvaluationResult, describe_sampler, evaluate_tasks, with_inner_steps
from metadist.intervals import Interval, mean_interval, student_t
from metadist.models import Conv4
from metadist.problem import Problem
from metadist.step_rules import SGD, Adam
from metadist.tasks import FewShotProblem, Glyphs
from metadist.tasks.few_shot.problem import QUERY
from tests.helpers import Images, Spoiled, curves, regression, small_conv4, with_compute
from tests.problems import (
    Quadratic,
    QuadraticSampler,
    Smooth,
    assert_close,
    generator,
    plain_objective,
    quadratic_terms,
    smooth_task,
)

SMOOTH = SimpleNamespace(sample=smooth_task)


def smooth_outer():
    return Smooth().init_outer(generator(1))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 29, 99, 599, 10_000])
def test_the_quantile_is_that_of_scipy(degrees):
    assert student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-7)


@pytest.mark.parametrize("count", [2, 3, 10, 600])
def test_the_interval_is_mean_and_t_times_standard_error(count):
    values = np.random.default_rng(count).normal(3, 2, count)
    found = mean_interval(values.tolist())
    low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-6)
    assert str(found) == f"{found.mean:.4f} +- {found.half_width:.4f}"


def test_equal_values_have_no_width():
    assert mean_interval([0.5] * 7) == Interval(0.5, 0.0)


def test_the_figures_are_those_of_adaptation_by_hand():
    problem, outer = Smooth(), smooth_outer()
    result = evaluate(problem, SMOOTH, ITD(inner_steps=3, inner_lr=0.1), outer, 7)
    losses, starts = (
        [plain_objective(problem, outer, smooth_task(i), steps, 0.1).item() for i in range(7)]
        for steps in (3, 0)
    )
    assert result.metrics["query_loss"].mean == pytest.approx(np.mean(losses), abs=1e-12)
    assert result.metrics["query_loss_before"].mean == pytest.approx(np.mean(starts), abs=1e-12)
    error = float(np.std(losses, ddof=1) / math.sqrt(7))
    assert result.metrics["query_loss"].half_width == pytest.approx(
        scipy.stats.t.ppf(0.975, 6) * error, rel=1e-6
    )
    assert set(result.metrics) == {
        *("query_loss", "query_loss_before", "query_error", "query_error_before", "support_loss"),
    }
    assert result.score == -result.metrics["query_loss"].mean


@pytest.mark.parametrize("vectorize", [True, False])
def test_without_metrics_before_adaptation_the_others_are_the_same(vectorize):
    def judged(before):
        compute = Compute(vectorize=vectorize)
        arguments = (Smooth(), SMOOTH, ITD(inner_steps=3, inner_lr=0.1), smooth_outer(), 4)
        return evaluate(*arguments, compute=compute, before=before).metrics

    most, few = judged(True), judged(False)
    assert few == {name: most[name] for name in ("query_loss", "query_error", "support_loss")}


def test_after_many_steps_the_figures_are_those_of_the_exact_solution():
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    found = evaluate(problem, QuadraticSampler(), ITD(inner_steps=300, inner_lr=0.3), outer, 5)
    losses = []
    for index in range(5):
        task = QuadraticSampler().sample(index)
        a, b, c, _ = quadratic_terms(task)
        solution = torch.linalg.solve(a, b @ outer["x"] + c)
        losses.append(float(problem.outer_loss(outer, {"y": solution}, task.query)))
    assert found.metrics["query_loss"].mean == pytest.approx(np.mean(losses), abs=1e-10)


@pytest.mark.parametrize(
    "algorithm",
    [
        ITD(inner_steps=3),
        ITD(inner_steps=2, inner_optimizer=SGD(0.1, momentum=0.9)),
        Reptile(inner_steps=3),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_together_and_one_by_one_give_the_same_numbers(algorithm, batch_size):
    ways: list[dict[str, Any]] = [
        {"vectorize": False},
        {"vectorize": True},
        {"vectorize": True, "chunk_size": 4},
        {"vectorize": "auto", "chunk_size": 2},
    ]
    results = [
        evaluate(
            Smooth(),
            SMOOTH,
            algorithm,
            smooth_outer(),
            9,
            compute=Compute(batch_size=batch_size, **way),
        )
        for way in ways
    ]
    for result in results[1:]:
        for name, expected in results[0].metrics.items():
            assert result.metrics[name].mean == pytest.approx(expected.mean, abs=1e-11)
            assert result.metrics[name].half_width == pytest.approx(expected.half_width, abs=1e-11)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [11]), ({"vectorize": False}, [5, 5, 1]), ({"chunk_size": 8}, [8, 3])],
)
def test_workers_are_sent_fewer_tasks_at_a_time_where_each_is_computed_alone(options, sizes):
    class Seen(LocalExecutor):
        def judge(self, judge, outer, chunks):
            assert [len(chunk) for chunk in chunks] == sizes
            return super().judge(judge, outer, chunks)

    task = (Smooth(), SMOOTH, ITD(inner_steps=2), smooth_outer(), 11)
    compute = Compute(**options)
    assert evaluate(*task, compute=compute, executor=Seen()) == evaluate(*task, compute=compute)


def test_two_evaluations_are_the_same_to_the_bit_and_the_global_state_is_left_alone():
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    results = [
        evaluate(
            *(Smooth(), SMOOTH, ITD(inner_steps=2), smooth_outer(), 6),
            compute=Compute(batch_size=2, seed=4, num_threads=2),
        )
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    other = evaluate(
        Smooth(),
        SMOOTH,
        ITD(inner_steps=2),
        smooth_outer(),
        6,
        compute=Compute(batch_size=2, seed=5),
    )
    assert other.metrics["support_loss"] != results[0].metrics["support_loss"]


def test_more_inner_steps_can_be_taken_than_in_training():
    problem, outer = Smooth(), smooth_outer()
    found = evaluate(problem, SMOOTH, ITD(inner_steps=1, truncate=1), outer, 4, inner_steps=6)
    assert found == evaluate(problem, SMOOTH, ITD(inner_steps=6), outer, 4)
    assert "inner_steps=6" in found.protocol["algorithm"]
    assert with_inner_steps(ITD(inner_steps=5, truncate=4), 2) == ITD(inner_steps=2)
    with pytest.raises(ValueError, match=r"^inner steps of an evaluation must suit ITD, got 1: "):
        with_inner_steps(ITD(inner_steps=5, inner_optimizer=Adam(0.1)), 1)


@pytest.mark.parametrize("learn_lr", ["per_tensor", "per_element"])
def test_learned_rates_are_used(learn_lr):
    problem, outer = Smooth(), smooth_outer()
    algorithm = ITD(inner_steps=2, inner_lr=9.0, learn_lr=learn_lr)
    start = problem.init_inner(outer, smooth_task(0))
    own = {name: 0 * leaf + 0.1 for name, leaf in algorithm.init_own(start).items()}
    found = evaluate(problem, SMOOTH, algorithm, {**outer, **own}, 4)
    expected = evaluate(problem, SMOOTH, ITD(inner_steps=2, inner_lr=0.1), outer, 4)
    assert found.metrics["query_loss"].mean == pytest.approx(
        expected.metrics["query_loss"].mean, abs=1e-12
    )


@pytest.mark.parametrize("vectorize", [True, False])
def test_no_hypergradient_is_computed_and_no_graph_is_kept(monkeypatch, vectorize):
    def refuse(*arguments):
        raise AssertionError("not needed for adaptation")

    for name in ("outer_grads", "second_order", "hvp", "inner_value", "outer_value"):
        monkeypatch.setattr(AutogradOracle, name, refuse)
    seen = []
    metrics = Smooth.metrics

    def look(self, context, inner, batch):
        leaves = (*context.values(), *inner.values())
        seen.append(any(leaf.requires_grad or leaf.grad_fn for leaf in leaves))
        return metrics(self, context, inner, batch)

    monkeypatch.setattr(Smooth, "metrics", look)
    outer = {name: leaf.requires_grad_() for name, leaf in smooth_outer().items()}
    evaluate(Smooth(), SMOOTH, ITD(inner_steps=2), outer, 3, compute=Compute(vectorize=vectorize))
    assert seen and not any(seen)


def evaluate_curves(broken, compute=AS_TORCH_IS_SET):
    outer = regression().init_outer(generator(0))
    sampler = Spoiled(curves(), broken=broken)
    return evaluate(regression(), sampler, ITD(), outer, 6, compute=compute)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("broken", [(4,), (0, 5)])
def test_tasks_that_diverge_are_in_no_mean_and_named(vectorize, broken):
    compute = Compute(vectorize=vectorize, chunk_size=3)
    result = evaluate_curves(broken, compute)
    outer = regression().init_outer(generator(0))
    all_values = evaluate_tasks(regression(), curves(), ITD(), outer, 6, compute=compute)
    kept = {
        name: [value for index, value in enumerate(column) if index not in broken]
        for name, column in all_values.items()
    }
    assert result.metrics == {name: mean_interval(column) for name, column in kept.items()}
    assert result.dropped == {name: list(broken) for name in kept}
    assert result.num_dropped == len(broken)
    assert (
        f"query_loss is the mean of {6 - len(broken)} of 6 tasks, not finite in "
        f"{', '.join(map(str, broken))}"
    ) in result.protocol["dropped"]
    # In the score each of them counts as the worst of the others.
    losses = [*kept["query_loss"], *[max(kept["query_loss"])] * len(broken)]
    assert result.score == pytest.approx(-math.fsum(losses) / 6)


def test_nothing_dropped_says_nothing():
    result = evaluate_curves(())
    assert result.dropped == {} and result.num_dropped == 0 and result.penalty == 0.0
    assert "dropped" not in result.protocol


@pytest.mark.parametrize("broken", [range(6), range(1, 6)])
def test_an_evaluation_without_two_finite_tasks_is_an_error(broken):
    with pytest.raises(
        FloatingPointError,
        match=rf"support_loss must be finite in at least 2 tasks, got nan in task {broken[0]} and "
        rf"{len(broken)} of 6 tasks that are not: adaptation diverges there; try a smaller",
    ):
        evaluate_curves(broken)


class Odd(Smooth):
    """With a metric that is undefined in the tasks of a mean below `limit`."""

    limit = 0.0

    def metrics(self, context, inner, batch):
        mean = batch.tensors[0].mean()
        value = torch.where(mean < self.limit, torch.nan, 0.5 + 0 * mean)
        return {**super().metrics(context, inner, batch), "accuracy": value}


def test_an_undefined_metric_leaves_the_others_alone():
    problem, outer = Odd(), smooth_outer()
    result = evaluate(problem, SMOOTH, ITD(inner_steps=1), outer, 8)
    means = [smooth_task(index).query.tensors[0].mean() for index in range(8)]
    undefined = [index for index, mean in enumerate(means) if mean < 0]
    assert 0 < len(undefined) < 7  # or this test says nothing
    names = ["query_accuracy", "query_accuracy_before"]
    assert result.dropped == dict.fromkeys(names, undefined)
    assert result.metrics["query_accuracy"] == Interval(0.5, 0.0)
    # An accuracy that is undefined counts as 0 where checkpoints are compared.
    assert result.score == pytest.approx(0.5 * (8 - len(undefined)) / 8)
    plain = evaluate(Smooth(), SMOOTH, ITD(inner_steps=1), outer, 8)
    assert result.metrics["query_loss"] == plain.metrics["query_loss"]


def test_an_accuracy_that_is_undefined_everywhere_gives_no_score(monkeypatch):
    monkeypatch.setattr(Odd, "limit", math.inf)
    result = evaluate(Odd(), SMOOTH, ITD(inner_steps=1), smooth_outer(), 4)
    assert "query_accuracy" not in result.metrics and "query_loss" in result.metrics
    assert result.score == -math.inf


class Counted(FewShotProblem):
    """Counts its passes through the query set."""

    num_passes = 0

    def predict(self, context, inner, batch, source=QUERY):
        Counted.num_passes += source == QUERY
        return super().predict(context, inner, batch, source)


class WithOtherLoss(Counted):
    def outer_loss(self, context, inner, batch):
        return 3 * super().outer_loss(context, inner, batch)


class WithOtherMetrics(Counted):
    def metrics(self, context, inner, batch):
        accuracy = super().metrics(context, inner, batch)["accuracy"]
        return {"accuracy": accuracy, "error": 1 - accuracy}


@pytest.mark.parametrize("adapt", ["all", "head"])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    ("kind", "passes"), [(Counted, 1), (WithOtherLoss, 2), (WithOtherMetrics, 2)]
)
def test_loss_and_metrics_come_from_one_pass_unless_a_subclass_changes_one(
    kind, passes, adapt, vectorize, monkeypatch
):
    problem = kind(small_conv4(), adapt=adapt)
    outer, compute = problem.init_outer(generator(0)), Compute(vectorize=vectorize)
    monkeypatch.setattr(Counted, "num_passes", 0)
    found = evaluate_tasks(problem, Images(), ITD(inner_steps=1), outer, 2, compute=compute)
    assert Counted.num_passes == 2 * passes * (1 if vectorize else 2)  # before, after
    monkeypatch.setattr(
        FewShotProblem, "loss_and_metrics", Problem.loss_and_metrics
    )  # each method on its own
    apart = evaluate_tasks(problem, Images(), ITD(inner_steps=1), outer, 2, compute=compute)
    assert found == apart  # to the last bit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 1}, r"num_tasks must be >= 2 for an interval, got 1"),
        ({"inner_steps": 0}, r"inner_steps must be >= 1, got 0"),
        ({"device": "cuda"}, r"device must be 'cpu' or 'auto' where torch sees no GPU, got 'cuda'"),
    ],
)
def test_errors_name_field_rule_and_value(options, message):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = {"num_tasks": 2, **options}
    with pytest.raises(ValueError, match=message):
        evaluate(Smooth(), SMOOTH, ITD(), smooth_outer(), **with_compute(options))


def test_the_protocol_says_how_the_figures_came_about():
    problem = FewShotProblem(small_conv4(), adapt="head")
    outer = problem.init_outer(generator(0))
    result = evaluate(problem, Images(), ITD(inner_steps=2, inner_lr=0.5), outer, 3)
    assert result.protocol == {
        "tasks": "3 (indices 0 .. 2)",
        "sampler": "Images(n_way=3, channels=1)",
        "algorithm": repr(ITD(inner_steps=2, inner_lr=0.5)),
        "model": "Conv4",
        "adapt": "head (2 of 18 tensors)",
        "batch norm": "transductive",
        "loss": "cross_entropy",
        "precision": "highest",
        "interval": "95 % Student t over tasks",
    }
    assert result.score == result.metrics["query_accuracy"].mean
    assert 0 <= result.metrics["query_accuracy_before"].mean <= 1
    data = result.to_json()
    assert data["protocol"] == result.protocol
    assert data["metrics"]["query_loss"] == vars(result.metrics["query_loss"])


def test_features_that_are_computed_once_give_the_figures_of_the_whole_network():
    results = []
    for adapt in ("head", "head.*"):
        problem = FewShotProblem(small_conv4().double(), adapt=adapt)
        outer = problem.init_outer(generator(0))
        results.append(evaluate(problem, Images(), ITD(inner_steps=3), outer, 3))
    means = [{k: torch.tensor(v.mean) for k, v in r.metrics.items()} for r in results]
    assert_close(means[0], means[1], 1e-10)


def test_a_sampler_is_described_by_its_repr_or_its_simple_fields():
    class Plain:
        def __init__(self):
            self.n_way, self.noise, self._cache, self.table = 3, 0.5, 1, [1, 2]

    assert describe_sampler(Plain()) == "Plain(n_way=3, noise=0.5)"
    assert describe_sampler(curves()) == repr(curves())


def test_without_accuracy_the_score_is_the_negative_loss():
    result = EvaluationResult({"query_loss": Interval(2.0, 0.1)}, {})
    assert result.score == -2.0
    result.metrics["query_accuracy"] = Interval(0.0, 0.0)
    assert result.score == 0.0


@pytest.mark.parametrize("vectorize", [True, False])
def test_per_task_has_every_task_and_counts_what_was_taken_for_what(vectorize):
    sampler = Glyphs(n_way=3, k_query=4)
    problem = FewShotProblem(Conv4(n_way=3, width=4), adapt="head")
    outer = problem.init_outer(generator(0))
    compute = Compute(vectorize=vectorize, num_threads=None)
    algorithm = ITD(inner_steps=2, inner_lr=0.1)
    result = evaluate(problem, sampler, algorithm, outer, 7, compute=compute, per_task=True)
    plain = evaluate(problem, sampler, algorithm, outer, 7, compute=compute)
    assert result.metrics == plain.metrics and not plain.per_task and not plain.confusion
    expected: dict[str, dict[str, int]] = {}
    for index in range(7):
        task, names = sampler.sample(index), sampler.classes_of(index)
        logits = predict(problem, algorithm, outer, task)
        targets = task.query.tensors[1]
        hits = (logits.argmax(1) == targets).double().mean()
        assert result.per_task["query_accuracy"][index] == pytest.approx(float(hits))
        for true, found in zip(targets.tolist(), logits.argmax(1).tolist(), strict=True):
            row = expected.setdefault(names[true], {})
            row[names[found]] = row.get(names[found], 0) + 1
    assert result.confusion == expected
    counts = [count for _, _, count in result.confused()]
    assert counts == sorted(counts, reverse=True)
    wrong = 7 * 12 * (1 - result.metrics["query_accuracy"].mean)
    assert sum(counts) == pytest.approx(wrong)


def test_outputs_beyond_the_classes_of_a_task_are_counted_by_number():
    sampler = Glyphs(n_way=3, k_query=4)
    problem = FewShotProblem(Conv4(n_way=5, width=4), adapt="head")
    outer = problem.init_outer(generator(0))
    outer["head.bias"][4] = 100.0
    result = evaluate(problem, sampler, ITD(inner_lr=1e-6), outer, 2, per_task=True)
    names = {name for index in range(2) for name in sampler.classes_of(index)}
    assert result.confusion == {name: {"4": 4} for name in names}


class NoPixels(Images):
    """Task 1 has images of NaN."""

    def sample(self, index):
        task = super().sample(index)
        if index == 1:
            task.support.tensors[0].fill_(torch.nan)
        return task


def test_a_task_that_diverges_is_in_per_task_as_null_and_is_not_counted():
    problem = FewShotProblem(small_conv4(), adapt="head")
    outer = problem.init_outer(generator(0))
    result = evaluate(problem, NoPixels(), ITD(inner_steps=1), outer, 4, per_task=True)
    assert result.to_json()["per_task"]["query_loss"][1] is None
    assert len(result.per_task["query_loss"]) == 4
    assert sum(sum(row.values()) for row in result.confusion.values()) == 3 * 6
    assert set(result.confusion) <= {"0", "1", "2"}


def test_the_number_of_inner_steps_that_is_best_on_validation_is_taken():
    problem, outer = regression(), regression().init_outer(generator(0))
    algorithm = ITD(inner_steps=1, inner_lr=0.02)
    steps, scores = best_inner_steps(problem, curves("val"), algorithm, outer, [1, 3, 9], 6)
    for tried, score in scores.items():
        result = evaluate(problem, curves("val"), algorithm, outer, 6, inner_steps=tried)
        assert score == result.score
    assert scores[steps] == max(scores.values()) and list(scores) == [1, 3, 9]
    wild = ITD(inner_steps=1, inner_lr=3.0)
    steps, scores = best_inner_steps(problem, curves("val"), wild, outer, [300, 1], 6)
    assert steps == 1 and scores[300] == -math.inf
    with pytest.raises(FloatingPointError):
        best_inner_steps(problem, curves("val"), wild, outer, [300], 6)
    with pytest.raises(ValueError, match="choices must name at least one"):
        best_inner_steps(problem, curves("val"), wild, outer, [], 6)
