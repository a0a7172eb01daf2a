"""Fixed points of a problem's own map: `Problem.inner_map`, Phi, in the place of steps on g.

The lower solution is y = Phi(x, y), so dy/dx = (I - dPhi/dy)^-1 dPhi/dx, and

    h = f_x + (dPhi/dx)' v,    (I - dPhi/dy)' v = b,    b = f_y.

With Phi = y - eta g_y that is f_x - J (eta v) with H (eta v) = b. The matrix is not symmetric.
"""

from __future__ import annotations

from torch import Tensor

from metadist.algorithm import Algorithm
from metadist.algorithms.parts.linear import Product, relative_residual
from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, add, sub


def iterate(
    oracle: Oracle, context: Params, y: Params, num_steps: int
) -> tuple[Params, list[tuple[Params, Draw]]]:
    """(y after `num_steps` of y <- Phi(x, y), each on a fresh draw; the points passed)."""
    steps = []
    for _ in range(num_steps):
        draw = oracle.draw_inner()
        steps.append((y, draw))
        y = oracle.inner_map(context, y, draw)
    return y, steps


def system(
    oracle: Oracle, context: Params, y: Params, draw: Draw, damping: float
) -> tuple[Product, Product]:
    """The products with M = (I - dPhi/dy)' + damping I, and with M'."""

    def product(v: Params) -> Params:
        _, phi_y = oracle.map_products(context, y, v, draw)
        return add(sub(v, phi_y), v, damping)

    def transposed(u: Params) -> Params:
        return add(sub(u, oracle.map_along(context, y, u, draw)), u, damping)

    return product, transposed


def fixed_point_gradient(
    oracle: Oracle, context: Params, y: Params, v: Params, f_x: Params, b: Params, damping: float
) -> tuple[Params, dict[str, Tensor]]:
    """(f_x + (dPhi/dx)' v, {"adjoint_residual": |M v - b| / |b|}) on a fresh draw."""
    phi_x, phi_y = oracle.map_products(context, y, v, oracle.draw_inner())
    residual = relative_residual(add(sub(v, phi_y), v, damping), b)
    return add(f_x, phi_x), {"adjoint_residual": residual}


def refuse_options(algorithm: Algorithm, *names: str) -> None:
    """Raise ValueError if one of these fields, which belong to steps on g, is set."""
    for name in names:
        value = getattr(algorithm, name)
        if value != getattr(type(algorithm), name):
            raise ValueError(
                f"{name} must be left out for a problem with inner_map, got {value!r}: y moves to "
                "where that map says, not along a gradient"
            )
