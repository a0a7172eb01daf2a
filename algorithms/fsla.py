"""FSLA: a fully single loop, with recursive momentum on the hypergradient alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import AdjointLoop
from metadist.algorithms.parts.inner import NO_MEMORY
from metadist.algorithms.parts.linear import relative_residual
from metadist.algorithms.parts.recursion import falling_weight, recursion
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, sub, zeros_like


class FSLAState(NamedTuple):
    """y, v, the context of the last estimate, its w (like x), the number of estimates."""

    inner: Params
    adjoint: Params
    previous_context: Params
    outer_direction: Params
    age: int
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class FSLA(AdjointLoop):
    """Fully single-loop algorithm (FSLA).

        y+ = y - inner_lr g_y(x, y)
        v+ = v - adjoint_lr (H(x, y+) v - f_y(x, y+))
        d(x, y, v) = f_x(x, y) - J(x, y) v
        w = d(x, y+, v+) + (1 - a_k) (w_old - d(x_old, y, v)),    x steps along w

    Both d on the same two draws, everything else on draws of its own. a_0 = 1, then
    a_k = min(1, outer_weight k^-weight_decay), k being the age of the state; on new tasks w lives
    where x does, over the tasks of an outer step (see `recursive_weight`).

    Falling rates: inner_optimizer=SGD(lr, schedule="power", exponent=0.5), adjoint_decay=0.5,
    weight_decay=0.5, and for x OuterOptimizer("sgd", schedule="power", schedule_power=0.5).

    Args:
        outer_weight: eta of the paper, the factor of a_k, > 0; 1 with weight_decay=0 means no
            momentum.
        weight_decay: The exponent of a_k, in [0, 1].

    Family: Stochastic.
    For: strongly convex, mini-batches.
    Cost: T (G + F + H) + 2 (F + J).
    State: y, v, w, previous x.
    Memory: the state, 2 vectors like y and 2 like x.
    Use: as SOBA, with less noise in x.
    Breaks: as SOBA: outer_lr must be well below inner_lr and adjoint_lr, and v starts at 0; as
    MRBO where x jumps between steps.
    Source: Li, Gu, Huang, "A Fully Single Loop Algorithm for Bilevel Optimization without Hessian
    Inverse", AAAI 2022. In the form of the public benchmark of bilevel solvers.
    Differs: a_k has a rate and an exponent of its own, where in the benchmark's code it shares the
    step size's; inner_steps > 1 moves y and v several times at one x.
    """

    outer_weight: float = rule(0.5, gt=0)
    weight_decay: float = rule(0.0, ge=0, le=1)

    @property
    def tolerates_staleness(self) -> bool:
        return True

    @property
    def kept_options(self) -> dict[str, str]:
        return {}  # h has the v from after the step

    def recursive_weight(self, step: int) -> float:
        return falling_weight(self.outer_weight, self.weight_decay, step)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> FSLAState:
        zero_x = zeros_like(context)
        return FSLAState(
            inner=inner,
            adjoint=zeros_like(inner),
            previous_context=zero_x,
            outer_direction=zero_x,
            age=0,
            memory=self.new_memory(inner),
        )

    def estimate(self, oracle: Oracle, context: Params, state: FSLAState) -> Estimate:
        moved: FSLAState = super().estimate(oracle, context, state).state
        draws = oracle.draw_outer(), oracle.draw_inner()
        w, metrics = direction(oracle, context, moved.inner, moved.adjoint, *draws)
        if state.age:
            old, _ = direction(oracle, state.previous_context, state.inner, state.adjoint, *draws)
            w = recursion(w, old, state.outer_direction, self.recursive_weight(state.age))
        return Estimate(
            hypergradient=w,
            start_gradient=None,
            state=moved._replace(previous_context=context, outer_direction=w, age=state.age + 1),
            metrics=metrics,
        )

    def move(self, oracle: Oracle, context: Params, state: FSLAState) -> Estimate:
        g_y = oracle.inner_grad(context, state.inner, oracle.draw_inner())
        y, memory = self.step_inner(oracle, state.inner, state.memory, g_y)
        h_v = oracle.hvp(context, y, state.adjoint, oracle.draw_inner())
        _, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        v = self.step_adjoint(oracle, state.adjoint, h_v, f_y)
        moved = state._replace(inner=y, adjoint=v, memory=memory)
        return Estimate(
            hypergradient=state.outer_direction, start_gradient=None, state=moved, metrics={}
        )


def direction(
    oracle: Oracle, context: Params, y: Params, v: Params, outer_draw: Draw, cross_draw: Draw
) -> tuple[Params, dict[str, Tensor]]:
    """(d(x, y, v), the relative residual of v, which H v beside J v gives, where it is read)."""
    f_x, f_y = oracle.outer_grads(context, y, outer_draw)
    if not oracle.reports:
        return sub(f_x, oracle.cross(context, y, v, cross_draw)), {}
    j_v, h_v = oracle.second_order(context, y, v, cross_draw)
    return sub(f_x, j_v), {"adjoint_residual": relative_residual(h_v, f_y)}
