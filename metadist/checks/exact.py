"""Exact solutions and derivatives of a lower problem that is small enough for a dense Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.oracle import Oracle
from metadist.trees import Params, add, flatten, num_elements, unflatten, zeros_like


class NoMinimiser(ValueError):
    """g has no strict minimiser where minimising it has led, or it was not reached."""


class Minimum(NamedTuple):
    """A strict minimiser y of g, (P,); the Hessian there, (P, P), its extreme eigenvalues.

    Or the fixed point of `Problem.inner_map`, I - dPhi/dy and its extreme singular values.
    """

    y: Tensor
    hessian: Tensor
    eigenvalues: tuple[float, float]


def lbfgs(loss: Callable[[Params], Tensor], y: Params, max_iter: int = 1000) -> Params:
    """A point near `y` with a small gradient of `loss`, if L-BFGS finds one; else `y`."""
    flat = flatten(y).detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=max_iter,
        history_size=50,
        tolerance_grad=torch.finfo(flat.dtype).eps,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(unflatten(flat, y))
            value.backward()
        return value

    optimizer.step(closure)
    found = unflatten(flat.detach(), y)
    return found if all(bool(leaf.isfinite().all()) for leaf in found.values()) else y


def newton(
    gradient: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    y: Tensor,
    num_steps: int,
) -> Minimum:
    """The minimiser of g that Newton's method finds from `y`.

    `gradient` and `hessian` are functions of a flat y, shape (P,).

    Raises:
        NoMinimiser: There is none, or it was not reached; the message says which, and why.

    Cost: a gradient, a Hessian, its eigenvalues and a solve with it per step.
    """
    tiny = torch.finfo(y.dtype).eps ** 0.6
    for _ in range(num_steps):
        along, matrix = gradient(y), hessian(y)
        if not bool(matrix.isfinite().all()):
            raise NoMinimiser("the Hessian of g is not finite where minimising g has led")
        eigenvalues = torch.linalg.eigvalsh(matrix)
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        if low <= tiny * abs(high):
            raise NoMinimiser(
                "the Hessian of g is not positive definite where minimising g has led, its "
                f"eigenvalues go from {low:.2g} to {high:.2g}: g has no strict minimum there; "
                "a weight decay would give it one"
            )
        step = torch.linalg.solve(matrix, along)
        if float(step.norm()) <= tiny * (1 + float(y.norm())):
            return Minimum(y, matrix, (low, high))
        y = y - step
    raise NoMinimiser(
        "no stationary point of g was reached, |grad_y g| is still "
        f"{float(gradient(y).norm()):.2g} after {num_steps} Newton steps"
    )


def dense_hessian(oracle: Oracle, context: Params, y: Params) -> Tensor:
    """The Hessian of g at y, shape (P, P). Cost: P Hessian-vector products."""
    draw = oracle.draw_inner()
    matrix = torch.stack([flatten(oracle.hvp(context, y, axis, draw)) for axis in axes(y)])
    return (matrix + matrix.mT) / 2


def implicit_gradient(oracle: Oracle, context: Params, y: Params, hessian: Tensor) -> Params:
    """grad_x f - J H^-1 grad_y f: the hypergradient of x -> f(x, y*(x)) at y = y*(x)."""
    along_x, along_y = oracle.outer_grads(context, y, oracle.draw_outer())
    v = unflatten(torch.linalg.solve(hessian, flatten(along_y)), y)
    j_v, _ = oracle.second_order(context, y, v, oracle.draw_inner())
    return add(along_x, j_v, -1.0)


def fixed_point(oracle: Oracle, context: Params, y: Params, num_steps: int) -> Minimum:
    """The fixed point of `Problem.inner_map` that Newton's method finds from `y`.

    Raises:
        NoMinimiser: There is none near, or it was not reached.

    Cost: P products with dPhi/dy and a solve per step.
    """
    draw = oracle.draw_inner()
    tiny = torch.finfo(flatten(y).dtype).eps ** 0.6
    for _ in range(num_steps):
        columns = [flatten(oracle.map_along(context, y, axis, draw)) for axis in axes(y)]
        matrix = -torch.stack(columns, 1)
        matrix.diagonal().add_(1)
        if not bool(matrix.isfinite().all()):
            raise NoMinimiser("the Jacobian of inner_map is not finite where the map has led")
        singular = torch.linalg.svdvals(matrix)
        low, high = float(singular[-1]), float(singular[0])
        if low <= tiny * high:
            raise NoMinimiser("I - dPhi/dy is singular where the map has led")
        residual = flatten(y) - flatten(oracle.inner_map(context, y, draw))
        step = torch.linalg.solve(matrix, residual)
        if float(step.norm()) <= tiny * (1 + float(flatten(y).norm())):
            return Minimum(flatten(y), matrix, (low, high))
        y = unflatten(flatten(y) - step, y)
    raise NoMinimiser(
        f"no fixed point of inner_map was reached, |y - Phi(x, y)| is still "
        f"{float(residual.norm()):.2g} after {num_steps} Newton steps"
    )


def fixed_point_gradient(oracle: Oracle, context: Params, y: Params, matrix: Tensor) -> Params:
    """grad_x f + (dPhi/dx)' M'^-1 grad_y f: the hypergradient at the fixed point y."""
    along_x, along_y = oracle.outer_grads(context, y, oracle.draw_outer())
    v = unflatten(torch.linalg.solve(matrix.mT, flatten(along_y)), y)
    phi_x, _ = oracle.map_products(context, y, v, oracle.draw_inner())
    return add(along_x, phi_x)


def axes(tree: Params) -> list[Params]:
    """The unit vectors of the space of `tree`."""
    flat = flatten(zeros_like(tree))
    found = []
    for position in range(num_elements(tree)):
        axis = flat.clone()
        axis[position] = 1
        found.append(unflatten(axis, tree))
    return found
