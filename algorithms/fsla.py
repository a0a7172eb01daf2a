"""FSLA: a fully single loop, with recursive momentum on the hypergradient alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metadist.algorithm import Card, Estimate
from metadist.algorithms.mrbo import falling_weight, recursion
from metadist.algorithms.parts.inner import SingleLoop, check_positive, check_within, decayed
from metadist.algorithms.parts.linear import relative_residual
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, sub, zeros_like


class FSLAState(NamedTuple):
    """y, v, the x of the last estimate, its w (like x), and how many estimates there were."""

    inner: Params
    v: Params
    previous_outer: Params
    outer_direction: Params
    age: int


@dataclass(frozen=True)
class FSLA(SingleLoop):
    """Fully single-loop algorithm: one step of y, then of v, then a momentum of differences.

        y+ = y - inner_lr * grad_y g(x, y)
        v+ = v - adjoint_lr * (H(x, y+) v - grad_y f(x, y+))
        d(x, y, v) = grad_x f(x, y) - J(x, y) v
        w = d(x, y+, v+) + (1 - a_k) (w_old - d(x_old, y, v)),    x steps along w

    Both d on the same two draws, everything else on draws of its own. a_0 = 1, then
    a_k = min(1, outer_weight * k^-weight_decay), k being the age of the state; on new tasks w
    lives where x does, see `recursive_weight`.

    Args:
        adjoint_lr: step of v, > 0; at most 2 / L.
        adjoint_decay: the rate at outer step k is adjoint_lr * (k+1)^-adjoint_decay, in [0, 1].
        outer_weight: eta of the paper, of a_k, > 0; 1 with weight_decay=0 is no momentum.
        weight_decay: exponent, in [0, 1].

    Falling rates: inner_decay=0.5, adjoint_decay=0.5, weight_decay=0.5, and for x
    OuterOptimizer("sgd", schedule="power", schedule_power=0.5).

    Cost: T (1 gradient, 1 outer gradient, 1 product) + 2 (1 outer gradient, 1 product).
    Memory: the state, 2 vectors like y and 2 like x.
    Breaks: as SOBA: outer_lr must be well below inner_lr and adjoint_lr, and v starts at 0; as
    MRBO where x jumps between steps.
    Source: Li, Gu, Huang, "A Fully Single Loop Algorithm for Bilevel Optimization without Hessian
    Inverse", AAAI 2022, the update as in the public benchmark of bilevel solvers. Differs from it
    in: a_k has a rate and an exponent of its own, where there it is the step size; inner_steps > 1
    moves y and v several times at one x.
    """

    card = Card(
        title="Fully single-loop algorithm",
        source="Li, Gu, Huang, AAAI 2022",
        problems="strongly convex, mini-batches",
        cost="T (G + F + H) + 2 (F + J)",
        state="y, v, w, previous x",
        use="as SOBA, with less noise in x",
    )

    adjoint_lr: float = 0.1
    adjoint_decay: float = 0.0
    outer_weight: float = 0.5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("adjoint_lr", self.adjoint_lr)
        check_within("adjoint_decay", self.adjoint_decay, 0, 1)
        check_positive("outer_weight", self.outer_weight)
        check_within("weight_decay", self.weight_decay, 0, 1)

    @property
    def tolerates_staleness(self) -> bool:
        return True

    def recursive_weight(self, step: int) -> float:
        return falling_weight(self.outer_weight, self.weight_decay, step)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> FSLAState:
        return FSLAState(inner, zeros_like(inner), zeros_like(context), zeros_like(context), 0)

    def estimate(self, oracle: Oracle, context: Params, state: FSLAState) -> Estimate:
        moved: FSLAState = super().estimate(oracle, context, state).state
        draws = oracle.draw_outer(), oracle.draw_inner()
        w, residual = direction(oracle, context, moved.inner, moved.v, *draws)
        if state.age:
            old, _ = direction(oracle, state.previous_outer, state.inner, state.v, *draws)
            w = recursion(w, old, state.outer_direction, self.recursive_weight(state.age))
        moved = FSLAState(moved.inner, moved.v, context, w, state.age + 1)
        return Estimate(w, None, moved, {"adjoint_residual": residual})

    def move(self, oracle: Oracle, context: Params, state: FSLAState) -> Estimate:
        y, v = state.inner, state.v
        y = self.descend_once(oracle, y, oracle.inner_grad(context, y, oracle.draw_inner()))
        product = oracle.hvp(context, y, v, oracle.draw_inner())
        _, right = oracle.outer_grads(context, y, oracle.draw_outer())
        rate = decayed(self.adjoint_lr, self.adjoint_decay, oracle.step)
        moved = state._replace(inner=y, v=add(v, sub(product, right), -rate))
        return Estimate(state.outer_direction, None, moved, {})


def direction(
    oracle: Oracle, x: Params, y: Params, v: Params, outer_draw: Draw, cross_draw: Draw
) -> tuple[Params, Tensor]:
    """(d(x, y, v), the relative residual of v, which H v beside J v gives)."""
    direct, right = oracle.outer_grads(x, y, outer_draw)
    j_v, h_v = oracle.second_order(x, y, v, cross_draw)
    return sub(direct, j_v), relative_residual(h_v, right)
