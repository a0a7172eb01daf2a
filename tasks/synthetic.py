"""Synthetic bilevel problems whose lower level is a mean over examples, in float64.

Their data can be cut into mini-batches and shards, and a dense Hessian tells how far a solver is.

Shape letters: n examples, L size of x, P size of y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metadist.oracle import AutogradOracle
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.episodes import require_integer, require_word
from metadist.tasks.one_task import OneTask
from metadist.trees import Params

DOUBLE = torch.float64
NEWTON_STEPS = 30


class DenseTask(OneTask):
    """A task small enough for a dense Hessian, which tells how good a solution of it is."""

    def figures(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """|grad Phi(x)| and |y - y*(x)|, by Newton's method with a dense Hessian.

        Cost: up to 30 Hessians of size P x P.
        """
        outer = {"x": outer["x"].cpu().double()}
        found = inner["y"].cpu().double()
        hypergradient, solution = implicit_hypergradient(problem, self.sample(0), outer, found)
        return {
            "hypergradient_norm": float(hypergradient.norm()),
            "inner_distance": float((found - solution).norm()),
        }


def implicit_hypergradient(
    problem: Problem, task: Task, outer: Params, near: Tensor
) -> tuple[Tensor, Tensor]:
    """(grad Phi(x), y*(x)): grad_x f - J H^-1 grad_y f at the minimiser of g found from `near`.

    Raises:
        ValueError: Newton's method does not converge from there.
    """

    def g(y: Tensor) -> Tensor:
        return problem.inner_loss(outer, {"y": y}, task.support)

    y = near
    for _ in range(NEWTON_STEPS):
        hessian = torch.func.jacrev(torch.func.grad(g))(y)
        step = torch.linalg.solve(hessian, torch.func.grad(g)(y))
        y = y - step
        if float(step.norm()) <= 1e-9 * (1 + float(y.norm())):
            break
    else:
        raise ValueError(
            f"y must be near a minimiser of g for Newton's method, got steps of {step.norm():.2g} "
            f"after {NEWTON_STEPS}: adapt longer first"
        )
    oracle = AutogradOracle(problem, task)
    along_x, along_y = oracle.outer_grads(outer, {"y": y}, oracle.draw_outer())
    v = {"y": torch.linalg.solve(hessian, along_y["y"])}
    j_v, _ = oracle.second_order(outer, {"y": y}, v, oracle.draw_inner())
    return along_x["x"] - j_v["x"], y


class Synthetic(Problem):
    """A problem in vectors x and y, both starting from constants."""

    def __init__(self, num_outer: int, num_inner: int, start: float = 0.0) -> None:
        self.num_outer = num_outer
        self.num_inner = num_inner
        self.start = start

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.full((self.num_outer,), self.start, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": outer["x"].new_full((self.num_inner,), self.start)}


class LancBiOSynthetic(Synthetic):
    """The synthetic problem of LancBiO: a lower level of any condition number, x coupled to y.

        f = cos(x'(c o y)) / 10 + |d o x - y|^2 / 2                        (o: elementwise)
        g = gamma sum sin(x_i + y_i) + log sum exp(x_i y_i) + y'(E + G)y / 2

    E + G = A'A / n comes as the rows of A, one an example; see `LancBiOData`.

        data = LancBiOData(size=200)
        trainer = Trainer(LancBiOSynthetic(200), data, LancBiO(inner_lr=1e-5),
                          meta_batch_size=1, keep_state=True)

    Args:
        size: of x and of y.
        gamma: the lower level is strongly convex by 1 - gamma at least, 0 <= gamma < 1.
        start: every number of x and y at the start; not 0, where x has no hypergradient.

    Source: Yang, Gao, Yuan, LancBiO (ICLR 2025), section 5.1.
    """

    def __init__(self, size: int = 1000, gamma: float = 0.5, start: float = 1.0) -> None:
        require_integer("size", size, 1)
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}")
        super().__init__(size, size, start)
        self.gamma = gamma

    def inner_loss(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        (a_nP,) = batch.tensors
        x, y = outer["x"], inner["y"]
        smooth = self.gamma * (x + y).sin().sum() + (x * y).logsumexp(0)
        return smooth + 0.5 * (a_nP @ y).square().mean()

    def outer_loss(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        c_nP, d_nP = batch.tensors
        x, y = outer["x"], inner["y"]
        wave = (c_nP @ (x * y)).cos()
        return (0.1 * wave + 0.5 * (d_nP * x - y).square().sum(1)).mean()


class LancBiOData(DenseTask):
    """The data of `LancBiOSynthetic`.

    c_i is uniform on (-5, 5), d_i on (.1, 1.1), e_i on (0, gamma); G = Q diag(1 .. condition) Q'
    with a random rotation Q. The support set holds n = size rows of a square root of diag(e) + G,
    the query set one example (c, d). Memory: 8 size^2 bytes; time: size^3.

    Args:
        size: of x and of y.
        condition: largest eigenvalue of G, the smallest being 1.
        gamma: as of the problem.
        seed: of all numbers.
    """

    def __init__(
        self, size: int = 1000, condition: float = 1e5, gamma: float = 0.5, seed: int = 0
    ) -> None:
        require_integer("size", size, 1)
        require_word("seed", seed)
        if not 1 <= condition < math.inf:
            raise ValueError(f"condition must be >= 1 and finite, got {condition}")
        random = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(size, generator=random, dtype=DOUBLE)

        c, d, e = uniform(-5, 5), uniform(0.1, 1.1), uniform(0, gamma)
        normal = torch.randn(size, size, generator=random, dtype=DOUBLE)
        basis = torch.linalg.qr(normal)[0]
        matrix = (basis * torch.linspace(1, condition, size, dtype=DOUBLE)) @ basis.T + e.diag()
        rows = torch.linalg.cholesky(matrix).T.contiguous() * math.sqrt(size)
        super().__init__(Batch.of(rows), Batch.of(c[None], d[None]))


class Quadratics(Synthetic):
    """Two coupled least-squares problems; every hypergradient has a closed form.

        g = mean_i (u_i'y + w_i'x - t_i)^2 / 2 + mu/2 |y|^2
        f = mean_j (u_j'y + w_j'x - t_j)^2 / 2 + mu/2 |x|^2

        data = QuadraticData(100, 100)
        trainer = Trainer(Quadratics(100, 100), data, SABA(), meta_batch_size=1, keep_state=True,
                          batch_size=64)

    Args:
        num_outer, num_inner: sizes of x and y.
        mu: > 0, of strong convexity.

    Source: the quadratics of the benchmark of bilevel solvers (benchopt), with A = mean u u' + mu,
    B = mean w w', C = mean w u' and so on. Differs from it in: examples are of rank one.
    """

    def __init__(self, num_outer: int = 100, num_inner: int = 100, mu: float = 0.1) -> None:
        require_integer("num_outer", num_outer, 1)
        require_integer("num_inner", num_inner, 1)
        if not 0 < mu < math.inf:
            raise ValueError(f"mu must be > 0 and finite, got {mu}")
        super().__init__(num_outer, num_inner)
        self.mu = mu

    def inner_loss(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        return self._fit(outer, inner, batch) + self.mu / 2 * inner["y"].square().sum()

    def outer_loss(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        return self._fit(outer, inner, batch) + self.mu / 2 * outer["x"].square().sum()

    def _fit(self, outer: Params, inner: Params, batch: Batch) -> Tensor:
        u_nP, w_nL, t_n = batch.tensors
        return 0.5 * (u_nP @ inner["y"] + w_nL @ outer["x"] - t_n).square().mean()


class QuadraticData(DenseTask):
    """The data of `Quadratics`: u_i of mean square 1, w_i of mean square cross^2, t_i normal.

    Args:
        num_outer, num_inner: sizes of x and y.
        num_examples: of the support set and of the query set.
        cross: size of w, >= 0: how much x and y have to do with one another.
        seed: of all numbers.
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
        if not 0 <= cross < math.inf:
            raise ValueError(f"cross must be >= 0 and finite, got {cross}")
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=DOUBLE)

        def batch() -> Batch:
            u_nP = normal(num_examples, num_inner) / math.sqrt(num_inner)
            w_nL = normal(num_examples, num_outer) / math.sqrt(num_outer) * cross
            return Batch.of(u_nP, w_nL, normal(num_examples))

        super().__init__(batch(), batch())
