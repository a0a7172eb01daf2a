"""BDA: the inner loop descends on both levels, and is differentiated as it ran."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.inner import decayed
from metadist.algorithms.parts.through import DescentThrough, Trace, pull
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, add, scale, zeros_like


@dataclass(frozen=True)
class BDA(DescentThrough):
    """Bilevel descent aggregation (BDA).

        y_{t+1} = y_t - (1 - a_t) inner_lr g_y(x, y_t) - a_t y_lr f_y(x, y_t),   t = 0 .. T-1
        h = d f(x, y_T) / d (x, start),  backwards from w = f_y, h = f_x, with
            u = -(1 - a_t) inner_lr w,   e = -a_t y_lr w:
            h += J u + J_f e;   w += H u + H_f e

    where a_t = alpha (t+1)^-alpha_decay, and H_f = d2f/dy2, J_f = d2f/dxdy. Among the minimisers
    of g the steps along f_y lead to one that is good for f, and a_t falls, so that g decides in
    the end. With alpha = 0 it is ITD.

    Args:
        y_lr: The step size of y along f_y, > 0. None: that along g_y. Its ratio to that one is the
            weight of f_y in the gradient that `inner_optimizer` gets.
        alpha: The share of f in the first step, in [0, 1).
        alpha_decay: The exponent of its fall over the inner steps, in [0, 1].

    Family: Through the inner loop.
    For: convex, smooth, with many minima.
    Cost: T (G + F + H + J + H_f + J_f) + F. The last two, second derivatives of f, cost as much as
    H and J on the query set.
    State: y.
    Memory: T iterates and, as far as `Compute.graph_budget` goes, the graphs of g_y.
    Use: lower problems with several solutions, of which the one that is best for f is meant.
    Breaks: f must be twice differentiable. On a strongly convex g it has a bias that falls with
    a_T: y_T is not the solution, and h not its hypergradient. The y of training has seen the query
    set, so metrics of training are not those of evaluation, which adapts on g alone.
    Source: Liu, Mu, Yuan, Zeng, Zhang, "A Generic First-Order Algorithmic Framework for Bi-Level
    Programming Beyond Lower-Level Singleton", ICML 2020.
    Differs: in the official code f alone falls, by 0.9^t, and g keeps the share 1 - alpha; here
    both shares add up to 1, as in the paper. The library BOAT gives the same name, GDA, to any loss
    of y that the user writes. Sets of constraints for y are left out.
    """

    inner_steps: int = rule(5, ge=1)
    y_lr: float | None = rule(None, gt=0, none="for inner_lr")
    alpha: float = rule(0.5, ge=0, lt=1)
    alpha_decay: float = rule(1.0, ge=0, le=1)

    def weights(self, t: int) -> tuple[float, float]:
        """Those of g_y and f_y in the direction of inner step t."""
        share = decayed(self.alpha, self.alpha_decay, t)
        return 1 - share, share if self.y_lr is None else share * self.y_lr / self.step_rule.lr

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        steps, rate = self.step_rule, self.step_rule.lr_at(oracle.step)
        traces: list[tuple[Trace, Draw, Draw]] = []
        y, memory = state.inner, state.memory or steps.start(state.inner)
        for t in range(self.inner_steps):
            draws = oracle.draw_inner(), oracle.draw_outer()
            g_y = oracle.kept_grad(context, y, draws[0])
            trace = Trace(y, memory, self._direction(oracle, context, y, g_y, draws[1], t))
            traces.append((trace.kept_for(steps), *draws))
            y, memory = steps.step(*trace, rate)
        h, w = oracle.outer_grads(context, y, oracle.draw_outer())
        w_means = tuple(map(zeros_like, memory.means))
        for t in reversed(range(self.inner_steps)):
            lower, upper = self.weights(t)
            trace, inner_draw, outer_draw = traces.pop()
            w, w_means, u = pull(oracle, steps, trace, rate, w, w_means)
            j_u, h_u = oracle.second_order(context, trace.y, u, inner_draw)
            h, w = add(h, j_u, lower), add(w, h_u, lower)
            if upper:
                j_u, h_u = oracle.outer_second_order(context, trace.y, u, outer_draw)
                h, w = add(h, j_u, upper), add(w, h_u, upper)
        return Estimate(
            hypergradient=h,
            start_gradient=w,
            state=InnerState(y, self.carried(memory)),
            metrics={},
        )

    def unrolled_map(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        steps, memory = self.step_rule, self.step_rule.start(inner)
        for t in range(self.inner_steps):
            g_y = oracle.inner_grad(context, inner, oracle.draw_inner())
            along = self._direction(oracle, context, inner, g_y, oracle.draw_outer(), t)
            inner, memory = steps.step(inner, memory, along, steps.lr_at(oracle.step))
        return inner

    def _direction(
        self, oracle: Oracle, context: Params, y: Params, g_y: Params, outer_draw: Draw, t: int
    ) -> Params:
        lower, upper = self.weights(t)
        if not upper:
            return g_y
        _, f_y = oracle.outer_grads(context, y, outer_draw)
        return add(scale(g_y, lower), f_y, upper)
