"""SOBA: y, its adjoint and x move at once, each by one unbiased direction."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card, Estimate, State
from metadist.algorithms.parts.implicit import AdjointState
from metadist.algorithms.parts.inner import SingleLoop, check_positive, check_within, decayed
from metadist.algorithms.parts.linear import relative_residual
from metadist.oracle import Oracle
from metadist.trees import Params, add, norm, sub, zeros_like


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """Stochastic bilevel algorithm: three directions at one point, each linear in f and g.

        y+ = y - inner_lr * grad_y g
        v+ = v - adjoint_lr * (H v - grad_y f)
        h = grad_x f - J v

    all at the same (x, y, v), h with the old v. One draw of the support set and one of the query
    set, so each direction is unbiased given (x, y, v).

    Args:
        adjoint_lr: step of v, > 0; at most 2 / L.
        adjoint_decay: the rate at outer step k is adjoint_lr * (k+1)^-adjoint_decay, in [0, 1].

    With noisy draws the paper lets all rates fall: inner_decay=0.5, adjoint_decay=0.5, and for x
    OuterOptimizer("sgd", schedule="power", schedule_power=0.5).

    Cost: 1 gradient, 1 outer gradient, 1 product (H v and J v together) per step of y.
    Memory: one vector like y. State: y, v.
    Breaks: an outer_lr that is not well below inner_lr and adjoint_lr: x, y and v then spiral away
    together (with both rates equal and |y - t|^2 / 2 for f, beyond 2 inner_lr mu^3 / |J|^2, mu
    the smallest eigenvalue of H). v starts at 0, so on new tasks take inner_steps of several
    1 / (adjoint_lr mu). Constant rates stop at a floor of noise (see SABA).
    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022; their v has the other
    sign. Differs from it in: inner_steps > 1 moves y and v several times at one x.
    """

    card = Card(
        title="Stochastic bilevel algorithm",
        source="Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022",
        problems="strongly convex, mini-batches",
        cost="T (G + F + H + J)",
        state="y, v",
        use="kept states: the simplest single loop, and the cheapest step",
    )

    adjoint_lr: float = 0.1
    adjoint_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("adjoint_lr", self.adjoint_lr)
        check_within("adjoint_decay", self.adjoint_decay, 0, 1)

    @property
    def tolerates_staleness(self) -> bool:
        return True

    def init(self, oracle: Oracle, context: Params, inner: Params) -> State:
        return AdjointState(inner, zeros_like(inner))

    def move(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        y, v = state
        draw = oracle.draw_inner()
        gradient = oracle.inner_grad(context, y, draw)
        j_v, h_v = oracle.second_order(context, y, v, draw)
        direct, right = oracle.outer_grads(context, y, oracle.draw_outer())
        residual = sub(h_v, right)
        rate = decayed(self.adjoint_lr, self.adjoint_decay, oracle.step)
        moved = AdjointState(self.descend_once(oracle, y, gradient), add(v, residual, -rate))
        metrics = {
            "adjoint_residual": relative_residual(h_v, right),
            "inner_gradient_norm": norm(gradient),
        }
        return Estimate(sub(direct, j_v), None, moved, metrics)
