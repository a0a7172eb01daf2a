"""DARTS: the product with the cross derivative by finite differences of first ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.parts.inner import InnerLoop, check_positive
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, norm, scale, sub


@dataclass(frozen=True)
class DARTS(InnerLoop):
    """DARTS: T1-T2 without second derivatives.

        y_T = inner_steps of the inner optimiser on g;    v = grad_y f(x, y_T)
        h = grad_x f - (grad_x g(x, y_T + e v) - grad_x g(x, y_T - e v)) / (2 e),  e = epsilon / |v|

    Args:
        epsilon: how far y_T is moved for the difference, in Euclidean norm, > 0.

    Cost: T G + F + 2 (G + Gx). Memory: two more y.
    Breaks: biased, as it takes H for the identity; rounding, in float32, where epsilon is too
    small beside |y|; curvature, where it is too large.
    Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, second
    order. Differs from it in: the difference is taken at y_T (as the library Betty does) with v
    not multiplied by the inner rate, where DARTS takes it at y_0 times inner_lr, T = 1.
    """

    card = Card(
        title="DARTS",
        source="Liu, Simonyan, Yang, ICLR 2019",
        problems="well-conditioned; heuristic",
        cost="T G + F + 2 G + 2 Gx",
        state="y",
        use="architecture search; no second derivatives",
    )

    epsilon: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("epsilon", self.epsilon)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = self.descend(oracle, context, state.inner)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        j_v = difference_product(oracle, context, y, f_y, oracle.draw_inner(), self.epsilon)
        return Estimate(sub(f_x, j_v), None, InnerState(y), {})


def difference_product(
    oracle: Oracle, x: Params, y: Params, v: Params, draw: Draw, radius: float
) -> Params:
    """J v by central differences along v / |v|; 0 where v = 0.

    y is moved by `radius` however short v is, so that the difference never drowns in rounding.
    Cost: 2 joint gradients, on one draw. Error: of order |v| * radius^2.
    """
    length = norm(v)
    unit = scale(v, torch.where(length > 0, 1 / length, torch.zeros_like(length)))
    above, _ = oracle.inner_grads(x, add(y, unit, radius), draw)
    below, _ = oracle.inner_grads(x, add(y, unit, -radius), draw)
    return scale(sub(above, below), length / (2 * radius))
