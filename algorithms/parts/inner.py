"""The inner loop: optimisers as pure functions, and what most algorithms share around them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from metadist.algorithm import Algorithm, Estimate, InnerState, State
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, multiply, sub, tree_map, zeros_like


def sgd_step(
    inner: Params, velocity: Params | None, gradient: Params, rates: Params, momentum: float
) -> tuple[Params, Params]:
    """(inner, velocity) after one step of `torch.optim.SGD` (no dampening).

    velocity <- momentum * velocity + gradient;   inner <- inner - rates * velocity

    Args:
        inner: y.
        velocity: None before the first step.
        gradient: grad_y g.
        rates: learning rates, each of shape () or of the shape of its inner tensor.
        momentum: 0 for plain gradient descent.
    """
    if velocity is not None and momentum:
        velocity = add(gradient, velocity, momentum)
    else:
        velocity = gradient
    return sub(inner, multiply(rates, velocity)), velocity


def sgd(
    oracle: Oracle,
    context: Params,
    inner: Params,
    num_steps: int,
    rates: Params,
    momentum: float = 0.0,
) -> Params:
    """y after `num_steps` steps on g, each on a fresh draw. Cost: num_steps gradients."""
    velocity = None
    for _ in range(num_steps):
        gradient = oracle.inner_grad(context, inner, oracle.draw_inner())
        inner, velocity = sgd_step(inner, velocity, gradient, rates, momentum)
    return inner


class Moments(NamedTuple):
    """Adam after `num_steps` steps: running means of the gradient and of its square."""

    first: Params
    second: Params
    num_steps: int


def adam_step(
    inner: Params, moments: Moments | None, gradient: Params, lr: float
) -> tuple[Params, Moments]:
    """(inner, moments) after one step of `torch.optim.Adam` (Kingma and Ba, 2015).

    Its defaults: decay rates 0.9 and 0.999, 1e-8 added to the bias-corrected root.
    """
    if moments is None:
        moments = Moments(zeros_like(inner), zeros_like(inner), 0)
    count = moments.num_steps + 1
    first = tree_map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments.first, gradient)
    second = tree_map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, moments.second, gradient)
    rate, root = lr / (1 - BETA1**count), math.sqrt(1 - BETA2**count)

    def move(y: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return y - rate * m / (s.sqrt() / root + EPSILON)

    return tree_map(move, inner, first, second), Moments(first, second, count)


BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def decayed(rate: float, exponent: float, step: int) -> float:
    """rate * (step + 1)^-exponent: the schedule of a rate over outer steps."""
    return rate * (step + 1) ** -exponent


def repeat(
    move: Callable[[Oracle, Params, Any], Estimate],
    number: int,
    oracle: Oracle,
    context: Params,
    state: State,
) -> Estimate:
    """The last of `number` moves at one x, each from the state that the one before it has left."""
    estimate = move(oracle, context, state)
    for _ in range(number - 1):
        estimate = move(oracle, context, estimate.state)
    return estimate


@dataclass(frozen=True)
class GradientDescent(Algorithm):
    """What algorithms share whose lower problem is plain gradient descent on g.

    Args:
        inner_steps: T, >= 1.
        inner_lr: alpha, > 0.
    """

    inner_steps: int = 5
    inner_lr: float = 0.1

    def __post_init__(self) -> None:
        check_sgd(self.inner_steps, self.inner_lr, 0.0)

    def next_inner(self, oracle: Oracle, context: Params, inner: Params, draw: Draw) -> Params:
        """y - inner_lr * grad_y g. Cost: one gradient."""
        return add(inner, oracle.inner_grad(context, inner, draw), -self.inner_lr)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> InnerState:
        return InnerState(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        for _ in range(self.inner_steps):
            inner = self.next_inner(oracle, context, inner, oracle.draw_inner())
        return inner


@dataclass(frozen=True)
class InnerLoop(Algorithm):
    """What algorithms share that run `inner_steps` steps on g at every outer step.

    Args:
        inner_steps: T, >= 1.
        inner_lr: alpha, > 0.
        inner_decay: the rate at outer step k is inner_lr * (k+1)^-inner_decay, in [0, 1].
            Evaluation is at k = 0: it adapts with inner_lr.
        inner_optimizer: "sgd" or "adam" (with torch's defaults); as in torch.optim, started
            anew at every outer step.
        momentum: of "sgd", in [0, 1).
    """

    trains = "context"

    inner_steps: int = 10
    inner_lr: float = 0.1
    inner_decay: float = 0.0
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_sgd(self.inner_steps, self.inner_lr, self.momentum)
        check_choice("inner_optimizer", self.inner_optimizer, ("sgd", "adam"))
        check_within("inner_decay", self.inner_decay, 0, 1)
        if self.inner_optimizer == "adam" and self.momentum:
            raise ValueError(
                f"momentum must be 0 with inner_optimizer='adam', got {self.momentum}: it is the "
                "momentum of 'sgd'"
            )

    def descend(
        self, oracle: Oracle, context: Params, inner: Params, draws: Iterable[Draw] | None = None
    ) -> Params:
        """y after the inner loop, on `draws` or, if None, fresh ones. Cost: T gradients."""
        optimizer = InnerOptimizer(self, decayed(self.inner_lr, self.inner_decay, oracle.step))
        if draws is None:
            draws = (oracle.draw_inner() for _ in range(self.inner_steps))
        for draw in draws:
            inner = optimizer.step(inner, oracle.inner_grad(context, inner, draw))
        return inner

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

    def step(self, inner: Params, gradient: Params) -> Params:
        """y after one step along `gradient`."""
        if self._adam:
            inner, self._kept = adam_step(inner, self._kept, gradient, self._lr)
        else:
            if self._rates is None:
                self._rates = {name: leaf.new_tensor(self._lr) for name, leaf in inner.items()}
            inner, self._kept = sgd_step(inner, self._kept, gradient, self._rates, self._momentum)
        return inner


@dataclass(frozen=True)
class SingleLoop(Algorithm):
    """What single-loop algorithms share: y makes one step of SGD where others solve for it.

    With states kept from one outer step to the next that is all. On a new task one step would
    say little, so `inner_steps` of them can be made at one x, of which the last one's
    hypergradient counts.

    Args:
        inner_steps: steps of y (and of what else moves) per outer step; the papers have 1.
        inner_lr: alpha, > 0.
        inner_decay: as in `InnerLoop`.
    """

    trains = "context"

    inner_steps: int = 1
    inner_lr: float = 0.1
    inner_decay: float = 0.0

    def __post_init__(self) -> None:
        check_sgd(self.inner_steps, self.inner_lr, 0.0)
        check_within("inner_decay", self.inner_decay, 0, 1)

    @abstractmethod
    def move(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        """One step of everything, and the hypergradient that goes with it."""

    def estimate(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        return repeat(self.move, self.inner_steps, oracle, context, state)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        for _ in range(self.inner_steps):
            gradient = oracle.inner_grad(context, inner, oracle.draw_inner())
            inner = self.descend_once(oracle, inner, gradient)
        return inner

    def descend_once(self, oracle: Oracle, inner: Params, gradient: Params) -> Params:
        """y - alpha_k * gradient."""
        return add(inner, gradient, -decayed(self.inner_lr, self.inner_decay, oracle.step))


def check_sgd(inner_steps: int, inner_lr: float, momentum: float) -> None:
    """Raise ValueError for hyperparameters that no inner SGD can run with."""
    check_at_least("inner_steps", inner_steps, 1)
    check_positive("inner_lr", inner_lr)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise ValueError unless value >= least and finite."""
    if not least <= value < math.inf:
        finite = " and finite" if isinstance(value, float) else ""
        raise ValueError(f"{field} must be >= {least}{finite}, got {value}")


def check_positive(field: str, value: float) -> None:
    """Raise ValueError unless 0 < value < infinity."""
    if not 0 < value < math.inf:
        raise ValueError(f"{field} must be > 0 and finite, got {value}")


def check_within(field: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{field} must be in [{low}, {high}], got {value}")


def check_choice(field: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{field} must be one of {choices}, got {value!r}")
