"""The synthetic problem of LancBiO.

Shape letters: n examples, L size of x, P size of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metadist.autograd import AutogradOracle
from metadist.checks.exact import NoMinimiser
from metadist.checks.values import check, require_integer, require_word
from metadist.problem import Problem
from metadist.task import Batch
from metadist.tasks.fixed import OneTask
from metadist.tasks.synthetic.dense import DOUBLE, NEWTON_STEPS, DenseTask, Synthetic
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
        check("start", start)
        super().__init__(size, size, start)
        self.gamma = gamma

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        x, y = context["x"], inner["y"]
        smooth = self.gamma * (x + y).sin().sum() + (x * y).logsumexp(0)
        return smooth + self.quadratic(y, batch)

    def quadratic(self, y: Tensor, batch: Batch) -> Tensor:
        """y'(E + G)y / 2 by the rows of `batch`."""
        (a_nP,) = batch.tensors
        return 0.5 * (a_nP @ y).square().mean()

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
        random, c, d, e = _vectors(size, condition, gamma, seed)
        normal = torch.randn(size, size, generator=random, dtype=DOUBLE)
        basis = torch.linalg.qr(normal)[0]
        matrix = (basis * torch.linspace(1, condition, size, dtype=DOUBLE)) @ basis.T + e.diag()
        rows = torch.linalg.cholesky(matrix).T.contiguous() * math.sqrt(size)
        super().__init__(Batch.of(rows), Batch.of(c[None], d[None]))


class LancBiOMatrixFree(LancBiOSynthetic):
    """`LancBiOSynthetic` whose G is never formed: size 10,000 in a megabyte instead of 0.8 GB.

    G = Q diag(values) Q', where Q' changes signs at random and takes a Hartley transform, twice:
    each eigenvector is spread over all of y. The examples are the eigenvectors.

        data = LancBiOMatrixFreeData(size=10_000)
        trainer = Trainer(LancBiOMatrixFree(10_000), data, LancBiO(inner_lr=1e-5))

    Args:
        size, gamma, start: As for `LancBiOSynthetic`.
        rotation: The seed of the signs, 0 <= rotation < 2^64.

    Cost: size log size for a gradient or a product.
    Differs from the paper in: Q, which there is a random rotation.
    """

    def __init__(
        self, size: int = 10_000, gamma: float = 0.5, start: float = 1.0, rotation: int = 0
    ) -> None:
        super().__init__(size, gamma, start)
        require_word("rotation", rotation)
        random = torch.Generator().manual_seed(rotation)
        self.signs = 2 * torch.randint(2, (2, size), generator=random).to(DOUBLE) - 1

    def rotated(self, y: Tensor) -> Tensor:
        """Q'y."""
        for signs in self.signs.to(y):
            y = hartley(signs * y)
        return y

    def rotated_back(self, z: Tensor) -> Tensor:
        """Q z."""
        for signs in self.signs.to(z).flip(0):
            z = signs * hartley(z)
        return z

    def quadratic(self, y: Tensor, batch: Batch) -> Tensor:
        values_n, diagonal_n = batch.fields("values", "diagonal")
        z_n, y_n = self.rotated(y)[batch.index], y[batch.index]
        return 0.5 * len(y) * (values_n * z_n.square() + diagonal_n * y_n.square()).mean()


class LancBiOMatrixFreeData(OneTask):
    """The data of `LancBiOMatrixFree`: c, d, e and the eigenvalues as in `LancBiOData`.

    Example i of the support set is the i-th eigenvalue of G and the i-th entry of e. Arguments are
    those of `LancBiOData`.
    """

    def __init__(
        self, size: int = 10_000, condition: float = 1e5, gamma: float = 0.5, seed: int = 0
    ) -> None:
        _, c, d, e = _vectors(size, condition, gamma, seed)
        values = torch.linspace(1, condition, size, dtype=DOUBLE)
        super().__init__(Batch.named(values=values, diagonal=e), Batch.of(c[None], d[None]))

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """|grad Phi(x)| and |y - y*(x)|; Newton's method and the adjoint system by products alone.

        Conjugate gradients are preconditioned by G, so that the condition number does not matter.

        Raises:
            NoMinimiser: Newton's method finds none.
        """
        if not isinstance(problem, LancBiOMatrixFree):
            return {}
        outer = {"x": outer["x"].cpu().double()}
        found = inner["y"].cpu().double()
        oracle = AutogradOracle(problem, self.sample(0))
        draw = oracle.draw_inner()
        values, _ = self.support.tensors

        def solve(y: Tensor, right: Tensor) -> Tensor:
            def product(v: Tensor) -> Tensor:
                return oracle.hvp(outer, {"y": y}, {"y": v}, draw)["y"]

            def precondition(v: Tensor) -> Tensor:
                return problem.rotated_back(problem.rotated(v) / values)

            return _conjugate_gradients(product, right, precondition)

        y = found
        for _ in range(NEWTON_STEPS):
            step = solve(y, oracle.inner_grad(outer, {"y": y}, draw)["y"])
            y = y - step
            if float(step.norm()) <= 1e-10 * (1 + float(y.norm())):
                break
        else:
            raise NoMinimiser(f"Newton's method has not converged after {NEWTON_STEPS} steps")
        along_x, along_y = oracle.outer_grads(outer, {"y": y}, oracle.draw_outer())
        v = {"y": solve(y, along_y["y"])}
        j_v, _ = oracle.second_order(outer, {"y": y}, v, draw)
        return {
            "hypergradient_norm": float((along_x["x"] - j_v["x"]).norm()),
            "inner_distance": float((found - y).norm()),
        }


def hartley(y: Tensor) -> Tensor:
    """The orthonormal Hartley transform along the last axis, which is its own inverse."""
    frequencies = torch.fft.fft(y, norm="ortho")
    return frequencies.real - frequencies.imag


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    num_steps: int = 200,
) -> Tensor:
    """H^-1 right, to a residual of 1e-12 of it or as far as `num_steps` lead."""
    solution, residual = torch.zeros_like(right), right
    preconditioned = precondition(residual)
    direction, square = preconditioned, residual @ preconditioned
    for _ in range(num_steps):
        if float(residual.norm()) <= 1e-12 * float(right.norm()):
            break
        along = product(direction)
        length = square / (direction @ along)
        solution, residual = solution + length * direction, residual - length * along
        preconditioned = precondition(residual)
        square, last = residual @ preconditioned, square
        direction = preconditioned + square / last * direction
    return solution


def _vectors(
    size: int, condition: float, gamma: float, seed: int
) -> tuple[torch.Generator, Tensor, Tensor, Tensor]:
    """The random numbers, and c, d and e, the first that were drawn."""
    require_integer("size", size, 1)
    require_word("seed", seed)
    check("condition", condition, ge=1)
    check("gamma", gamma, ge=0, lt=1)
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=random, dtype=DOUBLE)

    return random, uniform(-5, 5), uniform(0.1, 1.1), uniform(0, gamma)
