"""The synthetic problem of LancBiO.

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


class LancBiOSynthetic(Synthetic):
    """The synthetic problem of LancBiO: a lower level of any condition number, x coupled to y.

        f = cos(x'(c o y)) / 10 + |d o x - y|^2 / 2                        (o: elementwise)
        g = gamma sum sin(x_i + y_i) + log sum exp(x_i y_i) + y'(E + G)y / 2

    E + G = A'A / n is given by the rows of A, one for each example; see `LancBiOData`.

        data = LancBiOData(size=200)
        trainer = Trainer(LancBiOSynthetic(200), data, LancBiO(inner_lr=1e-5))

    Args:
        size: The size of x and of y.
        gamma: The lower level is strongly convex by 1 - gamma at least, 0 <= gamma < 1.
        start: The value of all entries of x and y at the start; at 0 x has no hypergradient.

    Source: Yang, Gao, Yuan, LancBiO (ICLR 2025), section 5.1.
    """

    def __init__(self, size: int = 1000, gamma: float = 0.5, start: float = 1.0) -> None:
        require_integer("size", size, 1)
        check("gamma", gamma, ge=0, lt=1)
        super().__init__(size, size, start)
        self.gamma = gamma

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        (a_nP,) = batch.tensors
        x, y = context["x"], inner["y"]
        smooth = self.gamma * (x + y).sin().sum() + (x * y).logsumexp(0)
        return smooth + 0.5 * (a_nP @ y).square().mean()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        c_nP, d_nP = batch.tensors
        x, y = context["x"], inner["y"]
        wave = (c_nP @ (x * y)).cos()
        return (0.1 * wave + 0.5 * (d_nP * x - y).square().sum(1)).mean()


class LancBiOData(DenseTask):
    """The data of `LancBiOSynthetic`.

    c_i is uniform on (-5, 5), d_i on (.1, 1.1), e_i on (0, gamma); G = Q diag(1 .. condition) Q'
    with a random rotation Q. The support set holds n = size rows of a square root of diag(e) + G,
    the query set one example (c, d). Memory: 8 size^2 bytes; time: size^3.

    Args:
        size: The size of x and of y.
        condition: The largest eigenvalue of G, the smallest being 1.
        gamma: The gamma of the problem.
        seed: The seed of all data.
    """

    def __init__(
        self, size: int = 1000, condition: float = 1e5, gamma: float = 0.5, seed: int = 0
    ) -> None:
        require_integer("size", size, 1)
        require_word("seed", seed)
        check("condition", condition, ge=1)
        random = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(size, generator=random, dtype=DOUBLE)

        c, d, e = uniform(-5, 5), uniform(0.1, 1.1), uniform(0, gamma)
        normal = torch.randn(size, size, generator=random, dtype=DOUBLE)
        basis = torch.linalg.qr(normal)[0]
        matrix = (basis * torch.linspace(1, condition, size, dtype=DOUBLE)) @ basis.T + e.diag()
        rows = torch.linalg.cholesky(matrix).T.contiguous() * math.sqrt(size)
        super().__init__(Batch.of(rows), Batch.of(c[None], d[None]))
