"""BAMM: a single loop with a multiplier, on an average of both levels."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import AdjointLoop, AdjointState
from metadist.algorithms.parts.inner import decayed
from metadist.algorithms.parts.linear import relative_residual
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, norm, scale, sub


@dataclass(frozen=True)
class BAMM(AdjointLoop):
    """Single-loop averaged method of multipliers (sl-BAMM), the dual multiplier (DM) of BOAT.

        psi = mu_k f + (1 - mu_k) g,    mu_k = mu (k+1)^-mu_decay
        y+ = y - inner_lr psi_y
        v+ = v - adjoint_lr (psi_yy v - f_y)
        h = f_x - psi_xy v

    all at the same (x, y, v). v is the multiplier of psi_y = 0: SOBA with psi in the place of g,
    which is strongly convex in y wherever f is, though g may have many minima. With mu = 0 it is
    SOBA.

    Args:
        mu: The share of f at the first outer step, in [0, 1).
        mu_decay: The exponent of its fall, in [0, 1]; the official code has 0.1.

    In the paper the rates fall too: a "power" schedule, adjoint_decay, and for x a faster one of
    the outer optimiser.

    Family: Implicit differentiation.
    For: convex, with many minima; f strongly convex in y.
    Cost: T (G + F + H + J + H_f + J_f). The last two, second derivatives of f, cost as much as H
    and J on the query set.
    State: y, v.
    Memory: one vector like y.
    Use: kept states, lower problems with several solutions, of which the best for f is meant.
    Breaks: as SOBA; psi_yy is nearly singular where g is flat and mu_k small, and v then moves
    slowly. A fixed mu has the solution of another lower problem. f must be twice differentiable.
    Source: Liu, Liu, Yao, Zeng, Zhang, "Averaged Method of Multipliers for Bi-Level Optimization
    without Lower-Level Strong Convexity", ICML 2023.
    Differs: the rates are fields of their own, where the paper ties all to mu_k. The official code
    also steps v by an exact line search; BOAT does so by default, and without its GDA it has
    mu = 0, which is another problem than the paper's. inner_steps > 1 is for new tasks.
    """

    mu: float = rule(0.5, ge=0, lt=1)
    mu_decay: float = rule(0.1, ge=0, le=1)

    def move(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        y, v, memory = state
        mu = decayed(self.mu, self.mu_decay, oracle.step)
        draw, outer_draw = oracle.draw_inner(), oracle.draw_outer()
        j_v, h_v = oracle.second_order(context, y, v, draw)
        psi_y = oracle.inner_grad(context, y, draw)
        f_x, f_y = oracle.outer_grads(context, y, outer_draw)
        if mu:
            of_f = oracle.outer_second_order(context, y, v, outer_draw)
            j_v = add(scale(j_v, 1 - mu), of_f[0], mu)
            h_v = add(scale(h_v, 1 - mu), of_f[1], mu)
            psi_y = add(scale(psi_y, 1 - mu), f_y, mu)
        y, memory = self.step_inner(oracle, y, memory, psi_y)
        moved = AdjointState(y, self.step_adjoint(oracle, v, h_v, f_y), memory)
        return Estimate(
            hypergradient=sub(f_x, j_v),
            start_gradient=None,
            state=moved,
            metrics={
                "adjoint_residual": relative_residual(h_v, f_y),
                "averaged_gradient_norm": norm(psi_y),
            },
        )
