"""Reports, checks and metrics take no more examples at once than they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import BOME, ITD, SOBA, FreePBGD
from metadist.compare import kept_metrics
from metadist.compute import Compute
from metadist.draws import MiniBatches, first_parts, in_parts
from metadist.evaluation import evaluate
from metadist.hypergradient import task_hypergradients
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks import FixedTasks
from metadist.tasks.fixed import AT_ONCE, metrics_on
from metadist.trees import Params
from tests.problems import DOUBLE, Smooth, assert_close, generator, smooth_task

SGD = OuterOptimizer("sgd", lr=0.1)


class Weighted(Problem):
    """Means with a weight for each support example; it counts the examples that it reads."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples
        self.most = 0

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"w": torch.randn(self.num_examples, generator=generator, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.zeros(3, dtype=DOUBLE)}

    def per_example(self, outer: Params) -> set[str]:
        return {"w"}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
        weights = context["w"][batch.index].sigmoid()
        return (weights * self.errors(inner, batch)).mean() + 0.01 * inner["y"].square().sum()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
        return self.errors(inner, batch).mean() + 1e-3 * context["w"].square().sum()

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, torch.Tensor]:
        return {"near": (self.errors(inner, batch) < 1).double().mean()}

    def errors(self, inner: Params, batch: Batch) -> torch.Tensor:
        inputs, targets = batch.tensors
        self.most = max(self.most, len(inputs))
        return (inputs @ inner["y"] - targets).square()


@pytest.mark.parametrize("algorithm", [SOBA(), BOME(), FreePBGD(), ITD(inner_steps=2)])
@pytest.mark.parametrize("report_examples", [None, 30])
def test_no_more_examples_are_read_at_once_than_a_batch_or_a_report(
    algorithm, report_examples, monkeypatch
):
    compute = Compute(batch_size=10, report_examples=report_examples)
    problem = Weighted(700)
    task = smooth_task(0, 700, 900)
    if isinstance(algorithm, FreePBGD):
        monkeypatch.setattr(Weighted, "per_example", lambda self, outer: set())
    trainer = Trainer(
        problem,
        FixedTasks([task]),
        algorithm,
        outer_optimizer=SGD,
        compute=compute,
        val_sampler=FixedTasks([task, smooth_task(1, 700, 900)]),
        val_every=2,
        eval_inner_steps=1 if isinstance(algorithm, ITD) else None,
        log_every=1,
        quiet=True,
    )
    trainer.fit(3)
    assert problem.most == (report_examples or 256)
    found = kept_metrics(trainer)
    assert problem.most == (report_examples or 256)
    context, inner = trainer.outer, trainer.inner(0)
    assert found["query_loss"] == pytest.approx(float(problem.outer_loss(context, inner, task[1])))
    assert found["support_loss"] == pytest.approx(
        float(problem.inner_loss(context, inner, task[0]))
    )
    near = problem.metrics(context, inner, task[1])["near"]
    assert found["query_near"] == pytest.approx(float(near))
    assert problem.most == 900


def test_with_no_more_examples_than_a_report_they_stay_whole_and_in_order():
    task = smooth_task(0, 7, 5)
    assert first_parts(task, Compute(batch_size=2).part_size, 0)[0] is task.support
    assert first_parts(task, None, 0)[1] is task.query


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_parts_of_a_set_are_the_whole_of_it(size):
    task = smooth_task(3, 7, 4)
    parts = list(in_parts(task, "support", size, 5))
    assert sorted(i for _, batch in parts for i in batch.index.tolist()) == list(range(7))
    assert sum(share for share, _ in parts) == pytest.approx(1)
    assert all(share == pytest.approx(len(batch.index) / 7) for share, batch in parts)


def test_a_report_is_about_the_same_examples_at_every_step():
    problem, task = Weighted(50), smooth_task(0, 50, 60)
    outer = problem.init_outer(generator(0))
    compute = Compute(batch_size=5, report_examples=20)
    some = first_parts(task, 20, compute.seed)
    assert len(some.support.index) == 20
    for step in (0, 4):
        found = task_hypergradients(
            problem, ITD(inner_steps=1), outer, [task], compute=compute, report=True, step=step
        )
        start = {"y": torch.zeros(3, dtype=DOUBLE)}
        expected = problem.outer_loss(outer, start, some.query)
        assert found.metrics["query_loss_before"] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("together", [False, True])
def test_an_evaluation_in_parts_has_the_values_of_the_whole(together):
    problem = Smooth()
    outer = problem.init_outer(generator(0))
    sampler = FixedTasks([smooth_task(index, 20, 23) for index in range(3)])
    whole, parts = (
        evaluate(
            problem,
            sampler,
            ITD(inner_steps=2, inner_lr=0.1),
            outer,
            3,
            compute=Compute(report_examples=size, vectorize=together),
        )
        for size in (None, 6)
    )
    for name, interval in whole.metrics.items():
        assert parts.metrics[name].mean == pytest.approx(interval.mean, rel=1e-12)


def test_a_loss_that_is_a_sum_is_taken_as_it_is_on_each_part_as_on_each_draw():
    class Sums(Weighted):
        def outer_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
            return self.errors(inner, batch).sum()

    problem, task = Sums(12), smooth_task(0, 12, 12)
    outer = problem.init_outer(generator(0))
    found = evaluate(
        problem,
        FixedTasks([task, task]),
        ITD(inner_steps=1, inner_lr=1e-9),
        outer,
        2,
        compute=Compute(report_examples=4),
    )
    start = problem.init_inner(outer, task)
    whole = float(problem.outer_loss(outer, start, task.query))
    assert found.metrics["query_loss"].mean == pytest.approx(whole / 3, rel=1e-6)


def test_test_data_is_judged_in_parts():
    task = smooth_task(0, 3, AT_ONCE + 40)
    problem = Weighted(3)
    outer = problem.init_outer(generator(0))
    inner = {"y": torch.ones(3, dtype=DOUBLE)}
    found = metrics_on(problem, outer, inner, task.query)
    assert problem.most == AT_ONCE
    assert found["test_loss"] == pytest.approx(float(problem.outer_loss(outer, inner, task.query)))


def test_f_has_a_batch_size_of_its_own():
    draws = MiniBatches((9, 8), 0, (4, 3), 0, 0)
    assert draws.size(draws.draw("support")) == 4 and draws.size(draws.draw("query")) == 3
    assert [round((part.share or 0) * 8) for part in draws.parts("query")] == [3, 3, 2]
    one_sided = MiniBatches((9, 8), 0, (None, 3), 0, 0)
    assert one_sided.is_whole("support") and not one_sided.is_whole("query")
    with pytest.raises(ValueError, match="batch_size must be >= 1 or None"):
        MiniBatches((9, 8), 0, (4, 0), 0, 0)
    with pytest.raises(ValueError, match="outer_batch_size must be >= 1"):
        Compute(outer_batch_size=0)
    assert Compute(batch_size=4).batch_sizes == (4, 4)

    problem, task = Weighted(9), smooth_task(0, 9, 8)
    outer = problem.init_outer(generator(1))

    def hypergradient(**sizes: Any) -> Params:
        return task_hypergradients(
            problem, ITD(inner_steps=2), outer, [task], compute=Compute(**sizes), step=3
        ).total

    # f on all of its set and g on draws, by a size that is larger than the set.
    whole_f = hypergradient(batch_size=4, outer_batch_size=100)
    assert_close(whole_f, hypergradient(batch_size=4, outer_batch_size=8), 1e-15)
    assert not torch.equal(whole_f["w"], hypergradient(batch_size=4)["w"])
    assert not torch.equal(whole_f["w"], hypergradient(outer_batch_size=8)["w"])
