"""PBGD-Free: penalty-based descent that leaves the value function out of the step of x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.inner import InnerLoop
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.problem import Problem, context_depends_on, context_of
from metadist.task import Task
from metadist.trees import Params, add, gradients, leaves, norm, tree_map


@dataclass(frozen=True)
class FreePBGD(InnerLoop):
    """Value-function-free penalty-based bilevel gradient descent (PBGD-Free).

        y <- inner_steps of  y - inner_lr (g_y + f_y / gamma)(x, y);    h = f_x(x, y)

    y is that of the penalty method F2SA (lam = gamma), h its hypergradient without the part
    gamma (g_x(x, y) - g_x(x, z)), for which the lower problem would have to be solved once more.
    That part stands for what x does to f through y. Under a condition of flatness (f hardly
    changes with y near the lower solution) it is small. `adapt` descends on g alone.

    Args:
        inner_steps: T, >= 1; the paper has 1.
        gamma: The weight of g against f, > 0.

    Family: Heuristic.
    For: smooth, and f nearly flat in y at the lower solution.
    Cost: T (G + F) + F.
    State: y.
    Memory: no more than y.
    Use: large models in which x enters f itself, as a representation that both levels share.
    Breaks: wherever x acts on f through y: h has no such part, and the end point is biased by all
    of it. Refused where an outer variable does not enter f (data weights, regularisation), since
    its h would be 0.
    Source: Jiang, Xiao, Chen, Chen, "Beyond Value Functions: Single-Loop Bilevel Optimization under
    Flatness Conditions", 2025. The updates are those of its description; no official code was
    found.
    Differs: no constraints, coupled or not; x is stepped by the outer optimiser.
    """

    takes_second_derivatives = False
    bears_rounding = "autocast"

    inner_steps: int = rule(1, ge=1)
    gamma: float = rule(10.0, gt=0)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y, memory = state
        for _ in range(self.inner_steps):
            g_y = oracle.inner_grad(context, y, oracle.draw_inner())
            _, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
            direction = add(g_y, f_y, 1 / self.gamma)
            y, memory = self.step_inner(oracle, y, memory, direction)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        return Estimate(
            hypergradient=f_x,
            start_gradient=None,
            state=InnerState(y, self.carried(memory)),
            metrics={"outer_gradient_in_y": norm(f_y)},
        )

    def check(self, problem: Problem, outer: Params, task: Task, some: Task | None = None) -> None:
        random = torch.Generator().manual_seed(0)

        def perturb(leaf: Tensor) -> Tensor:
            return leaf + torch.randn(leaf.shape, generator=random).to(leaf)

        x = leaves(outer)
        y = tree_map(perturb, problem.init_inner(outer, task))
        with torch.enable_grad():
            loss = problem.outer_loss(context_of(problem, x, task), y, (some or task).query)
        (f_x,) = gradients([loss], [None], x)
        reached = context_depends_on(problem, outer, task)
        unused = sorted(name for name in reached if not f_x[name].any())
        if unused:
            raise ValueError(
                "algorithm FreePBGD needs an outer loss in which every outer variable stands, but "
                f"its gradient is zero in {', '.join(unused)}: what they do to it through the "
                "inner variable is left out, and they would never move. Use VPBGD or F2SA"
            )
