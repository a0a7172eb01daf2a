"""Bilevel toys of the literature, without data and with a known solution, in float64.

    toy = Coreset()
    trainer = Trainer(toy, NoData(), BOME())
    trainer.fit(1000)
    toy.solution_metrics(trainer.outer, trainer.inner(0))

x and y are vectors, each one tensor of the outer and of the inner variable.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from metadist.checks.values import check, require_integer, require_word
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params

DOUBLE = torch.float64


class NoData:
    """A sampler for problems without data, which ignore the one value that each set holds."""

    num_tasks = 1

    def sample(self, index: int) -> Task:
        """The same task at every index, which is its id."""
        support, query = (torch.full((1,), value, dtype=DOUBLE) for value in (0.0, 1.0))
        return Task(Batch.of(support), Batch.of(query), index)


class Toy(Problem):
    """A problem in x of size `num_outer` and y of size `num_inner`, both starting from 0."""

    num_outer = 1
    num_inner = 1

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.zeros(self.num_outer, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": outer["x"].new_zeros(self.num_inner)}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.lower(context["x"], inner["y"])

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.upper(context["x"], inner["y"])

    def solution_metrics(self, outer: Params, inner: Params) -> dict[str, float]:
        """Both losses, and how far x and y are from the solution."""
        x, y = outer["x"], inner["y"]
        return {
            "outer_loss": float(self.upper(x, y)),
            "inner_loss": float(self.lower(x, y)),
            "distance": float(self.error(x, y).norm()),
        }

    @abstractmethod
    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner loss g."""

    @abstractmethod
    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer loss f."""

    @abstractmethod
    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """A vector that is 0 at the solution."""


class Sine(Toy):
    """The sine toy of MEHA, whose lower minima are many and all global.

        f = |x - 2|^2 + |y - 4|^2,    g = sum of sin(x + y - 2)

    For x and y of one size these are independent copies of the scalar problem; there x + y =
    2 - pi/2 + 2 pi k at the minima, and the best is x = 3 pi/4, y = 2 + 3 pi/4, f = 0.253749. For
    x of size 1 and y of size n: x = (2 (1 - n) + 3 pi n / 2) / (1 + n), y = 2 + 3 pi / 2 - x.

    Source: Liu et al., MEHA (ICML 2024).
    """

    def __init__(self, num_outer: int = 1, num_inner: int | None = None) -> None:
        require_integer("num_outer", num_outer, 1)
        self.num_outer = num_outer
        self.num_inner = num_outer if num_inner is None else num_inner
        require_integer("num_inner", self.num_inner, 1)
        if num_outer not in (1, self.num_inner):
            raise ValueError(f"num_outer must be 1 or num_inner ({num_inner}), got {num_outer}")

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y - 2).sin().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - 2).square().sum() + (y - 4).square().sum()

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        n = self.num_inner // self.num_outer
        best = (2 * (1 - n) + 1.5 * math.pi * n) / (1 + n)
        return torch.cat([x - best, y - (2 + 1.5 * math.pi - best)])


SINE_SOLUTION = (0.75 * math.pi, 2 + 0.75 * math.pi)
"""(x, y) of `Sine()`."""


class Coreset(Toy):
    """The coreset toy of BOME: y should be the point nearest to (3, -2) in the hull of four points.

    g = |y - p' softmax(x)|^2, f = |y - (3, -2)|^2 / 10; solution y = (1.8, 0.4) with weights
    (0, .8, 0, .2) and f = .72, approached as two of x tend to minus infinity.

    Source: Liu et al., BOME (NeurIPS 2022), section 6.
    """

    num_outer = 4
    num_inner = 2
    corners = torch.tensor([[1, 3], [3, 1], [-2, 2], [-3, -2]], dtype=DOUBLE)

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - x.softmax(0) @ self.corners.to(x)).square().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.1 * (y - y.new_tensor([3, -2])).square().sum()

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        weights = x.softmax(0) - x.new_tensor([0, 0.8, 0, 0.2])
        return torch.cat([weights, y - y.new_tensor([1.8, 0.4])])


class Minimax(Toy):
    """The minimax toy of BOME: f = x y, g = -x y with x in [-10, 10]; solution x = 0.

    There y is boxed too, which makes |x| * 10 of the upper objective. From (4, 4) a barrier
    method does not get to that box, so it is left out here, and the tests assert that.

    Source: Liu et al., BOME (NeurIPS 2022), section 6.
    """

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.full((1,), 4.0, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": outer["x"].new_full((1,), 4.0)}

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return -(x * y).sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum()

    def project_outer(self, outer: Params) -> Params:
        return {"x": outer["x"].clamp(-10, 10)}

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class Degenerate(Toy):
    """The degenerate toy of BOME: g = y_1^2 / 2 - x y_1 leaves y_2 free, H = diag(1, 0).

    f = (x - y_2)^2 / 2 + (y_1 - 1)^2 / 2; the optimistic solution is x = y_1 = y_2 = 1, f = 0.

    Source: Liu et al., BOME (NeurIPS 2022), section 6.
    """

    num_inner = 2

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y[0].square() - x[0] * y[0]

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x[0] - y[1]).square() + 0.5 * (y[0] - 1).square()

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y]) - 1


class MerelyConvex(Toy):
    """A lower level that is convex but leaves half of y = (y1, y2) free, x, y1, y2 of size n.

    g = |y1|^2 / 2 - x'y1, f = |x - y2|^2 / 2 + |y1 - 1|^2 / 2; solution x = y1 = y2 = 1.

    Source: Liu et al., BDA (2020), and MEHA (ICML 2024).
    """

    def __init__(self, size: int = 10) -> None:
        require_integer("size", size, 1)
        self.num_outer, self.num_inner = size, 2 * size

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        y1, _ = y.chunk(2)
        return 0.5 * y1.square().sum() - x @ y1

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2)
        return 0.5 * (x - y2).square().sum() + 0.5 * (y1 - 1).square().sum()

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y]) - 1


class PBGDToy(Toy):
    """A non-convex lower level with solution y = -x, x in [0, 3].

        f = cos(4y + 2) / (1 + e^(2 - 4x)) + log((4x - 2)^2 + 1) / 2
        g = (x + y)^2 + x sin(x + y)^2

    f(x, -x) has local minima at .3824, 1.2152 (global, .1999) and 2.8296.

    Source: Shen and Chen, On penalty-based bilevel gradient descent (2023).
    """

    best = 1.215145475476

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return (total.square() + x * total.sin().square()).sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        wave = (4 * y + 2).cos() / (1 + (2 - 4 * x).exp())
        return (wave + 0.5 * ((4 * x - 2).square() + 1).log()).sum()

    def project_outer(self, outer: Params) -> Params:
        return {"x": outer["x"].clamp(0, 3)}

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x - self.best, y + self.best])


class Lasso(Toy):
    """A lower level with a non-smooth part: y = soft(a, x), x in [0, 1]^n the thresholds.

    g = |y - a|^2 / 2 + sum x_i |y_i| with a = 1/n on the first half and -1/n on the second,
    f = sum y_i; solution y = 0 with any x_i >= 1/n on the first half, y = -1/n, x = 0 on the
    second.

    Source: the non-smooth toy of MEHA (ICML 2024).
    """

    def __init__(self, size: int = 4) -> None:
        require_integer("size", size, 2)
        self.num_outer = self.num_inner = size
        sign = torch.where(torch.arange(size) < size / 2, 1.0, -1.0).to(DOUBLE)
        self.target = sign / size

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - self.target.to(y)).square().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return y.sum()

    def nonsmooth_loss(self, context: Params, inner: Params) -> Tensor:
        return (context["x"] * inner["y"].abs()).sum()

    def prox_inner(self, context: Params, inner: Params, step_size: float) -> Params:
        y = inner["y"]
        return {"y": y.sign() * (y.abs() - step_size * context["x"]).relu()}

    def project_outer(self, outer: Params) -> Params:
        return {"x": outer["x"].clamp(0, 1)}

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        target = self.target.to(x)
        missing = torch.where(target > 0, (target - x).relu(), x)
        return torch.cat([missing, y - target.clamp(max=0)])


class PenaltyToy(Toy):
    """The toys of the penalty paper in 20 dimensions, x in [-5, 5].

    "sum": f = |x|^2 + |y|^2 - 1, g = |1 - x - y|^2, solution x = y = 1/2.
    "difference": f = |y|^2 - |x - y|^2, g = |x - y|^2, solution x = y = 0.

    Source: Mehra and Hamm, Penalty method for inversion-free deep bilevel optimization (2021).
    """

    num_outer = num_inner = 20

    def __init__(self, kind: str = "sum") -> None:
        if kind not in ("sum", "difference"):
            raise ValueError(f"kind must be 'sum' or 'difference', got {kind!r}")
        self.kind = kind

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return ((1 - x - y) if self.kind == "sum" else (x - y)).square().sum()

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "sum":
            return (x.square() + y.square()).sum() - 1
        return y.square().sum() - (x - y).square().sum()

    def project_outer(self, outer: Params) -> Params:
        return {"x": outer["x"].clamp(-5, 5)}

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y]) - (0.5 if self.kind == "sum" else 0.0)


class AmigoToy(Toy):
    """The quadratic of AmIGO, which has a solution in closed form.

        f = x'Px / 2 + c'y,    g = y'Ay / 2 + y'Bx,    x = P^-1 B' A^-1 c,  y = -A^-1 B x

    A and P have eigenvalues from 1 / `condition` to 1 and random eigenvectors.

    Args:
        num_outer, num_inner: The sizes of x and y.
        condition: The condition number of A and of P, >= 1.
        seed: The seed of A, B, c and P.

    Source: Arbel and Mairal, Amortized implicit differentiation (2022), section 5.1.
    Differs from it in: A is regular; their code sets about a hundred eigenvalues to 0.
    """

    def __init__(
        self, num_outer: int = 20, num_inner: int = 20, condition: float = 10.0, seed: int = 0
    ) -> None:
        require_integer("num_outer", num_outer, 1)
        require_integer("num_inner", num_inner, 1)
        require_word("seed", seed)
        check("condition", condition, ge=1)
        self.num_outer, self.num_inner = num_outer, num_inner
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=DOUBLE) / math.sqrt(shape[0])

        def positive(size: int) -> Tensor:
            basis = torch.linalg.qr(normal(size, size))[0]
            return (basis * torch.linspace(1 / condition, 1, size, dtype=DOUBLE)) @ basis.T

        self.a, self.p = positive(num_inner), positive(num_outer)
        self.b, self.c = normal(num_inner, num_outer), normal(num_inner)
        self.solution = torch.linalg.solve(self.p, self.b.T @ torch.linalg.solve(self.a, self.c))

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return y @ (0.5 * self.a.to(y) @ y + self.b.to(y) @ x)

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x @ self.p.to(x) @ x + self.c.to(y) @ y

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(DOUBLE)
        best = torch.linalg.solve(self.a, -self.b @ self.solution)
        return torch.cat([x - self.solution.to(x), y.to(x) - best.to(x)])
