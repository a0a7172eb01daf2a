"""Checks of a whole training set-up before any work starts."""

from __future__ import annotations

import warnings

import torch

from metadist.algorithm import Algorithm, split_own
from metadist.hypergradient import HypergradientSum, task_hypergradients
from metadist.lease import Workload, intra_op_threads
from metadist.problem import Problem
from metadist.task import Task, to_device
from metadist.trees import Params, check_flattenable


class NoSecondDerivative(ValueError):
    """An operator of the problem cannot be differentiated the way the algorithm needs."""


def initial_outer(problem: Problem, workload: Workload, seed: int) -> Params:
    """The outer variable at the start of training, the algorithm's own variables included."""
    outer = problem.init_outer(torch.Generator().manual_seed(seed))
    start = problem.init_inner(outer, _first_task(workload, outer))
    outer = {**outer, **workload.algorithm.init_own(start)}
    check_flattenable(outer, "outer")
    return {name: leaf.detach().cpu() for name, leaf in outer.items()}


def preflight(workload: Workload, outer: Params) -> None:
    """Raise ValueError if training cannot work; run one task through everything, on the CPU.

    Warns (RuntimeWarning) of outer variables that get no hypergradient.

    Cost: the hypergradient of one task.
    """
    task = _first_task(workload, outer)
    problem, algorithm = workload.problem, workload.algorithm
    problem_outer, _ = split_own(outer)
    algorithm.check(problem, problem_outer, task)
    with intra_op_threads(workload.num_threads):
        _check_loss(problem, problem_outer, task)
        result = _hypergradient(workload, outer, task)
    if not result.num_tasks:
        raise ValueError(
            "the hypergradient of task 0 must be finite, got NaN or Inf: adaptation diverges; "
            f"try a smaller inner_lr, or look at the task ({algorithm})"
        )
    dead = [name for name, leaf in result.total.items() if not leaf.any()]
    if len(dead) == len(result.total):
        raise ValueError(
            f"the hypergradient of task 0 is zero in every outer variable ({_few(dead)}): neither "
            "the context nor the start of adaptation depends on them"
        )
    if dead:
        warnings.warn(
            f"these outer variables got no hypergradient from task 0 and may never be trained: "
            f"{_few(dead)}; freeze them with requires_grad_(False) if that is meant",
            RuntimeWarning,
            stacklevel=2,
        )


def _first_task(workload: Workload, outer: Params) -> Task:
    task = workload.sampler.sample(0)
    if not isinstance(task, Task):
        raise ValueError(
            f"sampler.sample(index) must return a metadist.Task, got {type(task).__name__} "
            f"from {type(workload.sampler).__name__}"
        )
    return to_device(task, "cpu", next(iter(outer.values())).dtype)


def _check_loss(problem: Problem, outer: Params, task: Task) -> None:
    context, start = problem.encode(outer, task), problem.init_inner(outer, task)
    for name, loss, batch in (
        ("inner_loss", problem.inner_loss, task.support),
        ("outer_loss", problem.outer_loss, task.query),
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch.tensors)
        try:
            value = loss(context, start, batch)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"{name} must be computable on task 0, whose tensors have shapes {shapes}, got "
                f"{type(error).__name__}: {error}. Do the model's inputs and outputs fit the "
                "sampler (n_way, channels, image size, labels 0..N-1)?"
            ) from error
        if not isinstance(value, torch.Tensor) or value.shape != ():
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{name} must return a tensor of shape (), got {got}")
        if not bool(value.isfinite()):
            raise ValueError(
                f"{name} must be finite on task 0 at the start, got {float(value)}: look for NaN "
                "in the data or the initial weights"
            )


def _hypergradient(workload: Workload, outer: Params, task: Task) -> HypergradientSum:
    try:
        return task_hypergradients(
            workload.problem,
            workload.algorithm,
            outer,
            [task],
            batch_size=workload.batch_size,
            seed=workload.seed,
        )
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in NO_DERIVATIVE):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise NoSecondDerivative(
            f"the problem must be differentiable twice for {type(workload.algorithm).__name__}, "
            f"got: {reason}. Replace that operator (for attention and recurrent layers the plain "
            "kernels are chosen already), or use a first-order algorithm (ITD with "
            "first_order=True, Reptile)"
        ) from error


NO_DERIVATIVE = (
    "not implemented",
    "does not support",
    "is not supported",
    "double backward",
    "derivative for",
    "forward AD",
    "forward-mode",
    "setup_context",
    "functorch transforms",
)
"""What torch says of operators without double backward, forward mode or vmap."""


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_trainable(problem: Problem, algorithm: Algorithm) -> None:
    """Raise ValueError if these objects are not what they stand for."""
    for field, value, methods in (
        ("problem", problem, ("init_outer", "encode", "init_inner", "inner_loss", "outer_loss")),
        ("algorithm", algorithm, ("init", "estimate", "adapt")),
    ):
        missing = [name for name in methods if not callable(getattr(value, name, None))]
        if missing:
            raise ValueError(
                f"{field} must have the methods {', '.join(methods)}, got "
                f"{type(value).__name__} without {', '.join(missing)}"
            )
