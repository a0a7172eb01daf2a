"""The stochastic Neumann chain: an adjoint from sampled Hessians, each on a mini-batch of its own.

`linear.neumann` is the same sum for one matrix, as a solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

from torch import Tensor

from metadist.algorithms.parts.linear import relative_residual
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, add, scale, sub

Sample = Sequence[Draw]
"""A mini-batch: one draw, or all parts of a set for the whole of it."""


def average(sample: Sample, derivative: Callable[[Draw], tuple[Params, ...]]) -> tuple[Params, ...]:
    """Derivatives on a sample, the mean over its parts. Cost: as many as it has parts."""
    if len(sample) == 1:
        return derivative(sample[0])
    weighted = []
    for part in sample:
        share = part.share or 1.0
        weighted.append(tuple(scale(tree, share) for tree in derivative(part)))

    def plus(first: tuple[Params, ...], second: tuple[Params, ...]) -> tuple[Params, ...]:
        return tuple(add(a, b) for a, b in zip(first, second, strict=True))

    return reduce(plus, weighted)


class Bundle(NamedTuple):
    """The samples of one estimate; the same bundle can be evaluated at two points.

    Args:
        outer: D_F, for both gradients of f.
        cross: D_G, for J v.
        factors: B_Q .. B_1 in the order of use, one per factor I - eta H of the chain.
    """

    outer: Sample
    cross: Sample
    factors: list[Sample]


def draw_bundle(oracle: Oracle, num_factors: int) -> Bundle:
    """Independent draws, so that the mean of a product of factors is the product of the means."""
    factors: list[Sample] = [[oracle.draw_inner()] for _ in range(num_factors)]
    return Bundle(outer=[oracle.draw_outer()], cross=[oracle.draw_inner()], factors=factors)


def whole_bundle(oracle: Oracle, num_factors: int) -> Bundle:
    """The whole sets everywhere."""
    support = oracle.parts("support")
    return Bundle(outer=oracle.parts("query"), cross=support, factors=[support] * num_factors)


class NeumannEstimate(NamedTuple):
    """One random hypergradient.

    Args:
        hypergradient: f_x - J v.
        adjoint: v.
        metrics: "adjoint_residual", |H v - f_y| / |f_y| on the samples of J v and of f, where
            somebody reads it.
    """

    hypergradient: Params
    adjoint: Params
    metrics: dict[str, Tensor]


def neumann_estimate(
    oracle: Oracle,
    context: Params,
    y: Params,
    bundle: Bundle,
    rate: float,
    num_terms: int | None = None,
) -> NeumannEstimate:
    """With v = rate * (b + P_1 b + .. + P_p .. P_1 b), P_i = I - rate * H on factor i of p.

    With `num_terms` the last term stands for all of them: v = num_terms * rate * P_p .. P_1 b. Over
    p uniform in 0 .. num_terms-1 its mean is the sum of the first `num_terms` terms of the series.

    b = f_y. Cost: F + p H + J.
    """
    f_x, b = average(bundle.outer, lambda draw: oracle.outer_grads(context, y, draw))
    term = total = b
    for sample in bundle.factors:
        (h_v,) = average(sample, lambda draw: (oracle.hvp(context, y, term, draw),))  # noqa: B023
        term = add(term, h_v, -rate)
        total = add(total, term)
    v = scale(total, rate) if num_terms is None else scale(term, rate * num_terms)
    if not oracle.reports:
        (j_v,) = average(bundle.cross, lambda draw: (oracle.cross(context, y, v, draw),))
        return NeumannEstimate(sub(f_x, j_v), v, {})
    j_v, h_v = average(bundle.cross, lambda draw: oracle.second_order(context, y, v, draw))
    return NeumannEstimate(sub(f_x, j_v), v, {"adjoint_residual": relative_residual(h_v, b)})
