"""Evaluation: adapt to many tasks, judge on their query sets, report mean and interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metadist.algorithm import Algorithm, split_own
from metadist.autograd import AutogradOracle
from metadist.checks.purity import check_pure, is_known_pure
from metadist.checks.values import require_number
from metadist.chunks import FAILS_UNDER_VMAP, falls_back, vectorizes
from metadist.compute import AS_TORCH_IS_SET, Compute, pick_device
from metadist.confusion import confusion_of, counts_of, take_counts
from metadist.draws import in_parts
from metadist.executor import Executor, LocalExecutor, chunk_in_words
from metadist.feed import send
from metadist.intervals import Interval, mean_interval
from metadist.memory import device_memory
from metadist.metrics import adaptation_metrics
from metadist.problem import Problem, carries, context_of, start_carried, with_carried
from metadist.sampler import (
    Stream,
    TaskSampler,
    num_tasks_of,
    require_sampler,
    require_steps,
    sample_task,
)
from metadist.step_rules import SGD
from metadist.task import Task, stack_tasks, to_device
from metadist.trees import Params, detach, tree_map

TASKS_AT_A_TIME = 25
TASKS_ONE_BY_ONE = 5
"""The tasks that travel to a worker together where they are not computed together anyway."""


@dataclass(frozen=True)
class EvaluationResult:
    """Means over tasks by name of the metric, and the protocol they were obtained by.

    Names: `query_loss`, `query_accuracy` (classification), the same with `_before` for the start
    of adaptation, `support_loss`. `dropped` has, for each metric, the tasks that are not in its
    mean; those whose own loss is not finite are in no mean. `penalty` is the difference they
    make to the score, where each counts as the worst.

    With `per_task`, `per_task` has the metrics of each task by name, and for a classification
    `confusion` counts the query examples of all tasks: confusion[true][predicted], by the names
    that the sampler has for the classes of each task (`NamesTasks`), else by number. Tasks in
    which adaptation diverges are not counted.
    """

    metrics: dict[str, Interval]
    protocol: dict[str, str]
    dropped: dict[str, list[int]] = field(default_factory=dict)
    penalty: float = 0.0
    per_task: dict[str, list[float]] = field(default_factory=dict)
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Larger is better: the accuracy, or the negative query loss; less `penalty`."""
        accuracy = self.metrics.get("query_accuracy")
        score = accuracy.mean if accuracy else -self.metrics["query_loss"].mean
        return score - self.penalty

    @property
    def num_dropped(self) -> int:
        """Tasks that are missing in the mean of some metric."""
        return len(set().union(*self.dropped.values()))

    @property
    def headline(self) -> str:
        """The most important metric, before and after adaptation, in words."""
        name = "query_accuracy" if "query_accuracy" in self.metrics else "query_loss"
        text = f"{name.removeprefix('query_')} {self.metrics[name]}"
        if before := self.metrics.get(f"{name}_before"):
            is_unmoved = before == self.metrics[name]  # as of methods without an inner loop
            text += (
                " (the same before adaptation)" if is_unmoved else f" (before adaptation {before})"
            )
        if dropped := self.dropped.get(name):
            text += f", without {len(dropped)} tasks where it is not finite"
        return text

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data, in which what is not finite is null."""
        data = dataclasses.asdict(self)
        if not self.per_task:
            del data["per_task"], data["confusion"]
            return data
        data["per_task"] = {
            name: [value if math.isfinite(value) else None for value in column]
            for name, column in self.per_task.items()
        }
        return data

    def confused(self) -> list[tuple[str, str, int]]:
        """(true, predicted, how often) of the wrong predictions, the most frequent first."""
        wrong = []
        for true, row in self.confusion.items():
            wrong += [(true, predicted, n) for predicted, n in row.items() if predicted != true]
        return sorted(wrong, key=lambda pair: -pair[2])


def evaluate(
    problem: Problem,
    sampler: TaskSampler,
    algorithm: Algorithm,
    outer: Params,
    num_tasks: int = 600,
    *,
    inner_steps: int | None = None,
    compute: Compute = AS_TORCH_IS_SET,
    executor: Executor | None = None,
    before: bool = True,
    step: int = 0,
    per_task: bool = False,
) -> EvaluationResult:
    """Mean and 95 % t-interval over the tasks 0 .. num_tasks-1 of `sampler`.

    Args:
        problem: The problem.
        algorithm: Adaptation is its `adapt`; no hypergradient is computed.
        sampler: The sampler of the split to judge on.
        outer: The outer variable, the algorithm's own variables included.
        num_tasks: >= 2; 600 is the convention of the field. No more than a fixed set has.
        inner_steps: Steps of adaptation; None: as in training.
        compute: On which device and how; its batch_size is that of the support set. By default
            with threads as torch is set (a worker: as many as the CPUs it has reserved).
        executor: What computes; None: this process. The workers of a `RayExecutor` share the tasks,
            in pieces of `compute.chunk_size`. With the same number of threads the metrics are the
            same to the last bit.
        before: Also judge the start of adaptation, at the cost of one more pass over each query
            set; False: no metrics with `_before`.
        step: The outer step whose data is asked of a `Stream`.
        per_task: Also give the metrics of each task, and for a classification which classes were
            taken for which, see `EvaluationResult`.

    Raises:
        ValueError: num_tasks < 2, inner_steps with an algorithm that has none, a stream that ends
            before `step`, or a problem that is not pure (on a CPU, see `check_pure`).
        FloatingPointError: the losses are NaN or infinite in all tasks but one, or in all. Fewer
            such tasks are left out of the means, and `EvaluationResult` says which.
    """
    require_number(num_tasks=num_tasks, step=step)
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be >= 2 for an interval, got {num_tasks}")
    require_sampler("sampler", sampler)
    require_steps("step + 1", step + 1, sampler)
    if (size := num_tasks_of(sampler)) is not None:
        num_tasks = min(num_tasks, max(2, size))  # tasks that come again would narrow the interval
    _require_pure(problem, sampler, outer, compute, step)
    if inner_steps is not None:
        algorithm = with_inner_steps(algorithm, inner_steps)
    judge = _Judge(problem, sampler, algorithm, compute, before, step, per_task)
    found = _judged(judge, outer, num_tasks, executor)
    counts = [take_counts(of_task) for of_task in found]
    values = _columns(found)
    dropped = _dropped(values)
    kept = {}
    for name, column in values.items():
        left_out = dropped.get(name, ())
        kept[name] = [value for index, value in enumerate(column) if index not in left_out]
    protocol = {
        "tasks": f"{num_tasks} (indices 0 .. {num_tasks - 1})",
        "sampler": describe_sampler(sampler),
        **({"step": str(step)} if isinstance(sampler, Stream) else {}),
        "algorithm": repr(algorithm),
        **problem.describe(),
        **compute.arithmetic,
        "interval": "95 % Student t over tasks",
    }
    if dropped:
        protocol["dropped"] = "; ".join(
            f"{name} is the mean of {len(kept[name])} of {num_tasks} tasks, not finite in "
            f"{_listed(indices)}"
            for name, indices in dropped.items()
        )
    return EvaluationResult(
        metrics={name: mean_interval(column) for name, column in kept.items() if len(column) > 1},
        protocol=protocol,
        dropped=dropped,
        penalty=_penalty(kept, dropped, num_tasks),
        per_task=values if per_task else {},
        confusion=confusion_of(sampler, counts, dropped.get("query_loss", [])),
    )


def best_inner_steps(
    problem: Problem,
    val_sampler: TaskSampler,
    algorithm: Algorithm,
    outer: Params,
    choices: Sequence[int],
    num_tasks: int = 100,
    *,
    compute: Compute = AS_TORCH_IS_SET,
    executor: Executor | None = None,
) -> tuple[int, dict[int, float]]:
    """The number of inner steps with the best score on validation tasks, and the score of each.

        steps, scores = best_inner_steps(problem, val, algorithm, trainer.outer, [5, 10, 20])
        evaluate(problem, test, algorithm, trainer.outer, inner_steps=steps)

    Args:
        problem: The problem.
        val_sampler: The sampler of validation tasks; never those of the test.
        algorithm: As trained.
        outer: The outer variable.
        choices: The numbers to try; of equal scores the first counts.
        num_tasks: As for `evaluate`, as are compute and executor.
        compute: See there.
        executor: See there.

    Raises:
        ValueError: No choices, or as `evaluate`.
        FloatingPointError: Adaptation diverges with every choice; one with which it does has the
            score -inf.
    """
    if not choices:
        raise ValueError("choices must name at least one number of inner steps, got none")
    scores: dict[int, float] = {}
    errors: list[FloatingPointError] = []
    for inner_steps in choices:
        try:
            scores[inner_steps] = evaluate(
                problem,
                val_sampler,
                algorithm,
                outer,
                num_tasks,
                inner_steps=inner_steps,
                compute=compute,
                executor=executor,
                before=False,
            ).score
        except FloatingPointError as error:
            scores[inner_steps] = -math.inf
            errors.append(error)
    if len(errors) == len(scores):
        raise errors[0]
    return max(scores, key=lambda inner_steps: scores[inner_steps]), scores


def _require_pure(
    problem: Problem, sampler: TaskSampler, outer: Params, compute: Compute, step: int
) -> None:
    """See `check_pure`; on a CPU alone, since on a GPU equal sums may differ in bytes."""
    if pick_device(compute.device).type != "cpu" or is_known_pure(problem):
        return
    on_cpu = {name: leaf.detach().cpu() for name, leaf in outer.items()}
    dtype = next(iter(on_cpu.values())).dtype
    tasks = [
        to_device(sample_task(sampler, index, step), "cpu", dtype)
        for index in range(min(2, num_tasks_of(sampler) or 2))
    ]
    check_pure(problem, split_own(on_cpu)[0], tasks[0], compute, tasks[-1])


def _dropped(values: Mapping[str, list[float]]) -> dict[str, list[int]]:
    """By metric, the tasks to leave out of its mean."""
    broken = {
        name: {index for index, value in enumerate(column) if not math.isfinite(value)}
        for name, column in values.items()
    }
    # Where adaptation diverges, a metric such as the accuracy may be finite and mean nothing.
    diverged = broken["support_loss"] | broken["query_loss"]
    num_tasks = len(values["query_loss"])
    if len(diverged) > num_tasks - 2:
        index = min(diverged)
        name = next(name for name in ("support_loss", "query_loss") if index in broken[name])
        raise FloatingPointError(
            f"{name} must be finite in at least 2 tasks, got {values[name][index]} in task {index} "
            f"and {len(diverged)} of {num_tasks} tasks that are not: adaptation diverges there; "
            "try a smaller inner_lr or fewer inner_steps"
        )
    return {name: sorted(tasks | diverged) for name, tasks in broken.items() if tasks | diverged}


def _penalty(
    kept: Mapping[str, list[float]], dropped: Mapping[str, list[int]], num_tasks: int
) -> float:
    """The loss of score by dropped tasks: each counts as accuracy 0, or as the largest loss."""
    name = "query_accuracy" if "query_accuracy" in kept else "query_loss"
    column = kept[name]
    if len(column) < 2:
        return math.inf  # the accuracy is undefined, and a loss must not be compared with one
    mean = math.fsum(column) / len(column)
    lost = mean if name == "query_accuracy" else max(column) - mean
    return lost * len(dropped.get(name, ())) / num_tasks


def _listed(indices: list[int]) -> str:
    more = len(indices) - 8
    return ", ".join(map(str, indices[:8])) + (f" and {more} more" if more > 0 else "")


def evaluate_tasks(
    problem: Problem,
    sampler: TaskSampler,
    algorithm: Algorithm,
    outer: Params,
    num_tasks: int,
    *,
    compute: Compute = AS_TORCH_IS_SET,
    executor: Executor | None = None,
    before: bool = True,
    step: int = 0,
) -> dict[str, list[float]]:
    """The metrics of each of the tasks 0 .. num_tasks-1 by name; arguments as of `evaluate`.

    Those of a task in which adaptation diverges are NaN or infinite.
    """
    judge = _Judge(problem, sampler, algorithm, compute, before, step)
    return _columns(_judged(judge, outer, num_tasks, executor))


def _judged(
    judge: _Judge, outer: Params, num_tasks: int, executor: Executor | None
) -> list[dict[str, float]]:
    """What `judge` finds of each of the tasks 0 .. num_tasks-1."""
    compute = judge.compute
    size = compute.chunk_size
    if size is None:
        here = {name: leaf.to(pick_device(compute.device)) for name, leaf in outer.items()}
        leaf = next(iter(here.values()))
        twice = [to_device(sample_task(judge.sampler, 0, judge.step), leaf.device, leaf.dtype)] * 2
        together = vectorizes(compute.vectorize, judge.problem, judge.algorithm, here, twice)
        size = TASKS_AT_A_TIME if together else TASKS_ONE_BY_ONE
    chunks = [range(first, min(first + size, num_tasks)) for first in range(0, num_tasks, size)]
    return (executor or LocalExecutor()).judge(judge, outer, chunks)


def _columns(found: list[dict[str, float]]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for of_task in found:
        for name, value in of_task.items():
            columns.setdefault(name, []).append(value)
    return columns


class _Judge(NamedTuple):
    """What the metrics of tasks are computed from, see `metadist.executor.Judge`."""

    problem: Problem
    sampler: TaskSampler
    algorithm: Algorithm
    compute: Compute
    before: bool
    step: int
    counts: bool = False
    """Whether predictions are counted by class."""

    def __call__(self, outer: Params, indices: range) -> list[dict[str, float]]:
        leaf = next(iter(outer.values()))
        with device_memory(chunk_in_words(indices), chunk_size=self.compute.chunk_size):
            tasks = [sample_task(self.sampler, index, self.step) for index in indices]
            return self._of_tasks(outer, send(tasks, leaf.device, leaf.dtype))

    def _of_tasks(self, outer: Params, tasks: list[Task]) -> list[dict[str, float]]:
        """The metrics of each of these tasks, which are on the device of `outer`."""
        vectorize = self.compute.vectorize
        if not vectorizes(vectorize, self.problem, self.algorithm, outer, tasks):
            return self._one_by_one(outer, tasks)
        stacked = stack_tasks(tasks)
        try:
            columns = self._together(outer, stacked)
        except FAILS_UNDER_VMAP as error:
            if not falls_back(vectorize, error):
                raise
            return self._one_by_one(outer, tasks)
        return _by_task(columns)

    def _one_by_one(self, outer: Params, tasks: list[Task]) -> list[dict[str, float]]:
        problem_outer, _ = split_own(outer)
        found = []
        for task in tasks:
            with torch.no_grad():
                context = context_of(self.problem, problem_outer, task, compute=self.compute)
                start = self.problem.init_inner(problem_outer, task)
            metrics = self._of_task(outer, detach(context), start, task, eager=True)
            found += _by_task({name: value[None] for name, value in metrics.items()})
        return found

    def _together(self, outer: Params, tasks: Task) -> dict[str, Tensor]:
        """The metrics of a stack of tasks, each of shape (B,)."""
        problem, (problem_outer, _) = self.problem, split_own(outer)
        with torch.no_grad():
            context = self.compute.encode(problem.encode_tasks, problem_outer, tasks)
            if carries(problem):
                start_of = partial(start_carried, problem, problem_outer)
                context = with_carried(context, vmap(start_of)(tasks))
            start = vmap(problem.init_inner, in_dims=(None, 0))(problem_outer, tasks)
        start = tree_map(Tensor.contiguous, start)
        columns: dict[str, Tensor] = vmap(partial(self._of_task, outer))(context, start, tasks)
        return columns

    def _of_task(
        self, outer: Params, context: Params, start: Params, task: Task, eager: bool = False
    ) -> dict[str, Tensor]:
        """The metrics of one task, each of shape ()."""
        problem, algorithm, compute = self.problem, self.algorithm, self.compute
        oracle = AutogradOracle(
            problem,
            task,
            compute.batch_sizes,
            compute.seed,
            compile=algorithm.compiles,
            eager=eager,
        )
        _, own = split_own(outer)
        adapted = algorithm.adapt(oracle, {**context, **own}, start)
        found = adaptation_metrics(
            problem,
            context,
            start if self.before else None,
            adapted,
            in_parts(task, "support", compute.part_size, compute.seed),
            in_parts(task, "query", compute.part_size, compute.seed),
        )
        return found | (counts_of(problem, context, adapted, task) if self.counts else {})


def _by_task(columns: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """The metrics of each task, from columns of shape (B,); a GPU is waited for once."""
    rows = torch.stack([column.double() for column in columns.values()]).mT.tolist()
    return [dict(zip(columns, row, strict=True)) for row in rows]


def with_inner_steps(algorithm: Algorithm, inner_steps: int) -> Algorithm:
    """The algorithm with another number of inner steps, for adaptation only."""
    require_number(inner_steps=inner_steps)
    fields = {f.name for f in dataclasses.fields(algorithm)}  # type: ignore[arg-type]
    if "inner_steps" not in fields:
        raise ValueError(
            f"inner_steps must be None for {type(algorithm).__name__}, which has none, "
            f"got {inner_steps}"
        )
    changes: dict[str, Any] = {"inner_steps": inner_steps}
    if "truncate" in fields:
        changes["truncate"] = None  # of no effect on adaptation
    steps = getattr(algorithm, "inner_optimizer", None)
    if isinstance(steps, SGD) and inner_steps == 1:
        # of no effect on the first step
        changes["inner_optimizer"] = dataclasses.replace(steps, momentum=0.0, carry=False)
    try:
        return dataclasses.replace(algorithm, **changes)  # type: ignore[type-var]
    except ValueError as error:
        if inner_steps < 1:
            raise
        raise ValueError(
            f"inner steps of an evaluation must suit {type(algorithm).__name__}, got "
            f"{inner_steps}: {error}"
        ) from error


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
