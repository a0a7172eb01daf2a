"""Whether a problem has the derivatives that an algorithm asks for, and computes finely enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metadist.algorithm import split_own
from metadist.autograd import AutogradOracle
from metadist.checks.losses import drawn_parts, task_on_cpu
from metadist.hypergradient import HypergradientSum
from metadist.oracle import CountingOracle, Oracle
from metadist.problem import context_of
from metadist.task import Task
from metadist.trees import Params, dot, tree_map
from metadist.workload import Workload


class NoSecondDerivative(ValueError):
    """An operator of the problem cannot be differentiated the way the algorithm needs."""


NO_DERIVATIVE = (
    "not implemented",
    "does not support",
    "is not supported",
    "double backward",
    "derivative for",
    "forward AD",
    "forward-mode",
    "forward mode",
    "setup_context",
    "functorch transforms",
)
"""Phrases in torch's errors about operators without double backward, forward mode or vmap."""


def hypergradient(workload: Workload, outer: Params, tasks: list[Task]) -> HypergradientSum:
    """That of the tasks, as a lease of the workload would have it.

    Raises:
        NoSecondDerivative: An operator has no derivative that the algorithm asks for.
    """
    try:
        # With metrics where tasks go together, since they must run under vmap too; with states
        # that are kept, since those get no hypergradient from where they start.
        return workload.hypergradients(outer, tasks, report=len(tasks) > 1, states={})
    except RuntimeError as error:
        if len(tasks) > 1 or not any(phrase in str(error) for phrase in NO_DERIVATIVE):
            raise
        raise _no_second_derivative(workload, error) from error


def _no_second_derivative(workload: Workload, error: RuntimeError) -> NoSecondDerivative:
    return NoSecondDerivative(
        f"the problem must be differentiable twice for {type(workload.algorithm).__name__}, "
        f"got: {reason_of(error)}. Replace that operator (for attention and recurrent layers the "
        "plain kernels are chosen already), or use a first-order algorithm (ITD with "
        "first_order=True and engine='adjoint', Reptile)"
    )


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def estimate_once(workload: Workload, outer: Params, task: Task, oracle: Oracle) -> None:
    """Let the algorithm ask `oracle` for all that one estimate from a new state needs."""
    problem_outer, own = split_own(outer)
    x = {**context_of(workload.problem, problem_outer, task), **own}
    start = workload.problem.init_inner(problem_outer, task)
    workload.algorithm.estimate(oracle, x, workload.algorithm.init(oracle, x, start))


def check_twice_differentiable(workload: Workload, outer: Params, task: Task) -> None:
    """Raise NoSecondDerivative for operators that torch.func silently differentiates wrongly.

    It takes the backward pass of a `once_differentiable` function for a constant; a plain
    backward pass to all leaves refuses it.
    """
    problem, compute = workload.problem, workload.compute
    with torch.no_grad():
        context = context_of(problem, split_own(outer)[0], task)
        start = problem.init_inner(outer, task)

    def variable(leaf: Tensor) -> Tensor:
        return leaf.detach().clone().requires_grad_(leaf.is_floating_point())

    x, y = tree_map(variable, context), tree_map(variable, start)
    oracle = AutogradOracle(problem, task, compute.batch_sizes, compute.seed)
    losses = (
        (oracle.inner_value, oracle.draw_inner(), ("hvp", "jvp", "inner_value")),
        (oracle.outer_value, oracle.draw_outer(), ("outer_hvp", "outer_jvp")),
    )
    for value, draw, asked in losses:
        try:
            with sdpa_kernel(SDPBackend.MATH):
                gradients = torch.autograd.grad(
                    value(x, y, draw), list(y.values()), create_graph=True, allow_unused=True
                )
                total = sum(leaf.sum() for leaf in gradients if leaf is not None)
                if isinstance(total, Tensor) and total.requires_grad:
                    total.backward()
        except RuntimeError as error:
            if "once_differentiable" in str(error) and _asks(workload, outer, task, asked):
                raise _no_second_derivative(workload, error) from error


def _asks(workload: Workload, outer: Params, task: Task, names: tuple[str, ...]) -> bool:
    """Whether one estimate asks for one of these, as they are counted."""
    compute = workload.compute
    oracle = CountingOracle(
        AutogradOracle(workload.problem, task, compute.batch_sizes, compute.seed, eager=True)
    )
    estimate_once(workload, outer, task, oracle)
    return any(oracle.counts[name] for name in names)


def check_precision(workload: Workload, outer: Params) -> None:
    """Raise ValueError for an algorithm on a problem that computes too roughly for it.

    Looks at what the inner loss computes with, not only at the dtype of x: a problem may keep y in
    bfloat16, or run its model under autocast.
    """
    algorithm, problem = workload.algorithm, workload.problem
    if algorithm.bears_rounding == "bfloat16":
        return
    outer, _ = split_own(outer)
    task = task_on_cpu(workload.sampler, outer)
    with torch.no_grad():
        context, start = context_of(problem, outer, task), problem.init_inner(outer, task)
        with _Dtypes() as computed:
            problem.inner_loss(context, start, drawn_parts(task, workload.compute).support)
    borne = {torch.bfloat16} if algorithm.bears_rounding == "autocast" else set()
    for where, dtypes in (
        ("the context", _dtypes(context.values())),
        ("the inner variable", _dtypes(start.values())),
        ("inner_loss", computed.found - borne),
    ):
        rough = {dtype for dtype in dtypes if _is_rough(dtype)}
        if rough:
            reason = DIFFERENCES if not borne else NOT_MEASURED
            raise ValueError(
                f"{where} must be in float32 or float64 with {type(algorithm).__name__}, got "
                f"{', '.join(sorted(map(str, rough)))}: {reason}, or use another algorithm, as "
                "SOBA or ITD"
            )


DIFFERENCES = (
    "it takes differences between first derivatives at near points, or goes through steps of Adam "
    "with eps < 1e-3, and rounding drowns what it divides by. Cast the model with model.float() "
    "(without autocast)"
)
NOT_MEASURED = (
    "its error with that is large, or was not measured. Cast the model with model.float(), and run "
    "it under autocast in bfloat16 within the losses"
)


MIN_COSINE = 0.9
"""Between a hypergradient with an encode in bfloat16 and the same without."""


def check_encode_precision(workload: Workload, outer: Params, task: Task, found: Params) -> None:
    """Raise ValueError unless bfloat16 changes the context of task 0, and h only by rounding.

    Args:
        workload: With an `encode_precision`.
        outer: x.
        task: Task 0.
        found: Its hypergradient.
    """
    compute, problem = workload.compute, workload.problem
    fields = f"encode_precision must be 'highest' with {type(problem).__name__}, got "
    fields += repr(compute.encode_precision)
    problem_outer, _ = split_own(outer)
    exact = replace(workload, compute=replace(compute, encode_precision="highest"))
    with torch.no_grad():
        contexts = [
            work.compute.encode(problem.encode, problem_outer, task) for work in (exact, workload)
        ]
    if all(torch.equal(leaf, contexts[1][name]) for name, leaf in contexts[0].items()):
        raise ValueError(
            f"{fields}: its encode multiplies nothing that bfloat16 could make faster, as where "
            "all weights are adapted. It is for the body before an adapted head, as of "
            "FewShotProblem(model, adapt='head')"
        )
    expected = hypergradient(exact, outer, [task]).total
    length = dot(expected, expected).sqrt() * dot(found, found).sqrt()
    cosine = float(dot(expected, found) / length) if length else 1.0
    if not cosine >= MIN_COSINE:
        raise ValueError(
            f"{fields}: the cosine between the hypergradients of task 0 with it and without is "
            f"{cosine:.3f}, less than {MIN_COSINE}. Leave it out, or make adaptation less "
            "sensitive to its inputs (a smaller inner_lr, fewer inner_steps)"
        )


class _Dtypes(TorchDispatchMode):
    """The floating dtypes that operators return within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= _dtypes(tree_leaves(out))
        return out


def _dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    return {leaf.dtype for leaf in values if isinstance(leaf, Tensor)}


def _is_rough(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
