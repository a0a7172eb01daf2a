"""SubBiO: the adjoint vector from a subspace of two dimensions."""

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
from metadist.algorithms.parts.inner import InnerLoop
from metadist.algorithms.parts.linear import Product, Solution, in_span
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, zeros_like


@dataclass(frozen=True)
class SubBiO(InnerLoop):
    """Subspace bilevel optimisation (SubBiO).

        y <- inner_steps steps on g(x, .) from the last y;   b = f_y(x, y)
        W = [b, (I - adjoint_lr H) v]        v from the last outer step
        v = W (W'HW)^-1 W'b
        h = f_x - J v

    The best v in two dimensions: in the norm of H it is at least as near to H^-1 b as a step of
    fixed point is. Columns that vanish or are parallel (v = 0 at first, b = 0) count as absent.

    Args:
        adjoint_lr: eta > 0, of the step that makes the second vector; None: inner_lr.
        adjoint_steps: How often v is improved; the paper has 1, for new tasks set more.

    Family: Implicit differentiation.
    For: strongly convex in y.
    Cost: T G + F + 3 H + J. 3 H for each of adjoint_steps.
    State: y, v.
    Memory: 5 vectors like y.
    Use: kept states; the rate of v matters little.
    Breaks: indefinite H, where W'HW may be singular (`negative_curvature` is 1).
    Source: Yang, Gao, Yuan, "LancBiO: Dynamic Lanczos-aided Bilevel Optimization via Krylov
    Subspace", ICLR 2025, SubBiO. Of it the update as its code has it.
    Differs: W is made orthonormal, which leaves its span, as its columns are nearly parallel in the
    end; vanishing columns are left out, so v may start at 0; H is that of y, where the official
    synthetic script evaluates it with v in the place of y; on mini-batches W'HW is of one batch,
    so that it is symmetric.
    """

    bears_rounding = "autocast"

    adjoint_lr: float | None = None
    adjoint_steps: int = rule(1, ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adjoint_lr(self, self.adjoint_lr)

    @property
    def kept_options(self) -> dict[str, str]:
        return {"adjoint_lr": "adjoint_steps"} if self.adjoint_steps == 1 else {}

    def init(self, oracle: Oracle, context: Params, inner: Params) -> AdjointState:
        return AdjointState(inner, zeros_like(inner), self.new_memory(inner))

    def estimate(self, oracle: Oracle, context: Params, state: AdjointState) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        solution = Solution(state.adjoint, {})
        for _ in range(self.adjoint_steps):
            step = hessian(oracle, context, y, oracle.draw_inner())
            matrix = hessian(oracle, context, y, oracle.draw_inner())
            solution = self.improve(step, matrix, f_y, solution.v)
        v, metrics = solution
        h, residual = implicit_gradient(oracle, context, y, v, f_x, f_y)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=AdjointState(y, v, memory),
            metrics={**metrics, **residual},
        )

    def improve(self, step: Product, matrix: Product, b: Params, v: Params) -> Solution:
        """The best v in span{b, (I - adjoint_lr H) v}. Cost: 1 product `step`, 2 `matrix`."""
        moved = add(v, step(v), -adjoint_rate(self, self.adjoint_lr))
        return in_span(matrix, b, [b, moved])
