"""IAPTT-GM: differentiate the inner loop up to where f is worst, and learn where it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY
from metadist.algorithms.parts.through import DescentThrough, Trace, pull
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.step_rules import Memory
from metadist.trees import Params, add, tree_map, zeros_like


class IAPTTState(NamedTuple):
    """The end of the inner loop, and z, where the next one starts."""

    inner: Params
    start: Params
    memory: Any = NO_MEMORY


class Trajectory(NamedTuple):
    """The inner loop of one outer step.

    Args:
        end: y_T.
        worst: The y_t where f is largest.
        length: Its t, a number in a tensor of shape ().
        memory: That of the rule after the last step.
        traces: (step t, draw of its gradient), t = 0 .. T-1.
        draw: That of f, the same for all t.
    """

    end: Params
    worst: Params
    length: Tensor
    memory: Memory
    traces: list[tuple[Trace, Draw]]
    draw: Draw


@dataclass(frozen=True)
class IAPTT(DescentThrough):
    """Initialization auxiliary and pessimistic trajectory truncated gradient method (IAPTT-GM).

        y_0 = z;    y_{t+1} = y_t - inner_lr g_y(x, y_t);    s = argmax over t = 1 .. T of f(x, y_t)
        h = d f(x, y_s) / dx,    z <- z - start_lr d f(x, y_s) / dz

    max_t f(x, y_t) bounds f at the end of the loop from above and is a better surrogate of a
    non-convex lower problem; z, descended like x, chooses the basin of g that is good for f. With
    kept states z is a part of the state. On new tasks z is where adaptation starts, which the
    outer optimiser trains, and start_lr acts on nothing. Where f falls along the loop s = 1 and h
    sees one step; where it rises to the end it is ITD.

    Args:
        start_lr: The step size of z in a kept state, > 0.

    Family: Through the inner loop.
    For: non-convex, smooth, finite inner loop.
    Cost: T (G + H + J) + T values of f + F. All T products are made, whatever s is: those beyond
    it are dropped, since no step may depend on data.
    State: y, z.
    Memory: T iterates and, as far as `Compute.graph_budget` goes, their graphs.
    Use: lower problems with several local minima, tasks whose states are kept.
    Breaks: on a new task whose start is worse for f than the end: truncation then keeps few steps,
    and x learns from a y that is hardly adapted. With few steps z fits f by itself, and y_T is no
    solution of the lower problem.
    Source: Liu, Liu, Zeng, Zhang, "Towards Gradient-based Bilevel Optimization with Non-convex
    Followers and Beyond", NeurIPS 2021.
    Differs: z is stepped by plain gradient descent, without projection; s is chosen and f
    differentiated on one draw of the query set.
    """

    inner_steps: int = rule(5, ge=1)
    start_lr: float = rule(0.1, gt=0)

    @property
    def kept_options(self) -> dict[str, str]:
        return {"start_lr": ""}

    def init(self, oracle: Oracle, context: Params, inner: Params) -> IAPTTState:
        return IAPTTState(inner, inner, self.new_memory(inner))

    def estimate(self, oracle: Oracle, context: Params, state: IAPTTState) -> Estimate:
        steps, rate = self.step_rule, self.step_rule.lr_at(oracle.step)
        memory = state.memory or steps.start(state.start)
        path = self._trajectory(oracle, context, state.start, memory, oracle.kept_grad)
        h, w = oracle.outer_grads(context, path.worst, path.draw)
        w_means = tuple(map(zeros_like, path.memory.means))
        for t in reversed(range(self.inner_steps)):
            trace, draw = path.traces.pop()
            is_used = t < path.length

            def where_used(new: Tensor, old: Tensor, is_used: Tensor = is_used) -> Tensor:
                return torch.where(is_used, new, old)

            back, means, u = pull(oracle, steps, trace, rate, w, w_means)
            j_u, h_u = oracle.second_order(context, trace.y, u, draw)
            h = tree_map(where_used, add(h, j_u), h)
            w = tree_map(where_used, add(back, h_u), w)
            pairs = zip(means, w_means, strict=True)
            w_means = tuple(tree_map(where_used, new, old) for new, old in pairs)
        return Estimate(
            hypergradient=h,
            start_gradient=w,
            state=IAPTTState(
                inner=path.end,
                start=add(state.start, w, -self.start_lr),
                memory=self.carried(path.memory),
            ),
            metrics={"truncated_at": path.length},
        )

    def unrolled_map(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        memory = self.step_rule.start(inner)
        return self._trajectory(oracle, context, inner, memory, oracle.inner_grad).worst

    def _trajectory(
        self,
        oracle: Oracle,
        context: Params,
        y: Params,
        memory: Memory,
        ask: Callable[[Params, Params, Draw], Params],
    ) -> Trajectory:
        steps, rate = self.step_rule, self.step_rule.lr_at(oracle.step)
        traces: list[tuple[Trace, Draw]] = []
        outer_draw = oracle.draw_outer()
        worst = y
        for t in range(self.inner_steps):
            draw = oracle.draw_inner()
            trace = Trace(y, memory, ask(context, y, draw))
            traces.append((trace.kept_for(steps), draw))
            y, memory = steps.step(*trace, rate)
            value = oracle.outer_value(context, y, outer_draw)
            if t == 0:
                worst, largest, length = y, value, torch.ones_like(value)
                continue
            # NaN counts as the largest, so that a loop that diverges is not taken for a short one.
            is_worse = ~(value <= largest)
            worst = tree_map(lambda new, old: torch.where(is_worse, new, old), y, worst)  # noqa: B023
            largest = torch.where(is_worse, value, largest)
            length = torch.where(is_worse, t + 1.0, length)
        return Trajectory(
            end=y, worst=worst, length=length, memory=memory, traces=traces, draw=outer_draw
        )
