"""BVFSM: f plus a penalty on how far g is above its regularised value function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop, check_first_step, decayed
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, add, dot, scale, sub


class BVFSMState(NamedTuple):
    """y of the penalised problem, and z, which follows the minimiser of the regularised g."""

    inner: Params
    lower_solution: Params
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class BVFSM(InnerLoop):
    """Value-function-based sequential minimisation (BVFSM).

        v(x) = min_z g(x, z) + mu/2 |z|^2
        phi(x) = min_y f(x, y) + theta/2 |y|^2 + max(0, g(x, y) - v(x))^2 / (2 sigma)
        h = grad phi(x) = f_x(x, y) + lam (g_x(x, y) - g_x(x, z)),
            lam = max(0, g(x, y) - v(x)) / sigma

    x sees one smooth problem after the other, which come to the bilevel one as sigma, mu and theta
    fall. z makes inner_steps of the inner optimiser, then y y_steps of

        y <- y - y_lr (f_y + theta y + lam g_y) / (1 + lam)

    whose scale keeps them stable where lam is large. Both continue from where they were.

    Args:
        y_steps: Steps of y per outer step, >= 1.
        y_lr: The step size of y, > 0; about 1 / (3 L). `inner_lr` is z's, and that of `adapt`.
            `inner_optimizer` moves both, y with y_lr for its rate.
        sigma: > 0; the smaller, the nearer y is to the minimum of g.
        mu: The weight of |z|^2, >= 0: of several minimisers of g it means the shortest.
        theta: The weight of |y|^2, >= 0.
        decay: sigma, mu and theta are multiplied by (k+1)^-decay at outer step k, >= 0.

    Family: First derivatives of g.
    For: non-convex or with many minima; smooth.
    Cost: T G + S (F + 3 G) + F + 4 G + 2 Gx. S is y_steps; a value of g counts as G.
    State: y, z.
    Memory: one more y.
    Use: no second derivatives, several lower solutions, an f that may choose among them.
    Breaks: the bias of h is O(sigma^(1/3)) where g is strongly convex. But far from the minimum of
    phi's problem lam, and with it h, is of the size of 1 / sigma: on new tasks, and at the first
    steps of kept ones, a small sigma needs many y_steps, or a decay. mu lifts v above min g, and
    within that margin nothing holds y. Refused below float32, whose rounding is larger than the
    differences.
    Source: Liu, Liu, Zeng, Zhang, Zhang, "Value-Function-based Sequential Minimization for Bi-level
    Optimization", IEEE TPAMI 2023, after the interior-point method of Liu et al., ICML 2021.
    Differs: of the paper's penalties the quadratic one alone; y's steps are divided by 1 + lam. The
    official code and BOAT take the logarithm of v plus a constant, however large g is: it holds no
    barrier, only a fixed weight sigma / v of g, and fails where v is not positive.
    """

    takes_second_derivatives = False
    bears_rounding = "float32"

    y_steps: int = rule(10, ge=1)
    y_lr: float = rule(0.1, gt=0)
    sigma: float = rule(0.01, gt=0)
    mu: float = rule(0.001, ge=0)
    theta: float = rule(0.001, ge=0)
    decay: float = rule(0.0, ge=0)

    def _check_first_step(self) -> None:
        super()._check_first_step()
        check_first_step("y_steps", self.y_steps, self.step_rule)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> BVFSMState:
        return BVFSMState(inner, inner, self.new_memory(inner, 2))

    def estimate(self, oracle: Oracle, context: Params, state: BVFSMState) -> Estimate:
        fall = decayed(1.0, self.decay, oracle.step)
        y, z = state.inner, state.lower_solution
        y_memory, z_memory = state.memory or (NO_MEMORY, NO_MEMORY)
        for _ in range(self.inner_steps):
            g_z = oracle.inner_grad(context, z, oracle.draw_inner())
            direction = add(g_z, z, self.mu * fall)
            z, z_memory = self.step_inner(oracle, z, z_memory, direction)
        y_lr = self.step_rule.with_lr(self.y_lr).lr_at(oracle.step)
        for _ in range(self.y_steps):
            draw = oracle.draw_inner()
            lam = self._gap(oracle, context, y, z, draw).relu() / (self.sigma * fall)
            g_y = oracle.inner_grad(context, y, draw)
            _, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
            direction = add(add(f_y, y, self.theta * fall), g_y, lam)
            direction = scale(direction, 1 / (1 + lam))
            y, y_memory = self.step_inner(oracle, y, y_memory, direction, y_lr)

        draw = oracle.draw_inner()  # one for all, so that noise cancels in the differences
        gap = self._gap(oracle, context, y, z, draw)
        lam = gap.relu() / (self.sigma * fall)
        g_x, _ = oracle.inner_grads(context, y, draw)
        g_x_at_z, _ = oracle.inner_grads(context, z, draw)
        f_x, _ = oracle.outer_grads(context, y, oracle.draw_outer())
        return Estimate(
            hypergradient=add(f_x, sub(g_x, g_x_at_z), lam),
            start_gradient=None,
            state=BVFSMState(inner=y, lower_solution=z, memory=self.carried((y_memory, z_memory))),
            metrics={"lam": lam, "value_gap": gap},
        )

    def _gap(self, oracle: Oracle, context: Params, y: Params, z: Params, draw: Draw) -> Tensor:
        """g(x, y) - v(x), on the same examples."""
        mu = decayed(self.mu, self.decay, oracle.step)
        value = oracle.inner_value(context, z, draw) + mu / 2 * dot(z, z)
        return oracle.inner_value(context, y, draw) - value
