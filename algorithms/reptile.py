"""Reptile: move the start of adaptation towards where adaptation ends."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.algorithm import Algorithm, Estimate, InnerState
from metadist.algorithms.parts.inner import check_first_step, sgd
from metadist.checks.values import check_fields, rule
from metadist.oracle import Oracle
from metadist.problem import Problem, context_depends_on
from metadist.task import Task
from metadist.trees import Params, sub, zeros_like


@dataclass(frozen=True)
class Reptile(Algorithm):
    """Reptile.

        y_T = inner_steps of SGD on g from the start;    h = start - y_T

    A first-order method for a learned start of adaptation: with outer SGD of rate epsilon, h is
    start += epsilon mean(y_T - start). It uses no query set. With inner_steps = 1 it is plain SGD
    on the mean of g.

    Args:
        inner_steps: T, >= 1; useful from 2 on.
        inner_lr: > 0.
        momentum: The momentum of the inner SGD, in [0, 1); it needs inner_steps >= 2.

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
    Differs: inner SGD, where the official code runs Adam with beta1 = 0 and carries its moments
    from task to task.
    """

    takes_second_derivatives = False
    trains = "start"

    inner_steps: int = rule(5, ge=1)
    inner_lr: float = rule(0.1, gt=0)
    momentum: float = rule(0.0, ge=0, lt=1)

    def __post_init__(self) -> None:
        check_fields(self)
        check_first_step(self.inner_steps, "sgd", self.momentum)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> InnerState:
        return InnerState(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        rates = {name: leaf.new_full((), self.inner_lr) for name, leaf in inner.items()}
        return sgd(oracle, context, inner, self.inner_steps, rates, self.momentum)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        adapted = self.adapt(oracle, context, state.inner)
        return Estimate(
            hypergradient=zeros_like(context),
            start_gradient=sub(state.inner, adapted),
            state=InnerState(adapted),
            metrics={},
        )

    def check(self, problem: Problem, outer: Params, task: Task) -> None:
        depends = context_depends_on(problem, outer, task)
        names = [name for name in outer if name in depends]
        if names:
            raise ValueError(
                "algorithm Reptile trains the start of adaptation only, but the context of this "
                f"problem depends on {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}: "
                "use adapt='all', or ITD"
            )
