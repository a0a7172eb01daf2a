"""StocBiO: implicit differentiation on mini-batches, by a Neumann series of sampled Hessians."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.inner import InnerLoop
from metadist.algorithms.parts.neumann import draw_bundle, neumann_estimate
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params


@dataclass(frozen=True)
class StocBiO(InnerLoop):
    """Stochastic bilevel optimiser (StocBiO).

        y_T = inner_steps of SGD on g, each on a fresh draw
        r_Q = f_y(x, y_T),   r_{i-1} = (I - adjoint_lr H(x, y_T; B_i)) r_i
        v = adjoint_lr (r_Q + .. + r_0),    h = f_x - J v

    One draw for f, one for J, one per factor, all independent: then the mean of v is
    H^-1 (I - (I - adjoint_lr H)^(Q+1)) f_y with the mean H. One draw for all factors would be
    biased by the variance of H.

    Args:
        adjoint_steps: Q, Hessian products, >= 0.
        adjoint_lr: eta, > 0; at most 1 / L, L the largest eigenvalue of H.

    Family: Stochastic.
    For: strongly convex, mini-batches.
    Cost: T G + F + Q H + J.
    State: y.
    Memory: 3 vectors like y.
    Use: mini-batches, and a fresh unbiased adjoint at every step.
    Breaks: adjoint_lr > 2/L diverges, and so do negative eigenvalues of H.
    Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design",
    ICML 2021, algorithms 2 and 3.
    Differs: all batches have one size, where the paper's shrink along the chain. The official code
    adds up the propagated vectors without the factor adjoint_lr and leaves the first one out,
    which is another vector unless adjoint_lr H = 1/2; and it uses one batch for all factors.
    """

    adjoint_steps: int = rule(10, ge=0)
    adjoint_lr: float = rule(0.1, gt=0)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        bundle = draw_bundle(oracle, self.adjoint_steps)
        h, _, metrics = neumann_estimate(oracle, context, y, bundle, self.adjoint_lr)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=InnerState(y, memory),
            metrics=metrics,
        )
