"""Evaluation: adapt to many tasks, judge on their query sets, report mean and interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch

from metadist.algorithm import Algorithm, split_own
from metadist.autograd import AutogradOracle
from metadist.compute import AS_TORCH_IS_SET, Compute, intra_op_threads, pick_device
from metadist.hypergradient import adaptation_metrics, vectorizes
from metadist.problem import Problem
from metadist.task import Task, TaskSampler, stack_tasks, to_device
from metadist.trees import Params, detach, select, tree_map

TASKS_AT_A_TIME = 25


@dataclass(frozen=True)
class Interval:
    """A mean over tasks and the half width of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.half_width:.4f}"


@dataclass(frozen=True)
class EvaluationResult:
    """Means over tasks by name of the metric, and the protocol they were obtained by.

    Names: `query_loss`, `query_accuracy` (classification), the same with `_before` for the start
    of adaptation, `support_loss`.
    """

    metrics: dict[str, Interval]
    protocol: dict[str, str]

    @property
    def score(self) -> float:
        """Larger is better: the accuracy, or the negative query loss."""
        accuracy = self.metrics.get("query_accuracy")
        return accuracy.mean if accuracy else -self.metrics["query_loss"].mean

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        return dataclasses.asdict(self)


def evaluate(
    problem: Problem,
    sampler: TaskSampler,
    algorithm: Algorithm,
    outer: Params,
    num_tasks: int = 600,
    *,
    inner_steps: int | None = None,
    compute: Compute = AS_TORCH_IS_SET,
) -> EvaluationResult:
    """Mean and 95 % t-interval over the tasks 0 .. num_tasks-1 of `sampler`.

    Args:
        problem: The problem.
        algorithm: Adaptation is its `adapt`; no hypergradient is computed.
        sampler: The sampler of the split to judge on.
        outer: The outer variable, the algorithm's own variables included.
        num_tasks: >= 2; 600 is the convention of the field.
        inner_steps: Steps of adaptation; None: as in training.
        compute: On which device and how; its batch_size is that of the support set. By default
            with threads as torch is set.

    Raises:
        ValueError: num_tasks < 2, or inner_steps with an algorithm that has none.
        FloatingPointError: a metric of a task is NaN or infinite; the task is named.
    """
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be >= 2 for an interval, got {num_tasks}")
    if inner_steps is not None:
        algorithm = with_inner_steps(algorithm, inner_steps)
    metrics = evaluate_tasks(problem, sampler, algorithm, outer, num_tasks, compute=compute)
    protocol = {
        "tasks": f"{num_tasks} (indices 0 .. {num_tasks - 1})",
        "sampler": describe_sampler(sampler),
        "algorithm": repr(algorithm),
        **problem.describe(),
        "interval": "95 % Student t over tasks",
    }
    return EvaluationResult({k: mean_interval(v) for k, v in metrics.items()}, protocol)


def evaluate_tasks(
    problem: Problem,
    sampler: TaskSampler,
    algorithm: Algorithm,
    outer: Params,
    num_tasks: int,
    *,
    compute: Compute = AS_TORCH_IS_SET,
) -> dict[str, list[float]]:
    """The metrics of each of the tasks 0 .. num_tasks-1 by name; arguments as of `evaluate`."""
    where = pick_device(compute.device)
    size = compute.chunk_size or TASKS_AT_A_TIME
    outer = {name: leaf.detach().to(where) for name, leaf in outer.items()}
    leaf = next(iter(outer.values()))
    metrics: dict[str, list[float]] = {}
    with intra_op_threads(compute.num_threads):
        for first in range(0, num_tasks, size):
            indices = range(first, min(first + size, num_tasks))
            tasks = [to_device(sampler.sample(i), where, leaf.dtype) for i in indices]
            found = _adapt_and_judge(problem, algorithm, outer, tasks, compute)
            for index, of_task in zip(indices, found, strict=True):
                _require_finite(of_task, index)
                for name, value in of_task.items():
                    metrics.setdefault(name, []).append(value)
    return metrics


def _require_finite(metrics: Mapping[str, float], index: int) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} must be finite, got {value} in task {index}: adaptation diverges there; "
                "try a smaller inner_lr or fewer inner_steps"
            )


def with_inner_steps(algorithm: Algorithm, inner_steps: int) -> Algorithm:
    """The algorithm with another number of inner steps, for adaptation only."""
    fields = {f.name for f in dataclasses.fields(algorithm)}  # type: ignore[arg-type]
    if "inner_steps" not in fields:
        raise ValueError(
            f"inner_steps must be None for {type(algorithm).__name__}, which has none, "
            f"got {inner_steps}"
        )
    changes: dict[str, Any] = {"inner_steps": inner_steps}
    if "truncate" in fields:
        changes["truncate"] = None  # of no effect on adaptation
    return dataclasses.replace(algorithm, **changes)  # type: ignore[type-var]


def _adapt_and_judge(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
    compute: Compute,
) -> list[dict[str, float]]:
    problem_outer, own = split_own(outer)
    together = vectorizes(compute.vectorize, problem, algorithm, outer, tasks)

    def judge(context: Params, start: Params, task: Task) -> dict[str, torch.Tensor]:
        oracle = AutogradOracle(
            problem,
            task,
            compute.batch_size,
            compute.seed,
            compile=algorithm.compiles,
            eager=not together,
        )
        adapted = algorithm.adapt(oracle, {**context, **own}, start)
        return adaptation_metrics(problem, context, start, adapted, task)

    if not together:
        found = []
        for task in tasks:
            with torch.no_grad():
                context = problem.encode(problem_outer, task)
                start = problem.init_inner(problem_outer, task)
            found.append({k: float(v) for k, v in judge(detach(context), start, task).items()})
        return found
    stacked = stack_tasks(tasks)
    with torch.no_grad():
        context = problem.encode_tasks(problem_outer, stacked)
        start = torch.func.vmap(problem.init_inner, in_dims=(None, 0))(problem_outer, stacked)
    start = tree_map(torch.Tensor.contiguous, start)
    columns = torch.func.vmap(judge)(context, start, stacked)
    rows = [select(columns, b) for b in range(len(tasks))]
    return [{name: float(value) for name, value in row.items()} for row in rows]


def mean_interval(values: list[float]) -> Interval:
    """The mean of `values` (at least 2) and the half width of its 95 % t-interval."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, student_t(count - 1) * math.sqrt(variance / count))


@lru_cache
def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection on its distribution function."""

    def upper_tail(t: float) -> float:
        # Simpson's rule on x = sqrt(degrees) tan(angle), where the density is cos^(degrees-1).
        angle = math.atan(t / math.sqrt(degrees))
        steps = 2000
        width = angle / steps
        heights = [math.cos(width * i) ** (degrees - 1) for i in range(steps + 1)]
        area = heights[0] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]) + heights[-1]
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        return 0.5 - area * width / 3 * scale / math.sqrt(math.pi)

    low, high = NormalDist().inv_cdf(0.975), 13.0  # 12.71 with one degree of freedom
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle) > 0.025 else (low, middle)
    return (low + high) / 2


def describe_sampler(sampler: Any) -> str:
    """A sampler in words: its own repr if it has one, otherwise its class and simple fields."""
    if "__repr__" in vars(type(sampler)):
        return repr(sampler)
    fields: Mapping[str, Any] = getattr(sampler, "__dict__", {})
    simple = [
        f"{name}={value!r}"
        for name, value in fields.items()
        if isinstance(value, (int, float, str, bool)) and not name.startswith("_")
    ]
    return f"{type(sampler).__name__}({', '.join(simple)})"
