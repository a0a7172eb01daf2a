"""LancBiO: the adjoint vector from a Krylov space that grows over outer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from metadist.algorithm import Estimate
from metadist.algorithms.parts.implicit import hessian, implicit_gradient
from metadist.algorithms.parts.inner import NO_MEMORY, InnerLoop
from metadist.algorithms.parts.linear import (
    LOOKS_AT_EIGENVALUES,
    Krylov,
    empty_krylov,
    extend,
    project,
)
from metadist.checks.values import rule
from metadist.oracle import Oracle
from metadist.trees import Params, add, num_elements, sub, zeros_like


class LancBiOState(NamedTuple):
    """y, the last v, and the window: its anchor, H anchor as it was then, and its basis."""

    inner: Params
    adjoint: Params
    anchor: Params
    anchor_product: Params
    krylov: Krylov
    memory: Any = NO_MEMORY


@dataclass(frozen=True)
class LancBiO(InnerLoop):
    """Dynamic Lanczos-aided bilevel optimisation (LancBiO).

        y <- inner_steps steps on g(x, .) from the last y;   b = f_y(x, y)
        where a window of m vectors begins:  anchor = v;  w = H anchor;  q_1 ~ b - w
        adjoint_steps steps of Lanczos at the current H:  a_j = q_j'H q_j,
            beta_{j+1} q_{j+1} = H q_j - a_j q_j - beta_j q_{j-1};   Q = [q_1 .. q_j], T = tridiag
        v = anchor + Q T^-1 Q'(b - w)
        h = f_x - J v

    Conjugate gradients from the anchor, spread over outer steps: one product per step while H
    hardly moves. As x and y move it is an approximation, and the next window begins from the last
    v. m grows: subspace_start, times subspace_growth (rounded up) every subspace_every outer
    steps, up to subspace_cap; it is never below adjoint_steps or above the size of y.

    Args:
        adjoint_steps: Lanczos steps per estimate, >= 1; the paper has 1. On new tasks, whose v
            begins at 0, it is the dimension of the whole space.
        subspace_start: The first m, >= 1.
        subspace_growth: The factor of m, >= 1.
        subspace_every: Outer steps from one m to the next, >= 1.
        subspace_cap: The largest m.

    Family: Implicit differentiation.
    For: strongly convex in y.
    Cost: T G + F + Q (1 + 1/m) H + J. Q = adjoint_steps, and one H more where a window begins.
    State: y, v, m vectors like y.
    Memory: subspace_cap vectors like y.
    Use: kept states, whole sets, x that moves slowly: accurate v at one product per step.
    Breaks: x or y that move so fast that T is not Q'HQ: as long as they do, v can be worse than
    SubBiO's, which costs three times as many products (lower subspace_cap, or the outer rate);
    mini-batches, for the same reason: T mixes the H of other draws (subspace_cap of a few, or
    batches large enough for one H);
    indefinite T (`negative_curvature` is 1); singular H, as AID.
    Source: Yang, Gao, Yuan, "LancBiO: Dynamic Lanczos-aided Bilevel Optimization via Krylov
    Subspace", ICLR 2025. Of it the update as its synthetic code has it.
    Differs: the basis is orthogonalised again at every step (float32 loses it from about 20 vectors
    on); where Lanczos breaks down, the next vector is the residual that the basis leaves; m is at
    most the size of y; the first vector of a window is of the current b, where the official code
    has the last one. The first phase of its data-cleaning script, a sliding window without an
    anchor, is left out: it drops a direction per cycle, and with m = 1 does not move x at all.
    """

    no_graph = LOOKS_AT_EIGENVALUES
    bears_rounding = "autocast"

    adjoint_steps: int = rule(5, ge=1)
    subspace_start: int = rule(1, ge=1)
    subspace_growth: float = rule(1.1, ge=1.0)
    subspace_every: int = rule(20, ge=1)
    subspace_cap: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("subspace_start", "adjoint_steps"):
            if getattr(self, field) > self.subspace_cap:
                raise ValueError(
                    f"subspace_cap must be >= {field} ({getattr(self, field)}), got "
                    f"{self.subspace_cap}"
                )

    @property
    def kept_options(self) -> dict[str, str]:
        return dict.fromkeys(("subspace_start", "subspace_growth", "subspace_every"), "")

    def dimension(self, step: int) -> int:
        """m at an outer step."""
        m = self.subspace_start
        for _ in range(step // self.subspace_every):
            # Growth below 1/m still rounds up to m + 1; a growth of 1 ends it.
            grown = min(math.ceil(m * self.subspace_growth), self.subspace_cap)
            if grown == m:
                break
            m = grown
        return max(m, self.adjoint_steps)

    def init(self, oracle: Oracle, context: Params, inner: Params) -> LancBiOState:
        zeros = zeros_like(inner)
        return LancBiOState(
            inner=inner,
            adjoint=zeros,
            anchor=zeros,
            anchor_product=zeros,
            krylov=empty_krylov(inner, self.subspace_cap),
            memory=self.new_memory(inner),
        )

    def estimate(self, oracle: Oracle, context: Params, state: LancBiOState) -> Estimate:
        y, memory = self.descend(oracle, context, state.inner, state.memory)
        f_x, b = oracle.outer_grads(context, y, oracle.draw_outer())
        product = hessian(oracle, context, y, oracle.draw_inner())

        anchor, anchor_product, krylov = state.anchor, state.anchor_product, state.krylov
        steps = min(self.adjoint_steps, num_elements(y))
        # Which window a step belongs to depends on counters alone, so tasks that are stacked
        # under vmap open theirs together, and no branch depends on data.
        if krylov.size + steps > min(self.dimension(oracle.step), num_elements(y)):
            anchor, anchor_product = state.adjoint, product(state.adjoint)
            krylov = empty_krylov(y, self.subspace_cap)
        # The anchor's product is not refreshed within a window, although H moves: that would
        # cost the one product per step that the method saves.
        residual = sub(b, anchor_product)
        for _ in range(steps):
            krylov = extend(krylov, product, residual)
        dv, metrics = project(krylov, residual)
        v = add(anchor, dv)

        h, final = implicit_gradient(oracle, context, y, v, f_x, b)
        return Estimate(
            hypergradient=h,
            start_gradient=None,
            state=LancBiOState(
                inner=y,
                adjoint=v,
                anchor=anchor,
                anchor_product=anchor_product,
                krylov=krylov,
                memory=memory,
            ),
            metrics={**metrics, **final},
        )
