"""AID: differentiate implicitly, through the condition that holds at the lower solution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from metadist.algorithm import Estimate, InnerState, State
from metadist.algorithms.parts.implicit import (
    AdjointState,
    adjoint_rate,
    check_adjoint_lr,
    hessian,
    implicit_gradient,
)
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop
from metadist.algorithms.parts.linear import (
    Product,
    Solution,
    conjugate_gradient,
    fixed_point,
    neumann,
    normal_conjugate_gradient,
)
from metadist.algorithms.parts.maps import fixed_point_gradient, iterate, refuse_options, system
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, zeros_like


@dataclass(frozen=True)
class AID(InnerLoop):
    """Approximate implicit differentiation (AID-BiO).

        y <- inner_steps steps on g(x, .) from the last y
        v ~  (H + damping I)^-1 f_y(x, y), by adjoint_steps steps of a solver
        h = f_x(x, y) - J v

    Exact where y and v are; memory does not grow with inner_steps, unlike ITD's. All products of
    one solve are on one mini-batch, J on another one.

    For a problem with `inner_map` y makes inner_steps of y <- Phi(x, y) instead, and

        v ~  (I - dPhi/dy)'^-1 f_y,    h = f_x + (dPhi/dx)' v

    whose matrix is not symmetric: with "normal_cg", or "fixed_point" or "neumann", whose eta is
    then 1 by default.

    Args:
        solver: "cg", conjugate gradients: the fewest products, but on mini-batches the solution
            of a noisy system is biased; "normal_cg": the same on H'H v = H'b, for matrices that are
            indefinite or not symmetric, at two products per step; "fixed_point":
            v <- v - eta (H v - b); "neumann":
            v = eta sum over q = 0 .. adjoint_steps of (I - eta H)^q b.
        adjoint_steps: Q >= 1, products of the solver (fixed_point from 0: one less; normal_cg:
            2 Q + 1).
        adjoint_lr: eta of "neumann" and "fixed_point", <= 1/L; None: inner_lr.
        damping: >= 0, for singular or indefinite H; it biases v.
        tolerance: >= 0; the solver ends at a residual of tolerance |b|.
        warm_start: Start v from the last v; not with "neumann", which is a sum from 0.

    Family: Implicit differentiation.
    For: strongly convex in y, or damped. Any contraction, see `Problem.inner_map`.
    Cost: T G + F + Q H + J. With warm-started "cg" one H more, for the first residual.
    State: y, and v if warm_start.
    Memory: 5 vectors like y.
    Use: accurate hypergradients at low memory; many inner steps.
    Breaks: singular H without damping, as of a head with more weights than support examples: where
    b leaves the range of H, "cg" gives a v that is thousands or millions of times too large
    (`adjoint_residual` is far above 1). Then regularise g, set damping, or use IMAML. Indefinite
    H: "cg" stops there (`negative_curvature` is 1), the others diverge. Far from the lower
    solution h is the gradient of nothing. "normal_cg" squares the condition number.
    Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design",
    ICML 2021, AID-BiO. Of it the updates; that the paper starts v from the last v was not
    checked against its text, hence the option.
    Differs: the official code's conjugate gradients test a residual before they store the iterate
    that has it, and so return the one before; here the converged one is returned. Its two solvers
    use different fixed-point maps, so that v has different scales; here all solve H v = f_y.
    It never starts v from the last v. "normal_cg" and general maps are those of hypertorch
    (Grazzi, Franceschi, Pontil, Salzo, ICML 2020), whose plain conjugate gradients also take
    a matrix that is not symmetric; here they refuse a problem with `inner_map`.
    """

    takes_map = True

    solver: Literal["cg", "normal_cg", "fixed_point", "neumann"] = rule(
        "cg", one_of=("cg", "normal_cg", "fixed_point", "neumann")
    )
    adjoint_steps: int = rule(10, ge=1)
    adjoint_lr: float | None = None
    damping: float = rule(0.0, ge=0.0)
    tolerance: float = rule(1e-10, ge=0, le=1)
    warm_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adjoint_lr(self, self.adjoint_lr, self.solver)
        if self.warm_start and self.solver == "neumann":
            raise ValueError(
                "warm_start must be False with solver='neumann', got True: its sum has no start; "
                "'fixed_point' makes the same steps from any"
            )

    @property
    def kept_options(self) -> dict[str, str]:
        return {"warm_start": ""}

    def init(self, oracle: Oracle, context: Params, inner: Params) -> State:
        return self.state(inner, zeros_like(inner), self.new_memory(inner))

    def state(self, y: Params, v: Params, memory: Any) -> State:
        return AdjointState(y, v, memory) if self.warm_start else InnerState(y, memory)

    def estimate(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        draw = oracle.draw_inner()
        if oracle.has_inner_map:
            product, transposed = system(oracle, context, y, draw, self.damping)
            eta, gradient = self.adjoint_lr or 1.0, fixed_point_gradient
        else:
            product = transposed = hessian(oracle, context, y, draw, self.damping)
            eta, gradient = adjoint_rate(self, self.adjoint_lr), implicit_gradient
        start = state.adjoint if self.warm_start else None
        v, metrics = self._solve(product, transposed, f_y, eta, start)
        h, residual = gradient(oracle, context, y, v, f_x, f_y, self.damping)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=self.state(y, v, memory),
            metrics={**metrics, **residual},
        )

    def descend(
        self,
        oracle: Oracle,
        context: Params,
        y: Params,
        memory: Any = NO_MEMORY,
        draws: Iterable[Draw] | None = None,
        lr: float | None = None,
    ) -> tuple[Params, Any]:
        if not oracle.has_inner_map:
            return super().descend(oracle, context, y, memory, draws, lr)
        refuse_options(self, "inner_lr", "inner_optimizer")
        if self.solver == "cg":
            raise ValueError(
                "solver must be 'normal_cg', 'fixed_point' or 'neumann' for a problem with "
                "inner_map, got 'cg': the Jacobian of a map need not be symmetric"
            )
        return iterate(oracle, context, y, self.inner_steps)[0], NO_MEMORY

    def _solve(
        self, product: Product, transposed: Product, b: Params, eta: float, start: Params | None
    ) -> Solution:
        """The v for which product(v) is nearly b."""
        steps = self.adjoint_steps
        if self.solver == "cg":
            return conjugate_gradient(product, b, steps, start, self.tolerance)
        if self.solver == "normal_cg":
            return normal_conjugate_gradient(product, transposed, b, steps, start, self.tolerance)
        if self.solver == "fixed_point":
            return fixed_point(product, b, steps, eta, start, self.tolerance)
        return neumann(product, b, steps, eta, self.tolerance)
