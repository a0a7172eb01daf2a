"""BOME: first derivatives only, y held near the lower solution by a dynamic barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.parts.inner import (
    InnerLoop,
    check_at_least,
    check_choice,
    check_positive,
    decayed,
    repeat,
)
from metadist.oracle import Oracle
from metadist.problem import Problem
from metadist.task import Task
from metadist.trees import Params, add, dot, norm, sub, tree_map


@dataclass(frozen=True)
class BOME(InnerLoop):
    """BOME: the barrier method on the value-function constraint q(x, y) <= 0.

        y_T = inner_steps of SGD on g from y;    q(x, y) = g(x, y) - g(x, y_T),  y_T constant
        lam = max(0, (phi - <grad f, grad q>) / (|grad q|^2 + epsilon)),   grad = (d/dx, d/dy)
        y <- y - y_lr * (grad_y f + lam * grad_y q);    h = grad_x f + lam * grad_x q

    x and y are moved by one combined direction, along which q falls at a rate of phi at least. At
    one x, many `rounds` end where f + lam * g is stationary in y: h has the bias of a finite lam.

    Args:
        y_lr: xi, the step size of y, > 0; `inner_decay` applies to it too.
        eta: how fast q must fall, > 0.
        phi: "gradient": eta * |grad q|^2, "value": eta * q.
        epsilon: added to |grad q|^2, which is 0 at the lower solution; > 0. Where |grad q|^2 is
            below it the barrier acts no more: the smaller, the nearer x can come to a solution.
        rounds: moves of y (each with its own y_T) at one x, >= 1; the paper has 1.

    Cost: per round T G + F + 2 (G + Gx); two values of g with phi="value".
    Memory: one more y.
    Breaks: on a new task with rounds = 1: grad_y f has moved no y yet, so h can point away from
    the hypergradient; give it `rounds`, or keep states. A fixed y_lr leaves a gap q > 0 of
    order y_lr^2. Refused where g is flat in y.
    Source: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple
    First-Order Approach", NeurIPS 2022, algorithm 1. Differs from the official code in: x is
    stepped by the outer optimiser; no momentum on the step of y.
    """

    card = Card(
        title="Bilevel Optimization Made Easy (BOME)",
        source="Liu, Ye, Wright, Stone, Liu, NeurIPS 2022",
        problems="non-convex or with many minima, Polyak-Lojasiewicz; smooth",
        cost="rounds x (T G + F + 2 G + 2 Gx)",
        state="y",
        use="no second derivatives, several lower solutions; tasks whose states are kept",
    )

    y_lr: float = 0.1
    eta: float = 0.5
    phi: Literal["gradient", "value"] = "gradient"
    epsilon: float = 1e-8
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("y_lr", self.y_lr)
        check_positive("eta", self.eta)
        check_choice("phi", self.phi, ("gradient", "value"))
        check_positive("epsilon", self.epsilon)
        check_at_least("rounds", self.rounds, 1)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        return repeat(self._move, self.rounds, oracle, context, state)

    def _move(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = state.inner
        y_T = self.descend(oracle, context, y)
        draw = oracle.draw_inner()  # one for both: q is a difference
        g_x, q_y = oracle.inner_grads(context, y, draw)
        q_x = sub(g_x, oracle.inner_grads(context, y_T, draw)[0])
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        square = dot(q_x, q_x) + dot(q_y, q_y)
        if self.phi == "gradient":
            phi = self.eta * square
        else:
            gap = oracle.inner_value(context, y, draw) - oracle.inner_value(context, y_T, draw)
            phi = self.eta * gap
        slope = dot(f_x, q_x) + dot(f_y, q_y)
        lam = ((phi - slope) / (square + self.epsilon)).relu()
        rate = decayed(self.y_lr, self.inner_decay, oracle.step)
        moved = add(y, add(f_y, q_y, lam), -rate)
        metrics = {"lam": lam, "inner_gradient_norm": norm(q_y)}
        return Estimate(add(f_x, q_x, lam), None, InnerState(moved), metrics)

    def check(self, problem: Problem, outer: Params, task: Task) -> None:
        context, start = problem.encode(outer, task), problem.init_inner(outer, task)
        random = torch.Generator().manual_seed(0)

        def perturb(leaf: Tensor) -> Tensor:
            return leaf + torch.randn(leaf.shape, generator=random).to(leaf)

        gradient = grad(problem.inner_loss, argnums=1)
        points = (start, tree_map(perturb, start))
        if not any(norm(gradient(context, y, task.support)) > 0 for y in points):
            raise ValueError(
                "algorithm BOME needs an inner loss that depends on the inner variable, but its "
                "gradient is zero at the start of adaptation and at a point beside it: nothing "
                "would hold y near a lower solution, and the barrier would divide 0 by 0"
            )
