"""`AutogradOracle`: the oracle of a task on this machine, by torch.

Every derivative in `metadist.oracle.DERIVATIVES` is the gradient of a scalar, a loss or its slope
along given directions, so two short functions compute all of them: one by torch.autograd, which
has less overhead per call, one by torch.func, for vmap and compilers.

Second derivatives are reverse over reverse, the gradient of <grad g, v>. Forward over reverse is
as fast at best, and some operators (F.mse_loss) have no forward derivative of their gradient.
Reverse over reverse also gives J v and H v in one pass, as the gradient of one scalar in x and y.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from metadist.oracle import (
    DERIVATIVES,
    NO_CONSTANTS,
    Constants,
    Derivative,
    Draw,
    MiniBatches,
    Oracle,
    Source,
)
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, dot, gradients, leaves


class AutogradOracle(Oracle):
    """Derivatives of `problem` on the data of `task`.

    Args:
        problem: The problem.
        task: One task, or under vmap one slice of a stack of tasks.
        batch_size: Examples per draw; None: every draw is the whole support or query set.
        seed: The seed of the draws, together with the task's id; reproducible on every device.
        compile: Compile each derivative with torch.compile, once per problem and shape; where
            no compiler works, a warning is given and the derivatives run uncompiled.
        eager: Use torch.autograd, which is faster; not under the transforms of torch.func.
        step: The outer step; other steps have other draws.
        constants: What x does not enter.
    """

    def __init__(
        self,
        problem: Problem,
        task: Task,
        batch_size: int | None = None,
        seed: int = 0,
        compile: bool = False,
        eager: bool = False,
        step: int = 0,
        constants: Constants = NO_CONSTANTS,
    ) -> None:
        num_examples = task.support.index.shape[0], task.query.index.shape[0]
        mini_batches = MiniBatches(num_examples, task.id, batch_size, seed, step)
        super().__init__(problem, mini_batches, constants)
        self._task = task
        self._functions: dict[str, Callable[..., tuple[Params, ...]]] = {}
        if compile or not eager:
            self._functions = _functions(_Identity(problem), compile)

    def batch(self, draw: Draw) -> Batch:
        """The examples of `draw`."""
        full = self._set(draw.source)
        chosen = self._mini_batches.chosen(draw, full.index)
        return full if chosen is None else full.take(chosen)

    def _set(self, source: Source) -> Batch:
        return self._task.support if source == "support" else self._task.query

    def derive(self, name: str, draw: Draw, *trees: Params) -> tuple[Params, ...]:
        derivative, batch = DERIVATIVES[name], self.batch(draw)
        if derivative.gives == ("value",):
            return ({"value": _loss(self._problem, derivative)(*trees, batch)},)
        if self._functions:
            return self._functions[name](*trees, batch)
        return _eager(_loss(self._problem, derivative), derivative, batch, *trees)


def _loss(problem: Problem, derivative: Derivative) -> Callable[..., Tensor]:
    return problem.inner_loss if derivative.loss == "inner_loss" else problem.outer_loss


def _eager(
    loss: Callable[..., Tensor],
    derivative: Derivative,
    batch: Batch,
    x: Params,
    y: Params,
    *directions: Params,
) -> tuple[Params, ...]:
    """A derivative by torch.autograd."""
    variables = {"x": x, "y": y}
    for role, tree in variables.items():
        if role in derivative.along or role in derivative.gives:
            variables[role] = leaves(tree)
    outputs: list[Tensor] = [loss(variables["x"], variables["y"], batch)]
    cotangents: list[Tensor | None] = [None]
    if derivative.along:
        along = [variables[role] for role in derivative.along]
        slopes = gradients(outputs, cotangents, *along, create_graph=True)
        outputs, cotangents = [], []
        for slope, direction in zip(slopes, directions, strict=True):
            outputs += slope.values()
            cotangents += [direction[name] for name in slope]
    return gradients(outputs, cotangents, *(variables[role] for role in derivative.gives))


def _functional(problem: Problem, derivative: Derivative) -> Callable[..., tuple[Params, ...]]:
    """A derivative by torch.func: a pure function of (x, y, directions, batch)."""
    places = {"x": 0, "y": 1}
    function = _loss(problem, derivative)
    if derivative.along:
        gradient = torch.func.grad(function, tuple(places[role] for role in derivative.along))

        def slope(x: Params, y: Params, *rest: Any) -> Tensor:
            *directions, batch = rest
            products = map(dot, gradient(x, y, batch), directions)
            return reduce(torch.add, products)

        function = slope
    of: Callable[..., tuple[Params, ...]] = torch.func.grad(
        function, tuple(places[role] for role in derivative.gives)
    )
    return of


class _Identity:
    """A key that compares by identity and keeps its object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value


# A cache for the whole process: an oracle lives for one task of one step, and what torch.compile
# has compiled for its problem must outlive it. The functions are pure, so sharing them is safe.
@lru_cache(maxsize=8)
def _functions(problem: _Identity, compile: bool) -> dict[str, Callable[..., tuple[Params, ...]]]:
    functions = {}
    for name, derivative in DERIVATIVES.items():
        if derivative.gives != ("value",):
            function = _functional(problem.value, derivative)
            functions[name] = _compiled(function) if compile else function
    return functions


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call; uncompiled, with a warning, where that fails."""
    import torch._dynamo.exc  # some seconds, which no other user of this module should pay

    current = torch.compile(function, dynamic=False)

    def call(*args: Any) -> Any:
        nonlocal current
        if current is function:
            return function(*args)
        try:
            return current(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            # An error of the function itself is raised again, readable, by the call below.
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"compile=True has no effect, torch.compile failed: {reason}; "
                "install a C++ compiler (or on GPU, triton), or pass compile=False",
                RuntimeWarning,
                stacklevel=2,
            )
            current = function
            return function(*args)

    return call
