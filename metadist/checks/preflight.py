"""Checks of a whole training set-up before any work starts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from metadist.algorithm import Algorithm, split_own
from metadist.autograd import AutogradOracle
from metadist.checks.derivatives import (
    check_encode_precision,
    check_precision,
    check_twice_differentiable,
    estimate_once,
    hypergradient,
    reason_of,
)
from metadist.checks.losses import attempted, check_losses, drawn_parts, task_on_cpu
from metadist.checks.purity import remember
from metadist.chunks import FAILS_UNDER_VMAP, chunk_of, falls_back, vectorizes
from metadist.compute import Compute
from metadist.draws import Draw, Source
from metadist.problem import (
    Problem,
    check_rows,
    context_depends_on,
    context_of,
    has_inner_map,
    is_nonsmooth,
    start_depends_on,
)
from metadist.sampler import Stream, TaskSampler
from metadist.task import Task
from metadist.trees import (
    Params,
    add,
    check_flattenable,
    detach,
    dot,
    gradients,
    leaves,
    multiply,
    tree_map,
    zeros_like,
)
from metadist.workload import Workload


def initial_outer(workload: Workload) -> Params:
    """The outer variable at the start of training, the algorithm's own variables included."""
    problem = workload.problem
    remember(problem)
    outer = problem.init_outer(torch.Generator().manual_seed(workload.compute.seed))
    task = task_on_cpu(workload.sampler, outer)
    start = attempted(problem, "sampler", task, "init_inner", problem.init_inner, outer, task)
    outer = {**outer, **workload.algorithm.init_own(start)}
    check_flattenable(outer, "outer")
    return {name: leaf.detach().cpu() for name, leaf in outer.items()}


class Checked(NamedTuple):
    """What the checks before a training have found.

    Args:
        outer: x at the start.
        compute: How to compute the workload, see `preflight`.
        chunk_on_cpu: See `Workload`.
    """

    outer: Params
    compute: Compute
    chunk_on_cpu: int


def checked(workload: Workload, is_whole: bool, val_sampler: TaskSampler | None) -> Checked:
    """All checks before a training, which need the memory of a lease.

    Args:
        workload: What is to be trained.
        is_whole: As for `preflight`.
        val_sampler: The tasks of validation.

    Raises:
        ValueError: Training or validation cannot work.
    """
    outer = initial_outer(workload)
    compute = preflight(workload, outer, is_whole)
    chunk = chunk_on_cpu(replace(workload, compute=compute), outer)
    if val_sampler is not None:
        check_losses(workload.problem, val_sampler, outer, "val_sampler", compute)
    return Checked(outer, compute, chunk)


def preflight(workload: Workload, outer: Params, is_whole: bool = True) -> Compute:
    """Raise ValueError if training cannot work; run one task through everything, on the CPU.

    And two tasks together where vmap is used, since what works alone may not work there.
    Warns (RuntimeWarning) of outer variables that get no hypergradient.

    Returns:
        How to compute the workload: its own `compute`, where vectorize="auto" has become False if
        vmap cannot run the problem. All workers must agree on that, since it decides on rounding.

    Args:
        workload: What is to be trained.
        outer: x at the start.
        is_whole: Whether the sampler gives whole tasks; False: a part of each, see
            `Executor.probe`.

    Cost: the hypergradient of one or three tasks, one double backward pass of g, and that of
    `check_pure`.
    """
    num_tasks = min(2, workload.meta_batch_size) if workload.keep_state else 2
    tasks = [task_on_cpu(workload.sampler, outer, index) for index in range(num_tasks)]
    algorithm, problem_outer = workload.algorithm, split_own(outer)[0]
    if algorithm.needs_kept_state and not workload.keep_state:
        raise ValueError(
            f"keep_state must be True with {algorithm}, got False: {algorithm.needs_kept_state}, "
            "or keep states"
        )
    if is_whole:
        check_rows(workload.problem, problem_outer, len(tasks[0].support.index))
    with workload.compute.applied():
        check_losses(workload.problem, workload.sampler, outer, compute=workload.compute)
        _check_algorithm(workload, outer, tasks[0])
        result = hypergradient(workload, outer, tasks[:1])
        if workload.compute.encode_precision != "highest":
            check_encode_precision(workload, outer, tasks[0], result.total)
        check_twice_differentiable(workload, outer, tasks[0])
        compute = workload.compute
        if num_tasks > 1 and not _vectorizes(workload, outer, tasks):
            compute = replace(compute, vectorize=False)
        dead = [name for name, leaf in result.total.items() if not leaf.any()]
        is_random = False
        if dead and 0 not in result.dropped:
            dead, is_random = _without_hypergradient(workload, outer, tasks[0], dead)
    if 0 in result.dropped:
        raise ValueError(
            "the hypergradient of task 0 must be finite, got NaN or Inf: adaptation diverges; "
            f"try a smaller inner_lr, or look at the task ({algorithm})"
        )
    dead = _require_trained(workload, problem_outer, tasks[0], list(result.total), dead, is_random)
    if dead:
        warnings.warn(
            f"these outer variables got no hypergradient from task 0 and may never be trained: "
            f"{_few(dead)}; freeze them with requires_grad_(False) if that is meant",
            RuntimeWarning,
            stacklevel=2,
        )
    return compute


def _check_algorithm(workload: Workload, outer: Params, task: Task) -> None:
    """Raise ValueError for an algorithm that cannot train the problem of a workload."""
    problem, algorithm, problem_outer = workload.problem, workload.algorithm, split_own(outer)[0]
    if is_nonsmooth(problem) and not algorithm.takes_prox:
        raise ValueError(
            f"algorithm must take a prox for a problem with prox_inner, got "
            f"{type(algorithm).__name__}, which would leave the non-smooth part out: use MEHA"
        )
    if has_inner_map(problem) and not algorithm.takes_map:
        raise ValueError(
            f"algorithm must take the inner_map of {type(problem).__name__}, got "
            f"{type(algorithm).__name__}, which descends on inner_loss: use AID, or ITD"
        )
    some = drawn_parts(task, workload.compute)
    _check_inner_loss(problem, problem_outer, task, some)
    algorithm.check(problem, problem_outer, task, some)
    if workload.keep_state and isinstance(workload.sampler, Stream):
        _check_no_tables(workload, outer, task)
    check_precision(workload, outer)
    dtype = next(iter(outer.values())).dtype
    if workload.compute.encode_precision != "highest" and dtype != torch.float32:
        raise ValueError(
            "encode_precision must be 'highest' with an outer variable that is not of float32, "
            f"got {workload.compute.encode_precision!r} and {dtype}"
        )


def _require_trained(
    workload: Workload,
    outer: Params,
    task: Task,
    names: list[str],
    dead: list[str],
    is_random: bool,
) -> list[str]:
    """The outer variables that may never be trained; ValueError if none can be.

    Args:
        workload: What is to be trained.
        outer: x without the algorithm's own variables.
        task: Task 0.
        names: Those of x, with the algorithm's own.
        dead: Those that got no hypergradient from the task.
        is_random: Whether the hypergradient is a random estimate.
    """
    problem, algorithm = workload.problem, workload.algorithm
    if algorithm.trains == "context":
        # From a start at v = 0 the first hypergradient may be zero, and the next is not.
        reached = context_depends_on(problem, outer, task)
        dead = [name for name in dead if name not in reached]
        if not reached:
            raise ValueError(
                f"algorithm must not be {type(algorithm).__name__} for this problem: it takes the "
                "start of adaptation for a constant, and nothing else depends on the outer "
                "variable. Give the problem a context (FewShotProblem: adapt='head'), or use ITD"
            )
    if len(dead) == len(names):
        if workload.keep_state and start_depends_on(problem, outer, task):
            raise ValueError(
                "keep_state must be False for a problem that learns nothing but where adaptation "
                "starts, got True: a kept state starts where the last one ended"
            )
        reached = _enters(workload, outer, task)
        if not reached:
            raise ValueError(
                f"the hypergradient of task 0 is zero in every outer variable ({_few(dead)}): "
                "neither the context nor the start of adaptation depends on them"
            )
        if not is_random:
            raise ValueError(
                f"the hypergradient of task 0 is zero in every outer variable ({_few(dead)}), "
                f"though the losses or the start depend on {_few(sorted(reached))}: {algorithm} "
                "leaves that out. Use a method that has second derivatives (ITD, AID), or look for "
                "a vanishing gradient"
            )
    return dead


def _check_inner_loss(problem: Problem, outer: Params, task: Task, some: Task) -> None:
    """Raise ValueError if no inner variable enters the inner loss, so that nothing can adapt."""
    if has_inner_map(problem):
        return
    y = leaves(detach(problem.init_inner(outer, task)))
    with torch.enable_grad():
        loss = problem.inner_loss(context_of(problem, outer, task), y, some.support)
        found = loss.requires_grad and torch.autograd.grad(
            loss, list(y.values()), allow_unused=True
        )
    if not found or all(gradient is None for gradient in found):
        raise ValueError(
            f"inner_loss must depend on an inner variable, got one that none of {_few(list(y))} "
            "enters: adaptation would change nothing. Look for a detach() or a part of the model "
            "that the forward pass leaves out (FewShotProblem: adapt names what is adapted)"
        )


OTHER_SEEDS = 20
"""Further estimates of a random algorithm, where one was zero."""


def _without_hypergradient(
    workload: Workload, outer: Params, task: Task, dead: list[str]
) -> tuple[list[str], bool]:
    """(those of `dead` that get none from other draws either, whether the estimate is random)."""
    compute = workload.compute
    oracle = _Watched(workload.problem, task, compute.batch_sizes, compute.seed, eager=True)
    estimate_once(workload, outer, task, oracle)
    for number in range(1, 1 + OTHER_SEEDS if oracle.varies or oracle.is_random else 1):
        if not dead:
            break
        other = replace(workload, compute=replace(compute, seed=compute.seed + number))
        found = other.hypergradients(outer, [task], step=number, states={}).total
        dead = [name for name in dead if not found[name].any()]
    return dead, oracle.is_random


def _check_no_tables(workload: Workload, outer: Params, task: Task) -> None:
    """Raise ValueError if the algorithm keeps something of each part of sets that change."""
    compute = workload.compute
    oracle = _Watched(workload.problem, task, compute.batch_sizes, compute.seed, eager=True)
    estimate_once(workload, outer, task, oracle)
    if oracle.is_cut:
        raise ValueError(
            "algorithm must not go through whole sets in parts with a sampler that has sample_at "
            f"and kept states, got {type(workload.algorithm).__name__}: what it keeps of them "
            "would be of the data of earlier steps. Use SOBA or MRBO"
        )


class _Watched(AutogradOracle):
    """An oracle that knows whether it was asked for random numbers, the step, or parts of sets."""

    is_random = False
    varies = False
    is_cut = False

    def parts(self, source: Source) -> list[Draw]:
        self.is_cut = True
        return super().parts(source)

    @property
    def step(self) -> int:
        self.varies = True
        return super().step

    def uniform(self) -> float:
        self.is_random = True
        return super().uniform()

    def random_like(self, tree: Params, kind: Literal["normal", "rademacher"]) -> Params:
        self.is_random = True
        return super().random_like(tree, kind)


def _enters(workload: Workload, outer: Params, task: Task) -> set[str]:
    """Names of the outer variables that the losses or, if it is trained, the start depend on."""
    problem = workload.problem
    random = torch.Generator().manual_seed(0)

    def drawn(tree: Params) -> Params:
        return tree_map(lambda leaf: torch.rand(leaf.shape, generator=random).to(leaf), tree)

    x, some = leaves(outer), drawn_parts(task, workload.compute)
    with torch.enable_grad():
        context, start = context_of(problem, x, task), problem.init_inner(x, task)
        # Beside the start, where a loss may happen to be flat: a weight decay is so at y = 0.
        y = add(detach(start), drawn(start))
        at = leaves(context)
        losses = problem.inner_loss(at, y, some.support) + problem.outer_loss(at, y, some.query)
        if has_inner_map(problem):
            losses = losses + dot(problem.inner_map(at, y, some.support), drawn(start))
    (along,) = gradients([losses], [None], at)
    along = multiply(along, drawn(context))
    back = zeros_like(start) if workload.algorithm.trains == "context" else drawn(start)
    outputs, cotangents = [*context.values(), *start.values()], [*along.values(), *back.values()]
    (gradient,) = gradients(outputs, cotangents, x)
    return {name for name, leaf in gradient.items() if bool(leaf.any())}


def chunk_on_cpu(workload: Workload, outer: Params) -> int:
    """How many tasks of the workload go through vmap together on a CPU; 1: a loop over tasks."""
    problem, compute = workload.problem, workload.compute
    if workload.meta_batch_size == 1:
        return 1
    tasks = [task_on_cpu(workload.sampler, outer, index) for index in range(2)]
    if not vectorizes(compute.vectorize, problem, workload.algorithm, outer, tasks):
        return 1
    with compute.applied():
        return compute.chunk_size or chunk_of(problem, outer, tasks[0], compute)


def _vectorizes(workload: Workload, outer: Params, tasks: list[Task]) -> bool:
    """Whether tasks that worked alone work together under vmap, where that is left to us.

    Raises:
        ValueError: They do not, with vectorize=True.
    """
    problem, algorithm, compute = workload.problem, workload.algorithm, workload.compute
    if not vectorizes(compute.vectorize, problem, algorithm, outer, tasks):
        return True
    together = replace(workload, compute=replace(compute, vectorize=True))
    try:
        hypergradient(together, outer, tasks)
    except FAILS_UNDER_VMAP as error:
        if falls_back(compute.vectorize, error):
            return False
        raise ValueError(
            "vectorize must be False or 'auto' for a problem that vmap cannot run, got "
            f"{compute.vectorize!r}: {reason_of(error)}"
        ) from error
    return True


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_trainable(problem: Problem, algorithm: Algorithm) -> None:
    """Raise ValueError if these objects are not what they stand for."""
    for field, value, methods in (
        ("problem", problem, ("init_outer", "encode", "init_inner", "inner_loss", "outer_loss")),
        ("algorithm", algorithm, ("init", "estimate", "adapt")),
    ):
        if isinstance(value, type):
            raise ValueError(
                f"{field} must be an object, got the class {value.__name__}: make one, "
                f"{value.__name__}(...)"
            )
        missing = [name for name in methods if not callable(getattr(value, name, None))]
        if missing:
            way_out = ""
            if field == "problem" and isinstance(value, nn.Module):
                way_out = ": give it to a problem, such as FewShotProblem(model)"
            raise ValueError(
                f"{field} must have the methods {', '.join(methods)}, got "
                f"{type(value).__name__} without {', '.join(missing)}{way_out}"
            )
