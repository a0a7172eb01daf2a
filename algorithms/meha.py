"""MEHA: single loop, first derivatives only, the lower problem replaced by its Moreau envelope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY, SingleLoop, decayed
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.problem import Problem, is_nonsmooth
from metadist.step_rules import SGD
from metadist.task import Task
from metadist.trees import Params, add, norm, sub


class MEHAState(NamedTuple):
    """y, the estimate theta of its proximal point, and the outer step of the last move (or -1).

    `memory` is that of both.
    """

    inner: Params
    proximal_point: Params
    moved_at: int
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class MEHA(SingleLoop):
    """Moreau Envelope based Hessian-free Algorithm (MEHA).

    The lower problem becomes the constraint  g + r - v(x, y) <= 0  with the envelope
    v(x, y) = min_theta (g + r)(x, theta) + |theta - y|^2 / (2 gamma), where r is the non-smooth
    part of the lower objective (`Problem.nonsmooth_loss` and `prox_inner`):

        theta <- prox_r(theta - inner_lr (g_y(x, theta) + (theta - y) / gamma))
        h = f_x(x, y) / c_k + (g + r)_x(x, y) - (g + r)_x(x, theta)
        y <- prox_r(y - y_lr (f_y / c_k + g_y - (y - theta) / gamma)),  at the NEXT x

    with c_k = c (k+1)^c_power. y's step needs the x that h leads to, so it is made at the
    beginning of the next move. Several moves (`inner_steps`) can be made at one x. h is an estimate
    of the hypergradient divided by c_k.

    Args:
        y_lr: beta, the step size of y, > 0; `inner_lr` is theta's and that of `adapt`, the
            proximal gradient method on g + r. One `inner_optimizer` moves both, each with a
            memory of its own, y with y_lr for its rate.
        gamma: The parameter of the envelope, > 0; below 1 / (2 rho) where g + r is
            rho-weakly convex.
        c: The weight that divides f, > 0; large beside |f_y| over the curvature of g.
        c_power: p, in [0, 0.5).

    Family: First derivatives of g.
    For: non-convex; a non-smooth part with a prox (lasso).
    Cost: T x (4 G + 2 Gx + 2 F). Per move theta's G, two joint gradients of g and F for h, G and F
    of y at the next x (the oracle's gradients of f are joint, the method uses one half of each).
    State: y, theta.
    Memory: two more y.
    Use: non-smooth lower problems; no second derivatives.
    Breaks: on a new task with inner_steps = 1: f_y does not enter h yet, which can point away
    from the hypergradient; set inner_steps to 10 or more, or keep states. Where theta = y, as both
    are 0 under a large l1 weight, h has no lower part. The bias of the end point is O(1 / c_k).
    Refused below float32, whose rounding is larger than the differences.
    Source: Liu, Liu, Yao, Zeng, Zhang, "Moreau Envelope for Nonconvex Bi-Level Optimization: A
    Single-loop and Hessian-free Solution Strategy", ICML 2024. Order and division by c_k are
    those of the same group's code for the non-smooth case.
    Differs: the official PyTorch code multiplies f by the growing c_k, which ends at the minimiser
    of f alone; here c_k divides f. theta is kept from step to step, where the non-smooth toy resets
    it; thresholds of the prox are the step times the weight.
    """

    takes_second_derivatives = False
    takes_prox = True

    y_lr: float = rule(0.1, gt=0)
    gamma: float = rule(1.0, gt=0)
    c: float = rule(10.0, gt=0)
    c_power: float = rule(0.25, ge=0, lt=0.5)

    @property
    def tolerates_staleness(self) -> bool:
        return True

    @property
    def kept_options(self) -> dict[str, str]:
        return dict.fromkeys(("y_lr", "gamma"), "inner_steps") if self.inner_steps == 1 else {}

    def init(self, oracle: Oracle, context: Params, inner: Params) -> MEHAState:
        return MEHAState(
            inner=inner, proximal_point=inner, moved_at=-1, memory=self.new_memory(inner, 2)
        )

    def check(self, problem: Problem, outer: Params, task: Task, some: Task | None = None) -> None:
        steps = self.step_rule
        is_gradient_step = isinstance(steps, SGD) and not steps.momentum and steps.clip_norm is None
        if is_nonsmooth(problem) and not is_gradient_step:
            raise ValueError(
                f"inner_optimizer must be SGD without momentum and clip_norm in MEHA where the "
                f"inner loss has a non-smooth part, got {steps!r}: with any other step the prox "
                "stops at a point that is no solution"
            )

    def move(self, oracle: Oracle, context: Params, state: MEHAState) -> Estimate:
        y, theta = state.inner, state.proximal_point
        y_memory, theta_memory = state.memory or (NO_MEMORY, NO_MEMORY)
        if state.moved_at >= 0:
            y, y_memory = self._move_y(oracle, context, state, y_memory)
        g_y = oracle.inner_grad(context, theta, oracle.draw_inner())
        towards_y = add(g_y, sub(theta, y), 1 / self.gamma)
        rate = self.step_rule.lr_at(oracle.step)
        theta, theta_memory = self._prox_step(oracle, context, theta, theta_memory, towards_y, rate)

        draw = oracle.draw_inner()  # one for both, so that noise cancels in the difference
        at_y = self._lower_x(oracle, context, y, draw)
        at_theta = self._lower_x(oracle, context, theta, draw)
        f_x, _ = oracle.outer_grads(context, y, oracle.draw_outer())
        return Estimate(
            hypergradient=add(sub(at_y, at_theta), f_x, 1 / self._weight(oracle.step)),
            start_gradient=None,
            state=MEHAState(
                inner=y,
                proximal_point=theta,
                moved_at=oracle.step,
                memory=(y_memory, theta_memory),
            ),
            metrics={"envelope_gap": norm(sub(y, theta)) / self.gamma},
        )

    def _move_y(
        self, oracle: Oracle, context: Params, state: MEHAState, memory: Any
    ) -> tuple[Params, Any]:
        """y after the step that the last move left for the x it led to, with that move's rates."""
        y = state.inner
        _, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        g_y = oracle.inner_grad(context, y, oracle.draw_inner())
        direction = add(g_y, sub(y, state.proximal_point), -1 / self.gamma)
        direction = add(direction, f_y, 1 / self._weight(state.moved_at))
        rate = self.step_rule.with_lr(self.y_lr).lr_at(state.moved_at)
        return self._prox_step(oracle, context, y, memory, direction, rate)

    def _lower_x(self, oracle: Oracle, context: Params, y: Params, draw: Draw) -> Params:
        """The gradient of g + r in x."""
        g_x = oracle.inner_grad_x(context, y, draw)
        return add(g_x, oracle.nonsmooth_grad(context, y))

    def _prox_step(
        self,
        oracle: Oracle,
        context: Params,
        y: Params,
        memory: Any,
        direction: Params,
        rate: float,
    ) -> tuple[Params, Any]:
        moved, memory = self.step_inner(oracle, y, memory, direction, rate)
        return oracle.prox_inner(context, moved, rate), memory

    def _weight(self, step: int) -> float:
        return decayed(self.c, -self.c_power, step)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        memory: Any = NO_MEMORY
        rate = self.step_rule.lr
        for _ in range(self.inner_steps):
            g_y = oracle.inner_grad(context, inner, oracle.draw_inner())
            inner, memory = self._prox_step(oracle, context, inner, memory, g_y, rate)
        return inner
