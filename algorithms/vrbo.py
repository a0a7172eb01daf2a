"""VRBO: variance reduction by recursive differences, restarted from the whole sets."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Card, Estimate
from metadist.algorithms.mrbo import MRBOState, recursion
from metadist.algorithms.parts.inner import SingleLoop, check_at_least
from metadist.algorithms.stocbio import (
    average,
    check_chain,
    draw_bundle,
    neumann_sample,
    whole_bundle,
)
from metadist.oracle import Oracle
from metadist.trees import Params, norm, zeros_like


@dataclass(frozen=True)
class VRBO(SingleLoop):
    """Variance-reduced bilevel optimiser: SPIDER on both levels, y in an inner loop.

    At x_k, for t = 0 .. inner_steps-1, each t on draws of its own:

        u += grad_y g(x_k, y_t) - grad_y g(previous point);  y_{t+1} = y_t - inner_lr * u
        w += h(x_k, y_t) - h(previous point)

    and if k is a multiple of `period`, u and w are then computed anew on the whole sets. x steps
    along w; h is the estimate of StocBiO. The previous point is (x_k, y_{t-1}), at t = 0 the last
    point of the step before: so the differences add up without a gap.

    k is the age of the state. A new state starts from u on the whole set, takes its steps and
    ends with w on the whole sets; so on new tasks, see `recursive_weight`.

    Args:
        inner_steps: m + 1 of the paper, >= 1.
        adjoint_steps: Q, Hessian products of h, >= 0.
        adjoint_lr: eta of h, > 0; at most 1 / L.
        period: q, steps of x from one pass over the whole sets to the next, >= 1.

    Cost: 2T (1 gradient, 1 outer gradient, Q + 1 products); every `period`-th step 2T
    gradients and, on the whole sets, 1 gradient, 1 outer gradient, Q + 1 products.
    Memory: the state, 3 vectors like y and 2 like x.
    Breaks: as MRBO; errors of u and w live until the next restart.
    Source: Yang, Ji, Liang, "Provably Faster Algorithms for Bilevel Optimization", NeurIPS 2021,
    algorithm 2. Here the large batch is the whole sets, in parts of batch_size; w is at the last
    point that y moves from (after a restart at the one it ends at); the first y takes its steps
    too. Differs from the official code in: "previous x" is the x before.
    """

    card = Card(
        title="Variance-reduced bilevel optimiser",
        source="Yang, Ji, Liang, NeurIPS 2021",
        problems="strongly convex, finite sums",
        cost="2T (G + F + Q H + J) + passes over the whole sets",
        state="y, u, w, previous x and y",
        use="sets small enough to be passed through now and then",
    )

    inner_steps: int = 3
    adjoint_steps: int = 10
    adjoint_lr: float = 0.1
    period: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chain(self.adjoint_steps, self.adjoint_lr, 0)
        check_at_least("period", self.period, 1)

    def recursive_weight(self, step: int) -> float:
        return 0.0 if step % self.period else 1.0

    def init(self, oracle: Oracle, context: Params, inner: Params) -> MRBOState:
        zero_x, zero_y = zeros_like(context), zeros_like(inner)
        return MRBOState(inner, zero_x, zero_y, zero_y, zero_x, 0)

    def estimate(self, oracle: Oracle, context: Params, state: MRBOState) -> Estimate:
        estimate = super().estimate(oracle, context, state)
        moved: MRBOState = estimate.state
        if self._restarts(state):
            y = moved.inner
            (u,) = self._whole_gradient(oracle, context, y)
            bundle = whole_bundle(oracle, self.adjoint_steps)
            sample = neumann_sample(oracle, context, y, bundle, self.adjoint_lr)
            w, metrics = sample.hypergradient, {"adjoint_residual": sample.residual}
            moved = MRBOState(y, context, y, u, w, moved.age)
            estimate = Estimate(w, None, moved, metrics)
        metrics = {**estimate.metrics, "inner_gradient_norm": norm(moved.inner_direction)}
        return estimate._replace(metrics=metrics)

    def move(self, oracle: Oracle, context: Params, state: MRBOState) -> Estimate:
        _, x, previous, u, w, age = state
        y, metrics = state.inner, {}
        if age == 0:
            (u,) = self._whole_gradient(oracle, context, y)
        else:
            draw = oracle.draw_inner()
            u = recursion(
                oracle.inner_grad(context, y, draw), oracle.inner_grad(x, previous, draw), u, 0.0
            )
        if not self._restarts(state):
            bundle = draw_bundle(oracle, self.adjoint_steps)
            new, old = (
                neumann_sample(oracle, *point, bundle, self.adjoint_lr)
                for point in ((context, y), (x, previous))
            )
            w = recursion(new.hypergradient, old.hypergradient, w, 0.0)
            metrics = {"adjoint_residual": new.residual}
        moved = MRBOState(self.descend_once(oracle, y, u), context, y, u, w, age + 1)
        return Estimate(w, None, moved, metrics)

    def _restarts(self, state: MRBOState) -> bool:
        return state.age // self.inner_steps % self.period == 0

    def _whole_gradient(self, oracle: Oracle, x: Params, y: Params) -> tuple[Params, ...]:
        parts = oracle.parts("support")
        return average(parts, lambda draw: (oracle.inner_grad(x, y, draw),))
