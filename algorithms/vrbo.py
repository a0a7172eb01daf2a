"""VRBO: variance reduction by recursive differences, restarted from the whole sets."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import SingleLoop
from metadist.algorithms.parts.neumann import average, draw_bundle, neumann_estimate, whole_bundle
from metadist.algorithms.parts.recursion import (
    RECURSION_ALONE,
    RecursiveState,
    new_recursive_state,
    recursion,
)
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, norm


@dataclass(frozen=True)
class VRBO(SingleLoop):
    """Variance-reduced bilevel optimiser (VRBO).

    At x_k, for t = 0 .. inner_steps-1, each t on draws of its own:

        u += g_y(x_k, y_t) - g_y(previous point);    y_{t+1} = y_t - inner_lr u
        w += h(x_k, y_t) - h(previous point),        h of StocBiO

    SPIDER on both levels. If k is a multiple of `period`, u and w are then computed anew on the
    whole sets. x steps along w. The previous point is (x_k, y_{t-1}), at t = 0 the last point of
    the step before: so the differences add up without a gap.

    k is the age of the state. A new state starts from u on the whole set, makes its steps and
    ends with w on the whole sets; so on new tasks, where w lives with x, over the tasks of an
    outer step (see `recursive_weight`).

    Args:
        inner_steps: m + 1 of the paper, >= 1.
        adjoint_steps: Q, Hessian products of h, >= 0.
        adjoint_lr: eta of h, > 0; at most 1 / L.
        period: q, steps of x from one pass over the whole sets to the next, >= 1.

    Family: Stochastic.
    For: strongly convex, finite sums.
    Cost: 2T (G + F + Q H + J) + passes over the whole sets. Every `period`-th step costs 2T G and,
    on the whole sets, G + F + Q H + J instead.
    State: y, u, w, previous x and y.
    Memory: the state, 3 vectors like y and 2 like x.
    Use: sets small enough to be passed through now and then.
    Breaks: as MRBO; errors of u and w live until the next restart.
    Source: Yang, Ji, Liang, "Provably Faster Algorithms for Bilevel Optimization", NeurIPS 2021,
    algorithm 2. Here the large batch is the whole sets, in parts of batch_size; w is at the last
    point that y moves from (after a restart at the one it ends at); the first y makes its steps
    too.
    Differs: the previous x is the x before, where in the official code it is a neighbouring block
    of the same x.
    """

    refuses_memory = RECURSION_ALONE

    inner_steps: int = rule(3, ge=1)
    adjoint_steps: int = rule(10, ge=0)
    adjoint_lr: float = rule(0.1, gt=0)
    period: int = rule(10, ge=1)

    def recursive_weight(self, step: int) -> float:
        return 0.0 if step % self.period else 1.0

    def init(self, oracle: Oracle, context: Params, inner: Params) -> RecursiveState:
        return new_recursive_state(context, inner)

    def estimate(self, oracle: Oracle, context: Params, state: RecursiveState) -> Estimate:
        estimate = super().estimate(oracle, context, state)
        moved: RecursiveState = estimate.state
        w, metrics = estimate.hypergradient, estimate.metrics
        if self._restarts(state):
            y = moved.inner
            u = self._whole_gradient(oracle, context, y)
            bundle = whole_bundle(oracle, self.adjoint_steps)
            w, _, metrics = neumann_estimate(oracle, context, y, bundle, self.adjoint_lr)
            moved = moved._replace(
                previous_context=context, previous_inner=y, inner_direction=u, outer_direction=w
            )
        metrics = {**metrics, "inner_gradient_norm": norm(moved.inner_direction)}
        return Estimate(hypergradient=w, start_gradient=None, state=moved, metrics=metrics)

    def move(self, oracle: Oracle, context: Params, state: RecursiveState) -> Estimate:
        y, w, metrics = state.inner, state.outer_direction, {}
        previous = state.previous_context, state.previous_inner
        if state.age == 0:
            u = self._whole_gradient(oracle, context, y)
        else:
            draw = oracle.draw_inner()
            g_y = oracle.inner_grad(context, y, draw)
            u = recursion(g_y, oracle.inner_grad(*previous, draw), state.inner_direction, 0.0)
        # Before a restart w would be thrown away.
        if not self._restarts(state):
            bundle = draw_bundle(oracle, self.adjoint_steps)
            new = neumann_estimate(oracle, context, y, bundle, self.adjoint_lr)
            old = neumann_estimate(oracle, *previous, bundle, self.adjoint_lr)
            w = recursion(new.hypergradient, old.hypergradient, w, 0.0)
            metrics = new.metrics
        moved_y, memory = self.step_inner(oracle, y, state.memory, u)
        moved = RecursiveState(
            inner=moved_y,
            previous_context=context,
            previous_inner=y,
            inner_direction=u,
            outer_direction=w,
            age=state.age + 1,
            memory=memory,
        )
        return Estimate(hypergradient=w, start_gradient=None, state=moved, metrics=metrics)

    def _restarts(self, state: RecursiveState) -> bool:
        return state.age // self.inner_steps % self.period == 0

    def _whole_gradient(self, oracle: Oracle, context: Params, y: Params) -> Params:
        parts = oracle.parts("support")
        (g_y,) = average(parts, lambda draw: (oracle.inner_grad(context, y, draw),))
        return g_y
