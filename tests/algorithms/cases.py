"""The table of algorithms that every algorithm is held to, see test_table.py."""

from __future__ import annotations

from typing import NamedTuple

from metadist.algorithm import Algorithm


def implicit(inner_grad: int, products: int) -> dict[str, int]:
    """Counts of implicit differentiation: the pass for J v gives one more product H v."""
    return {"inner_grad": inner_grad, "outer_grads": 1, "hvp": products + 1, "jvp": 1}


class Case(NamedTuple):
    """What is expected of one algorithm.

    Args:
        algorithm: hyperparameters for `quadratic_task` (eigenvalues of A from 0.5 to 3) and
            `mild_task` (from 1 to 2).
        counts: of `CountingOracle`, of one estimate from the state that an estimate has left.
        outer_lr, num_steps: with which `run_single` solves the mild one.
        tolerance: below which the true hypergradient is in the end, in Euclidean norm; for a
            method with bias, as large as the bias.
    """

    algorithm: Algorithm
    counts: dict[str, int]
    outer_lr: float = 0.2
    num_steps: int = 100
    tolerance: float = 1e-6
