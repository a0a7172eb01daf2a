"""SUSTAIN: recursive momentum on both levels with Neumann chains of random length."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithms.parts.neumann import draw_bundle, neumann_estimate
from metadist.algorithms.parts.recursion import Estimator, RecursiveMomentum
from metadist.checks.values import rule
from metadist.oracle import Oracle


@dataclass(frozen=True)
class SUSTAIN(RecursiveMomentum):
    """Single-timescale double-momentum stochastic approximation (SUSTAIN).

        p uniform in 0 .. Q-1,    v = Q adjoint_lr P_p .. P_1 f_y,    P_i = I - adjoint_lr H(B_i)
        h = f_x - J v,   then u, w, y and x as MRBO

    The draws of the P_i are independent; p and the draws are the same at both points of a
    difference, and p is the same for all tasks of a step. The mean of v over p is the Neumann
    series' first Q terms, those of MRBO with adjoint_steps = Q - 1. Half the products on average,
    for a variance that grows with Q.

    Args:
        adjoint_steps: Q, >= 1.

    Family: Stochastic.
    For: strongly convex, mini-batches.
    Cost: 2 (T G + F + (Q-1)/2 H + J) on average.
    State: y, u, w, previous x and y.
    Memory: as MRBO.
    Use: as MRBO, where products are expensive.
    Breaks: as MRBO; with Q adjoint_lr large and few tasks the scatter of p outweighs the draws'
    noise.
    Source: Khanduri, Zeng, Hong, Wai, Wang, Yang, "A Near-Optimal Algorithm for Stochastic
    Bilevel Optimization via Double-Momentum", NeurIPS 2021. In the form of the public benchmark of
    bilevel solvers; the estimate of v is that of Ghadimi and Wang, 2018.
    """

    adjoint_steps: int = rule(10, ge=1)

    def draw_estimator(self, oracle: Oracle) -> Estimator:
        num_factors = int(oracle.uniform() * self.adjoint_steps)
        bundle = draw_bundle(oracle, num_factors)
        return lambda context, y: neumann_estimate(
            oracle, context, y, bundle, self.adjoint_lr, self.adjoint_steps
        )
