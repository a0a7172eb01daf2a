"""DARTS: the product with the cross derivative by finite differences of first ones."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.differences import difference_product
from metadist.algorithms.parts.inner import InnerLoop
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.step_rules import SGD
from metadist.trees import Params, add


@dataclass(frozen=True)
class DARTS(InnerLoop):
    """DARTS.

        y_T = inner_steps of the inner optimiser on g;    v = f_y(x, y_T)
        h = f_x - xi (g_x(x, y + e v) - g_x(x, y - e v)) / (2 e),
            y = y_{T-1},   e = epsilon / |v|,   xi = adjoint_lr

    The derivative of f through the last inner step, the rate of which is xi: ITD with truncate=1,
    without second derivatives.

    Args:
        epsilon: How far y is moved for the difference, in Euclidean norm, > 0.
        adjoint_lr: xi, > 0, what replaces H^-1. None: the rate of the inner step, as in the paper;
            1: as in the library Betty.

    Family: Heuristic.
    For: well-conditioned; heuristic.
    Cost: T G + F + 2 G + 2 Gx.
    State: y.
    Memory: two more y.
    Use: architecture search; no second derivatives.
    Breaks: biased, as xi replaces H^-1: h need not vanish at the solution; with "adam" no number is
    right for xi, see SAMA. Rounding, in float32, where epsilon is too small beside |y|; curvature,
    where it is too large. Refused below float32, whose rounding is larger than the differences.
    Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, second
    order, equations 7 and 8.
    Differs: any number of inner steps, where the paper has T = 1, y_0 and xi = inner_lr. Betty has
    the difference at y_T, as SAMA here, and xi = 1.
    """

    takes_second_derivatives = False
    bears_rounding = "float32"
    refuses_decay = ""

    epsilon: float = rule(0.01, gt=0)
    adjoint_lr: float | None = rule(None, gt=0, none="for the rate of the inner step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adjoint_lr is None and not isinstance(self.step_rule, SGD):
            raise ValueError(
                f"adjoint_lr must be given with inner_optimizer={type(self.step_rule).__name__}, "
                "got None: its last step has no single rate. SAMA has its derivative"
            )

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y, memory = state
        for _ in range(self.inner_steps):
            before = y
            g_y = oracle.inner_grad(context, y, oracle.draw_inner())
            y, memory = self.step_inner(oracle, y, memory, g_y)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        j_v = difference_product(oracle, context, before, f_y, oracle.draw_inner(), self.epsilon)
        xi = self.adjoint_lr or self.step_rule.lr_at(oracle.step)
        return Estimate(
            hypergradient=add(f_x, j_v, -xi),
            start_gradient=None,
            state=InnerState(y, self.carried(memory)),
            metrics={},
        )
