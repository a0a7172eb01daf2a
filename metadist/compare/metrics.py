"""The metrics of a solution, by which runs are compared."""

from __future__ import annotations

from statistics import fmean

import torch

from metadist.algorithm import split_own
from metadist.compute import DEFAULT, Compute
from metadist.draws import in_parts
from metadist.metrics import adaptation_metrics
from metadist.problem import Problem, context_of
from metadist.sampler import Measured, TaskSampler, sample_task
from metadist.task import to_device
from metadist.trainer import Trainer
from metadist.trees import Params


def solution_metrics(
    problem: Problem,
    sampler: TaskSampler,
    outer: Params,
    inner: Params,
    index: int = 0,
    step: int = 0,
    carried: Params | None = None,
    compute: Compute = DEFAULT,
) -> dict[str, float]:
    """The metrics of a solution (x, y) of one problem, by name.

    `query_loss` is f and `support_loss` is g on the whole sets of the task, `query_<name>` are the
    problem's `metrics`. The optional methods `problem.solution_metrics(outer, inner)` and
    `sampler.solution_metrics(problem, outer, inner)` add to these, for example the distance to a
    known solution or the accuracy on test data.

    Args:
        problem: The problem.
        sampler: The tasks; its own `solution_metrics` are about the task 0.
        outer: The variable x; the algorithm's own variables in it are ignored.
        inner: The variable y, for example `Trainer.inner(index)`.
        index: The index of the task.
        step: The outer step whose data is asked of a `Stream`.
        carried: What the problem carries, for example `Trainer.carried(index)`; None: as at the
            start.
        compute: How large the parts are in which losses are computed, see `Compute`.
    """
    outer, _ = split_own(outer)
    leaf = next(iter(outer.values()))
    task = to_device(sample_task(sampler, index, step), leaf.device, leaf.dtype)
    with torch.no_grad():
        context = context_of(problem, outer, task, carried)
    found = adaptation_metrics(
        problem,
        context,
        None,
        inner,
        in_parts(task, "support", compute.part_size, compute.seed),
        in_parts(task, "query", compute.part_size, compute.seed),
    )
    first = "query_loss", "support_loss"
    metrics = {name: float(found[name]) for name in (*first, *found)}
    metrics |= problem.solution_metrics(outer, inner)
    if index == 0 and isinstance(sampler, Measured):
        metrics |= sampler.solution_metrics(problem, outer, inner)
    return metrics


def kept_metrics(trainer: Trainer) -> dict[str, float]:
    """`solution_metrics` of a training that keeps states, at its x; means over its tasks."""
    found = [
        solution_metrics(
            trainer.problem,
            trainer.sampler,
            trainer.outer,
            trainer.inner(index),
            index,
            trainer.last_step,
            trainer.carried(index),
            trainer.workload.compute,
        )
        for index in range(trainer.workload.meta_batch_size)
    ]
    return {name: fmean(metrics[name] for metrics in found if name in metrics) for name in found[0]}
