"""BOME: first derivatives only, y held near the lower solution by a dynamic barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.inner import InnerLoop, check_first_step
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.problem import Problem, context_of
from metadist.step_rules import SGD
from metadist.task import Task
from metadist.trees import Params, add, dot, norm, sub, tree_map


@dataclass(frozen=True)
class BOME(InnerLoop):
    """Bilevel Optimization Made Easy (BOME).

        y_T = inner_steps of SGD on g from y;    q(x, y) = g(x, y) - g(x, y_T),  y_T constant
        lam = max(0, (phi - <f_x, q_x> - <f_y, q_y>) / (|q_x|^2 + |q_y|^2 + epsilon))
        y <- y - y_lr (f_y + lam q_y);    h = f_x + lam q_x

    The barrier method on the value-function constraint q <= 0. x and y move by one combined
    direction, along which q falls at a rate of phi at least; y is not replaced by y_T. At one x,
    many `rounds` end where f + lam g is stationary in y: h has the bias of a finite lam.

    Args:
        y_lr: xi, the rate of y, > 0, in the place of that of `inner_optimizer`, whose memory of y
            lasts from round to round; each y_T starts anew.
        eta: How fast q must fall, > 0.
        phi: "gradient": eta (|q_x|^2 + |q_y|^2), "value": eta q.
        epsilon: > 0, added to the squared gradient of q, which is 0 at the lower solution. Where
            that square is below it the barrier acts no more: the smaller, the nearer x can come
            to a solution.
        rounds: Moves of y (each with its own y_T) at one x, >= 1; the paper has 1.

    Family: First derivatives of g.
    For: non-convex or with many minima, Polyak-Lojasiewicz; smooth.
    Cost: rounds x (T G + F + 2 G + 2 Gx). Two values of g more with phi="value".
    State: y.
    Memory: one more y.
    Use: no second derivatives, several lower solutions; tasks whose states are kept.
    Breaks: on a new task with rounds = 1: f_y has moved no y yet, so h can point away from
    the hypergradient; set more `rounds`, or keep states. A fixed y_lr leaves a gap q > 0 of
    order y_lr^2. Refused where g is flat in y, and below float32, whose rounding is larger than
    the differences.
    Source: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple
    First-Order Approach", NeurIPS 2022, algorithm 1.
    Differs: x is stepped by the outer optimiser, so its rate is separate; the official code has
    momentum on the step of y; `rounds` is an addition.
    """

    takes_second_derivatives = False

    y_lr: float = rule(0.1, gt=0)
    eta: float = rule(0.5, gt=0)
    phi: Literal["gradient", "value"] = rule("gradient", one_of=("gradient", "value"))
    epsilon: float = rule(1e-8, gt=0)
    rounds: int = rule(1, ge=1)

    def _check_first_step(self) -> None:
        super()._check_first_step()
        if not isinstance(self.step_rule, SGD):
            check_first_step("rounds", self.rounds, self.step_rule)

    @property
    def kept_options(self) -> dict[str, str]:
        return {"y_lr": "rounds"} if self.rounds == 1 else {}

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        return self.repeat(self._move, self.rounds, oracle, context, state)

    def _move(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = state.inner
        y_T, _ = self.descend(oracle, context, y)
        draw = oracle.draw_inner()  # one for both: q is a difference
        g_x, g_y = oracle.inner_grads(context, y, draw)
        g_x_at_y_T = oracle.inner_grad_x(context, y_T, draw)
        q_x, q_y = sub(g_x, g_x_at_y_T), g_y  # y_T is a constant, so it adds nothing to q_y
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())

        square = dot(q_x, q_x) + dot(q_y, q_y)
        if self.phi == "gradient":
            phi = self.eta * square
        else:
            gap = oracle.inner_value(context, y, draw) - oracle.inner_value(context, y_T, draw)
            phi = self.eta * gap
        slope = dot(f_x, q_x) + dot(f_y, q_y)
        lam = ((phi - slope) / (square + self.epsilon)).relu()
        rate = self.step_rule.with_lr(self.y_lr).lr_at(oracle.step)
        y, memory = self.step_inner(oracle, y, state.memory, add(f_y, q_y, lam), rate)
        return Estimate(
            hypergradient=add(f_x, q_x, lam),
            start_gradient=None,
            state=InnerState(y, memory),
            metrics={"lam": lam, "inner_gradient_norm": norm(q_y)},
        )

    def check(self, problem: Problem, outer: Params, task: Task, some: Task | None = None) -> None:
        context, start = context_of(problem, outer, task), problem.init_inner(outer, task)
        random = torch.Generator().manual_seed(0)

        def perturb(leaf: Tensor) -> Tensor:
            return leaf + torch.randn(leaf.shape, generator=random).to(leaf)

        gradient = grad(problem.inner_loss, argnums=1)
        points = (start, tree_map(perturb, start))
        if not any(norm(gradient(context, y, (some or task).support)) > 0 for y in points):
            raise ValueError(
                "algorithm BOME needs an inner loss that depends on the inner variable, but its "
                "gradient is zero at the start of adaptation and at a point beside it: nothing "
                "would hold y near a lower solution, and the barrier would divide 0 by 0"
            )
