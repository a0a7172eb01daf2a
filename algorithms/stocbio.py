"""StocBiO, and the hypergradient by a random Neumann chain that MRBO, VRBO and SUSTAIN share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from torch import Tensor

from metadist.algorithm import Card, Estimate, InnerState
from metadist.algorithms.parts.inner import InnerLoop, check_at_least, check_positive
from metadist.algorithms.parts.linear import relative_residual
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, scale, sub

Draws = Sequence[Draw]
"""A mini-batch: one draw, or all parts of a set for the whole of it."""


def average(batch: Draws, derivative: Callable[[Draw], tuple[Params, ...]]) -> tuple[Params, ...]:
    """Derivatives on a batch. Cost: as many as it has parts."""
    if len(batch) == 1:
        return derivative(batch[0])

    def plus(first: tuple[Params, ...], second: tuple[Params, ...]) -> tuple[Params, ...]:
        return tuple(add(a, b) for a, b in zip(first, second, strict=True))

    weighted = (
        tuple(scale(tree, part.share or 1.0) for tree in derivative(part)) for part in batch
    )
    return reduce(plus, weighted)


class Bundle(NamedTuple):
    """The batches of one estimate; the same bundle can be evaluated at two points.

    Args:
        outer: D_F, of both gradients of f.
        cross: D_G, of J v.
        factors: B_Q .. B_1 in the order of use, one per factor I - eta H of the chain.
    """

    outer: Draws
    cross: Draws
    factors: list[Draws]


def draw_bundle(oracle: Oracle, num_factors: int) -> Bundle:
    """Independent draws, so that the mean of a product of factors is the product of the means."""
    factors: list[Draws] = [[oracle.draw_inner()] for _ in range(num_factors)]
    return Bundle([oracle.draw_outer()], [oracle.draw_inner()], factors)


def whole_bundle(oracle: Oracle, num_factors: int) -> Bundle:
    """The whole sets everywhere."""
    support = oracle.parts("support")
    return Bundle(oracle.parts("query"), support, [support] * num_factors)


class Sample(NamedTuple):
    """One random hypergradient.

    Args:
        hypergradient: grad_x f - J v.
        adjoint: v.
        residual: |H v - grad_y f| / |grad_y f|, on the batches of J v and of f.
    """

    hypergradient: Params
    adjoint: Params
    residual: Tensor


def neumann_sample(oracle: Oracle, x: Params, y: Params, bundle: Bundle, rate: float) -> Sample:
    """With v = rate * (b + P_1 b + .. + P_Q .. P_1 b), P_i = I - rate * H on factor i.

    b = grad_y f. Cost: F + Q H + J; H v comes with J v.
    """
    return _sample(oracle, x, y, bundle, rate, None)


def truncated_sample(
    oracle: Oracle, x: Params, y: Params, bundle: Bundle, rate: float, num_terms: int
) -> Sample:
    """With v = num_terms * rate * P_p .. P_1 b, where the bundle has p factors.

    Over p uniform in 0 .. num_terms-1 its mean is the sum of the Neumann series' first
    `num_terms` terms. Cost: F + p H + J.
    """
    return _sample(oracle, x, y, bundle, rate, num_terms)


def _sample(
    oracle: Oracle, x: Params, y: Params, bundle: Bundle, rate: float, num_terms: int | None
) -> Sample:
    direct, right = average(bundle.outer, lambda draw: oracle.outer_grads(x, y, draw))
    term = total = right
    for batch in bundle.factors:
        (product,) = average(batch, lambda draw: (oracle.hvp(x, y, term, draw),))  # noqa: B023
        term = add(term, product, -rate)
        total = add(total, term)
    v = scale(total, rate) if num_terms is None else scale(term, rate * num_terms)
    j_v, h_v = average(bundle.cross, lambda draw: oracle.second_order(x, y, v, draw))
    return Sample(sub(direct, j_v), v, relative_residual(h_v, right))


@dataclass(frozen=True)
class StocBiO(InnerLoop):
    """StocBiO: stochastic implicit differentiation with a Neumann series of sampled Hessians.

        y_T = inner_steps of SGD on g, each on a fresh draw
        b = grad_y f(x, y_T),  r_Q = b,  r_{i-1} = (I - adjoint_lr * H(x, y_T; B_i)) r_i
        v = adjoint_lr * (r_Q + .. + r_0),    h = grad_x f - J v

    One draw for f, one for J, one per factor, all independent: then the mean of v is
    H^-1 (I - (I - adjoint_lr * H)^(Q+1)) b with the mean H. One draw for all factors would be
    biased by the variance of H.

    Args:
        adjoint_steps: Q, Hessian products, >= 0.
        adjoint_lr: eta, > 0; at most 1 / L, L the largest eigenvalue of H.

    Cost: T gradients, 1 outer gradient, Q + 1 products (the last gives J v).
    Memory: 3 vectors like y. State: y.
    Breaks: adjoint_lr > 2/L diverges, and so do negative eigenvalues of H.
    Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design",
    ICML 2021, algorithms 2 and 3. Differs from it in: all batches have one size, where theirs
    shrink along the chain. Differs from the official code in: all Q + 1 vectors count, times
    adjoint_lr, where it adds up Q propagated vectors unscaled, and draws are independent.
    """

    card = Card(
        title="Stochastic bilevel optimiser",
        source="Ji, Yang, Liang, ICML 2021",
        problems="strongly convex, mini-batches",
        cost="T G + F + Q H + J",
        state="y",
        use="mini-batches, and a fresh unbiased adjoint at every step",
    )

    adjoint_steps: int = 10
    adjoint_lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chain(self.adjoint_steps, self.adjoint_lr, 0)

    def estimate(self, oracle: Oracle, context: Params, state: InnerState) -> Estimate:
        y = self.descend(oracle, context, state.inner)
        bundle = draw_bundle(oracle, self.adjoint_steps)
        sample = neumann_sample(oracle, context, y, bundle, self.adjoint_lr)
        metrics = {"adjoint_residual": sample.residual}
        return Estimate(sample.hypergradient, None, InnerState(y), metrics)


def check_chain(adjoint_steps: int, adjoint_lr: float, least: int) -> None:
    """Raise ValueError for a Neumann chain that cannot be."""
    check_at_least("adjoint_steps", adjoint_steps, least)
    check_positive("adjoint_lr", adjoint_lr)
