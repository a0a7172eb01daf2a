"""SRBA: SOBA with recursive differences, restarted from the whole sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import AdjointLoop
from metadist.algorithms.parts.inner import NO_MEMORY
from metadist.algorithms.parts.linear import relative_residual
from metadist.algorithms.parts.neumann import Sample, average
from metadist.algorithms.parts.recursion import RECURSION_ALONE, recursion
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, norm, sub, zeros_like


class Directions(NamedTuple):
    """Those of y, v and x."""

    inner: Params
    adjoint: Params
    outer: Params


class SRBAState(NamedTuple):
    """y and v; the point at which the directions were last evaluated; steps so far."""

    inner: Params
    adjoint: Params
    directions: Directions
    previous_context: Params
    previous_inner: Params
    previous_adjoint: Params
    age: int
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class SRBA(AdjointLoop):
    """Stochastic recursive bilevel algorithm (SRBA).

        d = (g_y, H v - f_y, f_x - J v)(x, y, v),  SOBA's directions
        D <- d on the whole sets, every `period` steps;  else  D += d - d(previous x, y, v)
        y <- y - inner_lr D_y;    v <- v - adjoint_lr D_v;    h = D_x

    SARAH's recursion in the place of each of SOBA's directions. Both d of a difference are on the
    same draws, so that noise cancels as steps get short, and constant rates converge. All steps
    are at the same (x, y, v), h with the old v.

    Args:
        period: Steps from one pass over the whole sets to the next, >= 1; about as many as a set
            has mini-batches. The first step of a state is such a pass.

    Family: Stochastic.
    For: strongly convex, finite sums.
    Cost: 2 T (G + F + H + J). Every `period`-th step is a pass over both sets instead.
    State: y, v, three directions, previous x, y and v.
    Memory: the state, 6 vectors like y and 2 like x.
    Use: kept states and mini-batches: converges with constant rates, without the tables of SABA.
    Breaks: as SOBA, and where x jumps between steps (large rates, Adam), the differences carry
    more noise than they cancel, which lives until the next pass.
    Source: Dagréou, Moreau, Vaiter, Ablin, "A Lower Bound and a Near-Optimal Algorithm for Bilevel
    Empirical Risk Minimization", AISTATS 2024, and the authors' benchmark of bilevel solvers.
    Differs: the sign of v; v is not projected on a ball, as in the benchmark's code and unlike the
    paper; inner_steps > 1 moves y and v several times at one x, for new tasks.
    """

    refuses_memory = RECURSION_ALONE

    period: int = rule(10, ge=1)

    @property
    def kept_options(self) -> dict[str, str]:
        # A new task begins with a whole pass, and may end before the next one.
        period = {} if self.inner_steps > self.period else {"period": "inner_steps"}
        return period | super().kept_options

    def init(self, oracle: Oracle, context: Params, inner: Params) -> SRBAState:
        zero_x, zero_y = zeros_like(context), zeros_like(inner)
        return SRBAState(
            inner=inner,
            adjoint=zero_y,
            directions=Directions(zero_y, zero_y, zero_x),
            previous_context=zero_x,
            previous_inner=zero_y,
            previous_adjoint=zero_y,
            age=0,
        )

    def move(self, oracle: Oracle, context: Params, state: SRBAState) -> Estimate:
        y, v = state.inner, state.adjoint
        if state.age % self.period == 0:
            samples: tuple[Sample, Sample] = oracle.parts("support"), oracle.parts("query")
            directions, residual = _directions(oracle, context, y, v, *samples)
        else:
            samples = [oracle.draw_inner()], [oracle.draw_outer()]
            new, residual = _directions(oracle, context, y, v, *samples)
            previous = state.previous_context, state.previous_inner, state.previous_adjoint
            old, _ = _directions(oracle, *previous, *samples)
            sums = [
                recursion(*three, 0.0) for three in zip(new, old, state.directions, strict=True)
            ]
            directions = Directions(*sums)
        zero = zeros_like(v)
        moved_y, memory = self.step_inner(oracle, y, state.memory, directions.inner)
        moved = SRBAState(
            inner=moved_y,
            adjoint=self.step_adjoint(oracle, v, directions.adjoint, zero),
            directions=directions,
            previous_context=context,
            previous_inner=y,
            previous_adjoint=v,
            age=state.age + 1,
            memory=memory,
        )
        return Estimate(
            hypergradient=directions.outer,
            start_gradient=None,
            state=moved,
            metrics={"adjoint_residual": residual, "inner_gradient_norm": norm(directions.inner)},
        )


def _directions(
    oracle: Oracle, context: Params, y: Params, v: Params, inner: Sample, outer: Sample
) -> tuple[Directions, Tensor]:
    """((g_y, H v - f_y, f_x - J v), |H v - f_y| / |f_y|), means over the samples."""
    g_y, j_v, h_v = average(
        inner,
        lambda draw: (
            oracle.kept_grad(context, y, draw),
            *oracle.second_order(context, y, v, draw),
        ),
    )
    f_x, f_y = average(outer, lambda draw: oracle.outer_grads(context, y, draw))
    directions = Directions(inner=g_y, adjoint=sub(h_v, f_y), outer=sub(f_x, j_v))
    return directions, relative_residual(h_v, f_y)
