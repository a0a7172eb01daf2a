"""NoLoopAID: implicit differentiation with one step on each of y, v and x."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card, Estimate
from metadist.algorithms.parts.implicit import (
    AdjointState,
    adjoint_rate,
    hessian,
    implicit_gradient,
)
from metadist.algorithms.parts.inner import SingleLoop, check_positive, decayed
from metadist.algorithms.parts.linear import fixed_point
from metadist.oracle import Oracle
from metadist.trees import Params, zeros_like


@dataclass(frozen=True)
class NoLoopAID(SingleLoop):
    """AID without loops: y, v and x follow one another with one step each.

        y <- y - inner_lr grad_y g(x, y)
        v <- v - adjoint_lr (H v - grad_y f)     at the new y
        h = grad_x f - J v                       at the new y and v

    With kept states the errors of y and v shrink while x moves slowly enough. On new tasks v
    starts from 0, so take inner_steps > 1: that many steps of both at one x.

    Args:
        adjoint_lr: eta, > 0 and <= 1/L; decays like inner_lr. None: inner_lr.

    Cost: G + F + H + J per step. Memory: y and v.
    Breaks: indefinite H, or rates > 2/L: v diverges; an outer_lr that is not well below inner_lr
    and adjoint_lr (see SOBA): y and v cannot follow.
    Source: Ji, Liu, Liang, Ying, "Will Bilevel Optimizers Benefit from Loops", NeurIPS 2022, the
    no-loop variant of AID; of it the updates, not the rates. No official code was found.
    """

    card = Card(
        title="AID without loops",
        source="Ji, Liu, Liang, Ying, NeurIPS 2022",
        problems="strongly convex in y",
        cost="T (G + F + H + J)",
        state="y, v",
        use="the cheapest implicit step, for tasks whose state is kept",
    )

    adjoint_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adjoint_lr is not None:
            check_positive("adjoint_lr", self.adjoint_lr)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> AdjointState:
        return AdjointState(inner, zeros_like(inner))

    def move(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        gradient = oracle.inner_grad(context, state.inner, oracle.draw_inner())
        y = self.descend_once(oracle, state.inner, gradient)
        outer_grads = oracle.outer_grads(context, y, oracle.draw_outer())
        eta = decayed(adjoint_rate(self, self.adjoint_lr), self.inner_decay, oracle.step)
        v = fixed_point(hessian(oracle, context, y), outer_grads[1], 1, eta, state.v).v
        h, metrics = implicit_gradient(oracle, context, y, v, outer_grads)
        return Estimate(h, None, AdjointState(y, v), metrics)
