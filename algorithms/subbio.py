"""SubBiO: the adjoint vector from a subspace of two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card, Estimate
from metadist.algorithms.parts.implicit import (
    AdjointState,
    adjoint_rate,
    check_adjoint_lr,
    hessian,
    implicit_gradient,
)
from metadist.algorithms.parts.inner import InnerLoop, check_at_least
from metadist.algorithms.parts.linear import Product, Solution, in_span
from metadist.oracle import Oracle
from metadist.trees import Params, add, zeros_like


@dataclass(frozen=True)
class SubBiO(InnerLoop):
    """Subspace bilevel optimisation: the best v in the span of two vectors.

        y <- inner_steps steps on g(x, .) from the last y;   b = grad_y f(x, y)
        W = [b, (I - adjoint_lr H) v]        v from the last outer step
        v = W (W'HW)^-1 W'b
        h = grad_x f - J v

    In the norm of H this v is at least as near to H^-1 b as a step of fixed point is. Columns
    that vanish or are parallel (v = 0 at first, b = 0) count as absent.

    Args:
        adjoint_lr: eta > 0, of the step that makes the second vector; None: inner_lr.
        adjoint_steps: how often v is improved; the paper has 1, for new tasks take more.

    Cost: T G + F + 3 H + J (3 H for each of adjoint_steps). Memory: 5 vectors like y.
    Breaks: indefinite H, where W'HW may be singular (`negative_curvature` is 1).
    Source: Yang, Gao, Yuan, "LancBiO: Dynamic Lanczos-aided Bilevel Optimization via Krylov
    Subspace", ICLR 2025, SubBiO; of it the update as its code has it.
    Differs from the official code in: W is made orthonormal, which leaves its span; v starts
    from 0; H is taken at y throughout; on mini-batches W'HW has one, so that it is symmetric.
    """

    card = Card(
        title="Subspace bilevel optimisation",
        source="Yang, Gao, Yuan, ICLR 2025",
        problems="strongly convex in y",
        cost="T G + F + 3 H + J",
        state="y, v",
        use="kept states; the rate of v matters little",
    )

    adjoint_lr: float | None = None
    adjoint_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adjoint_lr(self, self.adjoint_lr)
        check_at_least("adjoint_steps", self.adjoint_steps, 1)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> AdjointState:
        return AdjointState(inner, zeros_like(inner))

    def estimate(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        y = self.descend(oracle, context, state.inner)
        outer_grads = oracle.outer_grads(context, y, oracle.draw_outer())
        solution = Solution(state.v, {})
        for _ in range(self.adjoint_steps):
            step = hessian(oracle, context, y, oracle.draw_inner())
            matrix = hessian(oracle, context, y, oracle.draw_inner())
            solution = self.improve(step, matrix, outer_grads[1], solution.v)
        v, metrics = solution
        h, residual = implicit_gradient(oracle, context, y, v, outer_grads)
        return Estimate(h, None, AdjointState(y, v), {**metrics, **residual})

    def improve(self, step: Product, matrix: Product, b: Params, v: Params) -> Solution:
        """The best v in span{b, (I - adjoint_lr H) v}. Cost: 1 product `step`, 2 `matrix`."""
        moved = add(v, step(v), -adjoint_rate(self, self.adjoint_lr))
        return in_span(matrix, b, [b, moved])
