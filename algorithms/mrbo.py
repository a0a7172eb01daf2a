"""MRBO: recursive momentum on the inner gradient and on the hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from metadist.algorithm import Card, Estimate
from metadist.algorithms.parts.inner import SingleLoop, check_positive, check_within
from metadist.algorithms.stocbio import Sample, check_chain, draw_bundle, neumann_sample
from metadist.oracle import Oracle
from metadist.trees import Params, add, norm, sub, zeros_like

Estimator = Callable[[Params, Params], Sample]
"""(x, y) -> hypergradient, always on the same draws."""


class MRBOState(NamedTuple):
    """y; the point that u and w were last evaluated at; u (like y), w (like x); steps of y."""

    inner: Params
    previous_outer: Params
    previous_inner: Params
    inner_direction: Params
    outer_direction: Params
    age: int


@dataclass(frozen=True)
class MRBO(SingleLoop):
    """Momentum-based recursive bilevel optimiser: STORM on both levels.

        u_k = grad_y g(x_k, y_k) + (1 - b_k) (u_{k-1} - grad_y g(x_{k-1}, y_{k-1}))
        w_k = h(x_k, y_k) + (1 - a_k) (w_{k-1} - h(x_{k-1}, y_{k-1}))
        y_{k+1} = y_k - inner_lr_k * u_k;    x steps along w_k

    h is the estimate of StocBiO. The two terms of a difference are on the same draws, so their
    noise cancels as steps get short, and u and w need no large batch. a_0 = b_0 = 1, then
    a_k = min(1, outer_weight * k^-weight_decay), and b_k likewise with inner_weight.

    k is the age of the state (of u, in steps of y), so a state that is new starts with plain
    estimates. On new tasks w lives where x does, see `recursive_weight`, and y and u take
    `inner_steps` steps on each: more than 1, since w is at the last point that y moves from.

    Args:
        adjoint_steps: Q, Hessian products of h, >= 0.
        adjoint_lr: eta of h, > 0; at most 1 / L.
        outer_weight: of a_k, > 0; 1 with weight_decay=0 is no recursion.
        inner_weight: of b_k, > 0.
        weight_decay: exponent, in [0, 1]; the paper has 2/3.

    The paper's rates are inner_decay=1/3 here and, for x, OuterOptimizer("sgd",
    schedule="power", schedule_power=1/3).

    Cost: 2 (T gradients, 1 outer gradient, Q + 1 products); half of it for a new state.
    Memory: the state, 3 vectors like y and 2 like x.
    Breaks: as StocBiO; and where x jumps between steps (large rates, Adam), the differences
    carry more noise than they cancel.
    Source: Yang, Ji, Liang, "Provably Faster Algorithms for Bilevel Optimization", NeurIPS 2021,
    algorithm 1; its e_k = d / (m + k)^(1/3) with m = 1 and d inside rates and weights. Differs
    from the official code in: schedules act, y steps once. inner_steps > 1 is our addition.
    """

    card = Card(
        title="Momentum-based recursive bilevel optimiser",
        source="Yang, Ji, Liang, NeurIPS 2021",
        problems="strongly convex, mini-batches",
        cost="2 (T G + F + Q H + J)",
        state="y, u, w, previous x and y",
        use="noisy mini-batches, small steady steps of x",
    )

    adjoint_steps: int = 10
    adjoint_lr: float = 0.1
    outer_weight: float = 0.5
    inner_weight: float = 0.5
    weight_decay: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chain(self.adjoint_steps, self.adjoint_lr, 0)
        check_positive("outer_weight", self.outer_weight)
        check_positive("inner_weight", self.inner_weight)
        check_within("weight_decay", self.weight_decay, 0, 1)

    def recursive_weight(self, step: int) -> float:
        return falling_weight(self.outer_weight, self.weight_decay, step)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> MRBOState:
        zero_x, zero_y = zeros_like(context), zeros_like(inner)
        return MRBOState(inner, zero_x, zero_y, zero_y, zero_x, 0)

    def estimate(self, oracle: Oracle, context: Params, state: MRBOState) -> Estimate:
        moved: MRBOState = super().estimate(oracle, context, state).state
        sample = self.draw_estimator(oracle)
        new = sample(context, moved.previous_inner)
        w = new.hypergradient
        if state.age:
            old = sample(state.previous_outer, state.previous_inner).hypergradient
            weight = self.recursive_weight(state.age // self.inner_steps)
            w = recursion(w, old, state.outer_direction, weight)
        metrics = {
            "adjoint_residual": new.residual,
            "inner_gradient_norm": norm(moved.inner_direction),
        }
        return Estimate(w, None, moved._replace(outer_direction=w), metrics)

    def move(self, oracle: Oracle, context: Params, state: MRBOState) -> Estimate:
        draw = oracle.draw_inner()
        u = oracle.inner_grad(context, state.inner, draw)
        if state.age:
            old = oracle.inner_grad(state.previous_outer, state.previous_inner, draw)
            weight = falling_weight(self.inner_weight, self.weight_decay, state.age)
            u = recursion(u, old, state.inner_direction, weight)
        w, y = state.outer_direction, self.descend_once(oracle, state.inner, u)
        return Estimate(w, None, MRBOState(y, context, state.inner, u, w, state.age + 1), {})

    def draw_estimator(self, oracle: Oracle) -> Estimator:
        """The hypergradient estimate on draws made now."""
        bundle = draw_bundle(oracle, self.adjoint_steps)
        return lambda x, y: neumann_sample(oracle, x, y, bundle, self.adjoint_lr)


def recursion(new: Params, old: Params, direction: Params, weight: float) -> Params:
    """new + (1 - weight) (direction - old)."""
    return add(new, sub(direction, old), 1 - weight)


def falling_weight(weight: float, exponent: float, step: int) -> float:
    """1 at step 0, then weight * step^-exponent, at most 1."""
    return min(1.0, weight * step**-exponent) if step else 1.0
