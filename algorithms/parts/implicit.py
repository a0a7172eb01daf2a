"""What methods of implicit differentiation share: H v = grad_y f, h = grad_x f - J v."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metadist.algorithms.parts.inner import InnerLoop, SingleLoop, check_positive
from metadist.algorithms.parts.linear import Product, relative_residual
from metadist.oracle import Draw, Oracle
from metadist.trees import Params, add, sub


def hessian(
    oracle: Oracle, context: Params, inner: Params, draw: Draw | None = None, damping: float = 0.0
) -> Product:
    """v -> (H + damping I) v at (context, inner), on `draw` or, if None, on a new one each time."""

    def product(v: Params) -> Params:
        h_v = oracle.hvp(context, inner, v, oracle.draw_inner() if draw is None else draw)
        return add(h_v, v, damping) if damping else h_v

    return product


class AdjointState(NamedTuple):
    """The state of methods that start from the last y and the last v."""

    inner: Params
    v: Params


def implicit_gradient(
    oracle: Oracle,
    context: Params,
    inner: Params,
    v: Params,
    outer_grads: tuple[Params, Params],
    damping: float = 0.0,
) -> tuple[Params, dict[str, Tensor]]:
    """(grad_x f - J v, {"adjoint_residual": |(H + damping I) v - b| / |b|}) on a fresh draw.

    Args:
        oracle: of the task.
        context: x.
        inner: y.
        v: the adjoint vector.
        outer_grads: (grad_x f, b = grad_y f).
        damping: of the system that v solves.

    Cost: one product of second order, which gives J v and H v together.
    """
    along_x, b = outer_grads
    j_v, h_v = oracle.second_order(context, inner, v, oracle.draw_inner())
    residual = relative_residual(add(h_v, v, damping), b)
    return sub(along_x, j_v), {"adjoint_residual": residual}


def adjoint_rate(loop: InnerLoop | SingleLoop, adjoint_lr: float | None) -> float:
    """`adjoint_lr`, by default the rate of the inner loop (both should be 1/L)."""
    return loop.inner_lr if adjoint_lr is None else adjoint_lr


def check_adjoint_lr(loop: InnerLoop, adjoint_lr: float | None, solver: str = "") -> None:
    """Raise ValueError unless `solver` has the rate for its steps on v that it needs."""
    if solver == "cg":
        if adjoint_lr is not None:
            raise ValueError(
                f"adjoint_lr must be None with solver='cg', got {adjoint_lr}: conjugate "
                "gradients have no rate"
            )
    elif adjoint_lr is not None:
        check_positive("adjoint_lr", adjoint_lr)
    elif loop.inner_optimizer != "sgd":
        raise ValueError(
            f"adjoint_lr must be given with inner_optimizer={loop.inner_optimizer!r}, got None: "
            "the rate of that optimizer says nothing of steps on v, for which 1/L is good"
        )
