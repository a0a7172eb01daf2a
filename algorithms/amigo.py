"""AmIGO: amortised implicit differentiation, both loops started from the last outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import (
    AdjointState,
    adjoint_rate,
    check_adjoint_lr,
    hessian,
    implicit_gradient,
)
from metadist.algorithms.parts.inner import InnerLoop
from metadist.algorithms.parts.linear import conjugate_gradient, fixed_point
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, zeros_like


@dataclass(frozen=True)
class AmIGO(InnerLoop):
    """Amortised implicit gradient optimisation (AmIGO).

        y <- y - inner_lr g_y(x, y)              inner_steps times, from the last y
        v <- v - adjoint_lr (H v - f_y(x, y))    adjoint_steps times, from the last v
        h = f_x - J v

    Every step on y, every step on v and J have a mini-batch of their own; f has one for the
    whole loop on v. So with "gd" the mean of h, given x, y and the last v, is what whole sets give.

    Args:
        solver: "gd": the steps above; "cg": as many of conjugate gradients, on one mini-batch.
        adjoint_steps: Q >= 1.
        adjoint_lr: eta of "gd", <= 1/L; None: inner_lr.

    Family: Implicit differentiation.
    For: strongly convex in y.
    Cost: T G + F + Q H + J. With "cg" one H more, for the first residual.
    State: y, v.
    Memory: y and v; 4 vectors more with "cg".
    Use: mini-batches and kept states, a few steps on y and v.
    Breaks: as AID, and has no damping; on new tasks v starts from 0, so nothing is amortised.
    Source: Arbel, Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel
    Optimization", ICLR 2022.
    Differs: the sign of v, where the official code has H v = -f_y. Its option to minimise
    |H v - f_y|^2 instead is left out: it squares the condition number.
    """

    solver: Literal["gd", "cg"] = rule("gd", one_of=("gd", "cg"))
    adjoint_steps: int = rule(10, ge=1)
    adjoint_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adjoint_lr(self, self.adjoint_lr, self.solver)

    @property
    def tolerates_staleness(self) -> bool:
        return self.solver == "gd"

    def init(self, oracle: Oracle, context: Params, inner: Params) -> AdjointState:
        return AdjointState(inner, zeros_like(inner), self.new_memory(inner))

    def estimate(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        steps = self.adjoint_steps
        if self.solver == "gd":
            eta = adjoint_rate(self, self.adjoint_lr)
            v, metrics = fixed_point(hessian(oracle, context, y), f_y, steps, eta, state.adjoint)
        else:
            product = hessian(oracle, context, y, oracle.draw_inner())
            v, metrics = conjugate_gradient(product, f_y, steps, state.adjoint)
        h, residual = implicit_gradient(oracle, context, y, v, f_x, f_y)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=AdjointState(y, v, memory),
            metrics={**metrics, **residual},
        )
