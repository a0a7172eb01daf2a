"""AmIGO: amortised implicit differentiation, both loops started from the last outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.algorithm import Card, Estimate
from metadist.algorithms.parts.implicit import (
    AdjointState,
    adjoint_rate,
    check_adjoint_lr,
    hessian,
    implicit_gradient,
)
from metadist.algorithms.parts.inner import InnerLoop, check_at_least, check_choice
from metadist.algorithms.parts.linear import conjugate_gradient, fixed_point
from metadist.oracle import Oracle
from metadist.trees import Params, zeros_like


@dataclass(frozen=True)
class AmIGO(InnerLoop):
    """Amortised implicit gradient optimisation: warm-started SGD on y, then on v.

        y <- y - inner_lr grad_y g(x, y)              inner_steps times, from the last y
        v <- v - adjoint_lr (H v - grad_y f(x, y))    adjoint_steps times, from the last v
        h = grad_x f - J v

    Every step on y, every step on v and J have a mini-batch of their own; f has one for the
    whole loop on v. So with "gd" the mean of h, given x, y and the last v, is what whole sets give.

    Args:
        solver: "gd": the steps above; "cg": as many of conjugate gradients, on one mini-batch.
        adjoint_steps: N >= 1.
        adjoint_lr: eta of "gd", <= 1/L; None: inner_lr.

    Cost: T G + F + N H + J; with "cg" one H more, for the first residual.
    Memory: y and v, 4 vectors more with "cg".
    Breaks: as AID, and has no damping; on new tasks v starts from 0, so nothing is amortised.
    Source: Arbel and Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel
    Optimization", ICLR 2022.
    Differs from the official code in: the sign of v (there H v = -grad_y f).
    """

    card = Card(
        title="Amortised implicit gradient optimisation",
        source="Arbel, Mairal, ICLR 2022",
        problems="strongly convex in y",
        cost="T G + F + Q H + J",
        state="y, v",
        use="mini-batches and kept states, a few steps on y and v",
    )

    solver: Literal["gd", "cg"] = "gd"
    adjoint_steps: int = 10
    adjoint_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("solver", self.solver, ("gd", "cg"))
        check_at_least("adjoint_steps", self.adjoint_steps, 1)
        check_adjoint_lr(self, self.adjoint_lr, self.solver)

    @property
    def tolerates_staleness(self) -> bool:
        return self.solver == "gd"

    def init(self, oracle: Oracle, context: Params, inner: Params) -> AdjointState:
        return AdjointState(inner, zeros_like(inner))

    def estimate(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        y = self.descend(oracle, context, state.inner)
        outer_grads = oracle.outer_grads(context, y, oracle.draw_outer())
        b, steps = outer_grads[1], self.adjoint_steps
        if self.solver == "gd":
            eta = adjoint_rate(self, self.adjoint_lr)
            v, metrics = fixed_point(hessian(oracle, context, y), b, steps, eta, state.v)
        else:
            product = hessian(oracle, context, y, oracle.draw_inner())
            v, metrics = conjugate_gradient(product, b, steps, state.v)
        h, residual = implicit_gradient(oracle, context, y, v, outer_grads)
        return Estimate(h, None, AdjointState(y, v), {**metrics, **residual})
