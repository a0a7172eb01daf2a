"""PZOBO: the Jacobian of the inner loop by finite differences along random directions."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.differences import random_pair
from metadist.algorithms.parts.inner import InnerLoop
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, dot, scale, sub, zeros_like


@dataclass(frozen=True)
class PZOBO(InnerLoop):
    """Partial zeroth-order bilevel optimiser (PZOBO).

    With A(x, start) = y_T and (u, s) normal directions of context and start of adaptation, zero
    where x does not enter, as in a kept start:

        delta_j = (A(x + mu u_j, start + mu s_j) - A(x, start)) / mu
        h = f_x + mean_j <delta_j, f_y> u_j;    start: mean_j <delta_j, f_y> s_j

    Only the response of y to x is a difference; f is differentiated. All runs of A are on the
    same draws. Unbiased for A smoothed over a radius of about mu, so exact in the mean where A is
    affine (a quadratic g).

    Args:
        mu: The length of the differences, > 0.
        num_directions: b, >= 1.

    Family: Through the inner loop.
    For: any smooth one, finite inner loop.
    Cost: (1 + b) T G + F.
    State: y.
    Memory: b vectors like (x, y), independent of T.
    Use: few outer variables, no second derivatives, any inner optimiser.
    Breaks: the variance grows like d / b, d being the size of what x enters of context and start;
    mu near the rounding error of y_T over |y_T| (in float32, mu < 1e-3) gives noise, large mu bias.
    Refused below float32, whose rounding is larger than the differences.
    Source: Sow, Ji, Liang, "On the Convergence Theory for Hessian-Free Bilevel Algorithms",
    NeurIPS 2022. The ES-based Jacobian estimate; with mini-batches its PZOBO-S.
    Differs: directions are plain normal, where the official code can normalise them tensor by
    tensor and multiply by a size, which has the right mean only with each tensor's own size. The
    start of adaptation gets a gradient too.
    """

    takes_second_derivatives = False
    trains = "both"
    bears_rounding = "float32"
    refuses_decay = ""

    mu: float = rule(0.01, gt=0)
    num_directions: int = rule(8, ge=1)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        start = state.inner
        draws = [oracle.draw_inner() for _ in range(self.inner_steps)]
        y, memory = self.descend(oracle, context, start, state.memory, draws)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        h, start_gradient = f_x, zeros_like(y)
        for _ in range(self.num_directions):
            u, s = random_pair(oracle, context, start, "normal")
            x_moved, start_moved = add(context, u, self.mu), add(start, s, self.mu)
            moved, _ = self.descend(oracle, x_moved, start_moved, state.memory, draws)
            slope = dot(sub(moved, y), f_y) / (self.mu * self.num_directions)
            h = add(h, scale(u, slope))
            start_gradient = add(start_gradient, scale(s, slope))
        return Estimate(
            hypergradient=h,
            start_gradient=start_gradient,
            state=InnerState(y, memory),
            metrics={},
        )
