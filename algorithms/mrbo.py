"""MRBO: recursive momentum on the inner gradient and on the hypergradient."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithms.parts.neumann import draw_bundle, neumann_estimate
from metadist.algorithms.parts.recursion import Estimator, RecursiveMomentum
from metadist.oracle import Oracle


@dataclass(frozen=True)
class MRBO(RecursiveMomentum):
    """Momentum-based recursive bilevel optimiser (MRBO).

        u_k = g_y(x_k, y_k) + (1 - b_k) (u_{k-1} - g_y(x_{k-1}, y_{k-1}))
        w_k = h(x_k, y_k) + (1 - a_k) (w_{k-1} - h(x_{k-1}, y_{k-1})),    h of StocBiO
        y_{k+1} = y_k - inner_lr_k u_k;    x steps along w_k

    STORM on both levels. The two terms of a difference are on the same draws, so their noise
    cancels as steps get short, and u and w need no large batch. a_0 = b_0 = 1, then
    a_k = min(1, outer_weight k^-weight_decay), and b_k likewise with inner_weight; k is the age
    of the state, so a new one starts with plain estimates.

    On new tasks w lives where x does, over the tasks of an outer step (see `recursive_weight`),
    and y and u make `inner_steps` steps on each: set more than 1, since w is at the last point
    that y moves from. The paper's rates are SGD(lr, schedule="power", exponent=1/3) here and, for
    x, OuterOptimizer("sgd", schedule="power", schedule_power=1/3).

    Family: Stochastic.
    For: strongly convex, mini-batches.
    Cost: 2 (T G + F + Q H + J). Half of it for a new state.
    State: y, u, w, previous x and y.
    Memory: the state, 3 vectors like y and 2 like x.
    Use: noisy mini-batches, small steady steps of x.
    Breaks: as StocBiO; and where x jumps between steps (large rates, Adam), the differences
    carry more noise than they cancel.
    Source: Yang, Ji, Liang, "Provably Faster Algorithms for Bilevel Optimization", NeurIPS 2021,
    algorithm 1. Its e_k = d / (m + k)^(1/3) has m = 1 here, and d inside rates and weights.
    Differs: the schedules act, where the official code sets them anew in every iteration; y steps
    once, not twice; the previous x is the x before, not another block of it. inner_steps > 1 is
    an addition.
    """

    def draw_estimator(self, oracle: Oracle) -> Estimator:
        bundle = draw_bundle(oracle, self.adjoint_steps)
        return lambda context, y: neumann_estimate(oracle, context, y, bundle, self.adjoint_lr)
