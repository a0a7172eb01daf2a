"""F2SA: first derivatives only, a difference of two penalised lower problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from metadist.algorithm import Card, Estimate
from metadist.algorithms.parts.inner import (
    InnerLoop,
    InnerOptimizer,
    check_choice,
    check_positive,
    check_within,
    decayed,
)
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, scale, sub, zeros_like


class F2SAState(NamedTuple):
    """The solution of the lower problem, and how far the penalised one is from it."""

    inner: Params
    offset: Params


@dataclass(frozen=True)
class F2SA(InnerLoop):
    """Fully first-order stochastic approximation (F2SA), or F2SA-2 with order=2.

    l(s) = min_y g + s f has dl/ds = f(x, y*) at s = 0, so the hypergradient is d2 l / ds dx,
    which is differenced over s in {nu, 0}, or {nu, -nu} with order=2, nu = 1 / lam_k:

        inner_steps times  y_s <- y_s - rate_s * (grad_y g + s grad_y f)(x, y_s)
        h = (grad_x (g + s f)(x, y_s) - grad_x (g + s' f)(x, y_s')) / (s - s')

    In the words of the paper (order=1): y is y_nu, z is y_0, the adapted inner variable; it moves y
    by a_k (grad_y f + lam grad_y g) with a_k = y_lr / (1 + lam_k), stable for every lam, and z
    by inner_lr * grad_y g. With order=2 the adapted inner variable is the midpoint of both.

    Args:
        inner_lr: of z, > 0; `inner_decay` applies to y too (the paper's k^-4/7 for z and k^-5/7
            for y are one exponent here, as lam_k grows with k^1/7).
        y_lr: of y, > 0. None: what moves y along grad_y g as fast as z, so that a few steps from a
            common start make a sensible difference; stable where
            inner_lr < 2 / (L_g + L_f / lam).
        lam: of the first outer step, > 0.
        lam_growth: lam_k = lam * (k+1)^lam_growth, in [0, 1].
        order: 1: bias O(1/lam), 2: O(1/lam^2).

    Cost: T (2 G + F) + F + 2 (G + Gx); with order=2 T (2 G + 2 F) + 2 F + 2 (G + Gx).
    Memory: two more y.
    Breaks: noise of grad_x g is multiplied by lam. order=2 needs g - nu f strongly convex: lam
    above L_f / mu, or y runs away; where f is not smooth in that sense use order=1.
    Source: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel
    Optimization", ICML 2023; the central difference: F2SA-p. Schedules unverified. Differs
    from the paper in: both gradients of g take the same draws, so that noise cancels in their
    difference; no normalised outer steps for order=2.
    """

    card = Card(
        title="Fully First-order Stochastic Approximation (F2SA, F2SA-2)",
        source="Kwon, Kwon, Wright, Nowak, ICML 2023",
        problems="strongly convex",
        cost="T (2 G + F) + F + 2 G + 2 Gx",
        state="y, z",
        use="no second derivatives, a bias that lam controls",
    )

    y_lr: float | None = None
    lam: float = 10.0
    lam_growth: float = 0.0
    order: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.y_lr is not None:
            check_positive("y_lr", self.y_lr)
        check_positive("lam", self.lam)
        check_within("lam_growth", self.lam_growth, 0, 1)
        check_choice("order", self.order, (1, 2))

    @property
    def tolerates_staleness(self) -> bool:
        return True

    def init(self, oracle: Oracle, context: Params, inner: Params) -> F2SAState:
        return F2SAState(inner, zeros_like(inner))

    def estimate(self, oracle: Oracle, context: Params, state: F2SAState) -> Estimate:
        nu = 1 / decayed(self.lam, -self.lam_growth, oracle.step)
        low, above, below = 0.0, add(state.inner, state.offset), state.inner
        rate = lower_rate = self.inner_lr
        if self.y_lr is not None:
            rate = self.y_lr / (1 + nu)
        if self.order == 2:
            low, below, lower_rate = -nu, sub(state.inner, state.offset), rate
        up, down = (
            InnerOptimizer(self, decayed(lr, self.inner_decay, oracle.step))
            for lr in (rate, lower_rate)
        )
        for _ in range(self.inner_steps):
            draws = oracle.draw_inner(), oracle.draw_outer()
            above = up.step(above, _grad_y(oracle, context, above, nu, *draws))
            below = down.step(below, _grad_y(oracle, context, below, low, *draws))

        draws = oracle.draw_inner(), oracle.draw_outer()
        at_above = _grad_x(oracle, context, above, nu, *draws)
        at_below = _grad_x(oracle, context, below, low, *draws)
        h = scale(sub(at_above, at_below), 1 / (nu - low))
        inner = below if self.order == 1 else scale(add(above, below), 0.5)
        return Estimate(h, None, F2SAState(inner, sub(above, inner)), {})


def _grad_y(oracle: Oracle, x: Params, y: Params, s: float, inner: Draw, outer: Draw) -> Params:
    gradient = oracle.inner_grad(x, y, inner)
    return add(gradient, oracle.outer_grads(x, y, outer)[1], s) if s else gradient


def _grad_x(oracle: Oracle, x: Params, y: Params, s: float, inner: Draw, outer: Draw) -> Params:
    gradient = oracle.inner_grads(x, y, inner)[0]
    return add(gradient, oracle.outer_grads(x, y, outer)[0], s) if s else gradient
