"""Coupled least-squares problems.

Shape letters: n examples, L size of x, P size of y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metadist.checks.values import check, require_integer, require_word
from metadist.task import Batch
from metadist.tasks.synthetic.dense import DOUBLE, DenseTask, Synthetic
from metadist.trees import Params


class Quadratics(Synthetic):
    """Two coupled least-squares problems; every hypergradient has a closed form.

        g = mean_i (u_i'y + w_i'x - t_i)^2 / 2 + mu/2 |y|^2
        f = mean_j (u_j'y + w_j'x - t_j)^2 / 2 + mu/2 |x|^2

        data = QuadraticData(100, 100)
        trainer = Trainer(Quadratics(100, 100), data, SABA(), batch_size=64)

    Args:
        num_outer, num_inner: The sizes of x and y.
        mu: The modulus of strong convexity, > 0.

    Source: the quadratics of the benchmark of bilevel solvers (benchopt), with A = mean u u' + mu,
    B = mean w w', C = mean w u' and so on. Differs from it in: examples are of rank one.
    """

    def __init__(self, num_outer: int = 100, num_inner: int = 100, mu: float = 0.1) -> None:
        require_integer("num_outer", num_outer, 1)
        require_integer("num_inner", num_inner, 1)
        check("mu", mu, gt=0)
        super().__init__(num_outer, num_inner)
        self.mu = mu

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._fit(context, inner, batch) + self.mu / 2 * inner["y"].square().sum()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._fit(context, inner, batch) + self.mu / 2 * context["x"].square().sum()

    def _fit(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        u_nP, w_nL, t_n = batch.tensors
        return 0.5 * (u_nP @ inner["y"] + w_nL @ context["x"] - t_n).square().mean()


class QuadraticData(DenseTask):
    """The data of `Quadratics`: u_i of mean square 1, w_i of mean square cross^2, t_i normal.

    Args:
        num_outer, num_inner: The sizes of x and y.
        num_examples: The number of support examples and of query examples.
        cross: The size of w, >= 0: how strongly x and y are coupled.
        seed: The seed of all data.
    """

    def __init__(
        self,
        num_outer: int = 100,
        num_inner: int = 100,
        num_examples: int = 1024,
        cross: float = 0.1,
        seed: int = 0,
    ) -> None:
        for field, value in (
            ("num_outer", num_outer),
            ("num_inner", num_inner),
            ("num_examples", num_examples),
        ):
            require_integer(field, value, 1)
        require_word("seed", seed)
        check("cross", cross, ge=0)
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=DOUBLE)

        def batch() -> Batch:
            u_nP = normal(num_examples, num_inner) / math.sqrt(num_inner)
            w_nL = normal(num_examples, num_outer) / math.sqrt(num_outer) * cross
            return Batch.of(u_nP, w_nL, normal(num_examples))

        super().__init__(batch(), batch())
