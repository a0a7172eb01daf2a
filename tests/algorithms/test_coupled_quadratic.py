"""Quadratics in which x stands in both losses, alone and times y: every term of a hypergradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metadist.algorithm import Algorithm
from metadist.algorithms import (
    AID,
    BAMM,
    BDA,
    F2SA,
    FSLA,
    IMAML,
    ITD,
    SABA,
    SOBA,
    SRBA,
    UFOM,
    AmIGO,
    LancBiO,
    NoLoopAID,
    Nystrom,
    StocBiO,
    SubBiO,
)
from metadist.autograd import AutogradOracle
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params
from tests.problems import DOUBLE, assert_close, randn


def spd(seed: int, size: int, low: float, high: float) -> Tensor:
    basis = torch.linalg.qr(randn(seed, size, size))[0]
    return basis @ torch.diag(torch.linspace(low, high, size, dtype=DOUBLE)) @ basis.T


class Coupled(Problem):
    """g = y'Ay/2 + x'Bx/2 + x'Cy + a'y + b'x,  f = y'Fy/2 + x'Hx/2 + x'Ky + p'y + q'x."""

    def __init__(self, num_outer: int, num_inner: int) -> None:
        self.num_outer, self.num_inner = num_outer, num_inner
        self.a, self.b = spd(1, num_inner, 0.5, 2.0), spd(2, num_outer, 0.1, 1.0)
        self.f, self.h = spd(3, num_inner, 0.1, 1.0), spd(4, num_outer, 0.1, 1.0)
        self.c, self.k = (0.3 * randn(seed, num_outer, num_inner) for seed in (5, 6))
        self.in_y, self.in_x = randn(7, 2, num_inner), randn(8, 2, num_outer)

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": randn(9, self.num_outer)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.zeros(self.num_inner, dtype=DOUBLE)}

    def _value(self, x: Tensor, y: Tensor, terms: tuple[Tensor, ...], row: int) -> Tensor:
        in_yy, in_xx, in_xy = terms
        linear = self.in_y[row] @ y + self.in_x[row] @ x
        return y @ in_yy @ y / 2 + x @ in_xx @ x / 2 + x @ in_xy @ y + linear

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._value(context["x"], inner["y"], (self.a, self.b, self.c), 0)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._value(context["x"], inner["y"], (self.f, self.h, self.k), 1)

    def true_hypergradient(self, x: Tensor) -> Tensor:
        """H x + K y* + q + C w, where A w = -(F y* + K'x + p) and A y* = -(a + C'x)."""
        y = torch.linalg.solve(self.a, -(self.in_y[0] + self.c.T @ x))
        w = torch.linalg.solve(self.a, -(self.f @ y + self.k.T @ x + self.in_y[1]))
        return self.h @ x + self.k @ y + self.in_x[1] + self.c @ w


EMPTY = Batch.of(torch.zeros(1, 1, dtype=DOUBLE))
LONG: dict[str, Any] = {"inner_steps": 80, "inner_lr": 0.5}

EXACT: list[tuple[Algorithm, float]] = [
    (ITD(**LONG), 1e-6),
    (UFOM(**LONG, exact_probability=1.0), 1e-6),
    (AID(**LONG), 1e-8),
    (AID(**LONG, solver="neumann", adjoint_steps=80), 1e-8),
    (AID(**LONG, solver="fixed_point", adjoint_steps=80), 1e-8),
    (AmIGO(**LONG, adjoint_steps=80), 1e-8),
    (Nystrom(**LONG, rank=9, damping=1e-6), 1e-5),
    (LancBiO(**LONG, adjoint_steps=9, subspace_cap=9), 1e-8),
    (IMAML(**LONG, lam=1e-6, adjoint_steps=20), 1e-5),
    (StocBiO(**LONG, adjoint_steps=80, adjoint_lr=0.5), 1e-8),
    (SubBiO(**LONG, adjoint_steps=40), 1e-5),
    (NoLoopAID(**LONG), 1e-6),
    (SOBA(**LONG, adjoint_lr=0.5), 1e-6),
    (SABA(**LONG, adjoint_lr=0.5), 1e-6),
    (SRBA(**LONG, adjoint_lr=0.5), 1e-6),
    (BAMM(**LONG, adjoint_lr=0.5, mu=0.0), 1e-6),
    (BDA(**LONG, alpha=0.0), 1e-6),
    (AID(**LONG, solver="normal_cg"), 1e-8),
    (FSLA(**LONG, adjoint_lr=0.5), 1e-6),
    (F2SA(inner_steps=400, inner_lr=0.3, lam=1e4), 1e-3),
    (F2SA(inner_steps=400, inner_lr=0.3, lam=1e3, order=2), 1e-4),
]


@pytest.mark.parametrize("shape", [(3, 6), (7, 4)], ids=["wide", "tall"])
@pytest.mark.parametrize(("algorithm", "tolerance"), EXACT, ids=lambda value: type(value).__name__)
def test_every_term_is_there(algorithm, tolerance, shape):
    num_outer, num_inner = shape
    problem, task = Coupled(num_outer, num_inner), Task(EMPTY, EMPTY, 0)
    outer = problem.init_outer(torch.Generator())
    oracle = AutogradOracle(problem, task, eager=True)
    state = algorithm.init(oracle, outer, problem.init_inner(outer, task))
    found = algorithm.estimate(oracle, outer, state).hypergradient
    assert_close(found, {"x": problem.true_hypergradient(outer["x"])}, tolerance)
