"""SAMA: DARTS that knows the inner optimiser."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.differences import difference_product
from metadist.algorithms.parts.inner import InnerLoop
from metadist.algorithms.parts.through import Trace, pull
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.step_rules import SGD, Adam
from metadist.trees import Params, multiply, scale, sub


@dataclass(frozen=True)
class SAMA(InnerLoop):
    """Scalable Meta-learning with Arbitrary optimizers (SAMA).

        y_T = inner_steps of the inner optimiser on g;    v = P f_y(x, y_T)
        h = f_x - (g_x(x, y_T + e v) - g_x(x, y_T - e v)) / (2 e),    e = epsilon / |v|

    P is the derivative of the last inner update u with respect to its gradient: the identity
    for SGD, a diagonal for Adam and AdamW, times that of clipping:

        m = b1 m_old + (1-b1) g,   s = b2 s_old + (1-b2) g^2,   u = lr' m / (sqrt(s) + e')
        P = lr' ((1-b1) b2 s_old - b1 (1-b2) g m_old) / (sqrt(s) + e')^3

    with lr', e' of Adam's bias correction. As in the official code, Adam has the factor lr
    in h and SGD has not: outer rates differ. With SGD it is DARTS with adjoint_lr=1, but for
    the point of the difference.

    Args:
        epsilon: How far y_T is moved for the difference, in Euclidean norm, > 0.

    Family: Heuristic.
    For: large models trained with Adam; heuristic.
    Cost: T G + F + 2 G + 2 Gx.
    State: y, and Adam's moments if they are carried.
    Memory: with Adam, four more y.
    Use: data weights of large models; no second derivatives.
    Breaks: biased, as DARTS, and refused below float32, as DARTS. The first step of Adam is the
    sign of the gradient, which has no derivative: with inner_steps = 1 it needs the moments of a
    kept state (carry=True); evaluation adapts by that one step, since it starts Adam anew.
    Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, "Making Scalable Meta Learning
    Practical", NeurIPS 2023. And its library Betty.
    Differs: Adam's bias correction is differentiated too; epsilon is 0.01, a step that is small
    beside y, where the official code has 1.
    """

    takes_second_derivatives = False
    bears_rounding = "float32"
    refuses_decay = ""

    epsilon: float = rule(0.01, gt=0)

    @property
    def needs_kept_state(self) -> str:
        if isinstance(self.step_rule, SGD) or self.inner_steps > 1:
            return super().needs_kept_state
        return (
            "the first step of Adam is the sign of the gradient, which has no derivative, so that "
            "h is f_x alone. Set more inner_steps"
        )

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y, memory = state
        for _ in range(self.inner_steps):
            g_y = oracle.inner_grad(context, y, oracle.draw_inner())
            last = Trace(y, memory or self.step_rule.start(y), g_y)
            y, memory = self.step_inner(oracle, y, last.memory, g_y)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        v = self._through(oracle, last, f_y)
        draw = oracle.draw_inner()
        j_v = difference_product(oracle, context, y, v, draw, self.epsilon)
        return Estimate(
            hypergradient=sub(f_x, j_v),
            start_gradient=None,
            state=InnerState(y, self.carried(memory)),
            metrics={},
        )

    def _through(self, oracle: Oracle, last: Trace, f_y: Params) -> Params:
        """P f_y for the last step."""
        steps = self.step_rule
        v = f_y
        if isinstance(steps, Adam):
            gradient = steps.gradient(last.y, last.g_y)
            v = multiply(steps.slope(last.memory, gradient, steps.lr_at(oracle.step)), f_y)
        if steps.clip_norm is None:
            return v
        # The derivative of clipping alone: that of a plain step of rate 1 along a clipped gradient.
        clipping = SGD(lr=1.0, clip_norm=steps.clip_norm)
        trace = Trace(last.y, clipping.start(last.y), last.g_y)
        return scale(pull(oracle, clipping, trace, 1.0, v, ()).gradient, -1.0)
