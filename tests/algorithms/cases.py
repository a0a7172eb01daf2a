"""The table of algorithms that every algorithm is held to, see test_table.py."""

from __future__ import annotations

from typing import NamedTuple

from metadist.algorithm import Algorithm


class Case(NamedTuple):
    """What is expected of one algorithm.

    Args:
        algorithm: hyperparameters for the tasks of `quadratic_task` (eigenvalues 0.5 to 3),
            without noise in draws.
        counts: of `CountingOracle`, of one estimate from the state that an estimate has left.
        outer_lr, num_steps: with which `run_single` solves such a task.
        tolerance: below which the true hypergradient is in the end, in Euclidean norm; for a
            method with bias, as large as the bias.
    """

    algorithm: Algorithm
    counts: dict[str, int]
    outer_lr: float = 0.1
    num_steps: int = 500
    tolerance: float = 1e-6
