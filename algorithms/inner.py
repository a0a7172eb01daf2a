"""Inner optimisers as pure functions, step by step those of torch.optim."""

from __future__ import annotations

from metadist.oracle import Oracle
from metadist.trees import Params, add, multiply, sub


def sgd_step(
    inner: Params, velocity: Params | None, gradient: Params, rates: Params, momentum: float
) -> tuple[Params, Params]:
    """(inner, velocity) after one step of `torch.optim.SGD` (no dampening).

    velocity <- momentum * velocity + gradient;   inner <- inner - rates * velocity

    Args:
        inner: y.
        velocity: None before the first step.
        gradient: grad_y g.
        rates: learning rates, each of shape () or of the shape of its inner tensor.
        momentum: 0 for plain gradient descent.
    """
    if velocity is not None and momentum:
        velocity = add(gradient, velocity, momentum)
    else:
        velocity = gradient
    return sub(inner, multiply(rates, velocity)), velocity


def sgd(
    oracle: Oracle,
    outer: Params,
    inner: Params,
    num_steps: int,
    rates: Params,
    momentum: float = 0.0,
) -> Params:
    """y after `num_steps` steps on g, each on a fresh draw. Cost: num_steps gradients."""
    velocity = None
    for _ in range(num_steps):
        gradient = oracle.inner_grad(outer, inner, oracle.draw_inner())
        inner, velocity = sgd_step(inner, velocity, gradient, rates, momentum)
    return inner


def check_sgd(inner_steps: int, inner_lr: float, momentum: float) -> None:
    """Raise ValueError for hyperparameters that no inner SGD can run with."""
    if inner_steps < 1:
        raise ValueError(f"inner_steps must be >= 1, got {inner_steps}")
    if not 0 < inner_lr < float("inf"):
        raise ValueError(f"inner_lr must be > 0 and finite, got {inner_lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
