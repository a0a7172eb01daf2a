"""(FG)2U: forward-mode hypergradients along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.differences import random_pair
from metadist.algorithms.parts.through import DescentThrough, Trace, push
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, dot, scale, zeros_like


@dataclass(frozen=True)
class FG2U(DescentThrough):
    """Forward gradient unrolling with forward gradient, (FG)2U.

    No backward pass through the inner loop. For random directions (v, z_0) in the space of
    context and start of adaptation, zero where x does not enter, as in a kept start:

        y_{t+1} = y_t - inner_lr g_y;   z_{t+1} = z_t - inner_lr (J' v + H z_t)
        s = <f_x, v> + <f_y, z_T>;      h = mean over directions of s (v, z_0)

    s is the slope of f(x, y_T) along the direction, so the mean of h is the hypergradient of
    ITD, for the context and for the start.

    Args:
        num_directions: b, >= 1.
        directions: "rademacher", entries +1 or -1, or "normal".

    Family: Through the inner loop.
    For: any smooth one, finite inner loop.
    Cost: T G + F + b T directional derivatives. One of these, of g_y, costs about two G.
    State: y.
    Memory: b vectors like (x, y), independent of T.
    Use: few outer variables, long inner loops, no room for iterates.
    Breaks: E|h - E h|^2 / |E h|^2 = (d - 1) / b, or (d + 1) / b with "normal", d being the size
    of what x enters of context and start: for a large context (features) noise dominates.
    Source: Shen, Wang, Yang, Li, Wang, Zhang, Scarlett, Zhu, Kawaguchi, "Memory-Efficient Gradient
    Unrolling for Large-Scale Bi-level Optimization", NeurIPS 2024.
    Differs: a start that x enters is part of the direction, so that it can be learned, where the
    paper has x alone. The official code's black-box variant, by differences of the solver's
    output, is left out; PZOBO comes nearest to it.
    """

    inner_steps: int = rule(5, ge=1)
    num_directions: int = rule(8, ge=1)
    directions: Literal["rademacher", "normal"] = rule(
        "rademacher", one_of=("rademacher", "normal")
    )

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = state.inner
        directions = [
            random_pair(oracle, context, y, self.directions) for _ in range(self.num_directions)
        ]
        # All directions advance together, since they share y_t and so need no iterate kept.
        steps = self.step_rule
        rate = steps.lr_at(oracle.step)
        memory = state.memory or steps.start(y)
        zeros = tuple(map(zeros_like, memory.means))
        tangents = [(z_0, zeros) for _, z_0 in directions]
        for _ in range(self.inner_steps):
            draw = oracle.draw_inner()
            slopes = []
            for (v, _), (z, _) in zip(directions, tangents, strict=True):
                slopes.append(oracle.directional(context, y, v, z, draw))
            trace = Trace(y, memory, oracle.inner_grad(context, y, draw))
            for j, slope_of_g_y in enumerate(slopes):
                tangents[j] = push(oracle, steps, trace, rate, *tangents[j], slope_of_g_y)
            y, memory = steps.step(*trace, rate)

        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        h, start_gradient = zeros_like(context), zeros_like(y)
        for (v, z_0), (z, _) in zip(directions, tangents, strict=True):
            slope = (dot(f_x, v) + dot(f_y, z)) / self.num_directions
            h = add(h, scale(v, slope))
            start_gradient = add(start_gradient, scale(z_0, slope))
        return Estimate(
            hypergradient=h,
            start_gradient=start_gradient,
            state=InnerState(y, self.carried(memory)),
            metrics={},
        )
