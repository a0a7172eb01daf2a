"""`Oracle`: the derivatives of one problem on one task's data, the only thing an algorithm calls.

x is the context, y the inner variable, g the inner and f the outer loss;
H = d2g/dy2 and J = d2g/dxdy. All results are detached from x and y unless stated.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metadist.problem import Problem, is_nonsmooth
from metadist.task import Batch, Task
from metadist.trees import Params, dot, gradients, leaves, num_elements, unflatten, zeros_like

Source = Literal["support", "query"]
SOURCES: tuple[Source, Source] = ("support", "query")


class Draw(NamedTuple):
    """A mini-batch by number: the same draw of the same oracle is the same examples.

    Args:
        source: the set.
        counter: number of the draw, or of the part.
        share: of a part of the set's fixed partition (see `Oracle.parts`), which share of the
            set it is; None for a random mini-batch.
    """

    source: Source
    counter: int
    share: float | None = None


class Oracle(Protocol):
    """Derivatives of g on draws of the support set and of f on draws of the query set."""

    @property
    def step(self) -> int:
        """Outer steps taken before this one: for schedules, and part of the seed of all draws."""
        ...

    def draw_inner(self) -> Draw:
        """A fresh mini-batch of the support set."""
        ...

    def draw_outer(self) -> Draw:
        """A fresh mini-batch of the query set."""
        ...

    def parts(self, source: Source) -> list[Draw]:
        """The set cut into fixed mini-batches, the same at every outer step, the last smaller."""
        ...

    def uniform(self) -> float:
        """A fresh number in [0, 1), the same for all tasks of an outer step."""
        ...

    def random_like(self, tree: Params, kind: Literal["normal", "rademacher"]) -> Params:
        """Fresh random numbers of mean 0 and variance 1 of these shapes, the task's own."""
        ...

    def inner_grad(self, x: Params, y: Params, draw: Draw) -> Params:
        """grad_y g. Cost: one gradient."""
        ...

    def inner_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        """(grad_x g, grad_y g). Cost: one joint gradient."""
        ...

    def outer_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        """(grad_x f, grad_y f). Cost: one joint gradient."""
        ...

    def second_order(self, x: Params, y: Params, v: Params, draw: Draw) -> tuple[Params, Params]:
        """(J v shaped like x, H v shaped like y). Cost: about two gradients for both."""
        ...

    def hvp(self, x: Params, y: Params, v: Params, draw: Draw) -> Params:
        """H v. Cost: about two gradients."""
        ...

    def directional(self, x: Params, y: Params, dx: Params, dy: Params, draw: Draw) -> Params:
        """J' dx + H dy: how grad_y g changes along (dx, dy). Cost: about two gradients."""
        ...

    def prox_inner(self, x: Params, y: Params, step_size: float) -> Params:
        """argmin_z r(x, z) + |z - y|^2 / (2 step_size), r the non-smooth part of g; else y."""
        ...

    def nonsmooth_grad(self, x: Params, y: Params) -> Params:
        """grad_x r(x, y); zero for a problem without non-smooth part."""
        ...

    def inner_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        """g, shape (); differentiable in a local oracle."""
        ...

    def outer_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        """f, shape (); differentiable in a local oracle."""
        ...


class Draws:
    """The draws of one outer step on one task, and its random numbers: no data, no derivatives.

    Args:
        num_examples: in the support and in the query set.
        task_id: part of the seed, as are `seed` and `step`; reproducible on every device.
        batch_size: examples per draw; None: every draw is the whole support or query set.
        seed: of the draws.
        step: the outer step; other steps have other draws.
    """

    def __init__(
        self,
        num_examples: tuple[int, int],
        task_id: int | Tensor,
        batch_size: int | None,
        seed: int,
        step: int,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1 or None for whole sets, got {batch_size}")
        self._num_examples: dict[Source, int] = dict(zip(SOURCES, num_examples, strict=True))
        self._task_id = task_id
        self._batch_size = batch_size
        self._seed = seed
        self._step = step
        self._num_draws = 0

    @property
    def step(self) -> int:
        return self._step

    def _count(self) -> int:
        self._num_draws += 1
        return self._num_draws - 1

    def draw_inner(self) -> Draw:
        return Draw("support", self._count())

    def draw_outer(self) -> Draw:
        return Draw("query", self._count())

    def parts(self, source: Source) -> list[Draw]:
        num_examples = self._num_examples[source]
        size = min(self._batch_size or num_examples, num_examples)
        return [
            Draw(source, number, min(size, num_examples - number * size) / num_examples)
            for number in range(math.ceil(num_examples / size))
        ]

    def uniform(self) -> float:
        return random.Random(f"{self._seed} {self._step} {self._count()}").random()

    def random_like(self, tree: Params, kind: Literal["normal", "rademacher"]) -> Params:
        leaf = next(iter(tree.values()))
        places = torch.arange(num_elements(tree), device=leaf.device)
        seeds = (self._seed, self._step, self._task_id, self._count())
        keys = random_keys(places, *seeds)
        if kind == "rademacher":
            return unflatten((1 - 2 * ((keys >> 40) & 1)).to(leaf.dtype), tree)
        # Box and Muller's transform; + 0.5 keeps the logarithm finite.
        radius, angle = (
            (((bits >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) / 2**53
            for bits in (keys, random_keys(keys, 1))
        )
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        return unflatten(normal.to(leaf.dtype), tree)

    def chosen(self, draw: Draw, index: Tensor) -> Tensor | None:
        """Where in `index` (that of the full set) the examples of `draw` are; None: all of them.

        A uniform choice without replacement, or a fixed part; int64, shape (examples,).
        """
        size = self._batch_size
        if size is None or size >= index.shape[0]:
            return None
        if draw.share is not None:
            order = random_keys(index, self._seed, self._task_id).argsort()
            return order[draw.counter * size : (draw.counter + 1) * size]
        keys = random_keys(index, self._seed, self._step, self._task_id, draw.counter)
        # As keys.argsort()[:size], many times faster.
        return keys.topk(size, largest=False).indices


class AutogradOracle(Draws):
    """The local oracle: derivatives of `problem` on the data of `task`, by torch.func.

    Args:
        problem: whose losses are differentiated.
        task: one task, or under vmap one slice of a stack of tasks.
        batch_size: examples per draw; None: every draw is the whole support or query set.
        seed: of the draws, together with the task's id; reproducible on every device.
        compile: compile each derivative with torch.compile, once per problem and shape; where
            no compiler works, a warning is given and the derivatives run uncompiled.
        eager: use torch.autograd where it is faster; not under the transforms of torch.func.
        step: the outer step; other steps have other draws.
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
    ) -> None:
        num_examples = task.support.index.shape[0], task.query.index.shape[0]
        super().__init__(num_examples, task.id, batch_size, seed, step)
        self._derivatives: Any = (
            _EagerDerivatives(problem)
            if eager and not compile
            else _derivatives(_Identity(problem), compile)
        )
        self._problem = problem
        self._task = task

    def batch(self, draw: Draw) -> Batch:
        """The examples of `draw`."""
        full = self._set(draw.source)
        chosen = self.chosen(draw, full.index)
        return full if chosen is None else full.take(chosen)

    def _set(self, source: Source) -> Batch:
        return self._task.support if source == "support" else self._task.query

    def inner_grad(self, x: Params, y: Params, draw: Draw) -> Params:
        return self._derivatives.inner_grad(x, y, self.batch(draw))

    def inner_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        return self._derivatives.inner_grads(x, y, self.batch(draw))

    def outer_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        return self._derivatives.outer_grads(x, y, self.batch(draw))

    def second_order(self, x: Params, y: Params, v: Params, draw: Draw) -> tuple[Params, Params]:
        return self._derivatives.second_order(x, y, v, self.batch(draw))

    def hvp(self, x: Params, y: Params, v: Params, draw: Draw) -> Params:
        return self._derivatives.hvp(x, y, v, self.batch(draw))

    def directional(self, x: Params, y: Params, dx: Params, dy: Params, draw: Draw) -> Params:
        return self._derivatives.directional(x, y, dx, dy, self.batch(draw))

    def prox_inner(self, x: Params, y: Params, step_size: float) -> Params:
        return self._problem.prox_inner(x, y, step_size) if is_nonsmooth(self._problem) else y

    def nonsmooth_grad(self, x: Params, y: Params) -> Params:
        if not is_nonsmooth(self._problem):
            return zeros_like(x)
        return torch.func.grad(self._problem.nonsmooth_loss)(x, y)

    def inner_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        return self._problem.inner_loss(x, y, self.batch(draw))

    def outer_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        return self._problem.outer_loss(x, y, self.batch(draw))


class CountingOracle:
    """Another oracle, with `counts` of what it was asked.

    Keys: `inner_grad` (grad_y g), `inner_grad_x` (grad_x g), `outer_grads` (joint), `hvp` (H v),
    `jvp` (J v), `directional` (J' dx + H dy), `inner_value`, `outer_value`. Under vmap over B
    tasks one call is counted once.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.counts: Counter[str] = Counter()

    def draw_inner(self) -> Draw:
        return self._oracle.draw_inner()

    def draw_outer(self) -> Draw:
        return self._oracle.draw_outer()

    @property
    def step(self) -> int:
        return self._oracle.step

    def parts(self, source: Source) -> list[Draw]:
        return self._oracle.parts(source)

    def uniform(self) -> float:
        return self._oracle.uniform()

    def random_like(self, tree: Params, kind: Literal["normal", "rademacher"]) -> Params:
        return self._oracle.random_like(tree, kind)

    def inner_grad(self, x: Params, y: Params, draw: Draw) -> Params:
        self.counts["inner_grad"] += 1
        return self._oracle.inner_grad(x, y, draw)

    def inner_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        self.counts.update(inner_grad=1, inner_grad_x=1)
        return self._oracle.inner_grads(x, y, draw)

    def outer_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        self.counts["outer_grads"] += 1
        return self._oracle.outer_grads(x, y, draw)

    def second_order(self, x: Params, y: Params, v: Params, draw: Draw) -> tuple[Params, Params]:
        self.counts.update(hvp=1, jvp=1)
        return self._oracle.second_order(x, y, v, draw)

    def hvp(self, x: Params, y: Params, v: Params, draw: Draw) -> Params:
        self.counts["hvp"] += 1
        return self._oracle.hvp(x, y, v, draw)

    def directional(self, x: Params, y: Params, dx: Params, dy: Params, draw: Draw) -> Params:
        self.counts["directional"] += 1
        return self._oracle.directional(x, y, dx, dy, draw)

    def prox_inner(self, x: Params, y: Params, step_size: float) -> Params:
        return self._oracle.prox_inner(x, y, step_size)

    def nonsmooth_grad(self, x: Params, y: Params) -> Params:
        return self._oracle.nonsmooth_grad(x, y)

    def inner_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        self.counts["inner_value"] += 1
        return self._oracle.inner_value(x, y, draw)

    def outer_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        self.counts["outer_value"] += 1
        return self._oracle.outer_value(x, y, draw)


def in_gradients(
    counts: Mapping[str, int], support_share: float = 1.0, query_share: float = 1.0
) -> float:
    """The cost of `counts` (of a `CountingOracle`) in gradients on whole sets.

    A gradient, joint or not, and a value count 1; H v, with or without J v, and J' dx + H dy
    count 2. The shares are those of the sets that a draw holds.
    """
    support = sum(counts.get(name, 0) for name in ("inner_grad", "inner_value"))
    products = sum(counts.get(name, 0) for name in ("hvp", "directional"))
    query = sum(counts.get(name, 0) for name in ("outer_grads", "outer_value"))
    return support_share * (support + 2 * products) + query_share * query


def random_keys(index: Tensor, *seeds: int | Tensor) -> Tensor:
    """Pseudo-random int64 like `index`, a hash of each entry and of the seeds.

    Integer arithmetic only (the finaliser of splitmix64, Steele et al. 2014): the same on every
    device and under vmap, where a torch.Generator is neither.
    """

    def mix(z: Tensor) -> Tensor:
        # A shift of int64 copies the sign; the mask makes it the shift of an unsigned number.
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return z ^ ((z >> 31) & 0x1FFFFFFFF)

    keys = torch.zeros_like(index)
    for seed in (*seeds, index):
        keys = mix(keys + seed + -0x61C8864680B583EB)
    return keys


class _Derivatives:
    """The derivatives of one problem as pure functions, by torch.func: for vmap and compilers.

    Products are reverse over reverse, the gradient of <grad_y g, v>: as fast here as forward over
    reverse, and some operators (F.mse_loss) have no forward derivative of their gradient.
    """

    def __init__(self, problem: Problem) -> None:
        g, f = problem.inner_loss, problem.outer_loss
        inner_grad = torch.func.grad(g, argnums=1)

        def product(x: Params, y: Params, v: Params, batch: Batch) -> Tensor:
            return dot(inner_grad(x, y, batch), v)

        self.inner_grad: Callable[..., Any] = inner_grad
        self.inner_grads: Callable[..., Any] = torch.func.grad(g, argnums=(0, 1))
        self.outer_grads: Callable[..., Any] = torch.func.grad(f, argnums=(0, 1))
        self.second_order: Callable[..., Any] = torch.func.grad(product, argnums=(0, 1))
        self.hvp: Callable[..., Any] = torch.func.grad(product, argnums=1)

        def slope(x: Params, y: Params, dx: Params, dy: Params, batch: Batch) -> Tensor:
            along_x, along_y = self.inner_grads(x, y, batch)
            # The gradient in y of <grad_x g, dx> is J' dx.
            return dot(along_x, dx) + dot(along_y, dy)

        self.directional: Callable[..., Any] = torch.func.grad(slope, argnums=1)


class _EagerDerivatives:
    """The same by torch.autograd, which has less overhead per call than torch.func."""

    def __init__(self, problem: Problem) -> None:
        self._inner_loss = problem.inner_loss
        self._outer_loss = problem.outer_loss

    def inner_grad(self, x: Params, y: Params, batch: Batch) -> Params:
        y = leaves(y)
        return gradients([self._inner_loss(x, y, batch)], [None], y)[0]

    def inner_grads(self, x: Params, y: Params, batch: Batch) -> tuple[Params, ...]:
        x, y = leaves(x), leaves(y)
        return gradients([self._inner_loss(x, y, batch)], [None], x, y)

    def outer_grads(self, x: Params, y: Params, batch: Batch) -> tuple[Params, ...]:
        x, y = leaves(x), leaves(y)
        return gradients([self._outer_loss(x, y, batch)], [None], x, y)

    def second_order(self, x: Params, y: Params, v: Params, batch: Batch) -> tuple[Params, ...]:
        x, y = leaves(x), leaves(y)
        loss = self._inner_loss(x, y, batch)
        (gradient,) = gradients([loss], [None], y, create_graph=True)
        return gradients(list(gradient.values()), list(v.values()), x, y)

    def hvp(self, x: Params, y: Params, v: Params, batch: Batch) -> Params:
        y = leaves(y)
        loss = self._inner_loss(x, y, batch)
        (gradient,) = gradients([loss], [None], y, create_graph=True)
        return gradients(list(gradient.values()), list(v.values()), y)[0]

    def directional(self, x: Params, y: Params, dx: Params, dy: Params, batch: Batch) -> Params:
        x, y = leaves(x), leaves(y)
        loss = self._inner_loss(x, y, batch)
        along = gradients([loss], [None], x, y, create_graph=True)
        outputs = [leaf for tree in along for leaf in tree.values()]
        return gradients(outputs, [*dx.values(), *dy.values()], y)[0]


class _Identity:
    """A key that compares by identity and keeps its object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value


@lru_cache(maxsize=8)
def _derivatives(problem: _Identity, compile: bool) -> _Derivatives:
    derivatives = _Derivatives(problem.value)
    if compile:
        for name, function in list(vars(derivatives).items()):
            setattr(derivatives, name, _compiled(function))
    return derivatives


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
