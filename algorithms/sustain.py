"""SUSTAIN: recursive momentum on both levels with Neumann chains of random length."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card
from metadist.algorithms.mrbo import MRBO, Estimator
from metadist.algorithms.parts.inner import check_at_least
from metadist.algorithms.stocbio import draw_bundle, truncated_sample
from metadist.oracle import Oracle


@dataclass(frozen=True)
class SUSTAIN(MRBO):
    """Single-timescale double-momentum stochastic approximation: MRBO with another estimate.

        p uniform in 0 .. Q-1,    v = Q * adjoint_lr * P_p .. P_1 grad_y f,    h = grad_x f - J v

    with P_i = I - adjoint_lr * H on independent draws; p and the draws are the same at both
    points of a difference, and p is the same for all tasks of a step. The mean of v over p is
    the Neumann series' first Q terms, those of MRBO with adjoint_steps = Q - 1. Half the
    products on average, for a variance that grows with Q.

    Args:
        adjoint_steps: Q, >= 1.

    Cost: 2 (T gradients, 1 outer gradient, (Q-1)/2 + 1 products) on average.
    Memory: as MRBO. Breaks: as MRBO; with Q * adjoint_lr large and few tasks the scatter of p
    outweighs the draws' noise.
    Source: Khanduri, Zeng, Hong, Wai, Wang, Yang, "A Near-Optimal Algorithm for Stochastic
    Bilevel Optimization via Double-Momentum", NeurIPS 2021, in the form of the public benchmark of
    bilevel solvers; the estimate is that of Ghadimi and Wang, 2018.
    """

    card = Card(
        title="Single-timescale double-momentum stochastic approximation",
        source="Khanduri et al., NeurIPS 2021",
        problems="strongly convex, mini-batches",
        cost="2 (T G + F + (Q-1)/2 H + J) on average",
        state="y, u, w, previous x and y",
        use="as MRBO, where products are dear",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("adjoint_steps", self.adjoint_steps, 1)

    def draw_estimator(self, oracle: Oracle) -> Estimator:
        num_factors = int(oracle.uniform() * self.adjoint_steps)
        bundle = draw_bundle(oracle, num_factors)
        return lambda x, y: truncated_sample(
            oracle, x, y, bundle, self.adjoint_lr, self.adjoint_steps
        )
