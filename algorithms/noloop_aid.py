"""NoLoopAID: implicit differentiation with one step on each of y, v and x."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import (
    AdjointState,
    adjoint_rate,
    check_adjoint_lr,
    hessian,
    implicit_gradient,
)
from metadist.algorithms.parts.inner import SingleLoop
from metadist.algorithms.parts.linear import fixed_point
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, zeros_like


@dataclass(frozen=True)
class NoLoopAID(SingleLoop):
    """AID without loops.

        y <- y - inner_lr g_y(x, y)
        v <- v - adjoint_lr (H v - f_y)     at the new y
        h = f_x - J v                       at the new y and v

    One after another, each at the newest point. With kept states the errors of y and v shrink
    while x moves slowly enough. On new tasks v starts from 0, so set inner_steps > 1: that many
    steps of both at one x.

    Args:
        adjoint_lr: eta, > 0 and <= 1/L; it has the schedule of `inner_optimizer`. None: its rate.

    Family: Implicit differentiation.
    For: strongly convex in y.
    Cost: T (G + F + H + J).
    State: y, v.
    Memory: one more y.
    Use: the cheapest implicit step, for tasks whose state is kept.
    Breaks: indefinite H, or rates > 2/L: v diverges; an outer_lr that is not well below inner_lr
    and adjoint_lr (see SOBA): y and v cannot follow.
    Source: Ji, Liu, Liang, Ying, "Will Bilevel Optimizers Benefit from Loops", NeurIPS 2022.
    The no-loop variant of AID; of it the updates, not the rates. No official code was found.
    """

    adjoint_lr: float | None = rule(None, gt=0, none="for inner_lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adjoint_lr(self, self.adjoint_lr)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> AdjointState:
        return AdjointState(inner, zeros_like(inner), self.new_memory(inner))

    def move(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        g_y = oracle.inner_grad(context, state.inner, oracle.draw_inner())
        y, memory = self.step_inner(oracle, state.inner, state.memory, g_y)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        eta = self.step_rule.with_lr(adjoint_rate(self, self.adjoint_lr)).lr_at(oracle.step)
        v = fixed_point(hessian(oracle, context, y), f_y, 1, eta, state.adjoint).v
        h, metrics = implicit_gradient(oracle, context, y, v, f_x, f_y)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=AdjointState(y, v, memory),
            metrics=metrics,
        )
