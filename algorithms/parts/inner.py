"""The inner loop: optimisers as pure functions, and the bases that most methods stand on."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from metadist.algorithm import Algorithm, Estimate, InnerState, State
from metadist.checks.values import check_fields, rule
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, multiply, sub, tree_map, zeros_like


def sgd_step(
    y: Params, velocity: Params | None, g_y: Params, rates: Params, momentum: float
) -> tuple[Params, Params]:
    """(y, velocity) after one step of `torch.optim.SGD` (no dampening).

    velocity <- momentum * velocity + g_y;   y <- y - rates * velocity

    Args:
        y: The inner variable.
        velocity: None before the first step.
        g_y: The gradient of g at y.
        rates: Learning rates, each of shape () or of the shape of its inner tensor.
        momentum: 0 for plain gradient descent.
    """
    if velocity is not None and momentum:
        velocity = add(g_y, velocity, momentum)
    else:
        velocity = g_y
    return sub(y, multiply(rates, velocity)), velocity


def sgd(
    oracle: Oracle,
    context: Params,
    y: Params,
    num_steps: int,
    rates: Params,
    momentum: float = 0.0,
) -> Params:
    """y after `num_steps` steps on g, each on a fresh draw. Cost: num_steps gradients."""
    velocity = None
    for _ in range(num_steps):
        g_y = oracle.inner_grad(context, y, oracle.draw_inner())
        y, velocity = sgd_step(y, velocity, g_y, rates, momentum)
    return y


class Moments(NamedTuple):
    """Adam after `num_steps` steps: running means of the gradient and of its square."""

    first: Params
    second: Params
    num_steps: int


BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_step(y: Params, moments: Moments | None, g_y: Params, lr: float) -> tuple[Params, Moments]:
    """(y, moments) after one step of `torch.optim.Adam` (Kingma and Ba, 2015).

    Its defaults: decay rates 0.9 and 0.999, 1e-8 added to the bias-corrected root.
    """
    if moments is None:
        moments = Moments(zeros_like(y), zeros_like(y), 0)
    count = moments.num_steps + 1
    first = tree_map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments.first, g_y)
    second = tree_map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, moments.second, g_y)
    rate, root = lr / (1 - BETA1**count), math.sqrt(1 - BETA2**count)

    def move(y: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return y - rate * m / (s.sqrt() / root + EPSILON)

    return tree_map(move, y, first, second), Moments(first, second, count)


def check_first_step(inner_steps: int, optimizer: str, momentum: float) -> None:
    """Raise ValueError for an inner optimiser that ends before its memory has any effect.

    The first step of "sgd" with momentum is that of "sgd"; the first step of an adaptive optimiser
    is the sign of the gradient, times the rate.
    """
    if inner_steps > 1 or (optimizer == "sgd" and not momentum):
        return
    if optimizer == "sgd":
        option, plain = f"momentum={momentum}", "momentum=0"
        does = "its one step has no velocity yet, so that momentum does nothing"
    else:
        option, plain = f"inner_optimizer={optimizer!r}", "inner_optimizer='sgd'"
        does = "its one step is the sign of the gradient alone"
    raise ValueError(
        f"inner_steps must be >= 2 with {option}, got {inner_steps}: the inner optimiser starts "
        f"anew at every outer step, and {does}. Set more inner_steps, or {plain}"
    )


def decayed(rate: float, exponent: float, step: int) -> float:
    """rate * (step + 1)^-exponent: the schedule of a rate over outer steps."""
    return rate * (step + 1) ** -exponent


def repeat(
    move: Callable[[Oracle, Params, Any], Estimate],
    num_moves: int,
    oracle: Oracle,
    context: Params,
    state: State,
) -> Estimate:
    """The last of `num_moves` moves at one x, each from the state that the previous one left."""
    estimate = move(oracle, context, state)
    for _ in range(num_moves - 1):
        estimate = move(oracle, context, estimate.state)
    return estimate


@dataclass(frozen=True)
class GradientDescent(Algorithm):
    """A base for methods whose lower problem is plain gradient descent on g.

    Args:
        inner_steps: T, >= 1.
        inner_lr: alpha, > 0.
    """

    inner_steps: int = rule(5, ge=1)
    inner_lr: float = rule(0.1, gt=0)

    def __post_init__(self) -> None:
        check_fields(self)

    def next_inner(self, oracle: Oracle, context: Params, y: Params, draw: Draw) -> Params:
        """y - inner_lr * g_y. Cost: one gradient."""
        return add(y, oracle.inner_grad(context, y, draw), -self.inner_lr)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> InnerState:
        return InnerState(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        for _ in range(self.inner_steps):
            inner = self.next_inner(oracle, context, inner, oracle.draw_inner())
        return inner


@dataclass(frozen=True)
class InnerLoop(Algorithm):
    """A base for methods that run `inner_steps` steps on g at every outer step.

    Args:
        inner_steps: T, >= 1.
        inner_lr: alpha, > 0.
        inner_decay: The rate at outer step k is inner_lr * (k+1)^-inner_decay, in [0, 1].
            Evaluation is at k = 0: it adapts with inner_lr.
        inner_optimizer: "sgd" or "adam" (with torch's defaults); as in torch.optim, started
            anew at every outer step and in evaluation, so "adam" needs inner_steps >= 2.
        momentum: The momentum of "sgd", in [0, 1); it needs inner_steps >= 2.
    """

    trains = "context"
    keeps_moments = False  # whether those of "adam" are part of the state

    inner_steps: int = rule(10, ge=1)
    inner_lr: float = rule(0.1, gt=0)
    inner_decay: float = rule(0.0, ge=0, le=1)
    inner_optimizer: Literal["sgd", "adam"] = rule("sgd", one_of=("sgd", "adam"))
    momentum: float = rule(0.0, ge=0, lt=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.inner_optimizer == "adam" and self.momentum:
            raise ValueError(
                f"momentum must be 0 with inner_optimizer='adam', got {self.momentum}: it is the "
                "momentum of 'sgd'"
            )
        if not (self.inner_optimizer == "adam" and self.keeps_moments):
            check_first_step(self.inner_steps, self.inner_optimizer, self.momentum)

    def descend(
        self, oracle: Oracle, context: Params, y: Params, draws: Iterable[Draw] | None = None
    ) -> Params:
        """y after the inner loop, on `draws` or, if None, fresh ones. Cost: T gradients."""
        optimizer = InnerOptimizer(self, decayed(self.inner_lr, self.inner_decay, oracle.step))
        if draws is None:
            draws = (oracle.draw_inner() for _ in range(self.inner_steps))
        for draw in draws:
            y = optimizer.step(y, oracle.inner_grad(context, y, draw))
        return y

    def init(self, oracle: Oracle, context: Params, inner: Params) -> State:
        return InnerState(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        return self.descend(oracle, context, inner)


class InnerOptimizer:
    """The optimiser of an `InnerLoop` within one loop: keeps velocity or moments in between."""

    def __init__(self, loop: InnerLoop, lr: float) -> None:
        self._adam = loop.inner_optimizer == "adam"
        self._momentum = loop.momentum
        self._lr = lr
        self._kept: Any = None
        self._rates: Params | None = None

    def step(self, y: Params, gradient: Params) -> Params:
        """y after one step along `gradient`."""
        if self._adam:
            y, self._kept = adam_step(y, self._kept, gradient, self._lr)
            return y
        if self._rates is None:
            # Tensors, since `sgd_step` also serves rates that are outer variables (Meta-SGD).
            self._rates = {name: leaf.new_full((), self._lr) for name, leaf in y.items()}
        y, self._kept = sgd_step(y, self._kept, gradient, self._rates, self._momentum)
        return y


@dataclass(frozen=True)
class SingleLoop(Algorithm):
    """A base for single loops: y makes one step of SGD where other methods solve for it.

    With states kept from one outer step to the next that is all. On a new task a single step
    says little, so `inner_steps` of them can be made at one x; only the last one's
    hypergradient is used.

    Args:
        inner_steps: Steps of y (and of what else moves) per outer step; the papers have 1.
        inner_lr: alpha, > 0.
        inner_decay: The rate at outer step k is inner_lr * (k+1)^-inner_decay, in [0, 1].
    """

    trains = "context"

    inner_steps: int = rule(1, ge=1)
    inner_lr: float = rule(0.1, gt=0)
    inner_decay: float = rule(0.0, ge=0, le=1)

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def move(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        """One step of everything, and the hypergradient that goes with it."""

    def estimate(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        return repeat(self.move, self.inner_steps, oracle, context, state)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        for _ in range(self.inner_steps):
            g_y = oracle.inner_grad(context, inner, oracle.draw_inner())
            inner = self.descend_once(oracle, inner, g_y)
        return inner

    def descend_once(self, oracle: Oracle, y: Params, direction: Params) -> Params:
        """y - alpha_k * direction."""
        return add(y, direction, -decayed(self.inner_lr, self.inner_decay, oracle.step))
