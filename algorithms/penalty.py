"""Penalty method: the lower problem as the constraint grad_y g = 0 of an augmented Lagrangian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop
from metadist.algorithms.parts.linear import relative_residual
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, dot, norm, scale, sub, zeros_like


class PenaltyState(NamedTuple):
    """y, the multipliers, and how many times the weights have been updated (shape ())."""

    inner: Params
    multipliers: Params
    num_updates: Tensor
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class Penalty(InnerLoop):
    """Penalty method (augmented Lagrangian).

        h_up = f + <nu, g_y> + rho / 2 |g_y|^2,    h_low = h_up + lam g
        inner_steps of the inner optimiser on h_low in y:  f_y + H w + lam g_y,
        h = f_x + J w,   w = nu + rho g_y
        where |h|^2 + |f_y + H w + lam g_y|^2 < eps^2:  nu += rho g_y;  rho, lam and eps are
            multiplied by their factors, inner_lr by lr_factor

    No inverse of the Hessian: multipliers nu stand in its place. At a solution -w is the adjoint
    H^-1 f_y, so h is the hypergradient, at any rho once nu has converged. On a new task nu is 0:
    h has a bias of O(1/rho) and O(lam); set a larger rho there, with inner_lr < 2 / (rho L^2) and
    more inner_steps. `inner_lr` is that of y on h_low, and of `adapt`.

    Args:
        rho: The initial weight of the penalty, > 0. The curvature in y is of order rho H^2.
        lam: The initial weight of g, >= 0; it pulls y to a minimum of g.
        eps: The initial tolerance, > 0; set it against the size of the gradients of f.
        rho_factor: >= 1. With 1 the multipliers do the work, at a linear rate. Above 1, steps
            of x diverge once outer_lr rho |J|^2 > 2 unless the outer rate falls as well.
        lam_factor: In (0, 1].
        eps_factor: In (0, 1].
        lr_factor: In (0, 1]; with SGD and rho_factor > 1 it should be 1 / rho_factor.

    Family: First derivatives of g.
    For: strongly convex near the solution.
    Cost: T (G + F + H) + F + 2 G + J + H. The last H is a by-product of J's pass.
    State: y, multipliers, number of updates.
    Memory: one more y and one graph.
    Use: kept states, when an adjoint solve is not wanted.
    Breaks: nearly singular H; far from lower minima, where g_y = 0 may be a saddle.
    Source: Mehra, Hamm, "Penalty Method for Inversion-Free Deep Bilevel Optimization", ACML
    2021.
    Differs: the official code's test squares the sums of squares once more, (s^2 + t^2) < eps^2;
    nu starts at 0; x is stepped by the outer optimiser, whose rate no update shrinks, so rho_factor
    and lr_factor are 1 by default where the code has 1.1 and 0.9; the default inner optimiser is
    SGD where the code has Adam.
    """

    rho: float = rule(1.0, gt=0)
    lam: float = rule(0.01, ge=0)
    eps: float = rule(0.01, gt=0)
    rho_factor: float = rule(1.0, ge=1)
    lam_factor: float = rule(0.9, gt=0, le=1)
    eps_factor: float = rule(0.9, gt=0, le=1)
    lr_factor: float = rule(1.0, gt=0, le=1)

    @property
    def kept_options(self) -> dict[str, str]:
        return dict.fromkeys(("eps", "rho_factor", "lam_factor", "eps_factor", "lr_factor"), "")

    def init(self, oracle: Oracle, context: Params, inner: Params) -> PenaltyState:
        leaf = next(iter(inner.values()))
        # A counter, so it must be exact: bfloat16 would end at 256.
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        return PenaltyState(
            inner=inner,
            multipliers=zeros_like(inner),
            num_updates=leaf.new_zeros((), dtype=dtype),
            memory=self.new_memory(inner),
        )

    def estimate(self, oracle: Oracle, context: Params, state: PenaltyState) -> Estimate:
        # The number of updates is a tensor, not a counter: whether the test is met depends on
        # data, so under vmap each task has its own, and the weights follow it as tensors.
        y, nu, num_updates, memory = state
        rho = self.rho * self.rho_factor**num_updates
        lam = self.lam * self.lam_factor**num_updates
        eps = self.eps * self.eps_factor**num_updates
        shrink = self.lr_factor**num_updates
        for _ in range(self.inner_steps):
            draw = oracle.draw_inner()
            g_y = oracle.kept_grad(context, y, draw)
            h_w = oracle.hvp(context, y, add(nu, g_y, rho), draw)
            _, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
            direction = add(add(f_y, h_w), g_y, lam)
            moved, memory = self.step_inner(oracle, y, memory, direction)
            y = add(y, sub(moved, y), shrink)

        draw = oracle.draw_inner()
        g_y = oracle.kept_grad(context, y, draw)
        w = add(nu, g_y, rho)
        j_w, h_w = oracle.second_order(context, y, w, draw)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        h = add(f_x, j_w)
        low_y = add(add(f_y, h_w), g_y, lam)
        met = dot(h, h) + dot(low_y, low_y) < eps**2
        new = PenaltyState(
            inner=y,
            multipliers=add(nu, g_y, torch.where(met, rho, 0.0)),
            num_updates=num_updates + met,
            memory=self.carried(memory),
        )
        residual = relative_residual(scale(h_w, -1.0), f_y)  # -w is the adjoint
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=new,
            metrics={"inner_gradient_norm": norm(g_y), "adjoint_residual": residual},
        )
