"""Derivatives through one step of a rule, where what it is made of may not be known yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from metadist.algorithms.parts.inner import Descent
from metadist.oracle import Oracle
from metadist.step_rules import Adam, Means, Memory, Pulled, StepRule
from metadist.trees import Params

# An oracle on many machines gives values that come later. Arithmetic on them waits by itself, the
# transforms of torch.func do not: `Oracle.apply` makes them wait.


@dataclass(frozen=True)
class DescentThrough(Descent):
    """A base for methods that differentiate through the steps of y."""

    @property
    def bears_rounding(self) -> str:
        # The derivative of a step of Adam is 1 / (root of a second moment + eps). Rounding decides
        # what that is where a gradient is near 0: measured through 5 steps in bfloat16, h is wrong
        # by a multiple of itself with eps = 1e-8, by 24 % with 1e-4, by 1 % with 1e-3.
        steps = self.step_rule
        return "float32" if isinstance(steps, Adam) and steps.eps < 1e-3 else "bfloat16"


class Trace(NamedTuple):
    """A step as it was: y and memory before it, and the gradient along which it went."""

    y: Params
    memory: Memory
    g_y: Params

    def kept_for(self, steps: StepRule) -> Trace:
        """What `pull` needs of it: y and the number of the step if the rule is linear."""
        if not steps.is_linear:
            return self
        return Trace(self.y, Memory((), self.memory.num_steps), {})


def pull(
    oracle: Oracle,
    steps: StepRule,
    trace: Trace,
    lr: float | Params,
    w: Params,
    w_means: Means,
) -> Pulled:
    """`StepRule.pull` at a step that was made."""
    if steps.is_linear:
        return steps.pull(*trace, lr, w, w_means)

    def compute(trace: Trace, w: Params, w_means: Means) -> Pulled:
        return steps.pull(*trace, lr, w, w_means)

    pulled: Pulled = oracle.apply(compute, (trace, w, w_means), Pulled(w, w_means, w))
    return pulled


def push(
    oracle: Oracle,
    steps: StepRule,
    trace: Trace,
    lr: float,
    dy: Params,
    d_means: Means,
    dg_y: Params,
) -> tuple[Params, Means]:
    """`StepRule.push` at a step that is made."""
    if steps.is_linear:
        return steps.push(*trace, lr, dy, d_means, dg_y)

    def compute(trace: Trace, along: tuple[Params, Means, Params]) -> tuple[Params, Means]:
        return steps.push(*trace, lr, *along)

    pushed: tuple[Params, Means] = oracle.apply(
        compute, (trace, (dy, d_means, dg_y)), (dy, d_means)
    )
    return pushed
