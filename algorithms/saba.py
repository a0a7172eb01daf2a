"""SABA: SOBA with the variance taken out by tables of past derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import AdjointLoop, adjoint_metrics
from metadist.algorithms.parts.inner import NO_MEMORY
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, stack, sub, tree_map, zeros_like


class SABAState(NamedTuple):
    """y, v, and per part the last derivatives seen, with a leading axis over parts.

    Args:
        inner: y.
        adjoint: v.
        g_y_table: Gradients of g, by parts of the support set.
        h_v_table: Products H v, likewise.
        j_v_table: Products J v, likewise.
        f_x_table: Gradients of f in x, by parts of the query set.
        f_y_table: Gradients of f in y, likewise.
        age: Steps so far.
        memory: That of y.
    """

    inner: Params
    adjoint: Params
    g_y_table: Params
    h_v_table: Params
    j_v_table: Params
    f_x_table: Params
    f_y_table: Params
    age: int
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class SABA(AdjointLoop):
    """Stochastic average bilevel algorithm (SABA).

        d = n share_i (new_i - table_i) + sum_j share_j table_j,    table_i <- new_i

    SAGA's direction in the place of each of SOBA's: of g_y, H v, J v (part i of the support set)
    and f_x, f_y (part i' of the query set), parts drawn uniformly and the same for all tasks of a
    step. d is unbiased and its variance goes to 0 at the solution, so constant rates converge.

    Args:
        full_pass: Fill the tables at the first step of a state; they start at zero otherwise.

    Family: Stochastic.
    For: strongly convex, finite sums.
    Cost: T (G + F + H + J). And the mean of the tables; with full_pass one more pass over both sets
    at the first step.
    State: y, v, tables of n (2 y + x) + m (y + x) numbers. n parts of support, m of query.
    Memory: the state.
    Use: kept states and mini-batches: converges with constant rates.
    Breaks: as SOBA, outer_lr must be well below inner_lr and adjoint_lr; sets that change between
    steps, hence new tasks, where the tables are of no use.
    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022.
    Differs: one entry per part of fixed mini-batches, not per example, as in the benchmark's code;
    parts of unequal size are weighted by their share.
    """

    full_pass: bool = False

    def init(self, oracle: Oracle, context: Params, inner: Params) -> SABAState:
        num_support, num_query = len(oracle.parts("support")), len(oracle.parts("query"))
        zero_x, zero_y = zeros_like(context), zeros_like(inner)
        return SABAState(
            inner=inner,
            adjoint=zero_y,
            g_y_table=stack([zero_y] * num_support),
            h_v_table=stack([zero_y] * num_support),
            j_v_table=stack([zero_x] * num_support),
            f_x_table=stack([zero_x] * num_query),
            f_y_table=stack([zero_y] * num_query),
            age=0,
            memory=self.new_memory(inner),
        )

    def move(self, oracle: Oracle, context: Params, state: SABAState) -> Estimate:
        if self.full_pass and state.age == 0:
            state = self._fill(oracle, context, state)
        y, v = state.inner, state.adjoint
        support, query = oracle.parts("support"), oracle.parts("query")
        i = int(oracle.uniform() * len(support))
        j = int(oracle.uniform() * len(query))
        j_v, h_v = oracle.second_order(context, y, v, support[i])
        g_y = oracle.inner_grad(context, y, support[i])
        f_x, f_y = oracle.outer_grads(context, y, query[j])

        g_y, g_y_table = saga(g_y, state.g_y_table, support, i)
        h_v, h_v_table = saga(h_v, state.h_v_table, support, i)
        j_v, j_v_table = saga(j_v, state.j_v_table, support, i)
        f_x, f_x_table = saga(f_x, state.f_x_table, query, j)
        f_y, f_y_table = saga(f_y, state.f_y_table, query, j)
        y, memory = self.step_inner(oracle, y, state.memory, g_y)
        moved = SABAState(
            inner=y,
            adjoint=self.step_adjoint(oracle, v, h_v, f_y),
            g_y_table=g_y_table,
            h_v_table=h_v_table,
            j_v_table=j_v_table,
            f_x_table=f_x_table,
            f_y_table=f_y_table,
            age=state.age + 1,
            memory=memory,
        )
        return Estimate(
            hypergradient=sub(f_x, j_v),
            start_gradient=None,
            state=moved,
            metrics=adjoint_metrics(oracle, h_v, f_y, g_y),
        )

    def _fill(self, oracle: Oracle, context: Params, state: SABAState) -> SABAState:
        # The tables of H v and J v are right as they are: v is zero.
        y = state.inner
        g_y = [oracle.inner_grad(context, y, part) for part in oracle.parts("support")]
        f = [oracle.outer_grads(context, y, part) for part in oracle.parts("query")]
        return state._replace(
            g_y_table=stack(g_y),
            f_x_table=stack([f_x for f_x, _ in f]),
            f_y_table=stack([f_y for _, f_y in f]),
        )


def saga(new: Params, table: Params, parts: list[Draw], i: int) -> tuple[Params, Params]:
    """(the unbiased direction, the table with `new` in row i)."""
    shares = [part.share or 1.0 for part in parts]

    def direction(fresh: Tensor, rows: Tensor) -> Tensor:
        # Filled, not copied there: what is copied to a GPU is waited for.
        weights = torch.stack([rows.new_full((), share) for share in shares])
        mean = torch.tensordot(weights, rows, dims=1)
        return len(parts) * shares[i] * (fresh - rows[i]) + mean

    def replaced(fresh: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([rows[:i], fresh[None], rows[i + 1 :]])

    return tree_map(direction, new, table), tree_map(replaced, new, table)
