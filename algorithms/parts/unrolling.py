"""Derivatives through the steps of the inner loop: three engines that agree, and their base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import OWN, Estimate, InnerState, split_own
from metadist.algorithms.parts.through import DescentThrough, Trace, pull
from metadist.checks.values import require_number, rule
from metadist.draws import Draw
from metadist.followed import filled
from metadist.oracle import Oracle
from metadist.step_rules import SGD, Means, Memory, StepRule
from metadist.trees import Params, add, multiply, sub, tree_map, zeros_like

RATE = OWN + "inner_lr."


@dataclass(frozen=True)
class Unrolling(DescentThrough):
    """A base for methods that differentiate through every step on g.

    Args:
        inner_steps: T, >= 1.
        inner_lr: The rate of plain SGD, > 0.
        learn_lr: Make the rates outer variables: one per inner tensor ("per_tensor") or one per
            element ("per_element", Meta-SGD). A learned rate may become negative. The rate of the
            rule, which must be SGD without schedule, is their initial value.
        truncate: Differentiate twice through this many last steps only; None: all. In earlier
            steps the gradient of g counts as a constant.
        first_order: Use no second derivatives at all (FOMAML), the limit truncate = 0.
        engine: "adjoint" keeps the iterates y_t, with their graphs as far as they fit into
            `Compute.graph_budget`, and makes one second-order product per step; "unrolled"
            keeps the graph of all steps; "higher" does so with that library, for SGD.
        compile: Compile a step and its second-order product with torch.compile, under vmap for
            all tasks that are computed together (engine="adjoint").
    """

    inner_steps: int = rule(5, ge=1)
    learn_lr: Literal["no", "per_tensor", "per_element"] = "no"
    truncate: int | None = None
    first_order: bool = False
    engine: Literal["adjoint", "unrolled", "higher"] = "adjoint"
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_lr not in ("no", "per_tensor", "per_element"):
            raise ValueError(
                f"learn_lr must be 'no', 'per_tensor' or 'per_element', got {self.learn_lr!r}"
            )
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {sorted(ENGINES)}, got {self.engine!r}")
        if self.truncate is not None and self.first_order:
            raise ValueError(
                "truncate must be None with first_order=True, which keeps no second-order step, "
                f"got {self.truncate}"
            )
        if self.truncate is not None:
            require_number(truncate=self.truncate)
        if self.truncate is not None and not 1 <= self.truncate <= self.inner_steps:
            raise ValueError(
                f"truncate must be between 1 and inner_steps ({self.inner_steps}), got "
                f"{self.truncate}; for no second-order step pass first_order=True"
            )
        if self.compile and self.engine != "adjoint":
            raise ValueError(
                f"compile must be False with engine={self.engine!r}, got True: only the kernels "
                "of engine='adjoint' can be compiled and differentiated twice"
            )
        if self.engine == "higher":
            from metadist.algorithms.parts.higher import check_higher

            check_higher(self.step_rule)
        if self.learn_lr != "no":
            _check_learned(self.step_rule, self.learn_lr)
        if self.compile and self.step_rule.clip_norm is not None:
            raise ValueError(
                f"compile must be False with clip_norm={self.step_rule.clip_norm}, got True: the "
                "compiled loop moves a stack of tasks at once, and each is clipped by its own norm"
            )

    @property
    def second_order_steps(self) -> int:
        """Steps at the end of the inner loop that are differentiated twice."""
        if self.first_order:
            return 0
        return self.inner_steps if self.truncate is None else self.truncate

    @property
    def supports_vmap(self) -> bool:
        return self.engine != "higher"

    @property
    def takes_second_derivatives(self) -> bool:
        return self.second_order_steps > 0

    @property
    def compiles(self) -> bool:
        return self.compile

    @property
    def differentiates_values(self) -> bool:
        return self.engine != "adjoint"

    def init_own(self, inner: Params) -> Params:
        if self.learn_lr == "no":
            return {}
        rates = {}
        for name, leaf in inner.items():
            shape = leaf.shape if self.learn_lr == "per_element" else ()
            rates[RATE + name] = leaf.new_full(shape, self.step_rule.lr)
        return rates

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        context, own = split_own(context)
        rates = self._rates(own, inner) if own else self.step_rule.lr

        def descend(oracle: Oracle, context: Params, y: Params) -> Params:
            memory = self.step_rule.start(y)
            for _ in range(self.inner_steps):
                g_y = oracle.inner_grad(context, y, oracle.draw_inner())
                y, memory = self.step_rule.step(y, memory, g_y, rates)
            return y

        adapted: Params = oracle.together(descend, context, inner)
        return adapted

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        context, own = split_own(context)
        if self.learn_lr == "no":
            rates: float | Params = self.step_rule.lr_at(oracle.step)
        else:
            rates = self._rates(own, state.inner)
        memory = state.memory or self.step_rule.start(state.inner)
        # The rates are no argument: under vmap they have no axis of tasks.
        program = partial(_run, self, rates, memory.num_steps)
        result = oracle.together(program, context, state.inner, *memory.means)
        memory = Memory(result.means, memory.num_steps + self.inner_steps)
        hypergradient = dict(result.context)
        for name, leaf in result.rates.items():
            if RATE + name in own:
                # The engines differentiate one rate per element; a shared one adds them up.
                per_element = self.learn_lr == "per_element"
                hypergradient[RATE + name] = leaf if per_element else leaf.sum()
        return Estimate(
            hypergradient=hypergradient,
            start_gradient=result.start,
            state=InnerState(result.inner, self.carried(memory)),
            metrics={},
        )

    def _rates(self, own: Params, inner: Params) -> Params:
        return {name: own[RATE + name] for name in inner}


class Unrolled(NamedTuple):
    """The adapted inner variable, and d f / d (context, start of adaptation, rates).

    `means` are those of the rule after the last step.
    """

    inner: Params
    context: Params
    start: Params
    rates: Params
    means: Means


class Start(NamedTuple):
    """Where the inner loop starts."""

    y: Params
    memory: Memory


class Step(NamedTuple):
    """What the way back needs of one step.

    Args:
        trace: What the derivative of the rule needs.
        direction: What the rates multiplied, where they are learned.
        draw: That of its gradient.
    """

    trace: Trace
    direction: Params | None
    draw: Draw


def adjoint(
    loop: Unrolling, oracle: Oracle, context: Params, rates: float | Params, start: Start
) -> Unrolled:
    """Forward keeping the iterates, then backward with one second-order product per step.

    The oracle keeps the graphs of as many steps as its budget allows and makes the others again.

    A step is  (y_{t+1}, m_{t+1}) = step(y_t, m_t, g_y(x, y_t)),  so the chain rule from the last to
    the first, with w = d f / d y_{t+1} and p = d f / d m_{t+1}, is

        (w, p, u) <- (w, p) times the derivative of the step in (y, m, g);   h += J u;   w += H u

    For SGD  u = -rates w + p,  p <- momentum u  and  d rates -= w m_{t+1}.
    """
    steps, learns = loop.step_rule, loop.learn_lr != "no"
    num_first_order = loop.inner_steps - loop.second_order_steps
    # In a step whose gradient counts as a constant, decay and rates alone have a derivative.
    first = 0 if learns or steps.weight_decay else num_first_order
    y, memory = start
    done: list[Step] = []
    for t in range(loop.inner_steps):
        draw = oracle.draw_inner()
        ask = oracle.inner_grad if t < num_first_order else oracle.kept_grad
        trace = Trace(y, memory, ask(context, y, draw))
        y, memory = steps.step(*trace, rates)
        direction = None
        if learns:
            direction = memory.means[0] if memory.means else steps.gradient(trace.y, trace.g_y)
        if t >= first:
            # For plain SGD that is y alone: all other memory is free at once.
            done.append(Step(trace.kept_for(steps), direction, draw))

    h, w = oracle.outer_grads(context, y, oracle.draw_outer())
    rate_gradient = zeros_like(start.y) if learns else {}
    w_means: Means = tuple(map(zeros_like, memory.means))
    for t in reversed(range(first, loop.inner_steps)):
        step = done.pop()  # pop, so that an iterate is freed as soon as it has been used
        if step.direction is not None:
            rate_gradient = sub(rate_gradient, multiply(w, step.direction))
        w, w_means, u = pull(oracle, steps, step.trace, rates, w, w_means)
        if t >= num_first_order and not done and start.y.keys() <= oracle.constants.start:
            h = add(h, oracle.cross(context, step.trace.y, u, step.draw))  # w is of no more use
        elif t >= num_first_order:
            j_u, h_u = oracle.second_order(context, step.trace.y, u, step.draw)
            h, w = add(h, j_u), add(w, h_u)
    return Unrolled(inner=y, context=h, start=w, rates=rate_gradient, means=memory.means)


def unrolled(
    loop: Unrolling, oracle: Oracle, context: Params, rates: float | Params, start: Start
) -> Unrolled:
    """One reverse pass through the graph of all steps."""
    steps = loop.step_rule
    learned = rates if isinstance(rates, dict) else {}

    def query_loss(
        context: Params, y: Params, learned: Params
    ) -> tuple[Tensor, tuple[Params, Means]]:
        memory = start.memory
        for t in range(loop.inner_steps):
            draw = oracle.draw_inner()
            g_y = torch.func.grad(lambda y: oracle.inner_value(context, y, draw))(y)  # noqa: B023
            if t < loop.inner_steps - loop.second_order_steps:
                g_y = tree_map(Tensor.detach, g_y)
            y, memory = steps.step(y, memory, g_y, learned or rates)
        value = oracle.outer_value(context, y, oracle.draw_outer())
        return value, (y, memory.means)

    element_rates = {name: leaf.expand(start.y[name].shape) for name, leaf in learned.items()}
    loss, pull, (y, means) = torch.func.vjp(  # type: ignore[misc]  # three with aux
        query_loss, context, start.y, element_rates, has_aux=True
    )
    # torch.func.grad would keep a graph of this pass, too, which is larger than that of all steps.
    h, w, rate_gradient = pull(loss.new_ones(()), retain_graph=False, create_graph=False)
    return Unrolled(inner=y, context=h, start=w, rates=rate_gradient, means=means)


def through_higher(
    loop: Unrolling, oracle: Oracle, context: Params, rates: float | Params, start: Start
) -> Unrolled:
    """The same as `unrolled`, by the library `higher`; imported where it is used."""
    from metadist.algorithms.parts.higher import unroll

    steps = loop.step_rule
    assert isinstance(steps, SGD)
    if not isinstance(rates, dict):
        rates = {name: filled(leaf, (), rates, leaf.dtype) for name, leaf in start.y.items()}
    y, h, w, rate_gradient = unroll(
        oracle,
        context,
        start.y,
        rates,
        momentum=steps.momentum,
        num_steps=loop.inner_steps,
        second_order_steps=loop.second_order_steps,
    )
    return Unrolled(inner=y, context=h, start=w, rates=rate_gradient, means=start.memory.means)


def _run(
    loop: Unrolling,
    rates: float | Params,
    num_steps: int,
    oracle: Oracle,
    context: Params,
    y: Params,
    *means: Params,
) -> Unrolled:
    return ENGINES[loop.engine](loop, oracle, context, rates, Start(y, Memory(means, num_steps)))


ENGINES = {"adjoint": adjoint, "unrolled": unrolled, "higher": through_higher}


def _check_learned(steps: StepRule, learn_lr: str) -> None:
    if not isinstance(steps, SGD):
        raise ValueError(
            f"inner_optimizer must be SGD with learn_lr={learn_lr!r}, got {steps!r}: the rates "
            "that are learned are those of SGD"
        )
    if steps.schedule != "constant" or steps.warmup_steps:
        raise ValueError(
            f"inner_optimizer must have schedule='constant' and warmup_steps=0 with "
            f"learn_lr={learn_lr!r}, got {steps!r}: the outer optimiser sets the rates"
        )
