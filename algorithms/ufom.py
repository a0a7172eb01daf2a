"""UFOM: a first-order hypergradient, made unbiased by a rare exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.through import DescentThrough, Trace, pull
from metadist.checks.values import require_number, rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.step_rules import Memory
from metadist.trees import Params, add, norm, sub, zeros_like


@dataclass(frozen=True)
class UFOM(DescentThrough):
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

    inner_steps: int = rule(5, ge=1)
    exact_probability: float = 0.2
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(exact_probability=self.exact_probability)
        if not 0 < self.exact_probability <= 1:
            raise ValueError(
                f"exact_probability must be in (0, 1], got {self.exact_probability}: for first "
                "order alone use ITD with first_order=True"
            )

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        exact = oracle.uniform() < self.exact_probability
        draws = [oracle.draw_inner() for _ in range(self.inner_steps)]
        keeps = exact and not self.recompute
        traces, y, memory = self._steps(oracle, context, state, draws, keeps)
        f_x, f_y = h, w = oracle.outer_grads(context, y, oracle.draw_outer())
        if exact:
            steps = self.step_rule
            rate = steps.lr_at(oracle.step)
            w_means = tuple(map(zeros_like, memory.means))
            for t in reversed(range(self.inner_steps)):
                if self.recompute:
                    _, y_t, memory_t = self._steps(oracle, context, state, draws[:t], False)
                    g_y = {} if steps.is_linear else oracle.kept_grad(context, y_t, draws[t])
                    trace = Trace(y_t, memory_t, g_y)
                else:
                    trace = traces.pop()
                pulled = pull(oracle, steps, trace, rate, w, w_means)
                w, w_means = pulled.y, pulled.means
                j_u, h_u = oracle.second_order(context, trace.y, pulled.gradient, draws[t])
                h, w = add(h, j_u), add(w, h_u)
            h = add(f_x, sub(h, f_x), 1 / self.exact_probability)
            w = add(f_y, sub(w, f_y), 1 / self.exact_probability)
        metrics = {"exact_steps": torch.ones_like(norm(w)) * float(exact)}
        return Estimate(
            hypergradient=h,
            start_gradient=w,
            state=InnerState(y, self.carried(memory)),
            metrics=metrics,
        )

    def _steps(
        self,
        oracle: Oracle,
        context: Params,
        state: InnerState,
        draws: list[Draw],
        keeps: bool,
    ) -> tuple[list[Trace], Params, Memory]:
        """(what the way back needs of each step, y and memory after the last) on `draws`."""
        steps = self.step_rule
        rate = steps.lr_at(oracle.step)
        traces: list[Trace] = []
        y, memory = state.inner, state.memory or steps.start(state.inner)
        for draw in draws:
            ask = oracle.kept_grad if keeps else oracle.inner_grad
            trace = Trace(y, memory, ask(context, y, draw))
            if keeps:
                traces.append(trace.kept_for(steps))
            y, memory = steps.step(*trace, rate)
        return traces, y, memory
