"""Derivatives through the steps of the inner loop: three engines that agree, and their base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import OWN, Algorithm, Estimate, InnerState, split_own
from metadist.algorithms.parts.inner import check_first_step, sgd, sgd_step
from metadist.checks.values import check_fields, rule
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, multiply, scale, sub, tree_map, zeros_like

RATE = OWN + "inner_lr."


@dataclass(frozen=True)
class Unrolling(Algorithm):
    """A base for methods that differentiate through every step of SGD on g.

    Args:
        inner_steps: T, >= 1.
        inner_lr: The rate, > 0; the initial value if `learn_lr` is on.
        momentum: The momentum of the inner SGD, in [0, 1); it needs inner_steps >= 2.
        learn_lr: Make the rates outer variables: one per inner tensor ("per_tensor") or one per
            element ("per_element", Meta-SGD). A learned rate may become negative.
        truncate: Differentiate twice through this many last steps only; None: all. Earlier
            steps count as the identity for the start of adaptation.
        first_order: Use no second derivatives at all (FOMAML), the limit truncate = 0.
        engine: "adjoint" keeps the iterates y_t, with their graphs as far as they fit into
            `Compute.graph_budget`, and makes one second-order product per step; "unrolled"
            keeps the graph of all steps; "higher" does so with that library.
        inner_optimizer: "sgd", or with engine="higher" a key of `HIGHER_OPTIMIZERS`; all but
            "sgd" need inner_steps >= 2.
        compile: Compile a step and its second-order product with torch.compile, under vmap for
            all tasks that are computed together (engine="adjoint").
    """

    inner_steps: int = rule(5, ge=1)
    inner_lr: float = rule(0.1, gt=0)
    momentum: float = rule(0.0, ge=0, lt=1)
    learn_lr: Literal["no", "per_tensor", "per_element"] = "no"
    truncate: int | None = None
    first_order: bool = False
    engine: Literal["adjoint", "unrolled", "higher"] = "adjoint"
    inner_optimizer: str = "sgd"
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
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

            check_higher(self.inner_optimizer, self.momentum, self.learn_lr)
        elif self.inner_optimizer != "sgd":
            raise ValueError(
                f"inner_optimizer must be 'sgd' with engine={self.engine!r}, got "
                f"{self.inner_optimizer!r}; engine='higher' has others"
            )
        check_first_step(self.inner_steps, self.inner_optimizer, self.momentum)

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
            rates[RATE + name] = leaf.new_full(shape, self.inner_lr)
        return rates

    def init(self, oracle: Oracle, context: Params, inner: Params) -> InnerState:
        return InnerState(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        context, own = split_own(context)
        rates = self._rates(own, inner)
        if self.inner_optimizer != "sgd":
            return ENGINES[self.engine](self, oracle, context, rates, inner).inner

        def descend(oracle: Oracle, context: Params, y: Params) -> Params:
            return sgd(oracle, context, y, self.inner_steps, rates, self.momentum)

        adapted: Params = oracle.together(descend, context, inner)
        return adapted

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        context, own = split_own(context)
        rates = self._rates(own, state.inner)
        # The rates are no argument: under vmap they have no axis of tasks.
        result = oracle.together(partial(_run, self, rates), context, state.inner)
        hypergradient = dict(result.context)
        for name, leaf in result.rates.items():
            if RATE + name in own:
                # The engines differentiate one rate per element; a shared one adds them up.
                per_element = self.learn_lr == "per_element"
                hypergradient[RATE + name] = leaf if per_element else leaf.sum()
        return Estimate(
            hypergradient=hypergradient,
            start_gradient=result.start,
            state=InnerState(result.inner),
            metrics={},
        )

    def _rates(self, own: Params, inner: Params) -> Params:
        if self.learn_lr == "no":
            return {name: leaf.new_full((), self.inner_lr) for name, leaf in inner.items()}
        return {name: own[RATE + name] for name in inner}


class Unrolled(NamedTuple):
    """The adapted inner variable, and d f / d (context, start of adaptation, rates)."""

    inner: Params
    context: Params
    start: Params
    rates: Params


class Step(NamedTuple):
    """What the way back needs of one step: y before it, the velocity that moved y, its draw."""

    y: Params
    velocity: Params | None
    draw: Draw


def adjoint(
    loop: Unrolling, oracle: Oracle, context: Params, rates: Params, start: Params
) -> Unrolled:
    """Forward keeping the iterates, then backward with one second-order product per step.

    The oracle keeps the graphs of as many steps as its budget allows and makes the others again.

    The steps are  m_{t+1} = momentum m_t + g_y(x, y_t);  y_{t+1} = y_t - rates m_{t+1},  so the
    chain rule from the last to the first, with w = d f / d y_{t+1} and u = d f / d m_{t+1}, is

        u <- -rates w + momentum u;   h <- h + J u;   w <- w + H u;   d rates <- d rates - w m_{t+1}
    """
    learns = loop.learn_lr != "no"
    y, velocity = start, None
    steps: list[Step] = []
    for t in range(loop.inner_steps):
        draw = oracle.draw_inner()
        first_order = t < loop.inner_steps - loop.second_order_steps
        ask = oracle.inner_grad if first_order else oracle.kept_grad
        g_y = ask(context, y, draw)
        y_t = y
        y, velocity = sgd_step(y, velocity, g_y, rates, loop.momentum)
        # Only learned rates need the velocity; without them its memory is free at once.
        steps.append(Step(y_t, velocity if learns else None, draw))

    h, w = oracle.outer_grads(context, y, oracle.draw_outer())
    rate_gradient = zeros_like(start) if learns else {}
    w_velocity: Params | None = None
    for t in reversed(range(loop.inner_steps)):
        step = steps.pop()  # pop, so that an iterate is freed as soon as it has been used
        if step.velocity is not None:
            rate_gradient = sub(rate_gradient, multiply(w, step.velocity))
        # g_y enters y_{t+1} through the velocity only, so this is its cotangent as well.
        u = scale(multiply(rates, w), -1.0)
        if w_velocity is not None:
            u = add(u, w_velocity, loop.momentum)
        if t >= loop.inner_steps - loop.second_order_steps:
            j_u, h_u = oracle.second_order(context, step.y, u, step.draw)
            h, w = add(h, j_u), add(w, h_u)
        w_velocity = u if loop.momentum else None
    return Unrolled(inner=y, context=h, start=w, rates=rate_gradient)


def unrolled(
    loop: Unrolling, oracle: Oracle, context: Params, rates: Params, start: Params
) -> Unrolled:
    """One reverse pass through the graph of all steps."""

    def query_loss(context: Params, start: Params, rates: Params) -> tuple[Tensor, Params]:
        y, velocity = start, None
        for t in range(loop.inner_steps):
            draw = oracle.draw_inner()
            g_y = torch.func.grad(lambda y: oracle.inner_value(context, y, draw))(y)  # noqa: B023
            if t < loop.inner_steps - loop.second_order_steps:
                g_y = tree_map(Tensor.detach, g_y)
            y, velocity = sgd_step(y, velocity, g_y, rates, loop.momentum)
        return oracle.outer_value(context, y, oracle.draw_outer()), y

    element_rates = tree_map(lambda rate, leaf: rate.expand(leaf.shape), rates, start)
    loss, pull, y = torch.func.vjp(  # type: ignore[misc]  # three with aux
        query_loss, context, start, element_rates, has_aux=True
    )
    # torch.func.grad would keep a graph of this pass, too, which is larger than that of all steps.
    gradients = pull(loss.new_ones(()), retain_graph=False, create_graph=False)
    return Unrolled(y, *gradients)


def through_higher(
    loop: Unrolling, oracle: Oracle, context: Params, rates: Params, start: Params
) -> Unrolled:
    """The same as `unrolled`, by the library `higher`; imported where it is used."""
    from metadist.algorithms.parts.higher import unroll

    return Unrolled(
        *unroll(
            oracle,
            context,
            start,
            rates,
            optimizer=loop.inner_optimizer,
            momentum=loop.momentum,
            num_steps=loop.inner_steps,
            second_order_steps=loop.second_order_steps,
        )
    )


def _run(
    loop: Unrolling, rates: Params, oracle: Oracle, context: Params, start: Params
) -> Unrolled:
    return ENGINES[loop.engine](loop, oracle, context, rates, start)


ENGINES = {"adjoint": adjoint, "unrolled": unrolled, "higher": through_higher}
