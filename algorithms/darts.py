"""DARTS: the product with the cross derivative by finite differences of first ones."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.differences import difference_product
from metadist.algorithms.parts.inner import InnerLoop
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, sub


@dataclass(frozen=True)
class DARTS(InnerLoop):
    """DARTS.

        y_T = inner_steps of the inner optimiser on g;    v = f_y(x, y_T)
        h = f_x - (g_x(x, y_T + e v) - g_x(x, y_T - e v)) / (2 e),    e = epsilon / |v|

    T1-T2 without second derivatives.

    Args:
        epsilon: How far y_T is moved for the difference, in Euclidean norm, > 0.

    Family: Heuristic.
    For: well-conditioned; heuristic.
    Cost: T G + F + 2 G + 2 Gx.
    State: y.
    Memory: two more y.
    Use: architecture search; no second derivatives.
    Breaks: biased, as the identity replaces H: h need not vanish at the solution; rounding,
    in float32, where epsilon is too small beside |y|; curvature, where it is too large.
    Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, second
    order.
    Differs: the difference is at y_T (as in the library Betty) and v is not multiplied by the inner
    rate; the paper has it at y_0, times inner_lr, with T = 1.
    """

    epsilon: float = rule(0.01, gt=0)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = self.descend(oracle, context, state.inner)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        j_v = difference_product(oracle, context, y, f_y, oracle.draw_inner(), self.epsilon)
        return Estimate(
            hypergradient=sub(f_x, j_v), start_gradient=None, state=InnerState(y), metrics={}
        )
