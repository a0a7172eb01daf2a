"""SAMA: DARTS that knows the inner optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metadist.algorithm import Estimate, InnerState, State
from metadist.algorithms.parts.differences import difference_product
from metadist.algorithms.parts.inner import (
    BETA1,
    BETA2,
    EPSILON,
    InnerLoop,
    Moments,
    adam_step,
    decayed,
)
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, multiply, sub, tree_map, zeros_like


class SAMAState(NamedTuple):
    """y and the moments of its Adam, which continue from one outer step to the next."""

    inner: Params
    moments: Moments


@dataclass(frozen=True)
class SAMA(InnerLoop):
    """Scalable Meta-learning with Arbitrary optimizers (SAMA).

        y_T = inner_steps of the inner optimiser on g;    v = P f_y(x, y_T)
        h = f_x - (g_x(x, y_T + e v) - g_x(x, y_T - e v)) / (2 e),    e = epsilon / |v|

    P is the derivative of the last inner update u with respect to its gradient: the identity
    for "sgd", a diagonal for "adam":

        m = b1 m_old + (1-b1) g,   s = b2 s_old + (1-b2) g^2,   u = lr' m / (sqrt(s) + e')
        P = lr' ((1-b1) b2 s_old - b1 (1-b2) g m_old) / (sqrt(s) + e')^3

    with lr', e' of Adam's bias correction. As in the official code, "adam" has the factor inner_lr
    in h and "sgd" has not: outer rates differ. With "sgd" it is DARTS with adjoint_lr=1, but for
    the point of the difference.

    Args:
        epsilon: How far y_T is moved for the difference, in Euclidean norm, > 0.

    Family: Heuristic.
    For: large models trained with Adam; heuristic.
    Cost: T G + F + 2 G + 2 Gx.
    State: y, Adam's moments.
    Memory: with "adam", four more y.
    Use: data weights of large models; no second derivatives.
    Breaks: biased, as DARTS, and refused below float32, as DARTS. The first step of Adam is the
    sign of the gradient, which has no derivative: with inner_steps = 1 v would be 0 on new tasks,
    which are refused; evaluation adapts by that one step, since it starts Adam anew.
    Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, "Making Scalable Meta Learning
    Practical", NeurIPS 2023. And its library Betty.
    Differs: Adam's bias correction is differentiated too; epsilon is 0.01, a step that is small
    beside y, where the official code has 1.
    """

    takes_second_derivatives = False
    keeps_moments = True
    takes_differences = True

    epsilon: float = rule(0.01, gt=0)

    @property
    def needs_kept_state(self) -> str:
        if self.inner_optimizer == "sgd" or self.inner_steps > 1:
            return ""
        return (
            "the first step of Adam is the sign of the gradient, which has no derivative, so that "
            "h is f_x alone. Set more inner_steps"
        )

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
                g_y = oracle.inner_grad(context, y, oracle.draw_inner())
                state = SAMAState(*adam_step(y, before, g_y, lr))
            slope = adam_slope(before, g_y, lr)
        f_x, f_y = oracle.outer_grads(context, state.inner, oracle.draw_outer())
        v = f_y if slope is None else multiply(slope, f_y)
        draw = oracle.draw_inner()
        j_v = difference_product(oracle, context, state.inner, v, draw, self.epsilon)
        return Estimate(hypergradient=sub(f_x, j_v), start_gradient=None, state=state, metrics={})


def adam_slope(moments: Moments, g_y: Params, lr: float) -> Params:
    """d update / d gradient of the step of Adam that `g_y` makes from `moments`.

    It is 0 where every gradient so far was 0: epsilon counts as a constant beside the root of the
    second moment, as in the paper.
    """
    count = moments.num_steps + 1
    root = math.sqrt(1 - BETA2**count)
    rate, epsilon = lr * root / (1 - BETA1**count), EPSILON * root

    def slope(m: Tensor, s: Tensor, g: Tensor) -> Tensor:
        rise = (1 - BETA1) * BETA2 * s - BETA1 * (1 - BETA2) * g * m
        return rate * rise / ((BETA2 * s + (1 - BETA2) * g * g).sqrt() + epsilon) ** 3

    return tree_map(slope, moments.first, moments.second, g_y)
