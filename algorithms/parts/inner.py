"""The inner loop: the bases that most methods stand on, and the steps that they make."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from metadist.algorithm import Algorithm, Estimate, InnerState, State
from metadist.checks.values import check_fields, rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.step_rules import SGD, Memory, StepRule
from metadist.trees import Params


def decayed(rate: float, exponent: float, step: int) -> float:
    """rate * (step + 1)^-exponent: the schedule of a rate over outer steps."""
    return rate * (step + 1) ** -exponent


NO_MEMORY: tuple[()] = ()
"""What a state has in the place of a `Memory` if its method keeps none."""

DECAY_OF_G = (
    "y would then solve another problem than h is the gradient of. Write the decay into inner_loss"
)


@dataclass(frozen=True)
class Descent(Algorithm):
    """A base for methods that move y along gradients, by a step rule.

    Args:
        inner_steps: T, >= 1.
        inner_lr: alpha, > 0, the rate of plain gradient descent; short for
            inner_optimizer=SGD(lr=inner_lr).
        inner_optimizer: The rule of the inner steps, `metadist.SGD`, `Adam` or `AdamW`, whose `lr`
            then is inner_lr.
    """

    # What a method cannot take, with the reason; empty: it takes it.
    refuses_decay = ""
    refuses_memory = ""
    refuses_adam = ""

    inner_steps: int = rule(10, ge=1)
    inner_lr: float = rule(0.1, gt=0)
    inner_optimizer: StepRule | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        steps = self.inner_optimizer
        if steps is None:
            return
        if not isinstance(steps, StepRule):
            raise ValueError(
                f"inner_optimizer must be SGD(...), Adam(...) or AdamW(...), got {steps!r}"
            )
        if self.inner_lr != type(self).inner_lr:
            raise ValueError(
                f"inner_lr must be left out with inner_optimizer={steps!r}, got {self.inner_lr}: "
                "the rate is inner_optimizer.lr"
            )
        name = type(self).__name__
        if self.refuses_decay and steps.weight_decay:
            raise ValueError(
                f"inner_optimizer.weight_decay must be 0 in {name}, got {steps.weight_decay}: "
                f"{self.refuses_decay}"
            )
        if self.refuses_memory and steps.num_means:
            raise ValueError(
                f"inner_optimizer must be SGD(momentum=0) in {name}, got {steps!r}: "
                f"{self.refuses_memory}"
            )
        if self.refuses_adam and not isinstance(steps, SGD):
            raise ValueError(
                f"inner_optimizer must be SGD in {name}, got {steps!r}: {self.refuses_adam}"
            )
        self._check_first_step()

    def _check_first_step(self) -> None:
        """Raise ValueError for a rule that ends before what it remembers has any effect."""
        check_first_step("inner_steps", self.inner_steps, self.step_rule)

    @cached_property
    def step_rule(self) -> StepRule:
        """The rule of the inner steps."""
        return self.inner_optimizer or SGD(lr=self.inner_lr)

    @property
    def needs_kept_state(self) -> str:
        if self.step_rule.carry:
            return (
                "inner_optimizer.carry=True continues the velocity or the moments of a kept state "
                "alone. Leave it out"
            )
        return super().needs_kept_state

    def new_memory(self, y: Params, num_variables: int = 1) -> Any:
        """The memory in a state before the first step: nothing, unless it is carried.

        If the rule moves several variables like y, it is a tuple of theirs.
        """
        if not self.step_rule.carry:
            return NO_MEMORY
        memory = self.step_rule.start(y)
        return memory if num_variables == 1 else (memory,) * num_variables

    def carried(self, memory: Any) -> Any:
        """What a state keeps of a memory, or of several."""
        return memory if self.step_rule.carry else NO_MEMORY

    def step_inner(
        self,
        oracle: Oracle,
        y: Params,
        memory: Any,
        direction: Params,
        lr: float | None = None,
    ) -> tuple[Params, Memory]:
        """(y, memory) after one step along `direction`.

        Args:
            oracle: For the outer step, by which the schedule goes.
            y: What moves.
            memory: That of the step before; `NO_MEMORY`: this is the first one.
            direction: Shaped like y.
            lr: The rate if it is not that of the rule at this outer step.
        """
        steps = self.step_rule
        rate = steps.lr_at(oracle.step) if lr is None else lr
        return steps.step(y, memory or steps.start(y), direction, rate)

    def descend(
        self,
        oracle: Oracle,
        context: Params,
        y: Params,
        memory: Any = NO_MEMORY,
        draws: Iterable[Draw] | None = None,
        lr: float | None = None,
    ) -> tuple[Params, Any]:
        """(y, what a state keeps of its memory) after inner_steps steps on g.

        The steps are on `draws` or, if None, on fresh ones. Cost: T gradients.
        """
        if draws is None:
            draws = (oracle.draw_inner() for _ in range(self.inner_steps))
        for draw in draws:
            g_y = oracle.inner_grad(context, y, draw)
            y, memory = self.step_inner(oracle, y, memory, g_y, lr)
        return y, self.carried(memory)

    def repeat(
        self,
        move: Callable[[Oracle, Params, Any], Estimate],
        num_moves: int,
        oracle: Oracle,
        context: Params,
        state: State,
    ) -> Estimate:
        """The last of `num_moves` moves at one x, each from the state that the previous one left.

        Its state has what is carried of the memory of the moves.
        """
        estimate = move(oracle, context, state)
        for _ in range(num_moves - 1):
            estimate = move(oracle, context, estimate.state)
        memory = self.carried(estimate.state.memory)
        return estimate._replace(state=estimate.state._replace(memory=memory))

    def init(self, oracle: Oracle, context: Params, inner: Params) -> State:
        return InnerState(inner, self.new_memory(inner))

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        return self.descend(oracle, context, inner, lr=self.step_rule.lr)[0]

    def unrolled_map(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        steps = self.inner_optimizer
        if steps is None:
            return self.adapt(oracle, context, inner)
        at_step = replace(self, inner_optimizer=steps.with_lr(steps.lr_at(oracle.step)))
        return at_step.adapt(oracle, context, inner)


def check_first_step(field: str, num_steps: int, steps: StepRule) -> None:
    """Raise ValueError if `num_steps` from nothing remembered are too few for a rule."""
    if num_steps > 1 or steps.carry or not steps.first_step:
        return
    if isinstance(steps, SGD):
        option, plain = f"momentum={steps.momentum}", "momentum=0"
    else:
        option, plain = f"inner_optimizer={type(steps).__name__}", "SGD"
    raise ValueError(
        f"{field} must be >= 2 with {option}, got {num_steps}: the inner optimiser starts anew at "
        f"every outer step, and {steps.first_step}. Set more {field}, or {plain}, or carry=True "
        "where states are kept"
    )


@dataclass(frozen=True)
class InnerLoop(Descent):
    """A base for methods that run `inner_steps` steps on g at every outer step."""

    trains = "context"
    refuses_decay = DECAY_OF_G


@dataclass(frozen=True)
class SingleLoop(Descent):
    """A base for single loops: y makes one step where other methods solve for it.

    With states kept from one outer step to the next that is all. On a new task a single step
    says little, so `inner_steps` of them can be made at one x; only the last one's
    hypergradient is used.

    Args:
        inner_steps: Steps of y (and of what else moves) per outer step; the papers have 1.
    """

    trains = "context"
    refuses_decay = DECAY_OF_G

    inner_steps: int = rule(1, ge=1)

    @abstractmethod
    def move(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        """One step of everything, and the hypergradient that goes with it."""

    def estimate(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        return self.repeat(self.move, self.inner_steps, oracle, context, state)
