"""SOBA: y, its adjoint and x move at once, each by one unbiased direction."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import AdjointLoop, AdjointState, adjoint_metrics
from metadist.oracle import Oracle
from metadist.trees import Params, sub


@dataclass(frozen=True)
class SOBA(AdjointLoop):
    """Stochastic bilevel algorithm (SOBA).

        y+ = y - inner_lr g_y
        v+ = v - adjoint_lr (H v - f_y)
        h = f_x - J v

    all at the same (x, y, v), h with the old v: three directions, each linear in f and g. One draw
    of the support set and one of the query set, so each is unbiased given (x, y, v).

    With noisy draws the paper lets all rates fall: inner_optimizer=SGD(lr,
    schedule="power", exponent=0.5), adjoint_decay=0.5, and for x OuterOptimizer("sgd",
    schedule="power", schedule_power=0.5).

    Family: Stochastic.
    For: strongly convex, mini-batches.
    Cost: T (G + F + H + J). H v and J v come from one pass.
    State: y, v.
    Memory: one vector like y.
    Use: kept states: the simplest single loop, and the cheapest step.
    Breaks: an outer_lr that is not well below inner_lr and adjoint_lr: x, y and v then spiral away
    together (with both rates equal and |y - t|^2 / 2 for f, beyond 2 inner_lr mu^3 / |J|^2, mu
    the smallest eigenvalue of H). v starts at 0, so on new tasks set inner_steps to several
    1 / (adjoint_lr mu). Constant rates stop at a floor of noise (see SABA).
    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022.
    Differs: the sign of v, where the paper and its code have H v = -f_y; inner_steps > 1 moves y
    and v several times at one x, for new tasks.
    """

    @property
    def tolerates_staleness(self) -> bool:
        return True

    def move(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        y, v, memory = state
        draw = oracle.draw_inner()
        j_v, h_v = oracle.second_order(context, y, v, draw)
        g_y = oracle.inner_grad(context, y, draw)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        y, memory = self.step_inner(oracle, y, memory, g_y)
        moved = AdjointState(y, self.step_adjoint(oracle, v, h_v, f_y), memory)
        return Estimate(
            hypergradient=sub(f_x, j_v),
            start_gradient=None,
            state=moved,
            metrics=adjoint_metrics(oracle, h_v, f_y, g_y),
        )
