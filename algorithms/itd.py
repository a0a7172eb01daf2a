"""ITD: differentiate through the steps of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.maps import iterate, refuse_options
from metadist.algorithms.parts.unrolling import Unrolling
from metadist.oracle import Oracle
from metadist.trees import Params, add


@dataclass(frozen=True)
class ITD(Unrolling):
    """Iterative differentiation (ITD-BiO, MAML, ANIL, FOMAML).

        y_{t+1} = y_t - inner_lr g_y(x, y_t),   t = 0 .. inner_steps-1
        h = d f(x, y_T) / d (x, start),  backwards from w = f_y, h = f_x:
            h -= inner_lr J(x, y_t) w;   w -= inner_lr H(x, y_t) w

    On few-shot tasks this is MAML (`adapt="all"`), ANIL (`adapt="head"`), FOMAML
    (`first_order=True`) and truncated reverse mode (`truncate=K`). `learn_lr` makes the inner
    rates outer variables. The derivative does not flow into a kept y. For a problem with
    `inner_map` y makes inner_steps of y <- Phi(x, y), and h += (dPhi/dx)' w, w <- (dPhi/dy)' w.

    Exact for the unrolled map; away from the solution of the lower problem by
    (1 - inner_lr mu)^inner_steps, an error that more outer steps do not remove.

    Family: Through the inner loop.
    For: any smooth one; T steps of SGD are the lower problem. Or of `Problem.inner_map`.
    Cost: T G + F + T (H + J); K (H + J) with truncate=K, none with first_order.
    State: y.
    Memory: T iterates with engine="adjoint" and, as far as `Compute.graph_budget` goes, their
    graphs; T graphs with the others.
    Use: few-shot tasks: a learned start, few inner steps, a new task every time.
    Breaks: inner_lr > 2/L diverges; for second order through hundreds of steps see `truncate`.
    Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design",
    ICML 2021, ITD-BiO. Finn, Abbeel, Levine, ICML 2017 (MAML); Raghu et al., ICLR 2020 (ANIL);
    Li et al., 2017 (Meta-SGD); Shaban et al., AISTATS 2019 (truncation).
    Differs: The official code's meta-learning scripts keep a fixed random start of the head; here
    the start is learned as in ANIL, at no cost. Its "reverse" is always truncated; here on
    request only, since truncation is biased.
    """

    takes_map = True

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        if not oracle.has_inner_map:
            return super().adapt(oracle, context, inner)
        self._check_map()
        return iterate(oracle, context, inner, self.inner_steps)[0]

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        if not oracle.has_inner_map:
            return super().estimate(oracle, context, state)
        self._check_map()
        y, steps = iterate(oracle, context, state.inner, self.inner_steps)
        h, w = oracle.outer_grads(context, y, oracle.draw_outer())
        for y_t, draw in reversed(steps[self.inner_steps - self.second_order_steps :]):
            phi_x, w = oracle.map_products(context, y_t, w, draw)
            h = add(h, phi_x)
        return Estimate(hypergradient=h, start_gradient=w, state=InnerState(y), metrics={})

    def _check_map(self) -> None:
        options = "inner_lr", "inner_optimizer", "learn_lr", "engine", "compile"
        refuse_options(self, *options)
