"""PZOBO: the Jacobian of the inner loop by finite differences along random directions."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.fg2u import random_pair
from metadist.algorithms.parts.inner import InnerLoop, check_at_least, check_positive
from metadist.oracle import Oracle
from metadist.trees import Params, add, dot, scale, sub, zeros_like


@dataclass(frozen=True)
class PZOBO(InnerLoop):
    """Partial zeroth-order bilevel optimiser: only the response of y to x is a difference.

    With A(x, start) = y_T and (u, s) normal directions of context and start of adaptation:

        delta_j = (A(x + mu u_j, start + mu s_j) - A(x, start)) / mu
        h = grad_x f + mean_j <delta_j, grad_y f> u_j;   start: mean_j <delta_j, grad_y f> s_j

    all runs of A on the same draws. Unbiased for A smoothed over a radius of about mu, so exact
    in the mean where A is affine (a quadratic g). No second derivatives; any inner optimiser.

    Args:
        mu: length of the differences, > 0.
        num_directions: b, >= 1.

    Cost: (1 + b) T gradients, 1 outer gradient. Memory: b vectors like (x, y), independent of T.
    Breaks: the variance grows like d / b, d the size of context and start together; mu near the
    rounding error of y_T over |y_T| (in float32, mu < 1e-3) gives noise, large mu bias.
    Source: Sow, Ji, Liang, "On the Convergence Theory for Hessian-Free Bilevel Algorithms",
    NeurIPS 2022 (ES-based Jacobian estimate); with mini-batches its PZOBO-S. Differs from it in:
    the start of adaptation gets a gradient too.
    """

    trains = "both"
    card = Card(
        title="Partial zeroth-order bilevel optimiser",
        source="Sow, Ji, Liang, NeurIPS 2022",
        problems="any, finite inner loop",
        cost="(1 + b) T G + F",
        state="y",
        use="few outer numbers, no second derivatives, any inner optimiser",
    )

    mu: float = 0.01
    num_directions: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("mu", self.mu)
        check_at_least("num_directions", self.num_directions, 1)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        start, draws = state.inner, [oracle.draw_inner() for _ in range(self.inner_steps)]
        y = self.descend(oracle, context, start, draws)
        direct, right = oracle.outer_grads(context, y, oracle.draw_outer())
        h, start_gradient = direct, zeros_like(y)
        for _ in range(self.num_directions):
            u, s = random_pair(oracle, context, start, "normal")
            moved = self.descend(oracle, add(context, u, self.mu), add(start, s, self.mu), draws)
            slope = dot(sub(moved, y), right) / (self.mu * self.num_directions)
            h, start_gradient = add(h, scale(u, slope)), add(start_gradient, scale(s, slope))
        return Estimate(h, start_gradient, InnerState(y), {})
