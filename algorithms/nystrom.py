"""Nystrom: implicit differentiation with H from a few of its columns."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.implicit import hessian, implicit_gradient
from metadist.algorithms.parts.inner import InnerLoop
from metadist.algorithms.parts.linear import LOOKS_AT_EIGENVALUES, nystrom
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, num_elements


@dataclass(frozen=True)
class Nystrom(InnerLoop):
    """Nystrom hypergradient.

        C = `rank` columns of H, drawn without replacement;   M = their rows at the same places
        v = (C' M^+ C + damping I)^-1 b,   b = f_y
          = b/damping - C' (M + C C'/damping)^-1 C b / damping^2
        h = f_x - J v

    The inverse of a low-rank approximation of H, in closed form. No iteration, so nothing
    diverges: |v| <= |f_y| / damping. All tasks of an outer step have the same columns, new ones
    at every step.

    Args:
        rank: k >= 1, columns of H; with as many as y has elements v = (H + damping I)^-1 b.
        damping: rho > 0, a trust region: outside the span of the columns v is b / rho.

    Family: Implicit differentiation.
    For: H of low rank plus little, damped.
    Cost: T G + F + k H + J.
    State: y.
    Memory: k vectors like y, in float64.
    Use: ill-conditioned H of low rank, where iterations need many steps.
    Breaks: if H has many more than `rank` eigenvalues above `damping`. Of an indefinite M the
    negative part is left out (`negative_curvature` is 1).
    Source: Hataya, Yamada, "Nystrom Method for Accurate and Scalable Implicit Differentiation",
    AISTATS 2023. The second formula for v, and k = 5, rho = 0.1, are those of its code.
    Differs: v goes through M^(-1/2) in float64, where the official code inverts M + C C'/damping,
    which can be singular; the negative part of an indefinite M, common with ReLU networks, is
    left out and reported.
    """

    no_graph = LOOKS_AT_EIGENVALUES

    rank: int = rule(5, ge=1)
    damping: float = rule(0.1, gt=0)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        columns = choose(oracle, self.rank, num_elements(y))
        product = hessian(oracle, context, y, oracle.draw_inner())
        v, metrics = nystrom(product, f_y, columns, self.damping)
        h, residual = implicit_gradient(oracle, context, y, v, f_x, f_y, self.damping)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=InnerState(y, memory),
            metrics={**metrics, **residual},
        )


def choose(oracle: Oracle, count: int, size: int) -> list[int]:
    """At most `count` different integers below `size`, the same for all tasks of a step."""
    swapped: dict[int, int] = {}
    chosen = []
    # The first steps of Fisher and Yates' shuffle, keeping only the places that changed.
    for last in range(size - 1, size - 1 - min(count, size), -1):
        place = int(oracle.uniform() * (last + 1))
        chosen.append(swapped.get(place, place))
        swapped[place] = swapped.get(last, last)
    return chosen
