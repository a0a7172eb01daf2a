"""`task_hypergradients`: the whole mathematics of a worker, in one function.

encode and init_inner -> the algorithm on every task -> pull back -> sum over tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.algorithm import Algorithm, split_own
from metadist.autodiff import gradients, leaves
from metadist.oracle import AutogradOracle
from metadist.problem import Problem
from metadist.task import Task, shape_signature, stack_tasks
from metadist.trees import Params, add, detach, tree_map, zeros_like

Vectorize = Literal["auto"] | bool


@dataclass(frozen=True)
class HypergradientSum:
    """Sums over tasks; sums and counts, not means, so that any two of them can be added.

    Args:
        total: sum over tasks of d f / d outer, shaped like the outer variable.
        num_tasks: how many tasks are in `total`.
        dropped: ids of the tasks left out because their hypergradient was NaN or infinite.
        metrics: sums over the tasks in `total` of the figures of each.
    """

    total: Params
    num_tasks: int
    dropped: tuple[int, ...]
    metrics: dict[str, float]


def task_hypergradients(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
    *,
    vectorize: Vectorize = "auto",
    chunk_size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    report: bool = False,
) -> HypergradientSum:
    """The sum over `tasks` of the algorithm's hypergradients at `outer`.

    Args:
        problem: the problem.
        algorithm: run once on each task.
        outer: the outer variable, the algorithm's own variables included.
        tasks: tasks on the device of `outer`.
        vectorize: run tasks together under `torch.func.vmap` (they must have equal shapes), or
            one after another. "auto": together where the algorithm allows it and no inner
            tensor is a convolution kernel on a CPU, where vmap is slower than a loop.
        chunk_size: at most so many tasks at a time under vmap; bounds memory. None: all on a GPU,
            4 on a CPU, where memory for more costs time and saves none.
        batch_size: examples per draw of support and query; None: whole sets.
        seed: of the draws.
        report: also evaluate losses and metrics before and after adaptation (keys
            `query_loss`, `query_loss_before`, and so on), at the cost of three forward passes.

    Raises:
        ValueError: vectorize=True with an algorithm or tasks that cannot be vectorized.

    Cost: per task that of the algorithm, plus one forward and one backward pass of `encode` and
    `init_inner`. A result that is not finite is computed again task by task to find the culprit.
    """
    if not tasks:
        raise ValueError("tasks must hold at least one task, got none")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1 or None, got {chunk_size}")
    if vectorizes(vectorize, problem, algorithm, outer, tasks):
        on_cpu = next(iter(outer.values())).device.type == "cpu"
        size = chunk_size or (4 if on_cpu else len(tasks))
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    else:
        groups = [[task] for task in tasks]

    total = zeros_like(outer)
    metrics: dict[str, float] = {}
    num_tasks = 0
    dropped: list[int] = []
    while groups:
        group = groups.pop(0)
        # The fused attention kernels have no double backward, the plain one has.
        with sdpa_kernel(SDPBackend.MATH):
            gradient, figures = _group(problem, algorithm, outer, group, batch_size, seed, report)
        if not _is_finite(gradient):
            if len(group) == 1:
                dropped.append(int(group[0].id))
            else:
                groups[:0] = [[task] for task in group]
            continue
        total = add(total, gradient)
        num_tasks += len(group)
        for name, value in figures.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return HypergradientSum(total, num_tasks, tuple(dropped), metrics)


def _group(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
    batch_size: int | None,
    seed: int,
    report: bool,
) -> tuple[Params, dict[str, Tensor]]:
    """(sum of hypergradients, sums of metrics) of tasks that go through together."""
    problem_outer, own = split_own(outer)

    eager = len(tasks) == 1

    def one(context: Params, start: Params, task: Task) -> Any:
        oracle = AutogradOracle(
            problem, task, batch_size, seed, compile=algorithm.compiles, eager=eager
        )
        x = {**context, **own}
        estimate = algorithm.estimate(oracle, x, algorithm.init(oracle, x, start))
        context_gradient, own_gradient = split_own(estimate.hypergradient)
        start_gradient = estimate.start_gradient
        metrics = dict(estimate.metrics)
        if report:
            metrics |= adaptation_metrics(problem, context, start, estimate.state.inner, task)
        return (
            context_gradient,
            zeros_like(start) if start_gradient is None else start_gradient,
            own_gradient,
            metrics,
        )

    x = leaves(problem_outer)
    with torch.enable_grad():
        if eager:
            graph = problem.encode(x, tasks[0]), problem.init_inner(x, tasks[0])
        else:
            stacked = stack_tasks(tasks)
            starts = vmap(problem.init_inner, in_dims=(None, 0))(x, stacked)
            # vmap expands what does not depend on the task; others need memory of their own.
            graph = problem.encode_tasks(x, stacked), tree_map(Tensor.contiguous, starts)
    context, start = detach(graph[0]), detach(graph[1])
    if eager:
        context_gradient, start_gradient, own_gradient, metrics = one(context, start, tasks[0])
    else:
        results = vmap(one, randomness="error")(context, start, stacked)
        context_gradient, start_gradient = results[:2]
        own_gradient, metrics = (
            {name: leaf.sum(0) for name, leaf in tree.items()} for tree in results[2:]
        )
    (gradient,) = gradients(
        [*graph[0].values(), *graph[1].values()],
        [*context_gradient.values(), *start_gradient.values()],
        x,
    )
    return {**gradient, **own_gradient}, metrics


def adaptation_metrics(
    problem: Problem, context: Params, start: Params, adapted: Params, task: Task
) -> dict[str, Tensor]:
    """Losses and metrics of one task at `adapted`, and (names ending in `_before`) at `start`."""
    with torch.no_grad():
        figures = {"support_loss": problem.inner_loss(context, adapted, task.support)}
        for suffix, inner in (("", adapted), ("_before", start)):
            figures["query_loss" + suffix] = problem.outer_loss(context, inner, task.query)
            for name, value in problem.metrics(context, inner, task.query).items():
                figures[f"query_{name}{suffix}"] = value
    return {name: value.detach() for name, value in figures.items()}


def vectorizes(
    vectorize: Vectorize,
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
) -> bool:
    """Whether these tasks go through together; see `task_hypergradients`."""
    if vectorize not in ("auto", True, False):
        raise ValueError(f"vectorize must be 'auto', True or False, got {vectorize!r}")
    if vectorize is False or len(tasks) == 1:
        return False
    stackable = len({shape_signature(task) for task in tasks}) == 1
    if vectorize is True:
        if not algorithm.supports_vmap or algorithm.compiles:
            raise ValueError(
                f"vectorize must be False or 'auto' with {algorithm}: its "
                f"{'compiled derivatives do' if algorithm.compiles else 'engine does'} not run "
                "under vmap, got True"
            )
        if not stackable:
            raise ValueError(
                "vectorize=True needs tasks of equal shapes, got "
                f"{sorted({shape_signature(task) for task in tasks})}: use 'auto' or False"
            )
        return True
    if not stackable or not algorithm.supports_vmap or algorithm.compiles:
        return False
    if next(iter(outer.values())).device.type != "cpu":
        return True
    with torch.no_grad():
        inner = problem.init_inner(split_own(outer)[0], tasks[0])
    return all(leaf.ndim < 3 for leaf in inner.values())


def _is_finite(tree: Params) -> bool:
    # A sum is finite only if all terms are, and costs one pass without a temporary.
    return all(bool(leaf.sum().isfinite()) for leaf in tree.values()) or all(
        bool(leaf.isfinite().all()) for leaf in tree.values()
    )
