"""UFOM: a first-order hypergradient, made unbiased by a rare exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.inner import GradientDescent
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, norm, sub


@dataclass(frozen=True)
class UFOM(GradientDescent):
    """Unbiased first-order MAML.

        h_FOM = (f_x, f_y) at y_T  for (context, start), as if y_T were start + const
        h = h_FOM + (xi / q) (h_exact - h_FOM),    xi = 1 with probability q, else 0

    h_exact is that of ITD through the same inner_steps on the same draws, so the mean of h is
    the hypergradient of ITD. The error of h_FOM is corrected so rarely that it costs little, and
    so strongly that the mean is right; the variance is the squared error times (1 - q)/q. One
    coin xi per outer step, for all tasks, so that all of them take the expensive branch together.

    Args:
        exact_probability: q, in (0, 1]; 1 is ITD. The variance grows like 1/q.
        recompute: Find each y_t again from the start instead of keeping all: the memory does
            not grow with T, for T^2 / 2 more gradients in an exact step.

    Family: Through the inner loop.
    For: any smooth one, finite inner loop.
    Cost: T G + F + q T (H + J). With `recompute` T^2 / 2 G more in an exact step.
    State: y.
    Memory: one iterate, in an exact step T iterates (or one, with `recompute`) and, as far as
    `Compute.graph_budget` goes, their graphs.
    Use: long inner loops on a budget, where FOMAML is biased.
    Breaks: q small beside the squared relative error of h_FOM: rare, huge steps; clip or raise q.
    Source: Likhosherstov, Song, Choromanski, Davis, Weller, "Debiasing a First-order Heuristic for
    Approximate Bi-level Optimization", ICML 2021. Only its abstract was read; the factor 1/q is
    the one that makes the mean exact.
    Differs: q is fixed, where the paper also chooses q from running estimates.
    """

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
        keeps = exact and not self.recompute
        ask = oracle.kept_grad if keeps else oracle.inner_grad
        for draw in draws:
            if keeps:
                iterates.append(y)
            y = add(y, ask(context, y, draw), -self.inner_lr)

        f_x, f_y = h, w = oracle.outer_grads(context, y, oracle.draw_outer())
        if exact:
            for t in reversed(range(self.inner_steps)):
                y_t = self._iterate(oracle, context, state.inner, draws[:t], iterates)
                j_w, h_w = oracle.second_order(context, y_t, w, draws[t])
                h, w = add(h, j_w, -self.inner_lr), add(w, h_w, -self.inner_lr)
            h = add(f_x, sub(h, f_x), 1 / self.exact_probability)
            w = add(f_y, sub(w, f_y), 1 / self.exact_probability)
        metrics = {"exact_steps": torch.ones_like(norm(w)) * float(exact)}
        return Estimate(hypergradient=h, start_gradient=w, state=InnerState(y), metrics=metrics)

    def _iterate(
        self,
        oracle: Oracle,
        context: Params,
        start: Params,
        draws: list[Draw],
        iterates: list[Params],
    ) -> Params:
        """The iterate that `draws` lead to, kept or found again."""
        if not self.recompute:
            return iterates[len(draws)]
        y = start
        for draw in draws:
            y = self.next_inner(oracle, context, y, draw)
        return y
