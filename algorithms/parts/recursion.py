"""Recursive momentum: gradients corrected by differences between two points on the same draws."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY, SingleLoop
from metadist.algorithms.parts.neumann import NeumannEstimate
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, norm, sub, zeros_like

Estimator = Callable[[Params, Params], NeumannEstimate]
"""(context, y) -> hypergradient, always on the same draws."""


RECURSION_ALONE = (
    "its direction is a recursion on differences already, whose noise cancels only while steps are "
    "short multiples of it"
)


def recursion(new: Params, old: Params, direction: Params, weight: float) -> Params:
    """new + (1 - weight) (direction - old)."""
    return add(new, sub(direction, old), 1 - weight)


def falling_weight(weight: float, exponent: float, step: int) -> float:
    """1 at step 0, then weight * step^-exponent, at most 1."""
    return min(1.0, weight * step**-exponent) if step else 1.0


class RecursiveState(NamedTuple):
    """y; the point at which both directions were last evaluated; the directions; steps of y."""

    inner: Params
    previous_context: Params
    previous_inner: Params
    inner_direction: Params
    outer_direction: Params
    age: int
    memory: Any = NO_MEMORY


def new_recursive_state(context: Params, inner: Params) -> RecursiveState:
    """The state before the first step, whose directions start as plain estimates."""
    zero_x, zero_y = zeros_like(context), zeros_like(inner)
    return RecursiveState(
        inner=inner,
        previous_context=zero_x,
        previous_inner=zero_y,
        inner_direction=zero_y,
        outer_direction=zero_x,
        age=0,
    )


@dataclass(frozen=True)
class RecursiveMomentum(SingleLoop):
    """A base for STORM on both levels, with the formulas of MRBO.

    A method only says how it estimates the hypergradient h, in `draw_estimator`.

    Args:
        adjoint_steps: Q, the length of the Neumann chain of h.
        adjoint_lr: eta of h, > 0; at most 1 / L.
        outer_weight: The factor of a_k, > 0; 1 with weight_decay=0 means no recursion.
        inner_weight: The factor of b_k, > 0.
        weight_decay: The exponent of both weights, in [0, 1]; the paper has 2/3.
    """

    refuses_memory = RECURSION_ALONE

    adjoint_steps: int = rule(10, ge=0)
    adjoint_lr: float = rule(0.1, gt=0)
    outer_weight: float = rule(0.5, gt=0)
    inner_weight: float = rule(0.5, gt=0)
    weight_decay: float = rule(2 / 3, ge=0, le=1)

    @property
    def kept_options(self) -> dict[str, str]:
        return {"inner_weight": "inner_steps"} if self.inner_steps == 1 else {}

    @abstractmethod
    def draw_estimator(self, oracle: Oracle) -> Estimator:
        """The hypergradient estimate on draws made now."""

    def recursive_weight(self, step: int) -> float:
        return falling_weight(self.outer_weight, self.weight_decay, step)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> RecursiveState:
        return new_recursive_state(context, inner)

    def estimate(self, oracle: Oracle, context: Params, state: RecursiveState) -> Estimate:
        moved: RecursiveState = super().estimate(oracle, context, state).state
        estimate_at = self.draw_estimator(oracle)
        # w is evaluated where y stood before its last step, as u was: both belong to one point.
        new = estimate_at(context, moved.previous_inner)
        w = new.hypergradient
        if state.age:
            old = estimate_at(state.previous_context, state.previous_inner).hypergradient
            weight = self.recursive_weight(state.age // self.inner_steps)
            w = recursion(w, old, state.outer_direction, weight)
        return Estimate(
            hypergradient=w,
            start_gradient=None,
            state=moved._replace(outer_direction=w),
            metrics={**new.metrics, "inner_gradient_norm": norm(moved.inner_direction)},
        )

    def move(self, oracle: Oracle, context: Params, state: RecursiveState) -> Estimate:
        draw = oracle.draw_inner()
        u = oracle.inner_grad(context, state.inner, draw)
        if state.age:
            old = oracle.inner_grad(state.previous_context, state.previous_inner, draw)
            weight = falling_weight(self.inner_weight, self.weight_decay, state.age)
            u = recursion(u, old, state.inner_direction, weight)
        y, memory = self.step_inner(oracle, state.inner, state.memory, u)
        moved = RecursiveState(
            inner=y,
            previous_context=context,
            previous_inner=state.inner,
            inner_direction=u,
            outer_direction=state.outer_direction,
            age=state.age + 1,
            memory=memory,
        )
        return Estimate(
            hypergradient=state.outer_direction, start_gradient=None, state=moved, metrics={}
        )
