"""Analytic problems in float64 and independent references, shared by the tests.

Shape letters: S support examples, Q query examples, L size of x, P size of y.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Algorithm, Estimate, State
from metadist.autograd import AutogradOracle
from metadist.outer import Contribution, LeaseResult
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, add, dot, flatten, tree_map, unflatten

DOUBLE = torch.float64

torch.set_num_threads(1)  # on tensors this small threads only wait for one another


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator seeded by all of `seeds`."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % 2**31
    return torch.Generator().manual_seed(seed)


def computed_lease(
    lease_id: int,
    version: int,
    total: Tensor,
    num_tasks: int = 1,
    weight: float = 1.0,
    states: Mapping[int, Tensor] | None = None,
) -> Contribution:
    """A lease as it enters an outer step."""
    return Contribution(LeaseResult(lease_id, version, num_tasks), total, states or {}, weight)


def randn(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers, a function of `seed`."""
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def random_like(tree: Params, seed: int) -> Params:
    """A tree of standard normal numbers of the same shapes."""
    flat = torch.randn(
        sum(leaf.numel() for leaf in tree.values()), generator=generator(seed), dtype=DOUBLE
    )
    return unflatten(flat, tree)


class Quadratic(Problem):
    """The canonical quadratic: every hypergradient has a closed form.

        g = y'Ay/2 - y'(Bx + c),    f = |y - t|^2/2 + rho |x|^2/2

    A support example is (A_i, B_i, c_i), a query example t_j; the losses take their means.
    Adaptation starts from `start`, a constant, by default 0.
    """

    def __init__(self, num_outer: int, num_inner: int, rho: float = 0.1) -> None:
        self.num_outer = num_outer
        self.num_inner = num_inner
        self.rho = rho
        self.start = torch.zeros(num_inner, dtype=DOUBLE)

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.randn(self.num_outer, generator=generator, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": self.start}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        a, b, c = (tensor.mean(0) for tensor in batch.tensors)
        y = inner["y"]
        return 0.5 * y @ a @ y - y @ (b @ context["x"] + c)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        (t_QP,) = batch.tensors
        distance = (inner["y"] - t_QP).square().sum(1).mean()
        return 0.5 * distance + 0.5 * self.rho * context["x"] @ context["x"]


def quadratic_task(
    index: int,
    num_outer: int = 2,
    num_inner: int = 4,
    num_support: int = 3,
    num_query: int = 2,
    noise: float = 0.2,
) -> Task:
    """A random task of `Quadratic`: A not diagonal, its eigenvalues between 0.5 and 3.

    The examples scatter by `noise` around A, B, c and t.
    """
    random = generator(index, num_outer, num_inner)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=DOUBLE)

    basis = torch.linalg.qr(normal(num_inner, num_inner))[0]
    a = basis @ torch.diag(torch.linspace(0.5, 3, num_inner, dtype=DOUBLE)) @ basis.T
    scatter = noise * normal(num_support, num_inner, num_inner)
    a_SPP = a + (scatter - scatter.mean(0)).add((scatter - scatter.mean(0)).mT) / 2
    b_SPL = normal(num_inner, num_outer) + noise * normal(num_support, num_inner, num_outer)
    c_SP = normal(num_inner) + noise * normal(num_support, num_inner)
    t_QP = normal(num_inner) + noise * normal(num_query, num_inner)
    return Task(Batch.of(a_SPP, b_SPL, c_SP), Batch.of(t_QP), index)


def quadratic_terms(task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(A, B, c, t) of a task of `Quadratic`."""
    a, b, c = (tensor.mean(0) for tensor in task.support.tensors)
    return a, b, c, task.query.tensors[0].mean(0)


def golden_quadratic() -> tuple[Quadratic, Params, Task]:
    """(problem, outer, task): A = diag(1, 4), B = I, c = 0, t = (1, 1), rho = .1, x = (2, -4)."""
    a = torch.diag(torch.tensor([1.0, 4.0], dtype=DOUBLE))
    support = Batch.of(a[None], torch.eye(2, dtype=DOUBLE)[None], torch.zeros(1, 2, dtype=DOUBLE))
    task = Task(support, Batch.of(torch.ones(1, 2, dtype=DOUBLE)), 0)
    return Quadratic(2, 2), {"x": torch.tensor([2.0, -4.0], dtype=DOUBLE)}, task


class LinearMap(Quadratic):
    """Quadratic's data, but y is the fixed point of  Phi = My + (Bx + c),  M not symmetric.

    M = 0.9 (A R) / |A R| for a fixed rotation R, so it is a contraction.
    """

    def matrix(self, batch: Batch) -> Tensor:
        a = batch.tensors[0].mean(0)
        rotated = a @ torch.linalg.qr(randn(77, self.num_inner, self.num_inner))[0]
        return 0.9 * rotated / torch.linalg.matrix_norm(rotated, 2)

    def inner_map(self, context: Params, inner: Params, batch: Batch) -> Params:
        _, b, c = (tensor.mean(0) for tensor in batch.tensors)
        return {"y": self.matrix(batch) @ inner["y"] + b @ context["x"] + c}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        moved = self.inner_map(context, inner, batch)
        return (moved["y"] - inner["y"]).square().sum()


class QuadraticSampler:
    """Tasks of `Quadratic` by index; those of `broken` have NaN in them."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def sample(self, index: int) -> Task:
        task = quadratic_task(index)
        if index in self.broken:
            task.query.tensors[0].fill_(torch.nan)
        return task


class Smooth(Problem):
    """No quadratic: x enters the context, the start and both losses, y has two tensors."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {
            "a": torch.randn(3, generator=generator, dtype=DOUBLE),
            "b": torch.randn(2, 3, generator=generator, dtype=DOUBLE),
        }

    def encode(self, outer: Params, task: Task) -> Params:
        centre = task.support.tensors[0].mean(0)
        return {"c": (outer["a"] * (1 + centre)).tanh(), "b": outer["b"]}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"w": outer["b"].sin().sum(0), "m": outer["a"][:2].cos() * outer["b"][:, 0]}

    def _predict(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        slope = inner["w"] * context["c"] + inner["m"] @ context["b"]
        return (batch.tensors[0] @ slope).tanh()

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        fit = (self._predict(context, inner, batch) - batch.tensors[1]).square().mean()
        coupling = (inner["w"][0] * inner["m"][0] * context["c"][1]).cos()
        return fit + 0.1 * inner["w"].pow(4).sum() + 0.2 * inner["m"].square().sum() + coupling

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        fit = (self._predict(context, inner, batch) - batch.tensors[1]).pow(4).mean()
        return fit + (context["c"] * inner["w"]).sum().sin() + context["b"].square().mean()

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        return {"error": (self._predict(context, inner, batch) - batch.tensors[1]).abs().mean()}


def smooth_task(index: int, num_support: int = 5, num_query: int = 4) -> Task:
    """A random task of `Smooth`: inputs of three features, targets in (-1, 1)."""
    random = generator(index, 17)

    def batch(size: int) -> Batch:
        inputs = torch.randn(size, 3, generator=random, dtype=DOUBLE)
        return Batch.of(inputs, torch.randn(size, generator=random, dtype=DOUBLE).tanh())

    return Task(batch(num_support), batch(num_query), index)


def image_task(
    index: int, n_way: int = 3, k_shot: int = 2, k_query: int = 2, size: int = 16, channels: int = 1
) -> Task:
    """A random task of classification: images of noise around one prototype per class."""
    random = generator(index, 31)
    shape = (channels, size, size)
    prototypes = torch.randn(n_way, *shape, generator=random, dtype=DOUBLE)

    def batch(k: int) -> Batch:
        labels = torch.arange(n_way).repeat_interleave(k)
        noise = torch.randn(n_way * k, *shape, generator=random, dtype=DOUBLE)
        return Batch.of(prototypes[labels] + noise, labels)

    return Task(batch(k_shot), batch(k_query), index)


def vector_task(
    index: int, shape: tuple[int, ...] = (3,), num_examples: int = 4, outputs: int = 2
) -> Task:
    """A random task of regression from inputs of `shape` to vectors of size `outputs`."""
    random = generator(index, 47)

    def batch() -> Batch:
        inputs = torch.randn(num_examples, *shape, generator=random, dtype=DOUBLE)
        return Batch.of(inputs, torch.randn(num_examples, outputs, generator=random, dtype=DOUBLE))

    return Task(batch(), batch(), index)


def oracle_of(
    problem: Problem, outer: Params, task: Task, **options: int | bool | None
) -> tuple[AutogradOracle, Params, Params]:
    """(oracle, context, start): what an algorithm is given for one task."""
    oracle = AutogradOracle(problem, task, **options)  # type: ignore[arg-type]
    return oracle, problem.encode(outer, task), problem.init_inner(outer, task)


def assert_close(actual: Params, expected: Params, tolerance: float = 1e-10) -> None:
    """The same names, and values that differ by `tolerance` relative to the largest at most."""
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert actual[name].shape == leaf.shape, name
        assert actual[name].isfinite().all(), name
        error = float((actual[name] - leaf).abs().max()) if leaf.numel() else 0.0
        size = max(1.0, float(leaf.abs().max()) if leaf.numel() else 0.0)
        assert error <= tolerance * size, f"{name}: off by {error}, relative to {size}"


def assert_same_bytes(actual: Params, expected: Params) -> None:
    """The same names and bit-identical values."""
    assert list(actual) == list(expected)
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype and torch.equal(actual[name], leaf), name


def central_difference(
    function: Callable[[Params], Tensor], at: Params, eps: float = 1e-5
) -> Params:
    """The gradient of a scalar function, number by number."""
    flat = flatten(at)
    gradient = torch.empty_like(flat)
    for i in range(len(flat)):
        step = torch.zeros_like(flat)
        step[i] = eps
        above, below = function(unflatten(flat + step, at)), function(unflatten(flat - step, at))
        gradient[i] = (above.detach() - below.detach()) / (2 * eps)
    return unflatten(gradient, at)


def assert_slopes(
    gradient: Params,
    function: Callable[[Params], Tensor],
    at: Params,
    num_directions: int = 3,
    eps: float = 1e-7,
    tolerance: float = 1e-6,
) -> None:
    """`gradient` agrees with central differences of `function` along random directions.

    `eps` is small because the loss after adaptation jumps where an inner step crosses a kink.
    """
    for seed in range(num_directions):
        direction = random_like(at, 1000 + seed)
        above, below = function(add(at, direction, eps)), function(add(at, direction, -eps))
        slope = float(above.detach() - below.detach()) / (2 * eps)
        expected = float(dot(gradient, direction))
        assert abs(slope - expected) <= tolerance * max(1.0, abs(slope)), (slope, expected)


def plain_objective(
    problem: Problem,
    outer: Params,
    task: Task,
    inner_steps: int,
    inner_lr: float | Params,
    momentum: float = 0.0,
) -> Tensor:
    """f after SGD on g, written with torch.autograd alone; differentiable in `outer`."""
    context, y = problem.encode(outer, task), problem.init_inner(outer, task)
    y = {
        name: leaf if leaf.requires_grad else leaf.detach().requires_grad_()
        for name, leaf in y.items()
    }
    velocity: dict[str, Tensor] = {}
    for _ in range(inner_steps):
        loss = problem.inner_loss(context, y, task.support)
        gradients = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        for name, gradient in zip(list(y), gradients, strict=True):
            velocity[name] = gradient + momentum * velocity[name] if name in velocity else gradient
            rate = inner_lr[name] if isinstance(inner_lr, dict) else inner_lr
            y[name] = y[name] - rate * velocity[name]
    return problem.outer_loss(context, y, task.query)


def plain_gradient(function: Callable[[Params], Tensor], at: Params) -> Params:
    """The gradient of `function` by torch.autograd; 0 where it does not depend on a tensor."""
    leaves = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), at)
    gradients = torch.autograd.grad(
        function(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


class SingleRun(NamedTuple):
    """Where `run_single` ended."""

    outer: Params
    state: State
    estimate: Estimate


def run_single(
    algorithm: Algorithm,
    problem: Problem,
    task: Task,
    outer: Params,
    num_steps: int,
    outer_lr: float | Callable[[int], float],
    *,
    start: Params | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> SingleRun:
    """`num_steps` outer steps of plain SGD on one task whose state is kept.

    The problem's `encode` must be the identity; `project_outer` is applied after every step.
    """
    inner = problem.init_inner(outer, task) if start is None else start
    state: State = None
    for step in range(num_steps):
        oracle = AutogradOracle(problem, task, batch_size, seed, eager=True, step=step)
        if step == 0:
            state = algorithm.init(oracle, outer, inner)
        estimate = algorithm.estimate(oracle, outer, state)
        state = estimate.state
        rate = outer_lr if isinstance(outer_lr, float) else outer_lr(step)
        outer = problem.project_outer(add(outer, estimate.hypergradient, -rate))
    return SingleRun(outer, state, estimate)


def true_hypergradient(problem: Quadratic, outer: Params, task: Task) -> Tensor:
    """grad Phi(x) = rho x + B' A^-1 (y* - t) of a quadratic task."""
    a, b, c, t = quadratic_terms(task)
    solution = torch.linalg.solve(a, b @ outer["x"] + c)
    return problem.rho * outer["x"] + b.T @ torch.linalg.solve(a, solution - t)
