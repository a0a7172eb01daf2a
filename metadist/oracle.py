"""`Oracle`: the derivatives of one problem on one task's data, the only thing an algorithm calls.

x is the context, y the inner variable, g the inner and f the outer loss; H = d2g/dy2 and
J = d2g/dxdy. All results are detached from x and y unless stated.

How a derivative is counted, sent to a cluster and computed follows from its row in `DERIVATIVES`:
a new one is a row there and a method of `Oracle`. metadist/autograd.py computes them with torch,
metadist/cluster/data_parallel/oracle.py asks the machines that hold the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metadist.draws import Draw, MiniBatches, Source
from metadist.problem import Problem, has_inner_map, is_nonsmooth
from metadist.trees import Params, zeros_like

Role = Literal["x", "y", "value"]


@dataclass(frozen=True)
class Derivative:
    """What a derivative takes and gives.

    Args:
        loss: The loss that is differentiated; "inner_map" is `Problem.inner_map`, of which the
            slope along given directions is differentiated.
        gives: The variables of the result, a tree for each; "value" is the loss itself.
        counts: What one call adds to the counts of `CountingOracle`. The first name stands for
            the cost of the whole call.
        along: For a second derivative, the variables that the given directions belong to: the
            slope of the loss along the directions is differentiated.
        is_kept: Whether a second derivative at the same point will follow.
    """

    loss: Literal["inner_loss", "outer_loss", "inner_map"]
    gives: tuple[Role, ...]
    counts: tuple[str, ...]
    along: tuple[Role, ...] = ()
    is_kept: bool = False

    @property
    def takes(self) -> tuple[Role, ...]:
        """The trees that it is computed from: x, y and the directions."""
        return ("x", "y", *self.along)


DERIVATIVES = {
    "inner_grad": Derivative("inner_loss", ("y",), ("inner_grad",)),
    "kept_grad": Derivative("inner_loss", ("y",), ("inner_grad",), is_kept=True),
    "inner_grads": Derivative("inner_loss", ("x", "y"), ("inner_grad", "inner_grad_x")),
    "inner_grad_x": Derivative("inner_loss", ("x",), ("inner_grad", "inner_grad_x")),
    "outer_grads": Derivative("outer_loss", ("x", "y"), ("outer_grads",)),
    "second_order": Derivative("inner_loss", ("x", "y"), ("hvp", "jvp"), along=("y",)),
    "cross": Derivative("inner_loss", ("x",), ("hvp", "jvp"), along=("y",)),
    "outer_second_order": Derivative(
        "outer_loss", ("x", "y"), ("outer_hvp", "outer_jvp"), along=("y",)
    ),
    "hvp": Derivative("inner_loss", ("y",), ("hvp",), along=("y",)),
    "directional": Derivative("inner_loss", ("y",), ("directional",), along=("x", "y")),
    "inner_map": Derivative("inner_map", ("y",), ("inner_map",)),
    "map_products": Derivative("inner_map", ("x", "y"), ("map_vjp",), along=("y",)),
    "map_along": Derivative("inner_map", ("y",), ("map_jvp",), along=("y",)),
    "inner_value": Derivative("inner_loss", ("value",), ("inner_value",)),
    "outer_value": Derivative("outer_loss", ("value",), ("outer_value",)),
}
"""The methods of `Oracle` that need data."""


Program = Callable[..., Any]
"""(oracle, trees) -> trees: a part of an algorithm."""


class Constants(NamedTuple):
    """The leaves that x does not enter, by name: nobody uses a derivative in them.

    Args:
        context: Those of the context.
        start: Those of the start of adaptation: all of them where states are kept.
    """

    context: frozenset[str] = frozenset()
    start: frozenset[str] = frozenset()


NO_CONSTANTS = Constants()


class Oracle(ABC):
    """Derivatives of g on draws of the support set and of f on draws of the query set.

    Subclasses write `derive`, through which all derivatives go.

    Args:
        problem: The problem; only its non-smooth part is used here.
        mini_batches: The draws.
        constants: What x does not enter.
        reports: Somebody reads the metrics of the estimate; else an algorithm need not compute
            what only they need.
    """

    def __init__(
        self,
        problem: Problem,
        mini_batches: MiniBatches,
        constants: Constants = NO_CONSTANTS,
        reports: bool = True,
    ) -> None:
        self._problem = problem
        self._mini_batches = mini_batches
        self.constants = constants
        self.reports = reports
        self.has_inner_map = has_inner_map(problem)

    @abstractmethod
    def derive(self, name: str, draw: Draw, *trees: Params) -> tuple[Params, ...]:
        """The derivative `name` at `trees`, as its row in `DERIVATIVES` says.

        A value is the only leaf, "value", of a tree.
        """

    def apply(self, function: Callable[..., Any], arguments: Any, like: Any) -> Any:
        """`function(*arguments)`, trees like `like`; `function` needs no data.

        Override it where arguments may not be known yet.
        """
        return function(*arguments)

    def together(self, program: Program, *trees: Params) -> Any:
        """`program(oracle, *trees)`, under vmap for all tasks at once where it is compiled.

        Args:
            program: Gets an oracle of the same draws, and `trees`, all of which may have a leading
                axis of tasks; it computes with them element by element. Its results are trees.
            *trees: Its arguments.
        """
        return program(self, *trees)

    @property
    def step(self) -> int:
        """Outer steps taken before this one: for schedules, and part of the seed of all draws."""
        return self._mini_batches.step

    def draw_inner(self) -> Draw:
        """A fresh mini-batch of the support set."""
        return self._mini_batches.draw("support")

    def draw_outer(self) -> Draw:
        """A fresh mini-batch of the query set."""
        return self._mini_batches.draw("query")

    def parts(self, source: Source) -> list[Draw]:
        """The set cut into fixed mini-batches, the same at every outer step, the last smaller."""
        return self._mini_batches.parts(source)

    def uniform(self) -> float:
        """A fresh number in [0, 1), the same for all tasks of an outer step."""
        return self._mini_batches.uniform()

    def random_like(self, tree: Params, kind: Literal["normal", "rademacher"]) -> Params:
        """Fresh random numbers of mean 0 and variance 1 of these shapes, the task's own."""
        return self._mini_batches.random_like(tree, kind)

    def inner_grad(self, x: Params, y: Params, draw: Draw) -> Params:
        """grad_y g. Cost: one gradient."""
        return self.derive("inner_grad", draw, x, y)[0]

    def kept_grad(self, x: Params, y: Params, draw: Draw) -> Params:
        """grad_y g, where a second derivative at this very point will be asked for.

        An oracle may keep the graph until then, which saves one gradient. Cost: one gradient.
        """
        return self.derive("kept_grad", draw, x, y)[0]

    def inner_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        """(grad_x g, grad_y g). Cost: one joint gradient."""
        g_x, g_y = self.derive("inner_grads", draw, x, y)
        return g_x, g_y

    def inner_grad_x(self, x: Params, y: Params, draw: Draw) -> Params:
        """grad_x g; less work than both, and counted as both. Cost: one gradient."""
        return self.derive("inner_grad_x", draw, x, y)[0] if x else {}

    def outer_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        """(grad_x f, grad_y f). Cost: one joint gradient."""
        f_x, f_y = self.derive("outer_grads", draw, x, y)
        return f_x, f_y

    def second_order(self, x: Params, y: Params, v: Params, draw: Draw) -> tuple[Params, Params]:
        """(J v shaped like x, H v shaped like y). Cost: about two gradients for both."""
        j_v, h_v = self.derive("second_order", draw, x, y, v)
        return j_v, h_v

    def cross(self, x: Params, y: Params, v: Params, draw: Draw) -> Params:
        """J v; less work than both, and counted as both. Cost: about two gradients."""
        return self.derive("cross", draw, x, y, v)[0] if x else {}

    def outer_second_order(
        self, x: Params, y: Params, v: Params, draw: Draw
    ) -> tuple[Params, Params]:
        """(d2f/dxdy v shaped like x, d2f/dy2 v shaped like y). Cost: about two gradients of f."""
        j_v, h_v = self.derive("outer_second_order", draw, x, y, v)
        return j_v, h_v

    def hvp(self, x: Params, y: Params, v: Params, draw: Draw) -> Params:
        """H v. Cost: about two gradients."""
        return self.derive("hvp", draw, x, y, v)[0]

    def directional(self, x: Params, y: Params, dx: Params, dy: Params, draw: Draw) -> Params:
        """J' dx + H dy: how grad_y g changes along (dx, dy). Cost: about two gradients."""
        return self.derive("directional", draw, x, y, dx, dy)[0]

    def inner_map(self, x: Params, y: Params, draw: Draw) -> Params:
        """Phi(x, y), see `Problem.inner_map`. Cost: less than one gradient."""
        return self.derive("inner_map", draw, x, y)[0]

    def map_products(self, x: Params, y: Params, v: Params, draw: Draw) -> tuple[Params, Params]:
        """((dPhi/dx)' v shaped like x, (dPhi/dy)' v shaped like y). Cost: about one gradient."""
        phi_x, phi_y = self.derive("map_products", draw, x, y, v)
        return phi_x, phi_y

    def map_along(self, x: Params, y: Params, u: Params, draw: Draw) -> Params:
        """(dPhi/dy) u: how Phi changes along u. Cost: about two gradients."""
        return self.derive("map_along", draw, x, y, u)[0]

    def inner_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        """g, shape (); differentiable in a local oracle."""
        return self.derive("inner_value", draw, x, y)[0]["value"]

    def outer_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        """f, shape (); differentiable in a local oracle."""
        return self.derive("outer_value", draw, x, y)[0]["value"]

    def prox_inner(self, x: Params, y: Params, step_size: float) -> Params:
        """argmin_z r(x, z) + |z - y|^2 / (2 step_size), r the non-smooth part of g; else y."""
        if not is_nonsmooth(self._problem):
            return y
        return self.apply(self._problem.prox_inner, (x, y, step_size), y)

    def nonsmooth_grad(self, x: Params, y: Params) -> Params:
        """grad_x r(x, y); zero for a problem without non-smooth part."""
        if not is_nonsmooth(self._problem):
            return zeros_like(x)
        return self.apply(torch.func.grad(self._problem.nonsmooth_loss), (x, y), x)


class CountingOracle(Oracle):
    """Another oracle, with `counts` of what it was asked; draws are the other's own.

    Keys: `inner_grad` (grad_y g), `inner_grad_x` (grad_x g), `outer_grads` (joint), `hvp` (H v),
    `jvp` (J v), `directional` (J' dx + H dy), `outer_hvp` and `outer_jvp` (those of f),
    `inner_map`, `map_vjp`, `map_jvp` (Phi and its products), `inner_value`, `outer_value`. Under
    vmap over B tasks one call is counted once.
    """

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle._problem, oracle._mini_batches, oracle.constants, oracle.reports)
        self._oracle = oracle
        self.counts: Counter[str] = Counter()

    def derive(self, name: str, draw: Draw, *trees: Params) -> tuple[Params, ...]:
        self.counts.update(DERIVATIVES[name].counts)
        return self._oracle.derive(name, draw, *trees)

    def together(self, program: Program, *trees: Params) -> Any:
        def counted(oracle: Oracle, *trees: Params) -> Any:
            counting = CountingOracle(oracle)
            result = program(counting, *trees)
            self.counts.update(counting.counts)
            return result

        return self._oracle.together(counted, *trees)

    def apply(self, function: Callable[..., Any], arguments: Any, like: Any) -> Any:
        return self._oracle.apply(function, arguments, like)


def in_gradients(
    counts: Mapping[str, int], support_share: float = 1.0, query_share: float = 1.0
) -> float:
    """The cost of `counts` (of a `CountingOracle`) in gradients on whole sets.

    A gradient, joint or not, and a value count 1; H v, with or without J v, and J' dx + H dy
    count 2. The shares are those of the sets that a draw holds.
    """
    totals = {"inner_loss": 0, "outer_loss": 0, "inner_map": 0}
    costs = {row.counts[0]: (row.loss, 2 if row.along else 1) for row in DERIVATIVES.values()}
    for name, (loss, num_gradients) in costs.items():
        totals[loss] += num_gradients * counts.get(name, 0)
    on_support = totals["inner_loss"] + totals["inner_map"]
    return support_share * on_support + query_share * totals["outer_loss"]
