"""Implicit differentiation: the system H v = b with b = f_y, and the estimate f_x - J v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from metadist.algorithms.parts.inner import NO_MEMORY, Descent, SingleLoop, decayed
from metadist.algorithms.parts.linear import Product, relative_residual
from metadist.checks.values import check, rule
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.step_rules import SGD
from metadist.trees import Params, add, norm, sub, zeros_like


class AdjointState(NamedTuple):
    """The state of methods that start from the last y and the last adjoint v."""

    inner: Params
    adjoint: Params
    memory: Any = NO_MEMORY


def hessian(
    oracle: Oracle, context: Params, y: Params, draw: Draw | None = None, damping: float = 0.0
) -> Product:
    """v -> (H + damping I) v at (context, y), on `draw` or, if None, on a new one each time."""

    def product(v: Params) -> Params:
        h_v = oracle.hvp(context, y, v, oracle.draw_inner() if draw is None else draw)
        return add(h_v, v, damping) if damping else h_v

    return product


def implicit_gradient(
    oracle: Oracle,
    context: Params,
    y: Params,
    v: Params,
    f_x: Params,
    b: Params,
    damping: float = 0.0,
) -> tuple[Params, dict[str, Tensor]]:
    """(f_x - J v, {"adjoint_residual": |(H + damping I) v - b| / |b|}) on a fresh draw.

    `damping` is that of the system that v solves. The residual costs little, since one product of
    second order gives J v and H v together, and is left out where nobody reads it.
    """
    draw = oracle.draw_inner()
    if not oracle.reports:
        return sub(f_x, oracle.cross(context, y, v, draw)), {}
    j_v, h_v = oracle.second_order(context, y, v, draw)
    residual = relative_residual(add(h_v, v, damping), b)
    return sub(f_x, j_v), {"adjoint_residual": residual}


def adjoint_metrics(oracle: Oracle, h_v: Params, b: Params, g_y: Params) -> dict[str, Tensor]:
    """The relative residual of v and the norm of g_y, where somebody reads them."""
    if not oracle.reports:
        return {}
    return {"adjoint_residual": relative_residual(h_v, b), "inner_gradient_norm": norm(g_y)}


def adjoint_rate(loop: Descent, adjoint_lr: float | None) -> float:
    """`adjoint_lr`, by default the rate of the inner loop (both should be 1/L)."""
    return loop.step_rule.lr if adjoint_lr is None else adjoint_lr


def check_adjoint_lr(loop: Descent, adjoint_lr: float | None, solver: str = "") -> None:
    """Raise ValueError unless `solver` has the rate for its steps on v that it needs."""
    if solver in ("cg", "normal_cg"):
        if adjoint_lr is not None:
            raise ValueError(
                f"adjoint_lr must be None with solver={solver!r}, got {adjoint_lr}: conjugate "
                "gradients have no rate"
            )
    elif adjoint_lr is not None:
        check("adjoint_lr", adjoint_lr, gt=0)
    elif not isinstance(loop.step_rule, SGD):
        raise ValueError(
            f"adjoint_lr must be given with inner_optimizer={type(loop.step_rule).__name__}, got "
            "None: the rate of that rule says nothing of steps on v, for which 1/L is good"
        )


@dataclass(frozen=True)
class AdjointLoop(SingleLoop):
    """A base for single loops in which v, too, makes one step where other methods solve for it.

    Args:
        adjoint_lr: The step size of v, > 0; at most 2 / L.
        adjoint_decay: The rate at outer step k is adjoint_lr * (k+1)^-adjoint_decay, in [0, 1].
    """

    adjoint_lr: float = rule(0.1, gt=0)
    adjoint_decay: float = rule(0.0, ge=0, le=1)

    @property
    def kept_options(self) -> dict[str, str]:
        # h has the v from before the step, which is 0 at the only step on a new task.
        options = ("adjoint_lr", "adjoint_decay") if self.inner_steps == 1 else ()
        return dict.fromkeys(options, "inner_steps")

    def init(self, oracle: Oracle, context: Params, inner: Params) -> Any:
        return AdjointState(inner, zeros_like(inner), self.new_memory(inner))

    def step_adjoint(self, oracle: Oracle, v: Params, h_v: Params, b: Params) -> Params:
        """v - adjoint_lr_k * (H v - b)."""
        rate = decayed(self.adjoint_lr, self.adjoint_decay, oracle.step)
        return add(v, sub(h_v, b), -rate)
