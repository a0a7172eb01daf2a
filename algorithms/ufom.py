"""UFOM: a first-order hypergradient, made unbiased by a rare exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.parts.inner import GradientDescent
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, norm, sub


@dataclass(frozen=True)
class UFOM(GradientDescent):
    """Unbiased first-order MAML: with probability q the error of the first-order part, over q.

        h_FOM = (grad_x f, grad_y f) at y_T  for (context, start), as if y_T were start + const
        h = h_FOM + (xi / q) (h_exact - h_FOM),    xi = 1 with probability q, else 0

    h_exact is that of ITD through the same inner_steps on the same draws, so the mean of h is
    the hypergradient of ITD. One coin xi per step, for all tasks.

    Args:
        exact_probability: q, in (0, 1]; 1 is ITD. The variance grows like 1/q.
        recompute: find each y_t again from the start instead of keeping all: memory that does
            not grow with T, for T^2 / 2 more gradients in an exact step.

    Cost: T gradients, 1 outer gradient; with probability q also T products of second order.
    Memory: one iterate, in an exact step T iterates (or one, with `recompute`).
    Breaks: q small beside the squared relative error of h_FOM: rare, huge steps; clip or raise q.
    Source: Likhosherstov, Song, Choromanski, Davis, Weller, "Debiasing a First-order Heuristic for
    Approximate Bi-level Optimization", ICML 2021. Relied on the abstract; the form xi / q is the
    one that makes it unbiased. Differs from it in: q is fixed.
    """

    card = Card(
        title="Unbiased first-order MAML",
        source="Likhosherstov et al., ICML 2021",
        problems="any, finite inner loop",
        cost="T G + F + q T (H + J)",
        state="y",
        use="long inner loops on a budget, where FOMAML is biased",
    )

    exact_probability: float = 0.2
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.exact_probability <= 1:
            raise ValueError(
                f"exact_probability must be in (0, 1], got {self.exact_probability}: for first "
                "order alone use ITD with first_order=True"
            )

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        exact = oracle.uniform() < self.exact_probability
        draws = [oracle.draw_inner() for _ in range(self.inner_steps)]
        iterates: list[Params] = []
        y = state.inner
        for draw in draws:
            if exact and not self.recompute:
                iterates.append(y)
            y = self.next_inner(oracle, context, y, draw)
        first_x, first_y = h, w = oracle.outer_grads(context, y, oracle.draw_outer())
        if exact:
            for t in reversed(range(self.inner_steps)):
                y_t = self._replay(oracle, context, state.inner, draws[:t], iterates)
                j_w, h_w = oracle.second_order(context, y_t, w, draws[t])
                h, w = add(h, j_w, -self.inner_lr), add(w, h_w, -self.inner_lr)
            h = add(first_x, sub(h, first_x), 1 / self.exact_probability)
            w = add(first_y, sub(w, first_y), 1 / self.exact_probability)
        metrics = {"exact_steps": torch.ones_like(norm(w)) * float(exact)}
        return Estimate(h, w, InnerState(y), metrics)

    def _replay(
        self, oracle: Oracle, x: Params, y: Params, draws: list[Draw], iterates: list[Params]
    ) -> Params:
        """The iterate that `draws` lead to, kept or found again."""
        if not self.recompute:
            return iterates[len(draws)]
        for draw in draws:
            y = self.next_inner(oracle, x, y, draw)
        return y
