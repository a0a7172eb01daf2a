"""SAMA: DARTS that knows the inner optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metadist.algorithm import Card, Estimate, InnerState, State
from metadist.algorithms.darts import difference_product
from metadist.algorithms.parts.inner import (
    BETA1,
    BETA2,
    EPSILON,
    InnerLoop,
    Moments,
    adam_step,
    check_positive,
    decayed,
)
from metadist.oracle import Oracle
from metadist.trees import Params, multiply, sub, tree_map, zeros_like


class SAMAState(NamedTuple):
    """y and the moments of its Adam, which goes on from one outer step to the next."""

    inner: Params
    moments: Moments


@dataclass(frozen=True)
class SAMA(InnerLoop):
    """Scalable meta-learning with arbitrary optimisers (SAMA).

        y_T = inner_steps of the inner optimiser on g;    v = P grad_y f(x, y_T)
        h = grad_x f - (grad_x g(x, y_T + e v) - grad_x g(x, y_T - e v)) / (2 e),  e = epsilon / |v|

    P is the derivative of the last inner update u with respect to its gradient: the identity
    for "sgd", a diagonal for "adam":

        m = b1 m_old + (1-b1) g,  s = b2 s_old + (1-b2) g^2,  u = lr' m / (sqrt(s) + e')
        P = lr' ((1-b1) b2 s_old - b1 (1-b2) g m_old) / (sqrt(s) + e')^3

    with lr', e' of Adam's bias correction. Note that "adam" has the factor inner_lr in h and
    "sgd" has not: outer rates differ.

    Args:
        epsilon: how far y_T is moved for the difference, in Euclidean norm, > 0.

    Cost: T G + F + 2 (G + Gx). Memory: with "adam", four more y.
    Breaks: biased, as DARTS. The first step of Adam is the sign of the gradient, which has no
    derivative: on a new task with inner_steps = 1, v is 0.
    Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, "Making Scalable Meta Learning
    Practical", NeurIPS 2023, and its library Betty. Differs from the official code in: Adam's
    bias correction is differentiated too; epsilon is 0.01 where that has 1.
    """

    card = Card(
        title="Scalable Meta-learning with Arbitrary optimizers (SAMA)",
        source="Choe et al., NeurIPS 2023",
        problems="large models trained with Adam; heuristic",
        cost="T G + F + 2 G + 2 Gx",
        state="y, Adam's moments",
        use="data weights of large models; no second derivatives",
    )

    epsilon: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("epsilon", self.epsilon)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> State:
        if self.inner_optimizer == "sgd":
            return InnerState(inner)
        return SAMAState(inner, Moments(zeros_like(inner), zeros_like(inner), 0))

    def estimate(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        slope = None
        if self.inner_optimizer == "sgd":
            state = InnerState(self.descend(oracle, context, state.inner))
        else:
            lr = decayed(self.inner_lr, self.inner_decay, oracle.step)
            for _ in range(self.inner_steps):
                y, before = state
                gradient = oracle.inner_grad(context, y, oracle.draw_inner())
                state = SAMAState(*adam_step(y, before, gradient, lr))
            slope = adam_slope(before, gradient, lr)
        f_x, f_y = oracle.outer_grads(context, state.inner, oracle.draw_outer())
        v = f_y if slope is None else multiply(slope, f_y)
        draw = oracle.draw_inner()
        j_v = difference_product(oracle, context, state.inner, v, draw, self.epsilon)
        return Estimate(sub(f_x, j_v), None, state, {})


def adam_slope(moments: Moments, gradient: Params, lr: float) -> Params:
    """d update / d gradient of the step of Adam that `gradient` makes from `moments`.

    Where no gradient has ever been other than 0, it is 0: epsilon is taken for constant beside
    the root of the second moment, as in the paper.
    """
    count = moments.num_steps + 1
    root = math.sqrt(1 - BETA2**count)
    rate, epsilon = lr * root / (1 - BETA1**count), EPSILON * root

    def slope(m: Tensor, s: Tensor, g: Tensor) -> Tensor:
        rise = (1 - BETA1) * BETA2 * s - BETA1 * (1 - BETA2) * g * m
        return rate * rise / ((BETA2 * s + (1 - BETA2) * g * g).sqrt() + epsilon) ** 3

    return tree_map(slope, moments.first, moments.second, gradient)
