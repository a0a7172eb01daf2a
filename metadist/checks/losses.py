"""Whether the losses of a problem can be computed on the tasks of a sampler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metadist.algorithm import split_own
from metadist.checks.purity import check_pure, remember, told
from metadist.compute import DEFAULT, Compute
from metadist.draws import first_parts
from metadist.problem import (
    Problem,
    check_sampler,
    context_of,
    has_inner_map,
    start_carried,
    start_depends_on,
    with_carried,
)
from metadist.sampler import TaskSampler, num_steps_of, num_tasks_of, sample_task
from metadist.task import Task, targets_of, to_device
from metadist.trees import Params, tree_map


def check_losses(
    problem: Problem,
    sampler: TaskSampler,
    outer: Params,
    field: str = "sampler",
    compute: Compute = DEFAULT,
) -> None:
    """Raise ValueError unless the problem is pure and its losses finite on task 0 of `sampler`."""
    check_sampler(problem, sampler)
    remember(problem)
    outer, _ = split_own(outer)
    given, outer = outer, tree_map(torch.clone, outer)  # in case a loss changes it in place
    task = task_on_cpu(sampler, outer)
    some = drawn_parts(task, compute)

    def attempt(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return attempted(problem, field, task, name, function, *arguments)

    context = attempt("encode", problem.encode, outer, task)
    carried = attempt("init_carried", start_carried, problem, outer, task)
    context = with_carried(context, carried)
    start = attempt("init_inner", problem.init_inner, outer, task)
    for name, loss, batch in (
        ("inner_loss", problem.inner_loss, some.support),
        ("outer_loss", problem.outer_loss, some.query),
    ):
        value = attempt(name, loss, context, start, batch)
        _require_scalar(name, value)
        if not bool(value.isfinite()):
            raise ValueError(
                f"{name} must be finite on task 0 of {field} at the start, got {float(value)}: "
                "look for NaN in the data or the initial weights"
            )
    if has_inner_map(problem):
        moved = attempt("inner_map", problem.inner_map, context, start, some.support)
        _require_like("inner_map", moved, start)
    with torch.no_grad():
        metrics = attempt("metrics", problem.metrics, context, start, some.query)
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics must return a dict by name, got {type(metrics).__name__}")
    for name, value in metrics.items():
        _require_scalar(f"metrics[{name!r}]", value)
    other = None if num_tasks_of(sampler) == 1 else task_on_cpu(sampler, outer, 1)
    check_pure(problem, given, task, compute, other)
    num_steps = num_steps_of(sampler)
    if num_steps is not None:
        _check_last_step(problem, sampler, outer, field, compute, num_steps - 1)


def _check_last_step(
    problem: Problem, sampler: TaskSampler, outer: Params, field: str, compute: Compute, step: int
) -> None:
    """Raise ValueError unless losses can be computed on the last data of a stream, as on the first.

    Data of a late task may not fit where that of the first does: more classes or tasks than a model
    has rows for.
    """
    task = to_device(sample_task(sampler, 0, step), "cpu", next(iter(outer.values())).dtype)
    some = drawn_parts(task, compute)

    def attempt(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        name = f"{name} at outer step {step}"
        return attempted(problem, field, task, name, function, *arguments)

    context = attempt("encode", context_of, problem, outer, task)
    start = attempt("init_inner", problem.init_inner, outer, task)
    attempt("inner_loss", problem.inner_loss, context, start, some.support)
    attempt("outer_loss", problem.outer_loss, context, start, some.query)


def _require_scalar(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.shape != ():
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor of shape (), got {got}")


def _require_like(name: str, value: Any, start: Params) -> None:
    def form(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return type(tree).__name__
        return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in sorted(tree.items())}

    if form(value) != form(start):
        raise ValueError(
            f"{name} must return tensors of the names, shapes and dtypes of the inner variable, "
            f"{form(start)}, got {form(value)}"
        )


def learns_start(problem: Problem, sampler: TaskSampler, seed: int) -> bool:
    """Whether the start of adaptation depends on the outer variable, as that of MAML does."""
    remember(problem)
    outer = problem.init_outer(torch.Generator().manual_seed(seed))
    try:
        return bool(start_depends_on(problem, outer, task_on_cpu(sampler, outer)))
    except NOT_COMPUTABLE:
        return False  # `check_losses` says what is wrong


def task_on_cpu(sampler: TaskSampler, outer: Params, index: int = 0) -> Task:
    """A task on the CPU, in the dtype of x; raises ValueError for what is none."""
    task = sample_task(sampler, index)
    if not isinstance(task, Task):
        raise ValueError(
            f"sampler.sample(index) must return a metadist.Task, got {type(task).__name__} "
            f"from {type(sampler).__name__}"
        )
    return to_device(task, "cpu", next(iter(outer.values())).dtype)


def drawn_parts(task: Task, compute: Compute) -> Task:
    """The first mini-batches of a task, on which losses are checked; encode needs the whole."""
    return first_parts(task, compute.batch_sizes, compute.seed)


def attempted(
    problem: Problem,
    field: str,
    task: Task,
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """`function(*arguments)`; a ValueError says on which task, in which layer, and why it fails."""
    entered: list[tuple[nn.Module, Any]] = []
    outputs: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append((module, inputs[0] if inputs else None))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        while entered and entered.pop()[0] is not module:
            pass  # a module whose exception was caught
        if not entered:
            outputs[:] = [output]

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        return function(*arguments)
    except NOT_COMPUTABLE as error:
        shapes = ", ".join(str(tuple(t.shape)) for batch in task[:2] for t in batch.tensors)
        reason = str(error).strip().rstrip(".") or "no reason"
        if entered:
            module, given = entered[-1]
            reason += f", in {told(problem, module)}{_misfit(module, given)}"
        elif outputs:
            reason += _wrong_outputs(outputs[0], task, reason)
        raise ValueError(
            f"{name} must be computable on task 0 of {field}, whose tensors have shapes {shapes}, "
            f"got {type(error).__name__}: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _misfit(module: nn.Module, given: Any) -> str:
    """What `module` takes and is not given, where that is so."""
    if not isinstance(given, torch.Tensor) or given.ndim == 0:
        return ""
    for field, axis, what, question in (
        ("in_features", -1, "features", "does the size"),
        ("in_channels", 1, "channels", "do the channels"),
        ("num_features", 1, "channels", "do the channels"),
    ):
        size = getattr(module, field, None)
        if isinstance(size, int) and given.ndim > axis and given.shape[axis] != size:
            return (
                f", which takes {size} {what} and is given {given.shape[axis]}: {question} of the "
                "sampler's inputs fit the model?"
            )
    size = getattr(module, "num_embeddings", None)
    if isinstance(size, int) and not given.is_floating_point() and given.numel():
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= size:
            return f", which takes indices 0 .. {size - 1} and is given {low} .. {high}"
    return ""


def _wrong_outputs(output: Any, task: Task, reason: str) -> str:
    """How many outputs the labels want, where the model has fewer, or has no tensor of them."""
    kind = type(output).__name__
    if not isinstance(output, torch.Tensor) and re.search(rf"\b{kind}\b", reason):
        return f": the model returns a {kind}. Let it return the tensor of its outputs"
    if not isinstance(output, torch.Tensor) or output.ndim < 2:
        return ""
    for batch in (task.support, task.query):
        labels = targets_of(batch)
        if labels is None or labels.is_floating_point() or not labels.numel():
            continue
        if int(labels.max()) >= output.shape[1]:
            return (
                f": the model has {output.shape[1]} outputs, and there are labels up to "
                f"{int(labels.max())}. Give it one for each class (n_way)"
            )
    return ""


NOT_COMPUTABLE = (RuntimeError, LookupError, ValueError, TypeError, AttributeError)
"""The exceptions of torch, and of code around it, for inputs that do not fit."""
