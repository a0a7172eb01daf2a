"""`AutogradOracle`: the oracle of a task on this machine, by torch.

Every derivative in `metadist.oracle.DERIVATIVES` is the gradient of a scalar, a loss or its slope
along given directions, so two short functions compute all of them: one by torch.autograd, which
has less overhead per call, one by torch.func, for vmap and compilers.

Second derivatives are reverse over reverse, products with the graph of the gradient. Forward over
reverse is as fast at best, and some operators (F.mse_loss) have no forward derivative of their
gradient. Reverse over reverse also gives J v and H v in one pass. And the graph can be kept: of
several products at one point, on one draw, only the first pays for the loss and its gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metadist.compute import DEFAULT
from metadist.draws import BatchSize, Draw, MiniBatches, Source
from metadist.memory import LiveMemory
from metadist.oracle import DERIVATIVES, NO_CONSTANTS, Constants, Derivative, Oracle, Program, Role
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, detach, dot, gradients, leaves

if TYPE_CHECKING:
    from metadist.compiled import Kernels


class AutogradOracle(Oracle):
    """Derivatives of `problem` on the data of `task`.

    Args:
        problem: The problem.
        task: One task, or under vmap one slice of a stack of tasks.
        batch_size: Examples per draw, of both sets or of (support, query); None: every draw is the
            whole set.
        seed: The seed of the draws, together with the task's id; reproducible on every device.
        compile: Compile what is asked in `together`, see metadist/compiled.py.
        eager: Use torch.autograd, which is faster; not under the transforms of torch.func.
        step: The outer step; other steps have other draws.
        constants: What x does not enter.
        graph_budget: Bytes of graphs that `kept_grad` may leave behind; the results are the same.
        reports: Somebody reads the metrics of the estimate.
    """

    def __init__(
        self,
        problem: Problem,
        task: Task,
        batch_size: BatchSize = None,
        seed: int = 0,
        compile: bool = False,
        eager: bool = False,
        step: int = 0,
        constants: Constants = NO_CONSTANTS,
        graph_budget: int = DEFAULT.graph_budget,
        reports: bool = True,
    ) -> None:
        num_examples = task.support.index.shape[0], task.query.index.shape[0]
        mini_batches = MiniBatches(num_examples, task.id, batch_size, seed, step)
        super().__init__(problem, mini_batches, constants, reports)
        self._task = task
        self._compile = compile
        self._eager = eager
        self._batches: dict[Source, tuple[Draw, Batch]] = {}
        self._point: _Point | None = None
        self._kept: list[_Point] = []
        self._graph_budget = graph_budget
        # Under vmap the shapes of a task do not tell the size of its graph, which is of all tasks.
        self._graph_sizes = _graph_sizes(_Identity(problem)) if eager else {}

    def batch(self, draw: Draw) -> Batch:
        """The examples of `draw`; those of the last draw of each set are kept."""
        draw = self._mini_batches.canonical(draw)
        if self._batches.get(draw.source, (None,))[0] != draw:
            self._batches[draw.source] = draw, self._take(draw)
        return self._batches[draw.source][1]

    def _take(self, draw: Draw) -> Batch:
        full = self._set(draw.source)
        chosen = self._mini_batches.chosen(draw, full.index.device)
        return full if chosen is None else full.take(chosen)

    def _set(self, source: Source) -> Batch:
        return self._task.support if source == "support" else self._task.query

    def derive(self, name: str, draw: Draw, *trees: Params) -> tuple[Params, ...]:
        derivative = DERIVATIVES[name]
        if derivative.gives == ("value",):
            return ({"value": _loss(self._problem, derivative)(*trees, self.batch(draw))},)
        x, y, *directions = trees
        if derivative.loss == "inner_map":
            return _of_map(self._problem, name, self.batch(draw), x, y, *directions)
        if derivative.loss == "inner_loss" and self.has_inner_map:
            raise ValueError(
                f"an algorithm must take the inner_map of {type(self._problem).__name__}, as AID "
                f"and ITD do, got one that asks for {name} of inner_loss, which that problem only "
                "reports"
            )
        draw = self._mini_batches.canonical(draw)
        point = self._known(derivative, draw, x, y)
        if derivative.along:
            self._point = point or self._linearise(derivative, draw, x, y)
            return self._point.product(directions, derivative.gives)
        if point is not None:
            self._point = point
            return tuple(point.slopes[role] for role in derivative.gives)
        if derivative.is_kept and (point := self._keep(draw, x, y)):
            return (point.slopes["y"],)
        compute = _eager if self._eager else _functional
        return compute(_loss(self._problem, derivative), derivative, self.batch(draw), x, y)

    def together(self, program: Program, *trees: Params) -> Any:
        if not self._compile:
            return program(self, *trees)
        kernels = _kernels(_Identity(self._problem))
        return kernels.run(program, self, self._task, trees, self._graph_budget)

    def of(self, task: Task) -> AutogradOracle:
        """The oracle of another task of the same sizes."""
        other = copy.copy(self)
        other._task, other._mini_batches = task, self._mini_batches.of(task.id)
        other._batches, other._point, other._kept = {}, None, []
        return other

    def _known(self, derivative: Derivative, draw: Draw, x: Params, y: Params) -> _Point | None:
        """The point at which this can be had from what is kept."""
        # What is asked elsewhere ends the questions at a point: only one graph is alive at a time,
        # beside those for which a product has been announced.
        point, self._point = self._point, None
        if point is not None and point.serves(derivative, draw, x, y):
            return point
        for number in reversed(range(len(self._kept) if derivative.along else 0)):
            if self._kept[number].serves(derivative, draw, x, y):
                return self._kept.pop(number)
        return None

    def _keep(self, draw: Draw, x: Params, y: Params) -> _Point | None:
        """A point whose graph waits for a product; None: the budget has no room for it."""
        # The first points are kept and not the last ones, for which others would have to go.
        shapes = tuple(
            (leaf.shape, leaf.dtype)
            for leaf in (*x.values(), *y.values(), *self.batch(draw).tensors)
        )
        size = self._graph_sizes.get(shapes)
        if (len(self._kept) + 1) * (size or 1) > self._graph_budget:
            return None
        with LiveMemory() if size is None else nullcontext() as memory:
            point = self._linearise(DERIVATIVES["second_order"], draw, x, y)
        if memory is not None:
            size = self._graph_sizes[shapes] = memory.num_bytes()
        if (len(self._kept) + 1) * (size or 1) <= self._graph_budget:
            self._kept.append(point)
        return point

    def _linearise(self, derivative: Derivative, draw: Draw, x: Params, y: Params) -> _Point:
        loss, batch = _loss(self._problem, derivative), self.batch(draw)
        if self._eager:
            graph = _eager_graph(loss, derivative, batch, x, y)
            return _Point(derivative.loss, draw, x, y, ("x", "y"), *graph)
        graph = _functional_graph(loss, derivative, batch, x, y)
        return _Point(derivative.loss, draw, x, y, derivative.gives, *graph)


Pull = Callable[[Sequence[Params], tuple[Role, ...], bool], tuple[Params, ...]]
"""(directions, roles of the result, whether to keep the graph) -> products with the graph."""


class _Point:
    """The slopes of a loss at a point, with their graph.

    The point is told by its tensors, which it holds, and by their versions: a change in place
    makes it another one.

    Args:
        loss: The name of the loss.
        draw: The examples.
        x, y: The point.
        of: In what the slopes can be differentiated.
        slopes: The slopes, detached, by role.
        pull: Products with the graph.
    """

    def __init__(
        self,
        loss: str,
        draw: Draw,
        x: Params,
        y: Params,
        of: tuple[Role, ...],
        slopes: dict[Role, Params],
        pull: Pull,
    ) -> None:
        self.slopes = slopes
        self._loss = loss
        self._draw = draw
        self._trees = x, y
        self._versions = _versions(x, y)
        self._of = of
        self._pull: Pull | None = pull

    def serves(self, derivative: Derivative, draw: Draw, x: Params, y: Params) -> bool:
        """Whether the derivative can be had from what is kept here."""
        if derivative.along:
            known = self._pull is not None and tuple(self.slopes) == derivative.along
            known = known and set(derivative.gives) <= set(self._of)
        else:
            known = set(derivative.gives) <= self.slopes.keys()
        return (
            known
            and derivative.loss == self._loss
            and draw == self._draw
            and all(map(_is_same, self._trees, (x, y)))
            and self._versions == _versions(x, y)
        )

    def product(self, directions: Sequence[Params], gives: tuple[Role, ...]) -> tuple[Params, ...]:
        """The slope along `directions`, differentiated."""
        assert self._pull is not None
        # J v is the last thing that methods ask at a point, so its graph may go as it is read.
        is_last = "x" in gives
        result = self._pull(directions, gives, not is_last)
        if is_last:
            self._pull = None
        return result


def _versions(*trees: Params) -> list[int]:
    return [leaf._version for tree in trees for leaf in tree.values()]


def _is_same(first: Params, second: Params) -> bool:
    return list(first) == list(second) and all(first[name] is second[name] for name in first)


def _loss(problem: Problem, derivative: Derivative) -> Callable[..., Tensor]:
    return problem.inner_loss if derivative.loss == "inner_loss" else problem.outer_loss


def _eager(
    loss: Callable[..., Tensor], derivative: Derivative, batch: Batch, x: Params, y: Params
) -> tuple[Params, ...]:
    """A first derivative by torch.autograd."""
    at = {"x": x, "y": y}
    for role in derivative.gives:
        at[role] = leaves(at[role])
    value = loss(at["x"], at["y"], batch)
    return gradients([value], [None], *(at[role] for role in derivative.gives))


def _eager_graph(
    loss: Callable[..., Tensor], derivative: Derivative, batch: Batch, x: Params, y: Params
) -> tuple[dict[Role, Params], Pull]:
    """The slopes of `derivative`, and products with their graph, by torch.autograd."""
    at = {"x": leaves(x), "y": leaves(y)}
    value, along = loss(at["x"], at["y"], batch), derivative.along
    slopes = gradients([value], [None], *(at[role] for role in along), create_graph=True)

    def pull(
        directions: Sequence[Params], gives: tuple[Role, ...], retain_graph: bool
    ) -> tuple[Params, ...]:
        outputs: list[Tensor] = []
        cotangents: list[Tensor | None] = []
        for slope, direction in zip(slopes, directions, strict=True):
            outputs += slope.values()
            cotangents += [direction[name] for name in slope]
        variables = [at[role] for role in gives]
        return gradients(outputs, cotangents, *variables, retain_graph=retain_graph)

    return dict(zip(along, map(detach, slopes), strict=True)), pull


PLACES = {"x": 0, "y": 1}
"""Of the variables among the arguments of a loss."""


def _functional(
    loss: Callable[..., Tensor], derivative: Derivative, batch: Batch, x: Params, y: Params
) -> tuple[Params, ...]:
    """A first derivative by torch.func."""

    def loss_at(*variables: Params) -> Tensor:
        at = {"x": x, "y": y} | dict(zip(derivative.gives, variables, strict=True))
        return loss(at["x"], at["y"], batch)

    variables = [{"x": x, "y": y}[role] for role in derivative.gives]
    value, vjp = torch.func.vjp(loss_at, *variables)  # type: ignore[misc]
    # torch.func.grad would make the graph of the gradient, too.
    found: tuple[Params, ...] = vjp(value.new_ones(()), retain_graph=False, create_graph=False)
    return found


def _functional_graph(
    loss: Callable[..., Tensor], derivative: Derivative, batch: Batch, x: Params, y: Params
) -> tuple[dict[Role, Params], Pull]:
    """The slopes of `derivative`, and products with their graph, by torch.func."""
    gradient = torch.func.grad(loss, tuple(PLACES[role] for role in derivative.along))

    def slopes_at(*variables: Params) -> tuple[Params, ...]:
        at = {"x": x, "y": y} | dict(zip(derivative.gives, variables, strict=True))
        slopes: tuple[Params, ...] = gradient(at["x"], at["y"], batch)
        return slopes

    variables = [{"x": x, "y": y}[role] for role in derivative.gives]
    slopes, vjp = torch.func.vjp(slopes_at, *variables)  # type: ignore[misc]  # no third, aux

    def pull(
        directions: Sequence[Params], gives: tuple[Role, ...], retain_graph: bool
    ) -> tuple[Params, ...]:
        cotangents = [
            {name: direction[name] for name in slope}
            for slope, direction in zip(slopes, directions, strict=True)
        ]
        # No graph of the products, as in the eager form; a batch norm under vmap can have none.
        found = vjp(tuple(cotangents), retain_graph=retain_graph, create_graph=False)
        by_role = dict(zip(derivative.gives, found, strict=True))
        return tuple(by_role[role] for role in gives)

    return dict(zip(derivative.along, slopes, strict=True)), pull


def _of_map(
    problem: Problem, name: str, batch: Batch, x: Params, y: Params, *directions: Params
) -> tuple[Params, ...]:
    """Phi(x, y), or a product with its Jacobian."""
    if name == "inner_map":
        with torch.no_grad():
            return (problem.inner_map(x, y, batch),)
    (direction,) = directions

    def back(v: Params) -> tuple[Params, Params]:
        value, pull = torch.func.vjp(lambda x, y: problem.inner_map(x, y, batch), x, y)  # type: ignore[misc]
        found: tuple[Params, Params] = pull({name: v[name] for name in value})
        return found

    if name == "map_products":
        return tuple(map(detach, back(direction)))
    # The product with the transpose is linear in v, and its own transpose is the product: unlike
    # forward mode, that takes nothing that first derivatives do not have.
    _, push = torch.func.vjp(lambda v: back(v)[1], direction)  # type: ignore[misc]
    return (detach(push({name: direction[name] for name in y})[0]),)


def functional(problem: Problem, derivative: Derivative) -> Callable[..., tuple[Params, ...]]:
    """A derivative by torch.func: a pure function of (x, y, directions, batch)."""
    function = _loss(problem, derivative)
    if derivative.along:
        gradient = torch.func.grad(function, tuple(PLACES[role] for role in derivative.along))

        def slope(x: Params, y: Params, *rest: Any) -> Tensor:
            *directions, batch = rest
            products = map(dot, gradient(x, y, batch), directions)
            return reduce(torch.add, products)

        function = slope
    of: Callable[..., tuple[Params, ...]] = torch.func.grad(
        function, tuple(PLACES[role] for role in derivative.gives)
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


# Caches for the whole process: an oracle lives for one task of one step, and what is compiled for
# its problem must outlive it. The functions are pure, so sharing them is safe.
@lru_cache(maxsize=8)
def _kernels(problem: _Identity) -> Kernels:
    from metadist.compiled import Kernels  # torch's compiler takes seconds to import

    return Kernels(problem.value)


@lru_cache(maxsize=8)
def _graph_sizes(problem: _Identity) -> dict[Any, int]:
    """The bytes of a graph of `problem` by the shapes it was made of, filled by its oracles."""
    return {}
