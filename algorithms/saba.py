"""SABA: SOBA with the variance taken out by tables of past derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Card, Estimate
from metadist.algorithms.parts.inner import decayed
from metadist.algorithms.parts.linear import relative_residual
from metadist.algorithms.soba import SOBA
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, norm, stack, sub, tree_map, zeros_like


class SABAState(NamedTuple):
    """y, v, and per part the last derivatives seen, with a leading axis over parts.

    Args:
        inner, v: y and its adjoint.
        gradients: grad_y g, by parts of the support set.
        products: H v, likewise.
        crosses: J v, likewise.
        directs: grad_x f, by parts of the query set.
        rights: grad_y f, likewise.
        age: steps taken.
    """

    inner: Params
    v: Params
    gradients: Params
    products: Params
    crosses: Params
    directs: Params
    rights: Params
    age: int


@dataclass(frozen=True)
class SABA(SOBA):
    """Stochastic average bilevel algorithm: the directions of SOBA by SAGA.

        d = n share_i (new_i - table_i) + sum_j share_j table_j,    table_i <- new_i

    for each of grad_y g, H v, J v (part i of the support set) and grad_x f, grad_y f (part i' of
    the query set), parts drawn uniformly and the same for all tasks of a step. d is unbiased and
    its variance goes to 0 at the solution, so constant rates converge.

    Args:
        full_pass: fill the tables at the first step of a state, where they are zero otherwise.

    Cost: 1 gradient, 1 outer gradient, 1 product (H v and J v together) per step of y, and the
    mean of the tables; with full_pass one more pass over both sets at the first step.
    Memory: n parts of support, m of query: tables of n (2 y + x) + m (y + x) numbers. The state.
    Breaks: as SOBA, outer_lr must be well below inner_lr and adjoint_lr; sets that change between
    steps, hence new tasks, where the tables are of no use.
    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022. Differs from it in: tables
    by part, not by example.
    """

    card = Card(
        title="Stochastic average bilevel algorithm",
        source="Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022",
        problems="strongly convex, finite sums",
        cost="T (G + F + H + J)",
        state="y, v, tables of n (2 y + x) + m (y + x) numbers",
        use="kept states and mini-batches: converges with constant rates",
    )

    full_pass: bool = False

    @property
    def tolerates_staleness(self) -> bool:
        return False

    def init(self, oracle: Oracle, context: Params, inner: Params) -> SABAState:
        n, m = len(oracle.parts("support")), len(oracle.parts("query"))
        zero_x, zero_y = zeros_like(context), zeros_like(inner)
        y_by_support, x_by_support = stack([zero_y] * n), stack([zero_x] * n)
        y_by_query, x_by_query = stack([zero_y] * m), stack([zero_x] * m)
        return SABAState(
            inner, zero_y, y_by_support, y_by_support, x_by_support, x_by_query, y_by_query, 0
        )

    def move(self, oracle: Oracle, context: Params, state: SABAState) -> Estimate:
        if self.full_pass and state.age == 0:
            state = self._fill(oracle, context, state)
        y, v = state.inner, state.v
        support, query = oracle.parts("support"), oracle.parts("query")
        i, j = (int(oracle.uniform() * len(parts)) for parts in (support, query))
        j_v, h_v = oracle.second_order(context, y, v, support[i])
        direct, right = oracle.outer_grads(context, y, query[j])
        gradient, gradients = saga(
            oracle.inner_grad(context, y, support[i]), state.gradients, support, i
        )
        product, products = saga(h_v, state.products, support, i)
        cross, crosses = saga(j_v, state.crosses, support, i)
        direct, directs = saga(direct, state.directs, query, j)
        right, rights = saga(right, state.rights, query, j)
        residual = sub(product, right)
        rate = decayed(self.adjoint_lr, self.adjoint_decay, oracle.step)
        moved = SABAState(
            self.descend_once(oracle, y, gradient),
            add(v, residual, -rate),
            gradients,
            products,
            crosses,
            directs,
            rights,
            state.age + 1,
        )
        metrics = {
            "adjoint_residual": relative_residual(product, right),
            "inner_gradient_norm": norm(gradient),
        }
        return Estimate(sub(direct, cross), None, moved, metrics)

    def _fill(self, oracle: Oracle, context: Params, state: SABAState) -> SABAState:
        # The tables of H v and J v are right as they are: v is zero.
        y = state.inner
        gradients = [oracle.inner_grad(context, y, part) for part in oracle.parts("support")]
        directs, rights = zip(
            *(oracle.outer_grads(context, y, part) for part in oracle.parts("query")), strict=True
        )
        return state._replace(
            gradients=stack(gradients), directs=stack(list(directs)), rights=stack(list(rights))
        )


def saga(new: Params, table: Params, parts: list[Draw], i: int) -> tuple[Params, Params]:
    """(the unbiased direction, the table with `new` in row i)."""
    shares = [part.share or 1.0 for part in parts]

    def direction(fresh: Tensor, rows: Tensor) -> Tensor:
        mean = torch.tensordot(rows.new_tensor(shares), rows, dims=1)
        return len(parts) * shares[i] * (fresh - rows[i]) + mean

    def replaced(fresh: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([rows[:i], fresh[None], rows[i + 1 :]])

    return tree_map(direction, new, table), tree_map(replaced, new, table)
