"""What a solution is worth: the figures by which runs are compared."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch

from metadist.algorithm import split_own
from metadist.problem import Problem
from metadist.task import TaskSampler, to_device
from metadist.trainer import Trainer
from metadist.trees import Params


def solution_figures(
    problem: Problem, sampler: TaskSampler, outer: Params, inner: Params, index: int = 0
) -> dict[str, float]:
    """The figures of a solution (x, y) of one problem, by name.

    `query_loss` is f and `support_loss` is g on the whole sets of the task, `query_<name>` are the
    problem's `metrics`. What the optional methods `problem.figures(outer, inner)` and
    `sampler.figures(problem, outer, inner)` return is added, for example the distance to a known
    solution or the accuracy on test data.

    Args:
        problem: the problem.
        sampler: its data; `figures` of it is about the task 0.
        outer: x; the algorithm's own variables in it are ignored.
        inner: y, for example `Trainer.inner(index)`.
        index: which task.
    """
    outer, _ = split_own(outer)
    leaf = next(iter(outer.values()))
    task = to_device(sampler.sample(index), leaf.device, leaf.dtype)
    with torch.no_grad():
        context = problem.encode(outer, task)
        found = {
            "query_loss": problem.outer_loss(context, inner, task.query),
            "support_loss": problem.inner_loss(context, inner, task.support),
        }
        for name, value in problem.metrics(context, inner, task.query).items():
            found[f"query_{name}"] = value
    figures = {name: float(value) for name, value in found.items()}
    figures |= _optional(problem)(outer, inner)
    if index == 0:
        figures |= _optional(sampler)(problem, outer, inner)
    return figures


def kept_figures(trainer: Trainer) -> dict[str, float]:
    """`solution_figures` of a training that keeps states, at its x; means over its tasks."""
    found = [
        solution_figures(
            trainer.problem, trainer.sampler, trainer.outer, trainer.inner(index), index
        )
        for index in range(trainer.workload.meta_batch_size)
    ]
    return {name: fmean(figures[name] for figures in found if name in figures) for name in found[0]}


def _optional(owner: object) -> Callable[..., dict[str, float]]:
    """The method `figures` of a problem or sampler, or one that finds nothing."""
    method = getattr(owner, "figures", None)
    return method if callable(method) else lambda *arguments: {}
