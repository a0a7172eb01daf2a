"""Reptile: move the start of adaptation towards where adaptation ends."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms.parts.inner import Descent
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.problem import Problem, context_depends_on
from metadist.task import Task
from metadist.trees import Params, sub, zeros_like


@dataclass(frozen=True)
class Reptile(Descent):
    """Reptile.

        y_T = inner_steps steps on g from the start;    h = start - y_T

    A first-order method for a learned start of adaptation: with outer SGD of rate epsilon, h is
    start += epsilon mean(y_T - start). It uses no query set. With inner_steps = 1 it is plain SGD
    on the mean of g.

    Args:
        inner_steps: T, >= 1; useful from 2 on.

    Family: Heuristic.
    For: any smooth one, adapted from a learned start.
    Cost: T G.
    State: nothing.
    Memory: the inner variable.
    Use: a learned start of all weights, no query set and no second derivatives.
    Breaks: it trains the start of adaptation only, so a problem whose context depends on the
    outer variable (ANIL's features) is refused; h need not vanish at the solution.
    Source: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, algorithm
    2.
    Differs: inner SGD by default, where the official code runs Adam with beta1 = 0 and carries its
    moments from task to task.
    """

    takes_second_derivatives = False
    trains = "start"
    bears_rounding = "autocast"

    inner_steps: int = rule(5, ge=1)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        adapted, memory = self.descend(oracle, context, state.inner, state.memory)
        return Estimate(
            hypergradient=zeros_like(context),
            start_gradient=sub(state.inner, adapted),
            state=InnerState(adapted, memory),
            metrics={},
        )

    def check(self, problem: Problem, outer: Params, task: Task, some: Task | None = None) -> None:
        depends = context_depends_on(problem, outer, task)
        names = [name for name in outer if name in depends]
        if names:
            raise ValueError(
                "algorithm Reptile trains the start of adaptation only, but the context of this "
                f"problem depends on {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}: "
                "use adapt='all', or ITD"
            )
