"""IMAML: MAML with implicit gradients, through a proximal term that holds y near its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import hessian, implicit_gradient
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop
from metadist.algorithms.parts.linear import conjugate_gradient
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, scale, sub


class IMAMLState(NamedTuple):
    """y, and the start that it is held near."""

    inner: Params
    start: Params
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class IMAML(InnerLoop):
    """MAML with implicit gradients (iMAML).

        y ~ argmin of g(x, y) + lam |y - start|^2 / 2, by inner_steps steps
        (H + lam I) v = f_y(x, y), by adjoint_steps of conjugate gradients
        d f / d start = lam v;    d f / d context = f_x - J v

    Exact where y and v are, whatever the path to y, so its memory does not grow with inner_steps.
    Adaptation of a kept state continues from the last y, held near the first start, which is not
    trained then.

    Args:
        lam: > 0; large enough that H + lam I is positive definite. As it grows y stays at the
            start, as it vanishes d f / d start does.
        adjoint_steps: Q >= 1, steps of conjugate gradients.
        damping: >= 0, added to lam in the solve of v only.
        tolerance: >= 0; the solver ends at a residual of tolerance |f_y|.

    Family: Implicit differentiation.
    For: any that lam makes strongly convex.
    Cost: T G + F + Q H + J.
    State: nothing (y, start).
    Memory: 5 vectors like y.
    Use: MAML with many inner steps, memory of one.
    Breaks: lam below the negative curvature of g (`negative_curvature` is 1); too few
    inner_steps; inner_lr > 2/(L + lam).
    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS
    2019. Their (I + H/lam) u = f_y has u = lam v. The gradient of the context is the same theorem
    for what else g depends on.
    Differs: the proximal term is in every inner step, where the official code has one step at the
    end; the system is that of the paper, where with the code's defaults it is 2 I + H/(lam + 10),
    an argument having slipped into another's place.
    """

    trains = "both"

    lam: float = rule(1.0, gt=0)
    adjoint_steps: int = rule(5, ge=1)
    damping: float = rule(0.0, ge=0.0)
    tolerance: float = rule(1e-10, ge=0, le=1)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> IMAMLState:
        return IMAMLState(inner, inner, self.new_memory(inner))

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        start = IMAMLState(inner, inner)
        return self.descend_near(oracle, context, start, self.step_rule.lr).inner

    def descend_near(
        self, oracle: Oracle, context: Params, state: IMAMLState, lr: float | None = None
    ) -> IMAMLState:
        """The state after inner_steps steps on g + lam |y - start|^2 / 2."""
        y, start, memory = state
        for _ in range(self.inner_steps):
            g_y = oracle.inner_grad(context, y, oracle.draw_inner())
            direction = add(g_y, sub(y, start), self.lam)
            y, memory = self.step_inner(oracle, y, memory, direction, lr)
        return IMAMLState(y, start, self.carried(memory))

    def estimate(self, oracle: Oracle, context: Params, state: IMAMLState) -> Estimate:
        state = self.descend_near(oracle, context, state)
        y = state.inner
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        damping = self.lam + self.damping
        product = hessian(oracle, context, y, oracle.draw_inner(), damping)
        v, metrics = conjugate_gradient(product, f_y, self.adjoint_steps, None, self.tolerance)
        h, residual = implicit_gradient(oracle, context, y, v, f_x, f_y, damping)
        return Estimate(
            hypergradient=h,
            start_gradient=scale(v, self.lam),
            state=state,
            metrics={**metrics, **residual},
        )
