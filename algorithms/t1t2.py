"""T1-T2: the inverse Hessian replaced by a number."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.parts.implicit import implicit_gradient
from metadist.algorithms.parts.inner import InnerLoop, check_positive
from metadist.oracle import Oracle
from metadist.trees import Params, scale


@dataclass(frozen=True)
class T1T2(InnerLoop):
    """T1-T2: a hypergradient whose adjoint is one multiple of grad_y f.

        y_T = inner_steps of the inner optimiser on g;    v = adjoint_lr * grad_y f(x, y_T)
        h = grad_x f - J v

    It is the adjoint solve of AID stopped after one fixed-point step from 0.

    Args:
        adjoint_lr: what replaces H^-1, > 0. The paper has 1, or inner_lr, which makes h that of ITD
            with truncate=1 (plain SGD), but for J, here at y_T and there one step before.

    Cost: T G + F + J (with H v as a by-product, for the metric `adjoint_residual`).
    Memory: one graph.
    Breaks: biased, h need not vanish at the solution: right only as far as H is a multiple of
    the identity.
    Source: Luketina, Berglund, Greff, Raiko, "Scalable Gradient-Based Tuning of Continuous
    Regularization Hyperparameters", ICML 2016 (details beyond the formula unverified).
    """

    card = Card(
        title="T1-T2",
        source="Luketina, Berglund, Greff, Raiko, ICML 2016",
        problems="well-conditioned; heuristic",
        cost="T G + F + J",
        state="y",
        use="cheap first attempt",
    )

    adjoint_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("adjoint_lr", self.adjoint_lr)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = self.descend(oracle, context, state.inner)
        outer_grads = oracle.outer_grads(context, y, oracle.draw_outer())
        v = scale(outer_grads[1], self.adjoint_lr)
        h, metrics = implicit_gradient(oracle, context, y, v, outer_grads)
        return Estimate(h, None, InnerState(y), metrics)
