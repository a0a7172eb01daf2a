"""V-PBGD: descent on f plus a growing penalty on how far g is above its minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metadist.algorithm import Estimate
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop, check_first_step
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.step_rules import SGD
from metadist.trees import Params, add, norm, scale, sub


class VPBGDState(NamedTuple):
    """y of the penalised problem, omega, which follows the lower solution, and their memories."""

    inner: Params
    lower_solution: Params
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class VPBGD(InnerLoop):
    """Value-function Penalty-based Bilevel Gradient Descent (V-PBGD).

        omega <- inner_steps of SGD on g from omega
        y <- y - y_lr s (f_y + gamma g_y)(x, y)
        h = s (f_x(x, y) + gamma (g_x(x, y) - g_x(x, omega)))

    with s = min(1 / gamma, 1), which keeps steps stable as gamma grows; so where gamma > 1, h is
    an estimate of the hypergradient divided by gamma. gamma rises linearly over gamma_steps outer
    steps. x and y move together. `adapt` and `inner_lr` are omega's; the adapted inner variable of
    training is y, as in the paper.

    Args:
        y_lr: The rate of y, > 0, in the place of that of `inner_optimizer`; s multiplies its rate.
        gamma_init: gamma at outer step 0, >= 0; needs gamma_steps.
        gamma_max: gamma from outer step gamma_steps on, > 0 and >= gamma_init.
        gamma_steps: The length of the rise, >= 0; with 0, gamma is gamma_max throughout.
        rounds: Moves of y (each after a loop of omega) at one x, >= 1; the paper has 1.

    Family: First derivatives of g.
    For: non-convex, Polyak-Lojasiewicz; smooth.
    Cost: rounds x (T G + F + 2 G + 2 Gx).
    State: y, omega.
    Memory: one more y.
    Use: no second derivatives, several lower solutions.
    Breaks: on a new task with rounds = 1: f_y does not enter h yet, which can point away from
    the hypergradient; set more `rounds`, or keep states. The end point has a bias of
    O(1/gamma_max); a rise too fast stalls x. Refused below float32, whose rounding is larger than
    the differences.
    Source: Shen, Chen, "On Penalty-based Bilevel Gradient Descent Method", ICML 2023,
    algorithm 1. The scaled steps are those of its official code.
    Differs: x is stepped by the outer optimiser.
    """

    takes_second_derivatives = False

    y_lr: float = rule(0.1, gt=0)
    gamma_init: float = rule(0.0, ge=0)
    gamma_max: float = rule(10.0, gt=0)
    gamma_steps: int = rule(0, ge=0)
    rounds: int = rule(1, ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma_init > self.gamma_max:
            raise ValueError(
                f"gamma_init must be <= gamma_max ({self.gamma_max}), got {self.gamma_init}"
            )
        if self.gamma_init and not self.gamma_steps:
            raise ValueError(
                f"gamma_init must be 0 with gamma_steps=0, got {self.gamma_init}: without a rise, "
                "gamma is gamma_max throughout"
            )

    @property
    def kept_options(self) -> dict[str, str]:
        return {"y_lr": "rounds"} if self.rounds == 1 else {}

    def init(self, oracle: Oracle, context: Params, inner: Params) -> VPBGDState:
        return VPBGDState(inner, inner, self.new_memory(inner, 2))

    def penalty(self, step: int) -> float:
        """gamma at an outer step."""
        done = min(step / self.gamma_steps, 1.0) if self.gamma_steps else 1.0
        return self.gamma_init + done * (self.gamma_max - self.gamma_init)

    def estimate(self, oracle: Oracle, context: Params, state: VPBGDState) -> Estimate:
        return self.repeat(self._move, self.rounds, oracle, context, state)

    def _check_first_step(self) -> None:
        super()._check_first_step()
        if not isinstance(self.step_rule, SGD):
            check_first_step("rounds", self.rounds, self.step_rule)

    def _move(self, oracle: Oracle, context: Params, state: VPBGDState) -> Estimate:
        gamma = self.penalty(oracle.step)
        factor = 1 / max(gamma, 1.0)
        y_memory, omega_memory = state.memory or (NO_MEMORY, NO_MEMORY)
        y = state.inner
        omega, omega_memory = self.descend(oracle, context, state.lower_solution, omega_memory)
        draw = oracle.draw_inner()  # one for both, so that noise cancels in the difference
        g_x, g_y = oracle.inner_grads(context, y, draw)
        g_x_at_omega = oracle.inner_grad_x(context, omega, draw)
        f_x, f_y = oracle.outer_grads(context, y, oracle.draw_outer())
        rate = factor * self.step_rule.with_lr(self.y_lr).lr_at(oracle.step)
        moved, y_memory = self.step_inner(oracle, y, y_memory, add(f_y, g_y, gamma), rate)
        return Estimate(
            hypergradient=scale(add(f_x, sub(g_x, g_x_at_omega), gamma), factor),
            start_gradient=None,
            state=VPBGDState(inner=moved, lower_solution=omega, memory=(y_memory, omega_memory)),
            metrics={"inner_gradient_norm": norm(g_y)},
        )
