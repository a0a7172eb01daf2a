"""(FG)2U: forward-mode hypergradients along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.parts.inner import GradientDescent, check_at_least, check_choice
from metadist.oracle import Oracle
from metadist.trees import Params, add, dot, scale, zeros_like

CONTEXT, START = "context.", "start."


@dataclass(frozen=True)
class FG2U(GradientDescent):
    """Forward gradient unrolling with forward gradient: no backward pass through the inner loop.

    For random directions (v, z_0) in the space of context and start of adaptation:

        y_{t+1} = y_t - inner_lr * grad_y g;   z_{t+1} = z_t - inner_lr * (J' v + H z_t)
        s = <grad_x f, v> + <grad_y f, z_T>;   h = mean over directions of s * (v, z_0)

    s is the slope of f(x, y_T) along the direction, so the mean of h is the hypergradient of
    ITD, for the context and for the start.

    Args:
        num_directions: b, >= 1.
        directions: "rademacher", entries +1 or -1, or "normal".

    Cost: T gradients, b T directional derivatives of grad_y g, 1 outer gradient.
    Memory: b vectors like (x, y), independent of T.
    Breaks: E|h - E h|^2 / |E h|^2 = (d - 1) / b, or (d + 1) / b with "normal", d being the size
    of context and start together: for a context of many numbers (features) noise rules.
    Source: Shen, Wang, Yang, Li, Wang, Zhang, Scarlett, Zhu, Kawaguchi, "Memory-Efficient Gradient
    Unrolling for Large-Scale Bi-level Optimization", NeurIPS 2024. Differs from it in: the
    start of adaptation counts as part of the direction, where the paper has x alone.
    """

    card = Card(
        title="Forward gradient unrolling with forward gradient",
        source="Shen et al., NeurIPS 2024",
        problems="any, finite inner loop",
        cost="T G + F + b T directional derivatives",
        state="y",
        use="few outer numbers, long inner loops, no room for iterates",
    )

    num_directions: int = 8
    directions: Literal["rademacher", "normal"] = "rademacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("num_directions", self.num_directions, 1)
        check_choice("directions", self.directions, ("rademacher", "normal"))

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = state.inner
        directions = [
            random_pair(oracle, context, y, self.directions) for _ in range(self.num_directions)
        ]
        tangents = [z for _, z in directions]
        for _ in range(self.inner_steps):
            draw = oracle.draw_inner()
            tangents = [
                add(z, oracle.directional(context, y, v, z, draw), -self.inner_lr)
                for (v, _), z in zip(directions, tangents, strict=True)
            ]
            y = self.next_inner(oracle, context, y, draw)
        direct, right = oracle.outer_grads(context, y, oracle.draw_outer())
        h, start_gradient = zeros_like(context), zeros_like(y)
        for (v, z_0), z in zip(directions, tangents, strict=True):
            slope = (dot(direct, v) + dot(right, z)) / self.num_directions
            h, start_gradient = add(h, scale(v, slope)), add(start_gradient, scale(z_0, slope))
        return Estimate(h, start_gradient, InnerState(y), {})


def random_pair(
    oracle: Oracle, x: Params, y: Params, kind: Literal["normal", "rademacher"]
) -> tuple[Params, Params]:
    """Random directions shaped like the context x and like the start of adaptation y."""
    both = {CONTEXT + name: leaf for name, leaf in x.items()}
    both |= {START + name: leaf for name, leaf in y.items()}
    drawn = oracle.random_like(both, kind)
    return {name: drawn[CONTEXT + name] for name in x}, {name: drawn[START + name] for name in y}
