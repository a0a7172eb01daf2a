"""F2SA: first derivatives only, a difference of two penalised lower problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop, decayed
from metadist.checks.values import rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, add, scale, sub, zeros_like


class F2SAState(NamedTuple):
    """The solution of the lower problem, and how far the penalised one is from it.

    `memory` is that of both.
    """

    inner: Params
    offset: Params
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class F2SA(InnerLoop):
    """Fully First-order Stochastic Approximation (F2SA, F2SA-2).

        z <- z - inner_lr g_y(x, z);    y <- y - a_k (f_y + lam_k g_y)(x, y)
        h = f_x(x, y) + lam_k (g_x(x, y) - g_x(x, z))

    l(s) = min_y g + s f has dl/ds = f(x, y*) at s = 0, so the hypergradient is d2 l / ds dx,
    which is differenced over s in {nu, 0}, or {nu, -nu} with order=2, nu = 1 / lam_k:

        inner_steps times  y_s <- y_s - rate_s (g_y + s f_y)(x, y_s)
        h = ((g + s f)_x(x, y_s) - (g + s' f)_x(x, y_s')) / (s - s')

    With order=1 this is the first form: y is y_nu, z is y_0, the adapted inner variable, and
    a_k = y_lr / (1 + lam_k) is stable for every lam. With order=2 the bias is O(1/lam^2), where it
    is O(1/lam), but g - nu f must still be strongly convex; the adapted inner variable is the
    midpoint of both.

    Args:
        y_lr: The step size of y, > 0. None: what moves y along g_y as fast as z, so that a few
            steps from a common start make a sensible difference; stable where
            inner_lr < 2 / (L_g + L_f / lam).
        lam: The weight of g at the first outer step, > 0.
        lam_growth: lam_k = lam * (k+1)^lam_growth, in [0, 1].
        order: 1: bias O(1/lam), 2: O(1/lam^2).

    `inner_lr` is z's; one `inner_optimizer` moves both, each with a memory of its own, and its
    schedule applies to both (the paper's k^-4/7 for z and k^-5/7 for y are one exponent here, as
    lam_k grows with k^1/7).

    Family: First derivatives of g.
    For: strongly convex.
    Cost: T (2 G + F) + F + 2 G + 2 Gx. With order=2 T (2 G + 2 F) + 2 F + 2 G + 2 Gx.
    State: y, z.
    Memory: two more y.
    Use: no second derivatives, a bias that lam controls.
    Breaks: noise of g_x is multiplied by lam. order=2 needs lam above L_f / mu, or y runs away;
    where f is not smooth in that sense use order=1. Refused below float32, whose rounding is larger
    than the differences.
    Source: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel
    Optimization", ICML 2023. The central difference is that of F2SA-p. The schedules of the paper
    were not checked.
    Differs: both gradients of g are on the same draws, so that noise cancels in their difference;
    the step of y is scaled by 1/(1 + lam_k); no normalised outer steps for order=2. A public
    re-implementation evaluates the g_y of y at z; here it is at y.
    """

    takes_second_derivatives = False
    bears_rounding = "autocast"

    y_lr: float | None = rule(None, gt=0, none="for inner_lr")
    lam: float = rule(10.0, gt=0)
    lam_growth: float = rule(0.0, ge=0, le=1)
    order: Literal[1, 2] = rule(1, one_of=(1, 2))

    @property
    def tolerates_staleness(self) -> bool:
        return True

    def init(self, oracle: Oracle, context: Params, inner: Params) -> F2SAState:
        return F2SAState(inner, zeros_like(inner), self.new_memory(inner, 2))

    def estimate(self, oracle: Oracle, context: Params, state: F2SAState) -> Estimate:
        nu = 1 / decayed(self.lam, -self.lam_growth, oracle.step)
        above, below = add(state.inner, state.offset), state.inner
        low = 0.0
        steps = self.step_rule
        rate = steps.lr if self.y_lr is None else self.y_lr / (1 + nu)
        lower_rate = steps.lr
        if self.order == 2:
            below = sub(state.inner, state.offset)
            low = -nu
            lower_rate = rate

        up, down = state.memory or (NO_MEMORY, NO_MEMORY)
        rate = steps.with_lr(rate).lr_at(oracle.step)
        lower_rate = steps.with_lr(lower_rate).lr_at(oracle.step)
        for _ in range(self.inner_steps):
            draws = oracle.draw_inner(), oracle.draw_outer()
            upper_y = _grad_y(oracle, context, above, nu, *draws)
            lower_y = _grad_y(oracle, context, below, low, *draws)
            above, up = self.step_inner(oracle, above, up, upper_y, rate)
            below, down = self.step_inner(oracle, below, down, lower_y, lower_rate)

        draws = oracle.draw_inner(), oracle.draw_outer()
        at_above = _grad_x(oracle, context, above, nu, *draws)
        at_below = _grad_x(oracle, context, below, low, *draws)
        inner = below if self.order == 1 else scale(add(above, below), 0.5)
        return Estimate(
            hypergradient=scale(sub(at_above, at_below), 1 / (nu - low)),
            start_gradient=None,
            state=F2SAState(inner=inner, offset=sub(above, inner), memory=self.carried((up, down))),
            metrics={},
        )


def _grad_y(
    oracle: Oracle, context: Params, y: Params, s: float, inner_draw: Draw, outer_draw: Draw
) -> Params:
    """g_y + s f_y; f is not evaluated where s = 0."""
    g_y = oracle.inner_grad(context, y, inner_draw)
    if not s:
        return g_y
    _, f_y = oracle.outer_grads(context, y, outer_draw)
    return add(g_y, f_y, s)


def _grad_x(
    oracle: Oracle, context: Params, y: Params, s: float, inner_draw: Draw, outer_draw: Draw
) -> Params:
    """g_x + s f_x; f is not evaluated where s = 0."""
    g_x = oracle.inner_grad_x(context, y, inner_draw)
    if not s:
        return g_x
    f_x, _ = oracle.outer_grads(context, y, outer_draw)
    return add(g_x, f_x, s)
