"""T1-T2: the inverse Hessian replaced by a scalar."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.implicit import implicit_gradient
from metadist.algorithms.parts.inner import InnerLoop
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, scale


@dataclass(frozen=True)
class T1T2(InnerLoop):
    """T1-T2.

        y_T = inner_steps of the inner optimiser on g;    v = adjoint_lr f_y(x, y_T)
        h = f_x - J v

    A multiple of the identity replaces H: the adjoint solve of AID stopped after one fixed-point
    step from 0.

    Args:
        adjoint_lr: What replaces H^-1, > 0. The paper has 1, or inner_lr, which makes h that of ITD
            with truncate=1 (plain SGD), but for J, here at y_T and there one step before.

    Family: Heuristic.
    For: well-conditioned; heuristic.
    Cost: T G + F + J. H v is a by-product, for the metric `adjoint_residual`.
    State: y.
    Memory: one graph.
    Use: cheap first attempt.
    Breaks: biased, h need not vanish at the solution: right only as far as H is a multiple of
    the identity.
    Source: Luketina, Berglund, Greff, Raiko, "Scalable Gradient-Based Tuning of Continuous
    Regularization Hyperparameters", ICML 2016. Details beyond the formula were not checked.
    """

    refuses_decay = ""

    adjoint_lr: float = rule(1.0, gt=0)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        v = scale(f_y, self.adjoint_lr)
        h, metrics = implicit_gradient(oracle, context, y, v, f_x, f_y)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=InnerState(y, memory),
            metrics=metrics,
        )
