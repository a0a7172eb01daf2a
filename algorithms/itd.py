"""ITD: differentiate through the steps of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import OWN, Algorithm, Card, Estimate, InnerState, split_own
from metadist.algorithms.parts.inner import check_sgd, sgd, sgd_step
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, multiply, scale, sub, tree_map, zeros_like

RATE = OWN + "inner_lr."


@dataclass(frozen=True)
class ITD(Algorithm):
    """Iterative differentiation (ITD-BiO), on few-shot tasks MAML, ANIL, FOMAML or Meta-SGD.

        y_{t+1} = y_t - inner_lr * grad_y g(x, y_t),  t = 0 .. inner_steps-1
        h = d f(x, y_T) / dx, through every step

    Backwards from w = grad_y f(x, y_T):  h -= inner_lr * J w;  w -= inner_lr * H w  at each y_t.
    Exact for the unrolled map; away from the solution of the lower problem by
    (1 - inner_lr * mu)^inner_steps, an error that more outer steps do not remove.

    Args:
        inner_steps: T, >= 1.
        inner_lr: > 0; the initial value if `learn_lr` is on.
        momentum: of the inner SGD, in [0, 1).
        learn_lr: make the rates outer variables: one per inner tensor ("per_tensor") or one per
            number ("per_element", Meta-SGD). A learned rate may become negative.
        truncate: differentiate twice through the last so many steps only; None: all. Earlier
            steps count as the identity for the start of adaptation.
        first_order: no second derivatives at all (FOMAML), the limit truncate = 0.
        engine: "adjoint" keeps the iterates y_t and takes one second-order product per
            step; "unrolled" keeps the graph of all steps; "higher" does it with that library.
        inner_optimizer: "sgd", or with engine="higher" a key of `HIGHER_OPTIMIZERS`.
        compile: compile the derivatives with torch.compile (engine="adjoint", no vmap).

    Cost: T gradients, 1 outer gradient, T (or `truncate`) products of second order.
    Memory: T iterates with "adjoint", T graphs otherwise.
    Breaks: inner_lr > 2/L diverges; for second order through hundreds of steps see `truncate`.
    Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design",
    ICML 2021, ITD-BiO; Finn, Abbeel, Levine, ICML 2017 (MAML); Raghu et al., ICLR 2020 (ANIL);
    Li et al., 2017 (Meta-SGD); Shaban et al., AISTATS 2019 (truncation).
    """

    card = Card(
        title="Iterative differentiation (ITD-BiO, MAML, ANIL, FOMAML)",
        source="Ji, Yang, Liang, ICML 2021; Finn, Abbeel, Levine, ICML 2017",
        problems="any smooth one; T steps of SGD are the lower problem",
        cost="T G + F + T (H + J); K (H + J) with truncate=K, none with first_order",
        state="y",
        use="few-shot tasks: a learned start, few inner steps, a new task every time",
    )

    inner_steps: int = 5
    inner_lr: float = 0.1
    momentum: float = 0.0
    learn_lr: Literal["no", "per_tensor", "per_element"] = "no"
    truncate: int | None = None
    first_order: bool = False
    engine: Literal["adjoint", "unrolled", "higher"] = "adjoint"
    inner_optimizer: str = "sgd"
    compile: bool = False

    def __post_init__(self) -> None:
        check_sgd(self.inner_steps, self.inner_lr, self.momentum)
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
    def compiles(self) -> bool:
        return self.compile

    @property
    def differentiates_values(self) -> bool:
        return self.engine != "adjoint"

    def init_own(self, inner: Params) -> Params:
        if self.learn_lr == "no":
            return {}
        shape = (lambda leaf: leaf.shape) if self.learn_lr == "per_element" else lambda leaf: ()
        return {
            RATE + name: leaf.new_full(shape(leaf), self.inner_lr) for name, leaf in inner.items()
        }

    def init(self, oracle: Oracle, context: Params, inner: Params) -> InnerState:
        return InnerState(inner)

    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        context, own = split_own(context)
        if self.inner_optimizer != "sgd":
            return ENGINES[self.engine](self, oracle, context, self._rates(own, inner), inner).inner
        rates = self._rates(own, inner)
        return sgd(oracle, context, inner, self.inner_steps, rates, self.momentum)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        context, own = split_own(context)
        rates = self._rates(own, state.inner)
        result = ENGINES[self.engine](self, oracle, context, rates, state.inner)
        own_gradient = {
            RATE + name: leaf if self.learn_lr == "per_element" else leaf.sum()
            for name, leaf in result.rates.items()
            if RATE + name in own
        }
        return Estimate(
            {**result.context, **own_gradient}, result.start, InnerState(result.inner), {}
        )

    def _rates(self, own: Params, inner: Params) -> Params:
        if self.learn_lr == "no":
            return {name: leaf.new_tensor(self.inner_lr) for name, leaf in inner.items()}
        return {name: own[RATE + name] for name in inner}


class Unrolled(NamedTuple):
    """The adapted inner variable, and d f / d (context, start of adaptation, rates)."""

    inner: Params
    context: Params
    start: Params
    rates: Params


def adjoint(itd: ITD, oracle: Oracle, context: Params, rates: Params, inner: Params) -> Unrolled:
    """Forward keeping the iterates, then backward with one second-order product per step."""
    learns = itd.learn_lr != "no"
    y, velocity = inner, None
    # Of each step: y_t, the velocity that moved it (only learned rates need it), the batch.
    steps: list[tuple[Params, Params | None, Draw]] = []
    for _ in range(itd.inner_steps):
        draw = oracle.draw_inner()
        gradient = oracle.inner_grad(context, y, draw)
        before = y
        y, velocity = sgd_step(y, velocity, gradient, rates, itd.momentum)
        steps.append((before, velocity if learns else None, draw))

    h, w = oracle.outer_grads(context, y, oracle.draw_outer())
    rate_gradient = zeros_like(inner) if learns else {}
    w_velocity: Params | None = None
    for t in reversed(range(itd.inner_steps)):
        before, moved, draw = steps.pop()
        if moved is not None:
            rate_gradient = sub(rate_gradient, multiply(w, moved))
        # The cotangent of the velocity, which is also that of the gradient at y_t.
        u = scale(multiply(rates, w), -1.0)
        if w_velocity is not None:
            u = add(u, w_velocity, itd.momentum)
        if t >= itd.inner_steps - itd.second_order_steps:
            j_u, h_u = oracle.second_order(context, before, u, draw)
            h, w = add(h, j_u), add(w, h_u)
        w_velocity = u if itd.momentum else None
    return Unrolled(y, h, w, rate_gradient)


def unrolled(itd: ITD, oracle: Oracle, context: Params, rates: Params, inner: Params) -> Unrolled:
    """One reverse pass through the graph of all steps."""

    def query_loss(context: Params, start: Params, rates: Params) -> tuple[Tensor, Params]:
        y, velocity = start, None
        for t in range(itd.inner_steps):
            draw = oracle.draw_inner()
            gradient = torch.func.grad(lambda y: oracle.inner_value(context, y, draw))(y)  # noqa: B023
            if t < itd.inner_steps - itd.second_order_steps:
                gradient = tree_map(Tensor.detach, gradient)
            y, velocity = sgd_step(y, velocity, gradient, rates, itd.momentum)
        return oracle.outer_value(context, y, oracle.draw_outer()), y

    element_rates = tree_map(lambda rate, leaf: rate.expand(leaf.shape), rates, inner)
    gradients, y = torch.func.grad(query_loss, argnums=(0, 1, 2), has_aux=True)(
        context, inner, element_rates
    )
    return Unrolled(y, *gradients)


def through_higher(
    itd: ITD, oracle: Oracle, context: Params, rates: Params, inner: Params
) -> Unrolled:
    """The same as `unrolled`, by the library `higher`; imported where it is used."""
    from metadist.algorithms.parts.higher import unroll

    return Unrolled(
        *unroll(
            oracle,
            context,
            inner,
            rates,
            optimizer=itd.inner_optimizer,
            momentum=itd.momentum,
            num_steps=itd.inner_steps,
            second_order_steps=itd.second_order_steps,
        )
    )


ENGINES = {"adjoint": adjoint, "unrolled": unrolled, "higher": through_higher}
